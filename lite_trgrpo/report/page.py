"""The pages as HTML: Jinja2 templates beside this file, filled with what summary.py and charts.py make of a run."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lite_trgrpo.report import reading, summary
from lite_trgrpo.report.charts import COLOURS, Curve, Figure, chart
from lite_trgrpo.report.reading import Answer, Line, Story
from lite_trgrpo.text import plain

if TYPE_CHECKING:
    from jinja2 import Environment

# title, hint, metrics by the name that the legend gives them, whether they are shares
CURVES: tuple[tuple[str, str, Mapping[str, str], bool], ...] = (
    ("Length", "Tokens of an answer. A steady rise to the cap without reward is hacking.",
     {"mean length": "length_mean", "longest answer": "length_max"}, False),
    ("Truncated, and with signal", "Answers cut off by the cap; prompts whose answers differ in reward: others teach "
     "nothing.", {"truncated answers": "truncated", "prompts with signal": "groups_with_signal"}, True),
    ("Entropy", "How much answers vary (nats a token). Near 0 there is nothing left to learn from.",
     {"all sampled tokens": "entropy_sampled", "tokens in the update": "entropy"}, False),
    ("KL", "How far an update moved the policy, and where measured how far it is from its base (nats a token)."
     " Estimated on a few answers, so it may fall below 0.",
     {"moved by the update": "update_kl", "distance to the base": "kl"}, False),
    ("Gradient norm", "Before clipping. Single peaks are usual, growth is not.", {"norm": "grad_norm"}, False),
    ("Mean token weight", "What the objective gives a token on average; 1 is plain GRPO.",
     {"weight": "weight_mean"}, False),
)  # fmt: skip


def of_run(story: Story, answer: Answer | None) -> str:
    """The page of one run."""
    return _rendered("run.html.j2", figures=_figures(story), **summary.of_run(story, answer))


def of_runs(stories: Sequence[Story]) -> str:
    """One page for several runs: curves in the same figures, scores and differing options in tables."""
    names = distinct([story.folder for story in stories])
    options = [reading.flat(story.settings) for story in stories]
    differing = [key for key in options[0] if any(one.get(key) != options[0][key] for one in options)]
    return _rendered(
        "several.html.j2",
        title=f"{len(stories)} runs",
        keys=[(i % COLOURS + 1, name) for i, name in enumerate(names)],
        scores=[(name, _score_cells(story)) for name, story in zip(names, stories, strict=True)],
        figures=_common_figures(names, stories),
        settings=[(key, [reading.toml(one.get(key)) for one in options]) for key in differing],
    )


def _rendered(template: str, **variables: Any) -> str:
    return _environment().get_template(template).render(variables) + "\n"


@functools.cache
def _environment() -> "Environment":
    """Whatever is not Markup of our own goes in as text: unprintable characters visible, tags escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else plain(str(value)),
    )
    environment.globals["style"] = Markup((here / "style.css").read_text(encoding="utf-8"))
    return environment


def distinct(folders: Sequence[Path]) -> list[str]:
    """The folders' names, or the whole of them where a name is there twice."""
    names = [folder.resolve().name for folder in folders]
    return [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)]


def _score_cells(story: Story) -> list[str]:
    scored = story.evaluations
    before, after = (summary.estimate(scored[i]["pass@1"]) if scored else "-" for i in (0, -1))
    gain = summary.estimate(scored[-1]["gain"], "+") if scored and "gain" in scored[-1] else "-"
    time = summary.duration(sum(summary.seconds(story).values()))
    return [str(len(story.metrics)), before, after, gain, time]


# -- curves -------------------------------------------------------------------------------------------------


def _figures(story: Story) -> list[Figure]:
    if not story.metrics:
        return []
    parts = [name for name in story.metrics[-1] if name.startswith("reward/")]
    shown = {"reward": "reward_mean"} | ({name[7:]: name for name in parts} if len(parts) > 1 else {})
    training = _curves(story.metrics, {"training": "solved"})
    figures = [
        chart("Reward", "Mean of a step's answers, and of each reward function.", _curves(story.metrics, shown)),
        chart(
            "Solved",
            "Held-out scores with their intervals; the share of training answers solved.",
            [*_score_curves(story.evaluations), *training],
            share=True,
        ),
        *(chart(title, hint, _curves(story.metrics, names), share=share) for title, hint, names, share in CURVES),
    ]
    return [figure for figure in figures if figure is not None]


def _common_figures(names: Sequence[str], stories: Sequence[Story]) -> list[Figure]:
    """A figure for each metric, a line for each run."""

    def all_of(metric: str) -> list[Curve]:
        return [_curves(story.metrics, {name: metric})[0] for name, story in zip(names, stories, strict=True)]

    heldout = []
    for name, story in zip(names, stories, strict=True):
        found = _score_curves(story.evaluations)
        heldout.append(replace(found[0], name=name) if found else Curve(name, (), ()))
    figures = [
        chart("Held-out pass@1", "With 95 % intervals.", heldout, share=True),
        chart("Reward", "Mean of a step's answers.", all_of("reward_mean")),
        chart("Solved", "Share of training answers.", all_of("solved"), share=True),
        *(
            chart(f"{title}: {label}" if len(metrics) > 1 else title, hint, all_of(metric), share=share)
            for title, hint, metrics, share in CURVES
            for label, metric in metrics.items()
        ),
    ]
    return [figure for figure in figures if figure is not None]


def _curves(metrics: Sequence[Line], names: Mapping[str, str]) -> list[Curve]:
    steps = [line["step"] for line in metrics]
    return [Curve(label, steps, [line.get(name) for line in metrics]) for label, name in names.items()]


def _score_curves(evaluations: Sequence[Line]) -> list[Curve]:
    """One curve of points for each score."""
    steps = [line["step"] for line in evaluations]
    return [
        Curve(
            name,
            steps,
            [line[name]["value"] for line in evaluations],
            [(line[name]["low"], line[name]["high"]) for line in evaluations],
        )
        for name in (summary.score_names(evaluations[-1]) if evaluations else ())
    ]
