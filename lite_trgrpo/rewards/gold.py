r"""How a right answer is written: what a reward function can be tried on before any model is asked.

A form is a text with ANSWER in it: `\boxed{ANSWER}`, `#### ANSWER`, `<think>...</think> <answer>ANSWER</answer>`.
"""

import re
from typing import Any

from lite_trgrpo.rewards.gym import last_box

BARE, BOXED, MARKED = "ANSWER", "\\boxed{ANSWER}", "#### ANSWER"
TAGGED = "<answer>ANSWER</answer>"
FORMS = (BARE, BOXED, MARKED, TAGGED, f"<think>...</think>\n{TAGGED}")
# <think> ... </think>, or "between <answer> and </answer>"; a whole document between tags is data, not an instruction
_TAGS = re.compile(r"<(\w+)>[^<>\n]{0,60}</\1>")
HOLD_THE_ANSWER = ("answer", "solution", "result", "final")


def asked(text: str) -> str | None:
    """The form that a prompt, its system message included, asks an answer to have; None if it names none."""
    inner = BOXED if "\\boxed" in text else MARKED if "####" in text else BARE
    tags = list(dict.fromkeys(_TAGS.findall(text)))
    if not tags:
        return None if inner is BARE else inner
    holding = [tag for tag in tags if tag.startswith(HOLD_THE_ANSWER)][-1:]
    parts = [f"<{tag}>{inner if tag in holding else '...'}</{tag}>" for tag in tags]
    return "\n".join(parts if holding else [*parts, inner])


def final(gold: Any) -> str:
    r"""The answer alone: what follows the last `####`, else what the last `\boxed{}` holds, else all; without `$`."""
    text = str(gold).rsplit("####", 1)[-1]
    box = last_box(text)
    return (text if box is None else box).strip().strip("$")


def written(form: str, gold: Any) -> str:
    """The gold answer in a form."""
    return form.replace("ANSWER", final(gold))


def follows(text: str, form: str) -> bool:
    """Whether an answer has this form somewhere, whatever it says in it."""
    pattern = re.escape(form).replace("ANSWER", r"\s*\S.*?").replace(r"\.\.\.", ".*?").replace("\\\n", r"\s*")
    return re.search(pattern, text, flags=re.DOTALL) is not None
