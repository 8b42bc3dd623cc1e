"""Knights and Knaves: who always tells the truth, who always lies."""

import re
from collections.abc import Sequence
from typing import Any

from lite_trgrpo.rewards.text import completion_text, sections

FORMAT_RIGHT, FORMAT_WRONG = 1.0, -1.0
ANSWER_RIGHT, ANSWER_WRONG, ANSWER_UNREADABLE = 2.0, -1.5, -2.0

# reasoning-gym's wordings of the puzzle, the truthful role first
PAIRS = (
    ("knight", "knave"),
    ("pioneer", "laggard"),
    ("saint", "sinner"),
    ("hero", "villain"),
    ("angel", "devil"),
    ("altruist", "egoist"),
    ("sage", "fool"),
)
_ROLE = "|".join(role for pair in PAIRS for role in pair)
_ROLE_WORD = re.compile(rf"\b(?:{_ROLE})\b", re.IGNORECASE)
# "Zoey is a knight", "**Zoey**: knight", "Zoey = Knight"
_CLAIM = re.compile(
    rf"\b([^\W\d_][\w'-]*)\W{{0,4}}(?:\bis\b|[:=-])\W{{0,4}}(?:an?\s+)?\W{{0,3}}({_ROLE})\b", re.IGNORECASE
)


def knights_and_knaves(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Any],
    answer: Sequence[Any],
    **columns: Any,
) -> list[float | None]:
    """Format plus answer, as in Logic-RL; full marks are 3 (set rewards.solved_at = 3).

    The format is `<think>...</think><answer>...</answer>` and nothing else: +1, or -1. An answer in the right
    format gets +2 if everybody's role is right, -1.5 if one is wrong, -2 if it cannot be read. An answer in a
    wrong format is not read: -2. So an answer scores 3, -0.5, -1 or -3. A gold answer without any
    "NAME is a ROLE" is not gradable.
    """
    return [
        None if gold is None or not (roles := _roles(str(gold))) else _grade(completion_text(completion), roles)
        for completion, gold in zip(completions, answer, strict=True)
    ]


def _grade(text: str, gold: dict[str, str]) -> float:
    inside = sections(text)
    if inside is None:
        return FORMAT_WRONG + ANSWER_UNREADABLE
    claimed = _roles(inside["answer"])
    if claimed.keys() != gold.keys():
        return FORMAT_RIGHT + ANSWER_UNREADABLE
    return FORMAT_RIGHT + (ANSWER_RIGHT if claimed == gold else ANSWER_WRONG)


def _roles(text: str) -> dict[str, str]:
    """{name: role}, all lower case; empty if any role word is not part of one plain claim about one person.

    Counting keeps hedges out: "Zoey is a knight, Zoey is a knave" claims nothing; nor does "a knight/knave".
    """
    claims = [(name.lower(), role.lower()) for name, role in _CLAIM.findall(text)]
    roles = dict(claims)
    return roles if len(roles) == len(claims) == len(_ROLE_WORD.findall(text)) else {}
