"""Rewards for answers that are numbers or mathematics."""

import re
from collections.abc import Sequence
from decimal import Decimal
from itertools import product
from typing import Any

from lite_trgrpo.rewards.text import completion_text

TAIL = 2000  # characters of a completion that the mathematics parser gets to see; the answer stands at the end

# -- number -----------------------------------------------------------------------------------------------

# A sign counts only where no number, word or bracket ends right before it: "7-3" is 7 and 3, "x=-3" is -3.
_NUMBER = re.compile(
    r"""((?<![\w)\]])[-+\u2212])?           # sign
        (?:\\?[$€£])?                       # currency, as in -$5
        ((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)   # 1,234 or 1234
         (?:\.\d+)?                         # .5
         |(?<!\d)\.\d+)
        ([eE][-+]?\d{1,3}(?!\d))?           # e-07, as Python prints small floats
    """,
    re.VERBOSE,
)


def number(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Any],
    answer: Sequence[Any],
    **columns: Any,
) -> list[float | None]:
    r"""1 if the last number in the completion equals the gold number, else 0.

    The rule: every number in the text is read (sign, thousands commas, decimals, exponent); currency signs,
    units, percent signs and a final period do not count; the last number is the answer, whatever stands
    around it, so listing many does not help. Numbers are compared exactly, as decimals: 1.50 is 1.5.
    "1/2" is two numbers; use `math` for fractions and LaTeX.

    Gold: the text after the last `####` if there is one, else all of it. It must hold exactly one number, or
    the answer is not gradable.
    """
    return [
        None if (wanted := _gold_number(gold)) is None else float(wanted in _numbers(completion_text(completion))[-1:])
        for completion, gold in zip(completions, answer, strict=True)
    ]


def _numbers(text: str) -> list[Decimal]:
    return [
        Decimal((sign.replace("\u2212", "-")) + digits.replace(",", "") + exponent)
        for sign, digits, exponent in _NUMBER.findall(text)
    ]


def _gold_number(gold: Any) -> Decimal | None:
    found = _numbers(str(gold).rsplit("####", 1)[-1])
    return found[0] if len(found) == 1 else None


# -- math -------------------------------------------------------------------------------------------------


def math_answer(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Any],
    answer: Sequence[Any],
    **columns: Any,
) -> list[float | None]:
    r"""1 if math-verify finds the completion's answer equal to the gold answer, else 0.

    Only the last 2,000 characters of the completion are read; if they have an `<answer>...</answer>`, only
    what stands in the last one. There math-verify takes what is in `\boxed{}`; without a box, the mathematics
    after words such as "answer is"; else the last there is. Several boxes are read as one set, so boxing many
    numbers does not help.

    Gold may be GSM8K's `... #### 42`, LaTeX with or without `$`, or plain; one that is empty, in words or
    cannot be parsed is not gradable.

    What math-verify takes too long over is not 0: the sandbox stops it and counts it. Its own time-outs are off: they
    are signals, which only the main thread gets, and would turn a time-out into a 0.
    """
    if not completions:  # `load` tries it with nothing: time to import and compile, not at the first answer
        _parse("1")
    golds = {str(gold): _parse_gold(gold) for gold in answer}  # once for all completions of a prompt
    return [
        _verified(golds[str(gold)], completion_text(completion)) if golds[str(gold)] else None
        for completion, gold in zip(completions, answer, strict=True)
    ]


def _verified(gold: list[Any], text: str) -> float:
    tail = text[-TAIL:]
    answers = re.findall(r"<answer>(.*?)</answer>", tail, flags=re.DOTALL)
    found = _parse_bare(answers[-1].strip()) if answers else _parse(tail)
    return float(any(_equal(one, other) for one, other in product(gold, found)))


def _equal(gold: Any, found: Any) -> bool:
    from math_verify import verify

    try:
        return verify(gold, found, timeout_seconds=None, raise_on_error=True)
    except MemoryError:  # the sandbox's to treat
        raise
    except Exception:  # sympy raises all kinds of things at strange expressions; none of them is the gold answer
        return False


def _parse_gold(gold: Any) -> list[Any]:
    """The gold answer as math-verify's expressions; empty if it is none."""
    text = "" if gold is None else str(gold).rsplit("####", 1)[-1].strip()
    if not text or _is_words(text):
        return []
    found = _parse_bare(text)
    # A string alone is math-verify's fallback for what it could not read.
    return found if any(not isinstance(part, str) for part in found) else []


def _parse_bare(text: str) -> list[Any]:
    """A text that is an answer and little else: LaTeX need not be marked as such."""
    return _parse(text if _is_anchored(text) else f"${text}$")


def _is_words(text: str) -> bool:
    """Paris, `east`, `not enough information`: LaTeX would read these as products of letters."""
    return re.fullmatch(r"[A-Za-z]{3,}(?:[ '.-]+[A-Za-z]+)*\.?", text) is not None


def _is_anchored(text: str) -> bool:
    r"""True for prose, or where LaTeX is marked as such. Bare `2^{10}` is not, and would be read as 2."""
    prose = re.search(r"(?<![\\A-Za-z])[A-Za-z]{2,} [A-Za-z]{2,}", text) and "\\text" not in text
    return bool(prose) or any(mark in text for mark in ("$", "\\boxed", "\\(", "\\["))


def _parse(text: str) -> list[Any]:
    r"""math-verify's reading of a text. It never runs it: plain expressions are digits and operators only."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    # An escaped dollar is money, not mathematics, and makes math-verify find nothing in `\$1,000.00`.
    kinds = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    try:
        return parse(text.replace("\\$", ""), extraction_config=kinds, parsing_timeout=None, raise_on_error=True)
    except MemoryError:  # the sandbox's to treat
        raise
    except Exception:  # what cannot be parsed is no answer
        return []
