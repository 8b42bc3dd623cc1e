r"""The one definition of a number in text, for `init`, the data check and the rewards.

People and data sets write the same number in many ways: `1,234`, `1 234` with a space that does not break, `1\,234`,
`1{,}234`, full-width digits, a minus that is a dash. `plain` writes all of them in one way.
"""

import re
from decimal import Decimal

_DASHES = "\u2212\ufe63\uff0d\u2010\u2011"  # minus, small and full-width hyphen-minus, hyphens
_FULL_WIDTH = {0xFF10 + digit: str(digit) for digit in range(10)} | {0xFF0B: "+", 0xFF0E: ".", 0xFF0C: ","}
_PLAIN = str.maketrans(_FULL_WIDTH | dict.fromkeys(map(ord, _DASHES), "-"))
_WORD = r"[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"  # Chinese, Japanese and Korean put no blank before a number
_DASH = re.compile(rf"(?<!{_WORD})(?<![)\]])\u2013(?=\s?[\d.])")  # an en dash as minus; between numbers it is a range
_THOUSANDS = re.compile(  # 1\,234, 1{,}234, 1~234, and spaces that do not break
    r"(?<![\d.,])(\d{1,3})((?:(?:\\[,!; ]|\{,\}|~|[\u00a0\u2007\u2009\u202f])\d{3})+)(?!\d)"
)
# With ordinary spaces only if nothing else is there: "on day 5 100 people" holds two numbers.
_SPACED = re.compile(r"[-+]?\s?[$€£]?\d{1,3}(?: \d{3})+(?:[.,]\d+)?")
_LONE_SIGN = re.compile(r"^(\s*[-+])\s+(?=[$€£]?[\d.])")
# A sign counts only where no number, word or bracket ends right before it: "7-3" is 7 and 3, "x=-3" is -3.
_NUMBER = re.compile(
    rf"""((?<!{_WORD})(?<![)\]])[-+])?      # sign
        (?:\\?[$€£])?                       # currency, as in -$5
        ((?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)   # 1,234 or 1234
         (?:\.\d+)?                         # .5
         |(?<!\d)\.\d+)
        ([eE][-+]?\d{{1,3}}(?!\d))?           # e-07, as Python prints small floats
    """,
    re.VERBOSE,
)


def plain(text: str) -> str:
    """The text with its signs, digits and thousands written as Python does, and nothing else changed."""
    text = _DASH.sub("-", text.translate(_PLAIN))
    return _THOUSANDS.sub(lambda found: found[1] + re.sub(r"\D", "", found[2]), text)


def numbers(text: str) -> list[Decimal]:
    """Every number in the text, in order."""
    text = _LONE_SIGN.sub(r"\1", plain(text))
    found = _NUMBER.findall(text)
    return [Decimal(sign + digits.replace(",", "") + exponent) for sign, digits, exponent in found]


def joined(text: str) -> str:
    """A text that is nothing but a number with ordinary spaces for thousands, `10 000`, without them; else the same."""
    stripped = plain(text).strip()
    return stripped.replace(" ", "") if _SPACED.fullmatch(stripped) else text


def as_number(text: str) -> Decimal | None:
    """The number that a text is, with a currency or percent sign at most; None if it is anything else."""
    stripped = _LONE_SIGN.sub(r"\1", plain(joined(text))).strip()
    return numbers(stripped)[0] if re.fullmatch(rf"(?:{_NUMBER.pattern})\s?[%€£]?", stripped, re.VERBOSE) else None
