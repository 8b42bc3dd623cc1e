"""Numbers and text as a few terminal cells: curves, bars, durations, folded model text."""

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import fmean

from rich.console import Console
from rich.text import Text

from lite_trgrpo.text import plain

LEVELS = " ▁▂▃▄▅▆▇█"
_folding = Console(width=80, file=None, color_system=None)  # rich folds text only by a console's measure


def measured(values: Sequence[float | None]) -> list[float]:
    """Those that are numbers."""
    return [value for value in values if value is not None and math.isfinite(value)]


def curve(
    values: Sequence[float | None], width: int, rows: int = 1, low: float | None = None, high: float | None = None
) -> list[str]:
    """All values, stretched or averaged to `width` cells of `rows` lines; blank where there is none.

    low, high: the ends of the scale; those of the values if not given.
    """
    count = len(values)
    ends = [(i * count // width, (i + 1) * count // width) for i in range(width)]
    parts = [measured(values[i : max(j, i + 1)]) for i, j in ends]
    known = [fmean(part) for part in parts if part]
    if not known:
        return [" " * width] * rows
    bottom, top = min(known) if low is None else low, max(known) if high is None else high
    eighths = [1 + _share(fmean(part), bottom, top) * (8 * rows - 1) if part else 0 for part in parts]
    return ["".join(LEVELS[min(8, max(0, round(e) - 8 * row))] for e in eighths) for row in reversed(range(rows))]


def _share(value: float, bottom: float, top: float) -> float:
    """Position between the two, 0 to 1; the middle where nothing has changed."""
    return min(1.0, max(0.0, (value - bottom) / (top - bottom))) if top > bottom else 0.5


def bar(shares: Sequence[tuple[float, str]], width: int) -> str:
    """Shares (of 1) of `width` cells, each with its glyph, one after the other; what is left over stays empty."""
    drawn, total = "", 0.0
    for share, glyph in shares:
        total += share
        drawn += glyph * (round(min(1.0, total) * width) - len(drawn))
    return drawn.ljust(width)


def number(value: float | None, form: str) -> str:
    """Formatted; a dash for what is no number."""
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def duration(seconds: float | None) -> str:
    """`1:23:45` (hours, minutes, seconds)."""
    if seconds is None or not math.isfinite(seconds):
        return "-:--:--"
    minutes, rest = divmod(int(max(0.0, seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def one_line(text: str) -> str:
    """Text of a model or a file, harmless and without line breaks."""
    return " ".join(plain(text).split())


@lru_cache(maxsize=16)  # drawn every second, new once a step
def fold(text: str, width: int, lines: int) -> tuple[str, ...]:
    """Model text in exactly `lines` lines of at most `width` cells: its beginning and, where it is longer, its end.

    An answer's end matters most: that is where the result stands.
    """
    room = width * lines
    if len(text) > 2 * room:  # all that could be shown and more; the rest would only cost time
        text = f"{text[:room]} {text[-room:]}"
    folded = wrapped(one_line(text), width)
    if len(folded) > lines:
        first = lines // 3
        end = folded[len(folded) - (lines - first) :]
        folded = [*folded[:first], "…" + end[0][2:], *end[1:]]
    return *folded, *[""] * (lines - len(folded))


def wrapped(text: str, width: int) -> list[str]:
    """At spaces where possible; counts cells, so wide characters fit too. The text must be plain already."""
    return [line.plain.rstrip() for line in Text(text).wrap(_folding, max(2, width), overflow="fold")]
