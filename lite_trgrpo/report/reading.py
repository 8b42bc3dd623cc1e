"""Read a run folder as plain data. Nothing else is read, so a report can be made again at any time.

Settings are read without checking them: the options of an older version are no reason to show nothing.
"""

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lite_trgrpo.config import loading
from lite_trgrpo.config.loading import Settings
from lite_trgrpo.config.schema import SECTIONS, Guards, Objective, Section
from lite_trgrpo.store.run import Run
from lite_trgrpo.training import guards

RESOLVED = {"model.revision", "rollout.cache_mib"}  # found at the start of a run, not chosen
Line = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Story:
    """One run."""

    folder: Path
    settings: Settings
    """Every option, by section; None where it is unset."""
    facts: Line
    metrics: Sequence[Line]
    evaluations: Sequence[Line]
    written: datetime
    """When its last step was."""

    @property
    def name(self) -> str:
        return self.folder.resolve().name


def read(run: Run) -> Story:
    raw: Settings = {}
    loading.lay_over(raw, run.folder / "config.toml")
    settings = {name: _defaults(section) | raw.get(name, {}) for name, section in SECTIONS.items()}
    logs = [path for path in (run.folder / "metrics.jsonl", run.folder / "config.toml") if path.exists()]
    written = datetime.fromtimestamp(logs[0].stat().st_mtime)
    return Story(run.folder, settings, run.facts(), run.metrics(), run.evaluations(), written)


def _defaults(section: type[Section]) -> dict[str, Any]:
    found = {name: None if field.is_required() else field.default for name, field in section.model_fields.items()}
    return {name: value.model_dump() if isinstance(value, Section) else value for name, value in found.items()}


# -- settings -----------------------------------------------------------------------------------------------


def flat(settings: Settings) -> dict[str, Any]:
    """`section.key` -> value."""
    return {f"{section}.{key}": value for section, values in settings.items() for key, value in values.items()}


def differences(settings: Settings) -> tuple[str | None, dict[str, tuple[Any, Any]]]:
    """-> the preset of this base that is nearest, and by option its value and the run's; None: the defaults."""
    ours = flat(settings)
    known = {name: flat(loading.load(name).model_dump()) for name in loading.presets()}
    same = {name: theirs for name, theirs in known.items() if theirs["model.name"] == ours["model.name"]}
    same = same or {"": flat({name: _defaults(section) for name, section in SECTIONS.items()})}
    found = {
        name: {key: (theirs.get(key), value) for key, value in ours.items() if theirs.get(key) != value}
        for name, theirs in same.items()
    }
    nearest = min(found, key=lambda name: len(found[name]))
    return nearest or None, found[nearest]


def command(story: Story) -> str:
    """The command for the same run: the preset and what differs, or its own config.toml where that does not suffice."""
    preset, found = differences(story.settings)
    if preset is None or any(ours is None for _, ours in found.values()):
        return f"lite-trgrpo train --config {shlex.quote(str(story.folder / 'config.toml'))}"
    sets = [f"--set {shlex.quote(f'{name}={toml(ours)}')}" for name, (_, ours) in found.items()]
    return " ".join([f"lite-trgrpo train --preset {preset}", *sets])


def toml(value: Any) -> str:
    """A value as it stands in one line of TOML."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{toml(str(key))} = {toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    return "unset" if value is None else str(value)


# -- what happened ------------------------------------------------------------------------------------------


OLD_LEVELS = {"yellow": "warning", "red": "critical"}  # in metrics.jsonl of runs before version 0.2


def events(story: Story) -> Iterator[tuple[int, str, str, str]]:
    """(step, guard, level, advice) of each alert when it was raised, as on the screen; roll-backs have no level."""
    limits = Guards(**{key: value for key, value in story.settings["guards"].items() if key in Guards.model_fields})
    prompts, cap = story.settings["train"]["prompts_per_step"], story.settings["rollout"]["max_new_tokens"]
    before: Mapping[str, str] = {}
    for i, line in enumerate(story.metrics):
        now = {name: OLD_LEVELS.get(level, level) for name, level in line.get("guards", {}).items()}
        fresh = {name: level for name, level in now.items() if before.get(name) not in (level, "critical")}
        scored = [evaluation for evaluation in story.evaluations if evaluation["step"] <= i]
        then = {key: value for key, value in line.items() if key != "rolled_back_to"}  # that came of the alerts
        alerts = guards.alerts([*story.metrics[:i], then], scored, limits, prompts, cap) if fresh else []
        advice = {alert.name: alert.advice for alert in alerts}
        yield from ((line["step"], name, level, advice.get(name, "")) for name, level in fresh.items())
        if "rolled_back_to" in line:
            yield line["step"], "rolled back", "", f"to the adapter of step {line['rolled_back_to']}"
        before = now


def gains(story: Story) -> list[tuple[float, Line, Line]]:
    """(gain, row before, row after) of each held-out prompt: of its greedy answer, and of the share of its samples."""
    before, after = story.evaluations[0]["rows"], story.evaluations[-1]["rows"]

    def score(row: Line) -> float:
        return (row["solved"] or 0) + (row.get("samples_solved") or 0) / max(1, story.settings["eval"]["samples"])

    return [(score(new) - score(old), old, new) for old, new in zip(before, after, strict=False)]


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer token by token."""

    step: int
    prompt: str
    reward: float | None
    tokens: Sequence[tuple[str, float, float]]
    """Text, probability when it was sampled, weight."""


def shown(run: Run, story: Story) -> Answer | None:
    """The answer of the last step whose tokens have their text. None in runs that did not record it."""
    groups = run.last_rollouts()
    answers = [answer for group in groups for answer in group["completions"]]
    for group in groups:
        for answer in group["completions"]:
            if "pieces" in answer:
                others = [other["logprobs"] for other in answers if "logprobs" in other]
                weights = _weights(answer["logprobs"], others, story.settings["objective"])
                chances = [0.0 if value is None else math.exp(value) for value in answer["logprobs"]]
                tokens = list(zip(answer["pieces"], chances, weights, strict=True))
                return Answer(group["step"], group["prompt"], answer["reward"], tokens)
    return None


def _weights(logprobs: Sequence[float | None], step: Sequence[Any], objective: Line) -> list[float]:
    """Weights that the objective gives to the probabilities; `step` holds those of the whole step, for the mean."""
    import torch

    from lite_trgrpo.training.weighting import step_mean, weights_of

    def finite(values: Sequence[float | None]) -> list[float]:
        return [-math.inf if value is None else value for value in values]

    try:
        chosen = Objective(**objective)
    except ValidationError:  # of another version
        return [1.0] * len(logprobs)
    found = weights_of(torch.tensor(finite(logprobs)), chosen, step_mean([finite(row) for row in step], chosen))
    return [1.0] * len(logprobs) if found is None else found.tolist()
