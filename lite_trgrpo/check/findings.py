"""Findings of the checks before a run."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from lite_trgrpo.config.schema import Config
from lite_trgrpo.records import Example, Group
from lite_trgrpo.rewards import gold

COUNTED = ("id", "idx", "index", "row", "uid", "uuid")  # columns that number the rows: they hold no answers


@dataclass(frozen=True, slots=True)
class Finding:
    """Something is wrong, or odd."""

    problem: str
    """Name of the mistake, in a few words."""
    text: str
    """The observation, and the setting to change."""
    stops: bool = True
    """Training cannot work."""


@dataclass(frozen=True, slots=True)
class Report:
    """Numbers of a check, for JSON, and its findings."""

    facts: Mapping[str, Any]
    findings: Sequence[Finding]

    @property
    def broken(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.stops]

    def as_dict(self) -> dict[str, Any]:
        return {**self.facts, "findings": [asdict(finding) for finding in self.findings]}


# -- reading scored groups --------------------------------------------------------------------------------------


def known(values: Iterable[float]) -> list[float]:
    """The values that could be graded."""
    return [value for value in values if not math.isnan(value)]


def mean(values: Iterable[float]) -> float | None:
    found = known(values)
    return fmean(found) if found else None


def first(group: Group) -> Sequence[float]:
    """Values of the function that decides what is solved."""
    return next(iter(group.parts.values()))


def other_columns(example: Example, config: Config) -> list[str]:
    """Columns beside `data.answer` that could hold an answer: text or numbers."""
    taken = {"answer", config.data.answer, *COUNTED}
    return [
        name
        for name, value in example.columns.items()
        if name.lower() not in taken and isinstance(value, str | int | float)
    ]


def answered_by(example: Example, column: str) -> Example:
    """The example as if `data.answer` were this column."""
    return replace(example, columns={**example.columns, "answer": example.columns.get(column)})


# -- words ------------------------------------------------------------------------------------------------------


def names(config: Config) -> str:
    """Names of the functions whose weight is not 0, quoted."""
    return ", ".join(f"'{name}'" for name, weight in config.rewards.functions.items() if weight)


def short(value: Any, limit: int = 80) -> str:
    text = repr(str(value))
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def line(form: str) -> str:
    return "the answer alone" if form == gold.BARE else " ".join(form.split())
