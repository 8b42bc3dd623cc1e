"""Rewards that look at an answer's wording, structure or length."""

import re
from collections.abc import Sequence
from numbers import Number
from typing import Any

from lite_trgrpo.errors import RewardError

TAGS = ("think", "answer")


def completion_text(completion: Any) -> str:
    """The text of a completion: a string, or a list of chat messages of which the last counts."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def gold_text(gold: Any) -> str | None:
    """A gold answer as text; None for what is none: null, NaN, true or false, blank, a list or another structure."""
    if isinstance(gold, bool) or not isinstance(gold, str | Number) or gold != gold:
        return None
    return str(gold).strip() or None


def exact(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Any],
    answer: Sequence[Any],
    *,
    casefold: bool = False,
    **columns: Any,
) -> list[float | None]:
    """1 if the whole completion is the gold answer, else 0; a gold answer that is no text or number is not gradable.

    Blanks at the ends do not count and any run of blanks or line breaks is one blank. `casefold` also ignores
    upper and lower case.
    """

    def normal(text: str) -> str:
        words = " ".join(text.split())
        return words.casefold() if casefold else words

    return [
        None if (wanted := gold_text(gold)) is None else float(normal(completion_text(completion)) == normal(wanted))
        for completion, gold in zip(completions, answer, strict=True)
    ]


def tagged(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Any],
    *,
    tags: Sequence[str] = TAGS,
    **columns: Any,
) -> list[float | None]:
    """1 if the whole completion is `<think>...</think><answer>...</answer>`, else 0.

    Each tag stands exactly once, in the order of `tags`, and nothing but blanks stands outside of them.
    What is inside does not matter.
    """
    wrong = isinstance(tags, str) or not tags or not all(re.fullmatch(r"[\w-]+", str(tag)) for tag in tags)
    if wrong or len(set(tags)) != len(tags):
        raise RewardError(f'reward \'format\': tags = {tags!r} must be different plain words, e.g. ["think", "answer"]')
    return [float(sections(completion_text(completion), tags) is not None) for completion in completions]


def sections(text: str, tags: Sequence[str] = TAGS) -> dict[str, str] | None:
    """Text inside each tag, or None if the text is not exactly these sections in this order."""
    if any(text.count(mark) != 1 for tag in tags for mark in (f"<{tag}>", f"</{tag}>")):
        return None
    pattern = r"\s*".join(f"<{re.escape(tag)}>(.*)</{re.escape(tag)}>" for tag in tags)
    match = re.fullmatch(pattern, text.strip(), flags=re.DOTALL)
    return dict(zip(tags, match.groups(), strict=True)) if match else None


def overlong(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    buffer: int,
    **columns: Any,
) -> list[float | None]:
    """DAPO's soft overlong punishment (arXiv 2503.14476, Eq. 13), from the number of tokens.

    0 up to max_tokens - buffer, then falling on a line to -1 at max_tokens, and -1 beyond. Set max_tokens to
    rollout.max_new_tokens; buffer is from 1 to max_tokens.
    """
    whole = all(isinstance(value, int) and not isinstance(value, bool) for value in (max_tokens, buffer))
    if not whole or not 1 <= buffer <= max_tokens:
        raise RewardError(
            f"reward 'overlong': max_tokens = {max_tokens!r}, buffer = {buffer!r}; both must be whole "
            "numbers of tokens with 1 <= buffer <= max_tokens, e.g. max_tokens = 256, buffer = 64"
        )
    start = max_tokens - buffer
    return [max(-1.0, min(0.0, (start - len(ids)) / buffer)) for ids in completion_ids]
