"""The live panel of a run: is it learning, is it well, how long will it take, what does it write?"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from rich.cells import cell_len
from rich.console import Group as Stack
from rich.live import Live
from rich.text import Text

from lite_trgrpo.records import Completion, Group
from lite_trgrpo.terminal.drawing import bar, curve, duration, fold, measured, number, one_line, wrapped
from lite_trgrpo.terminal.screen import console, ungraded
from lite_trgrpo.text import plain
from lite_trgrpo.training.guards import NAMES

Line = Mapping[str, Any]

LABEL = 11  # cells of a row's name
SPARE = 2  # lines of the terminal that are left to what is said above the panel
ROOMY, TALL = 34, 4  # from so many lines on curves are so tall
WIDE = 120  # from here on the two answers stand side by side
RECENT = 20  # steps that an estimate of the time left is made from
FRESH = 10  # steps for which a warning stays, even if every guard is ok again
SIGNS = {"ok": "●", "warning": "▲", "critical": "■"}  # told apart without colour too
STYLES = {"ok": "green", "warning": "yellow", "critical": "red"}
WORK = {"rollout_s": "█", "reward_s": "▒", "update_s": "░"}


@dataclass(slots=True)
class Panel:
    """State of a run at work (`stepped`, `evaluated`, `warned` update it), and its picture (`lines`)."""

    name: str
    steps: int
    eval_every: int
    cap: int
    """Most tokens of an answer."""
    limit: int
    """Memory that the run may take (bytes)."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Lines of metrics.jsonl, those of a resumed run's earlier part among them."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    groups: Sequence[Group] = ()
    """Those of the last step."""
    doing: str = "loading"
    """Present activity of the run."""
    said: tuple[int, str] | None = None
    """The last warning, and the number of steps done when it came."""
    started: float = field(default_factory=time.monotonic)
    stepped_at: float = field(default_factory=time.monotonic)

    def stepped(self, metrics: dict[str, Any], groups: Sequence[Group]) -> None:
        self.history.append(metrics)
        self.groups, self.stepped_at = groups, time.monotonic()

    def evaluated(self, line: dict[str, Any]) -> None:
        self.evaluations.append(line)

    def warned(self, text: str) -> None:
        self.said = (len(self.history), text)

    def lines(self, width: int, height: int) -> list[Text]:
        """At most `height` lines of at most `width` cells."""
        found = [self._progress(width), _rule(self.name, "", width)]
        found += [*self._scores(width, TALL if height >= ROOMY else 1), *self._shares(width)]
        if self.history:
            found += [*self._work(width), *self._guards(width)]
        found += self._answers(width, height - len(found))
        for line in found:
            line.truncate(width, overflow="ellipsis")
        return found[:height]

    def seconds_left(self) -> float | None:
        """Estimate from the last steps and the last evaluation (seconds); None before the first step."""
        if not self.history:
            return None
        done = self.history[-1]["step"]
        step = fmean(_worked(line) for line in self.history[-RECENT:])
        due = {self.steps, *(range(0, self.steps, self.eval_every) if self.eval_every else ())}
        missing = [step for step in due if step >= done and step not in {line["step"] for line in self.evaluations}]
        scoring = self.evaluations[-1]["clock"]["eval_s"] if self.evaluations else 0.0
        left = step * (self.steps - done) + scoring * len(missing)
        return max(0.0, left - (time.monotonic() - self.stepped_at))

    def _progress(self, width: int) -> Text:
        done = self.history[-1]["step"] if self.history else 0
        left, busy = f" step {done}/{self.steps} ", f"{self.doing} "
        right = f" {duration(time.monotonic() - self.started)} so far, {duration(self.seconds_left())} left"
        room = max(0, width - len(left) - len(busy) - len(right))
        filled = round(room * done / self.steps)
        return Text.assemble(
            (left, "bold"), (busy, "cyan"), ("━" * filled, "green"), ("─" * (room - filled), "dim"), right
        )

    def _scores(self, width: int, rows: int) -> Iterator[Text]:
        room = max(8, width - 46)
        rewards = [line["reward_mean"] for line in self.history]
        span = f"{min(known):.2f} to {max(known):.2f}" if (known := measured(rewards)) else "no step yet"
        yield from _row("reward", number(_last(rewards), ".3f"), curve(rewards, room, rows), room, span, "cyan")
        scores = [(line["pass@1"]["value"], line["step"]) for line in self.evaluations]
        rest = "not scored yet"
        if scores:
            last = self.evaluations[-1]
            rest = f"[{last['pass@1']['low']:.2f}, {last['pass@1']['high']:.2f}]"
            rest += f" gain {last['gain']['value']:+.2f}" if "gain" in last else f" at step {last['step']}"
        # a score holds until the next one, so that both curves have the same steps above each other
        count = 1 + (self.history[-1]["step"] if self.history else 0)
        ends = [((i + 1) * count - 1) // room for i in range(room)]
        held = [_last([score for score, step in scores if step <= end]) for end in ends]
        yield from _row("held out", number(held[-1], ".3f"), curve(held, room, rows), room, rest, "magenta")

    def _shares(self, width: int) -> Iterator[Text]:
        """Two to a line, shares on a scale from 0 to 1."""
        room, half = max(4, width // 2 - LABEL - 11), width // 2

        def cell(name: str, key: str, form: str, top: float | None) -> Text:
            values = [line[key] for line in self.history]
            [drawn] = curve(values, room, low=0.0, high=top)
            [row] = _row(name, number(_last(values), form), [drawn], room, "", "blue")
            return row

        for left, right in (
            (cell("solved", "solved", ".0%", 1.0), cell("signal", "groups_with_signal", ".0%", 1.0)),
            (cell("truncated", "truncated", ".0%", 1.0), cell("length", "length_mean", ".1f", None)),
        ):
            left.truncate(half, pad=True)
            yield left + right

    def _work(self, width: int) -> Iterator[Text]:
        """Time, memory, and what the update says of itself."""
        last = self.history[-1]
        clock = last["clock"]
        seconds = _worked(last) or 1.0
        shares = {name: clock[name] / seconds for name in WORK}
        waited = f"  rewards {shares['reward_s']:.0%}" if shares["reward_s"] >= 0.01 else ""
        yield Text.assemble(
            _label("time"), f"rollout {shares['rollout_s']:>4.0%} ",
            (bar([(shares[name], glyph) for name, glyph in WORK.items()], max(6, width - 66)), "cyan"),
            f" update {shares['update_s']:.0%}  {seconds:.1f} s a step"
            f"  {number(clock['tokens_per_s'], ',.0f')} tokens/s{waited}",
        )  # fmt: skip
        yield self._memory(clock, max(6, width - 66))
        measures = [("weight_mean", "mean token weight"), ("entropy_sampled", "entropy"), ("grad_norm", "gradient")]
        measures += [("kl", "KL to base")] if "kl" in last else []
        parts = [f"{name} {number(last.get(key), '.3f')}" for key, name in measures]
        yield Text.assemble(_label("update"), "   ".join(parts))

    def _memory(self, clock: Mapping[str, float], room: int) -> Text:
        """Memory of the card where there is one, else of the process. Older runs have not logged both gauges."""
        kind, limit = "cuda" if "cuda_mib" in clock else "rss", self.limit / 2**30
        now, peak = clock[f"{kind}_mib"] / 1024, clock.get(f"{kind}_peak_mib", 0.0) / 1024
        filled = bar([(now / limit, "█"), (max(0.0, peak - now) / limit, "░")], room)
        known = f" peak {peak:.2f}," if peak else ""
        return Text.assemble(
            _label("memory"), f"{now:>5.2f} GB now ", (filled, "cyan"), f"{known} limit {limit:.2f} GB"
        )

    def _guards(self, width: int) -> Iterator[Text]:
        shown = self.history[-1]["guards"]
        row = Text.assemble(_label("guards"))
        for name in NAMES:
            level = shown.get(name, "ok")
            cell = Text.assemble((f"{SIGNS[level]} ", STYLES[level]), f"{name}  ")
            if row.cell_len + cell.cell_len > width + 2:
                yield row
                row = Text.assemble(_label(""))
            row += cell
        yield row
        if self.said is not None and (shown or len(self.history) - self.said[0] < FRESH):
            for line in wrapped(plain(self.said[1]), width - LABEL)[:4]:
                yield Text.assemble(_label(""), (line, "yellow"))
        elif lost := ungraded(self.history[-1]):
            yield Text.assemble(_label(""), (f"{lost.strip()}: a reward function fails, see above", "yellow"))
        elif not shown:
            yield Text.assemble(_label(""), ("nothing out of order", "dim"))

    def _answers(self, width: int, room: int) -> list[Text]:
        """A fresh good and a fresh bad answer to one question, as much of them as there is room for."""
        chosen = contrast(self.groups)
        if chosen is None or room < 3:
            return []
        group, pair = chosen
        columns = len(pair) if width >= WIDE else 1
        inner = width // columns - 2
        stacked = len(pair) // columns
        tall = min((room - 1) // stacked - 1, max(1, -(-self.cap * 5 // inner)))  # about 5 letters a token
        if tall < 1:
            return []
        blocks = []
        for name, colour, completion, reward in pair:
            title = f"{name}: reward {number(reward, '.2f')}, {len(completion.ids)} tokens"
            title += "" if completion.stopped else ", cut off"
            lines = [Text(f" {line}") for line in fold(completion.text, inner, tall)]
            blocks.append([_rule(title, colour, inner + 1), *lines])
        gold = group.example.columns.get("answer")
        question = f"asked: {one_line(group.example.text[:width])}"
        if gold is not None:
            question = f"gold: {one_line(str(gold)[: width // 3])}  {question}"
        if columns == 1:
            return [Text(f" {question}", style="dim"), *(line for block in blocks for line in block)]
        for line in blocks[0]:
            line.truncate(width // 2, pad=True)
        return [Text(f" {question}", style="dim"), *(a + b for a, b in zip(*blocks, strict=True))]


def contrast(groups: Sequence[Group]) -> tuple[Group, list[tuple[str, str, Completion, float]]] | None:
    """The best and the worst answer of the first group whose rewards differ (name, colour, answer, reward).

    Where no group has a spread, one answer: there is no better or worse.
    """
    for group in groups:
        graded = sorted((r, i) for i, r in enumerate(group.rewards) if r == r)
        if graded and graded[0][0] < graded[-1][0]:
            (low, worst), (high, best) = graded[0], graded[-1]
            return group, [
                ("good", "green", group.completions[best], high), ("bad", "red", group.completions[worst], low),
            ]  # fmt: skip
    if not groups or not groups[0].completions:
        return None
    return groups[0], [("no spread", "yellow", groups[0].completions[0], groups[0].rewards[0])]


@contextmanager
def live(panel: Panel) -> Iterator[None]:
    """Inside, the panel stands at the foot of the terminal and what is said appears above it.

    Drawn once a second by rich's thread, and with everything that is said; a terminal of another size is cleared
    first, because it has folded the old lines as it pleased.
    """
    size = console.size

    def drawn() -> Stack:
        nonlocal size
        if console.size != size:
            size = console.size
            console.clear()
        return Stack(*panel.lines(size.width, max(1, size.height - SPARE)))

    with Live(console=console, get_renderable=drawn, refresh_per_second=1, vertical_overflow="crop"):
        yield


def possible() -> bool:
    """Whether there is a terminal that can be drawn on."""
    return (
        console.is_terminal
        and not console.is_dumb_terminal
        and not console.options.ascii_only
        and not console.legacy_windows
    )


def _last(values: Sequence[float | None]) -> float | None:
    return values[-1] if values else None


def _worked(line: Line) -> float:
    return sum(line["clock"][name] for name in WORK)


def _label(name: str) -> tuple[str, str]:
    return f" {name:<{LABEL - 1}}", "dim"


def _row(name: str, value: str, drawn: Sequence[str], room: int, rest: str, colour: str) -> Iterator[Text]:
    """Name, number, curve and remark; further lines of the curve below."""
    yield Text.assemble(_label(name), (f"{value:>7}  ", "bold"), (drawn[0].ljust(room), colour), f"  {rest}")
    for line in drawn[1:]:
        yield Text.assemble(" " * (LABEL + 9), (line, colour))


def _rule(title: str, colour: str, width: int) -> Text:
    shown = f"── {one_line(title)} "
    return Text(shown + "─" * max(0, width - cell_len(shown)), style=colour or "dim")
