"""One page for several runs: their curves in the same figures, their scores and differing options in tables."""

from collections.abc import Sequence
from pathlib import Path

from lite_trgrpo.report import reading
from lite_trgrpo.report.account import duration, seconds
from lite_trgrpo.report.charts import COLOURS, Curve, chart
from lite_trgrpo.report.html import Html, document, table, tag
from lite_trgrpo.report.page import CURVES, curves, estimate, scores
from lite_trgrpo.report.reading import Story


def of_runs(stories: Sequence[Story]) -> str:
    names = distinct([story.folder for story in stories])
    keys = [tag("li", tag("i", class_=f"c{i % COLOURS + 1}"), name) for i, name in enumerate(names)]
    title = f"{len(stories)} runs"
    return document(title, [
        tag("header", tag("h1", title), tag("ul", *keys, class_="legend")),
        _scores(names, stories),
        _curves(names, stories),
        _differing(names, stories),
    ])  # fmt: skip


def distinct(folders: Sequence[Path]) -> list[str]:
    """The folders' names, or the whole of them where a name is there twice."""
    names = [folder.resolve().name for folder in folders]
    return [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)]


def _scores(names: Sequence[str], stories: Sequence[Story]) -> Html:
    rows = []
    for name, story in zip(names, stories, strict=True):
        scored = story.evaluations
        before, after = (estimate(scored[i]["pass@1"]) if scored else "-" for i in (0, -1))
        gain = estimate(scored[-1]["gain"], "+") if scored and "gain" in scored[-1] else "-"
        rows.append((tag("b", name), len(story.metrics), before, after, gain, duration(sum(seconds(story).values()))))
    head = ("run", "steps", "before", "after", "gain (paired)", "time")
    note = "Greedy answers, with 95 % intervals. Only runs with the same held-out prompts can be compared."
    return tag("section", tag("h2", "Held-out pass@1"), tag("p", note), table(head, rows))


def _curves(names: Sequence[str], stories: Sequence[Story]) -> Html:
    """A figure for each metric, a line for each run."""

    def all_of(metric: str) -> list[Curve]:
        return [curves(story.metrics, {name: metric})[0] for name, story in zip(names, stories, strict=True)]

    heldout = [
        Curve(name, *((found[0].steps, found[0].values, found[0].intervals) if (found := scores(story.evaluations)) else
                      ((), ())))
        for name, story in zip(names, stories, strict=True)
    ]  # fmt: skip
    figures = [
        chart("Held-out pass@1", "With 95 % intervals.", heldout, share=True),
        chart("Reward", "Mean of a step's answers.", all_of("reward_mean")),
        chart("Solved", "Share of training answers.", all_of("solved"), share=True),
    ]
    figures += [
        chart(f"{title}: {label}" if len(metrics) > 1 else title, hint, all_of(metric), share=share)
        for title, hint, metrics, share in CURVES
        for label, metric in metrics.items()
    ]
    note = "Thin: each step. Thick: running mean. The number is the last step's."
    return tag("section", tag("h2", "Curves"), tag("p", note), tag("div", *figures, class_="charts"))


def _differing(names: Sequence[str], stories: Sequence[Story]) -> Html:
    options = [reading.flat(story.settings) for story in stories]
    keys = [key for key in options[0] if any(one.get(key) != options[0][key] for one in options)]
    rows = [(tag("code", key), *(reading.toml(one.get(key)) for one in options)) for key in keys]
    shown = table(("option", *names), rows) if rows else tag("p", "None.")
    return tag("section", tag("h2", "Settings that differ"), shown)
