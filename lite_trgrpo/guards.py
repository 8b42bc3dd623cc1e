"""Traffic lights over a run: is it in trouble, what to do about it, and where to fall back to.

All of it is a function of what metrics.jsonl and eval.jsonl hold, so a resumed run decides as the one that went on.
A light is yellow when the last step was beyond a limit, red when the last `window` steps with a measurement were.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from lite_trgrpo.options import Guards

SOLVED = 0.9  # share of answers from which on a policy that has stopped varying them is what one wants
SPREAD = 0.25  # share of groups with signal that makes their vanishing remarkable
RISE = 1.2  # an answer this much longer than at the start has grown

Line = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Light:
    """One that is not green."""

    name: str
    colour: str
    """yellow or red"""
    advice: str


def lights(history: Sequence[Line], evaluations: Sequence[Line], options: Guards, cap: int) -> list[Light]:
    """All that are not green after the last line of `history` (metrics); `cap` is the rollout's, in tokens."""
    recent = history[restart(history) :]
    found = []
    for name, (beyond, advice) in _limits(options).items():
        measured = [value for line in recent if (value := beyond(line)) is not None]
        if beyond(recent[-1]):
            lasting = len(measured) >= options.window and all(measured[-options.window :])
            found.append(Light(name, "red" if lasting else "yellow", advice))
    if _fell_silent(recent, options.window):
        advice = (
            f"reward fell and no group had a spread for {options.window} steps: collapse. Lower train.learning_rate"
        )
        found.append(Light("reward", "red", advice))
    if _runs_to_the_cap(history, recent, options, cap):
        advice = (
            f"answers grow towards the cap of {cap} tokens. If reward does not grow with them, add the reward "
            "'overlong'; else raise rollout.max_new_tokens"
        )
        found.append(Light("length", "yellow", advice))
    if _without_held_out_gain(history, evaluations, options.window):
        advice = (
            "reward has risen, the held-out score has not: read rollouts.jsonl for answers that please the reward "
            "without being right, or train on more prompts"
        )
        found.append(Light("held_out", "yellow", advice))
    return found


def _limits(options: Guards) -> dict[str, tuple[Callable[[Line], bool | None], str]]:
    """Name -> (is this step beyond the limit? None: not measured in it), advice."""
    return {
        "finite": (
            lambda line: line["updates_skipped"] > 0,
            "loss, gradient or a probability was no finite number, so nothing was learned from the step. If it lasts, "
            "lower train.learning_rate or set model.dtype to float32",
        ),
        "entropy": (
            lambda line: _below(line.get("entropy"), options.entropy, line["solved"]),
            f"answers hardly vary any more (entropy below {options.entropy:g}), so there is little left to learn from. "
            "Lower train.learning_rate, or raise objective.clip_high",
        ),
        "grad_norm": (
            lambda line: _above(line["grad_norm"] or None, options.grad_norm),
            f"the gradient is above {options.grad_norm:g}. Lower train.learning_rate, or raise train.prompts_per_step",
        ),
        "kl": (
            lambda line: _above(line.get("kl"), options.kl),
            f"the policy is more than {options.kl:g} nats a token from its base. Lower train.learning_rate or raise "
            "objective.beta",
        ),
        "truncated": (
            lambda line: line["truncated"] >= options.truncated,
            "nearly every answer is cut off by the token cap. Raise rollout.max_new_tokens; if it was better before, "
            "lower train.learning_rate",
        ),
    }


def _above(value: float | None, limit: float) -> bool | None:
    return None if value is None else value > limit


def _below(value: float | None, limit: float, solved: float) -> bool | None:
    return None if value is None else value < limit and solved < SOLVED


def _fell_silent(recent: Sequence[Line], window: int) -> bool:
    """No signal over the window, though there was some before, and no reward above the lowest before."""
    before, now = recent[-2 * window : -window], recent[-window:]
    rewards, earlier = ([line["reward_mean"] for line in part] for part in (now, before))
    if not before or None in rewards or None in earlier or any(line["groups_with_signal"] for line in now):
        return False
    spread = fmean(line["groups_with_signal"] for line in before)
    return spread >= SPREAD and max(rewards) <= min(earlier) and fmean(rewards) < fmean(earlier)


def _runs_to_the_cap(history: Sequence[Line], recent: Sequence[Line], options: Guards, cap: int) -> bool:
    if len(recent) < options.window:
        return False
    first, now = (fmean(line["length_mean"] for line in part) for part in _ends(history, options.window))
    return now >= options.length * cap and now >= RISE * first


def _without_held_out_gain(history: Sequence[Line], evaluations: Sequence[Line], window: int) -> bool:
    """Reward rose by half a standard deviation of the start, the paired held-out gain is not above 0."""
    later = [line for line in evaluations if line["step"] > 0 and "gain" in line]
    start, now = _ends(history, window)
    rewards = [[line["reward_mean"] for line in part] for part in (start, now)]
    if not later or len(history) < 2 * window or any(None in part for part in rewards):
        return False
    rise = fmean(rewards[1]) - fmean(rewards[0])
    return later[-1]["gain"]["value"] <= 0 and rise > 0.5 * fmean(line["reward_std"] for line in start) > 0


def _ends(history: Sequence[Line], window: int) -> tuple[Sequence[Line], Sequence[Line]]:
    return history[:window], history[-window:]


# -- falling back -------------------------------------------------------------------------------------------


def restart(history: Sequence[Line]) -> int:
    """Lines up to the last roll-back: what came before it says nothing about the adapter of today."""
    return next((i for i in range(len(history), 0, -1) if "rolled_back_to" in history[i - 1]), 0)


def rollbacks(history: Sequence[Line]) -> int:
    """How often the run was rolled back; each time the learning rate is halved."""
    return sum("rolled_back_to" in line for line in history)


def good_steps(history: Sequence[Line], saved: Collection[int]) -> list[int]:
    """Those of the steps `saved` after which the next step raised no light, newest first.

    Line i is of step i + 1, whose answers were sampled by the adapter of step i: they show what that is worth.
    """
    return [step for step in range(len(history) - 1, -1, -1) if step in saved and not history[step]["guards"]]
