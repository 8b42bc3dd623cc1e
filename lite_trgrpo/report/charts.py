"""Curves as SVG inside a page: drawn by matplotlib, coloured by the page's style sheet, in light and in dark."""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from markupsafe import Markup

COLOURS = 8  # of the style sheet: c1 ... c8
# Stand-ins that matplotlib draws with; the page sees what comes after the arrow.
INK, LINE = "#010101", "#020202"  # -> currentColor, var(--line)
SIZE = (4.4, 2.3)  # inches; a phone shows it about as it is


@dataclass(frozen=True, slots=True)
class Curve:
    """One line: a value a step, or None where it was not measured."""

    name: str
    steps: Sequence[int]
    values: Sequence[float | None]
    intervals: Sequence[tuple[float, float]] = ()
    """Given for scores, which are drawn as points: low and high of each."""

    @property
    def last(self) -> float | None:
        return next((value for value in reversed(self.values) if value is not None), None)


@dataclass(frozen=True, slots=True)
class Figure:
    """A drawing with its legend."""

    title: str
    hint: str
    svg: "Markup"
    legend: Sequence[tuple[int, str, str]]
    """Colour in the style sheet, name and last value of each curve."""


def chart(title: str, hint: str, curves: Sequence[Curve], *, share: bool = False) -> Figure | None:
    """A figure of the curves; None where nothing was measured. `share`: the scale is 0 to 1."""
    places = [(i % COLOURS + 1, curve) for i, curve in enumerate(curves) if curve.last is not None]
    if not places:
        return None
    legend = [(place, curve.name, f"{curve.last:.3g}") for place, curve in places]
    return Figure(title, hint, _svg(title, places, share), legend)


def _svg(title: str, curves: Sequence[tuple[int, Curve]], share: bool) -> "Markup":
    import matplotlib
    from matplotlib import figure as drawing

    style: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": title, "font.size": 10, "text.color": INK, "xtick.color": INK,
        "ytick.color": INK, "axes.edgecolor": LINE, "axes.grid": True, "grid.color": LINE, "grid.linewidth": 0.5,
        "axes.spines.top": False, "axes.spines.right": False, "xtick.major.size": 0, "ytick.major.size": 0,
        "path.simplify_threshold": 0.3,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = drawing.Figure(figsize=SIZE)
        axes = figure.add_axes((0.115, 0.12, 0.87, 0.84))
        for place, curve in curves:
            _draw(axes, curve, f"#0000{0xC0 + place:02x}")
        axes.locator_params(axis="x", integer=True, nbins=6)
        axes.locator_params(axis="y", nbins=5)
        if share:
            axes.set_ylim(-0.03, 1.03)
        drawn = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(drawn, format="svg", transparent=True, metadata=nothing)
    return _for_page(drawn.getvalue())


def _draw(axes: Any, curve: Curve, colour: str) -> None:
    values = [math.nan if value is None else value for value in curve.values]
    if curve.intervals:
        below = [value - low for value, (low, _) in zip(values, curve.intervals, strict=True)]
        above = [high - value for value, (_, high) in zip(values, curve.intervals, strict=True)]
        axes.errorbar(
            curve.steps, values, yerr=(below, above), fmt="o-", color=colour, markersize=4, linewidth=1.5, capsize=3
        )
        return
    smooth = _running_mean(values)
    axes.plot(curve.steps, values, color=colour, linewidth=0.8, alpha=0.35)
    # a line of one step has no length
    axes.plot(curve.steps, smooth, "o-" if len(values) == 1 else "-", color=colour, linewidth=1.8, markersize=3)


def _running_mean(values: Sequence[float]) -> list[float]:
    """Over the last 5 steps, or a fortieth of a long run; NaN where none of them was measured."""
    window = max(5, len(values) // 40)
    found = []
    for i in range(len(values)):
        known = [value for value in values[max(0, i + 1 - window) : i + 1] if not math.isnan(value)]
        found.append(sum(known) / len(known) if known else math.nan)
    return found


def _for_page(drawn: str) -> "Markup":
    """Drop what a file needs and a page does not; replace the stand-ins by the page's colours."""
    from markupsafe import Markup

    body = re.sub(r' id="[\w.]+_\d+"| xmlns(:xlink)?="[^"]*"|<metadata>.*?</metadata>', "", drawn, flags=re.DOTALL)
    body = re.sub(r"#0000c(\d)", r"var(--c\1)", body).replace(INK, "currentColor").replace(LINE, "var(--line)")
    body = re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", r"<svg \1>", body[body.index("<svg") :])
    return Markup(body)
