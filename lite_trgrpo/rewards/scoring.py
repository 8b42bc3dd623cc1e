"""Calls the reward functions and refuses every value that is no reward."""

import asyncio
import inspect
import math
from collections import Counter
from collections.abc import Awaitable, Collection, Mapping, Sequence, Set
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Protocol

from lite_trgrpo.errors import LiteError, RewardError
from lite_trgrpo.records import Group
from lite_trgrpo.rewards.loading import Reward

RESERVED = ("prompt", "prompts", "completion", "completions", "completion_ids")  # TRL drops these columns too
FAILURES = {"timeout": "reward_timeouts", "crash": "reward_crashes", "error": "reward_errors"}  # kind: its counter


class FunctionRaisedError(RewardError):
    """A reward function raised; its exception is the cause. In the sandbox that is treated by `rewards.on_failure`."""


class Scorer(Protocol):
    """The interface that training and evaluation use; a run uses `Sandbox`."""

    def start(self, group: Group) -> Future[Group]:
        """Score a group while others are still being sampled."""

    def score(self, groups: Sequence[Group]) -> list[Group]:
        """The same groups, in the same order, with `rewards`, `parts` and `failures` filled in."""


def score(groups: Sequence[Group], rewards: Sequence[Reward]) -> list[Group]:
    """The same groups, in the same order, with `rewards` and `parts` filled in; all in this process.

    Each function is called once with all B = sum of G completions. None becomes NaN. The total of an answer
    is the weighted sum of the parts that could be graded; NaN if no part with a weight other than 0 could.

    Raises RewardError, naming the function and the sample, when a function raises or gives anything but one
    finite number or None for each completion.
    """
    weights = {reward.name: reward.weight for reward in rewards}
    if not any(len(group.completions) for group in groups):
        return [combined(group, {name: () for name in weights}, weights, {}) for group in groups]
    parts = {reward.name: values(reward, groups) for reward in rewards}
    scored, start = [], 0
    for group in groups:
        stop = start + len(group.completions)
        scored.append(combined(group, {name: part[start:stop] for name, part in parts.items()}, weights, {}))
        start = stop
    return scored


def combined(
    group: Group,
    parts: Mapping[str, Sequence[float]],
    weights: Mapping[str, float],
    failures: Mapping[str, Mapping[int, str]],
) -> Group:
    """The group with each function's values and their totals. An answer that failed and has no value has no total."""
    totals = []
    for i in range(len(group.completions)):
        counted = [name for name, weight in weights.items() if weight != 0]
        graded = [weights[name] * parts[name][i] for name in counted if not math.isnan(parts[name][i])]
        lost = any(i in failures.get(name, {}) and math.isnan(parts[name][i]) for name in counted)
        totals.append(math.fsum(graded) if graded and not lost else math.nan)
    own = {name: tuple(part) for name, part in parts.items()}
    return replace(group, rewards=tuple(totals), parts=own, failures=failures)


def failure_counts(groups: Sequence[Group]) -> dict[str, int]:
    """How many answers a function did not get through, by what happened, whatever they were given then."""
    kinds = Counter(kind for group in groups for failed in group.failures.values() for kind in failed.values())
    return {counter: kinds[kind] for kind, counter in FAILURES.items()}


def values(reward: Reward, groups: Sequence[Group]) -> list[float]:
    """One function's values for all completions: [B], NaN where it gave None.

    Raises FunctionRaisedError, and RewardError for what is no list of B finite numbers.
    """
    arguments = _arguments(reward, groups)
    try:
        returned = reward.function(**arguments)
        if inspect.isawaitable(returned):
            returned = asyncio.run(_awaited(returned))
    except LiteError:  # a built-in's own message, already written for a person
        raise
    except Exception as error:
        raise FunctionRaisedError(
            f"reward '{reward.name}' raised {type(error).__name__}: {' '.join(str(error).split())} "
            f"(first row of the batch: {groups[0].example.origin}). Fix the function, or return None for an "
            "answer that cannot be graded"
        ) from error
    samples = [(group, completion) for group in groups for completion in group.completions]
    _check_shape(reward, returned, len(samples), groups[0].example.origin)
    found = [
        math.nan if value is None else _number(reward, value, group.example.origin, completion.text)
        for value, (group, completion) in zip(returned, samples, strict=True)
    ]
    if not reward.truncated_max_zero:
        return found
    return [
        value if completion.stopped or math.isnan(value) else min(value, 0.0)
        for value, (_, completion) in zip(found, samples, strict=True)
    ]


async def _awaited(returned: Awaitable[Any]) -> Any:
    return await returned


def _arguments(reward: Reward, groups: Sequence[Group]) -> dict[str, Any]:
    """Arguments of a function. They are built anew for each, so that none can change what the next one sees."""
    offered = _batch(groups) | dict(reward.options)
    parameters = inspect.signature(reward.function).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    missing = [p.name for p in named if p.default is p.empty and p.name not in offered]
    if missing:
        raise RewardError(
            f"reward '{reward.name}' needs {', '.join(missing)}, which the data does not have "
            f"(columns of {groups[0].example.origin}: {', '.join(_columns(groups)) or 'none'}). "
            f"Add the column, or set data.answer to the one that holds the gold answer"
        )
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return offered
    return {p.name: offered[p.name] for p in named if p.name in offered}


def _batch(groups: Sequence[Group]) -> dict[str, Any]:
    """TRL's arguments: each value is a list of length B."""
    batch: dict[str, Any] = {"prompts": [], "completions": [], "completion_ids": []}
    columns: dict[str, list[Any]] = {name: [] for name in _columns(groups)}
    for group in groups:
        prompt = group.example.prompt
        for completion in group.completions:
            text = group.prompt.prefix + completion.text
            if isinstance(prompt, str):
                batch["prompts"].append(prompt)
                batch["completions"].append(text)
            else:
                batch["prompts"].append([dict(message) for message in prompt])
                batch["completions"].append([{"role": "assistant", "content": text}])
            batch["completion_ids"].append(list(completion.ids))
            for name, values in columns.items():
                values.append(group.example.columns.get(name))
    return batch | columns


def _columns(groups: Sequence[Group]) -> list[str]:
    """Every column that any example of the batch has, in the order they are met."""
    names = {name: None for group in groups for name in group.example.columns}
    return [name for name in names if name not in RESERVED]


def _check_shape(reward: Reward, returned: Any, expected: int, origin: str) -> None:
    """A list, tuple or one-dimensional array with one entry for each completion; nothing is broadcast."""
    where = f"(first row of the batch: {origin})"
    if not isinstance(returned, Collection) or isinstance(returned, (str, bytes, Mapping, Set)):
        raise RewardError(
            f"reward '{reward.name}' returned {type(returned).__name__} {_short(repr(returned))} {where}; it "
            f"must return a list with one number or None for each of the {expected} completions"
        )
    if len(returned) != expected:
        raise RewardError(
            f"reward '{reward.name}' returned {len(returned)} values for {expected} completions {where}; it "
            "must return exactly one number or None for each"
        )


def _number(reward: Reward, value: Any, origin: str, text: str) -> float:
    """One value as a finite float. True and False are 1 and 0; text is never read as a number."""
    where = f"for {origin}, completion {_short(repr(text))}"
    try:
        number = None if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last is how torch refuses
        number = None
    if number is None:
        raise RewardError(
            f"reward '{reward.name}' returned {type(value).__name__} {_short(repr(value))} {where}; it "
            "must be a number, or None for an answer that cannot be graded"
        )
    if not math.isfinite(number):
        raise RewardError(
            f"reward '{reward.name}' returned {number} {where}; a reward must be finite: "
            "return None for an answer that cannot be graded"
        )
    return number


def _short(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
