"""Rewards for answers that are numbers or mathematics."""

import re
from collections.abc import Sequence
from decimal import Decimal
from itertools import product
from typing import Any
from unicodedata import normalize

from lite_trgrpo.rewards.numerals import as_number, joined, numbers, plain
from lite_trgrpo.rewards.text import completion_text, gold_text

TAIL = 2000  # characters of a completion that the mathematics parser gets to see; the answer stands at the end

# -- number -----------------------------------------------------------------------------------------------


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
        None if (wanted := gold_number(gold)) is None else float(wanted in _read(completion_text(completion), gold))
        for completion, gold in zip(completions, answer, strict=True)
    ]


def gold_number(gold: Any) -> Decimal | None:
    """The one number in a gold answer; None if it holds none or several, so that it cannot be graded."""
    found = numbers(joined(_final(gold)))
    return found[0] if len(found) == 1 and found[0].is_finite() else None


def _final(gold: Any) -> str:
    """The text of a gold answer after the last `####` if there is one, else all of it."""
    return (gold_text(gold) or "").rsplit("####", 1)[-1].strip()


def _read(text: str, gold: Any) -> list[Decimal]:
    """The last number of a completion. `10 000` is one where the gold answer is written so, else two."""
    spaced = _final(gold) != joined(_final(gold))
    return numbers(re.sub(r"(?<=\d) (?=\d{3}(?!\d))", "", text) if spaced else text)[-1:]


# -- math -------------------------------------------------------------------------------------------------

_SCIENTIFIC = re.compile(r"(?<![\w.\\])\d+(?:\.\d+)?[eE][-+]?\d{1,3}(?![\w.])")
_MIXED = re.compile(r"(?<![\w.,/])(\d+) (\d+)/(\d+)(?![\w.,/])")
_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")
_RAISED = re.compile("[\u00b9\u00b2\u00b3\u2070-\u207e]+")
_ROOT = re.compile(r"\u221a(?:\(([^()]*)\)|(\d+(?:\.\d+)?|[A-Za-z]))")
_SYMBOLS = "\u0391-\u03c9\u00b0\u00d7\u00f7\u221e\u2260\u2264\u2265\u2208\u222a\u2229"  # Greek, degrees, relations
_UNREAD = re.compile(rf"[^\x00-\x7f{_SYMBOLS}]|\d\.\d{{3}}\.\d")
"""Characters of a gold answer that math-verify passes over, and 1.000.000, which it reads as a product."""


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
    return float(not _far_apart(gold, found) and any(_equal(one, other) for one, other in product(gold, found)))


def _far_apart(gold: list[Any], found: list[Any]) -> bool:
    """Whether both are plain decimals more than a millionth apart: math-verify rounds to six places after the point, to
    which 0.0000002 is 0.0000001.
    """
    texts = [next((part for part in parts if isinstance(part, str)), "") for parts in (gold, found)]
    one, other = map(as_number, texts)
    if one is None or other is None or any("%" in text for text in texts):  # 50% is 0.5
        return False
    return abs(one - other) > Decimal("1e-6") * max(abs(one), abs(other))


def _equal(gold: Any, found: Any) -> bool:
    from math_verify import verify

    try:
        return verify(gold, found, timeout_seconds=None, raise_on_error=True)
    except MemoryError:  # the sandbox's to treat
        raise
    except Exception:  # sympy raises all kinds of things at strange expressions; none of them is the gold answer
        return False


def _parse_gold(gold: Any) -> list[Any]:
    """The gold answer as math-verify's expressions; empty if it is none, or one that is read only in part."""
    text = joined(_final(gold))
    if not text or _is_words(text) or _UNREAD.search(_readable(text)):
        return []
    found = _parse_bare(text)
    # A string alone is math-verify's fallback for what it could not read.
    return found if any(not isinstance(part, str) for part in found) else []


def _parse_bare(text: str) -> list[Any]:
    """A text that is an answer and little else: LaTeX need not be marked as such."""
    return _parse(text if _is_anchored(text) else f"${text}$")


def _readable(text: str) -> str:
    """What math-verify would cut off or misread, written so that it reads it: Unicode's fractions, roots and powers,
    `10 1/2`, and Python's 5e3, whose e it takes for Euler's number.
    """
    text = _SCIENTIFIC.sub(lambda found: f"{Decimal(found[0]):f}", plain(text))
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    text = _VULGAR.sub(lambda found: "\\frac{{{}}}{{{}}}".format(*normalize("NFKC", found[0]).split("\u2044")), text)
    text = _RAISED.sub(lambda found: f"^{{{plain(normalize('NFKC', found[0]))}}}", text)
    return _ROOT.sub(lambda found: f"\\sqrt{{{found[1] or found[2]}}}", text)


def _is_words(text: str) -> bool:
    """Paris, `No`, `not enough information`: LaTeX would read these as products of letters."""
    return re.fullmatch(r"([A-Za-z]{3,}|[A-Z][a-z])(?:[ '.-]+[A-Za-z]+)*\.?", text) is not None


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
        text = _readable(text).replace("\\$", "")
        return parse(text, extraction_config=kinds, parsing_timeout=None, raise_on_error=True)
    except MemoryError:  # the sandbox's to treat
        raise
    except Exception:  # what cannot be parsed is no answer
        return []
