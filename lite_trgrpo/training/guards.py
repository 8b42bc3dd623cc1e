"""Guards over a run: is it in trouble, what to do about it, and where to fall back to.

All of it is a function of what metrics.jsonl and eval.jsonl hold, so a resumed run decides as the one that went on.
A guard is `warning` when the last step was beyond its limit, `critical` when the last WINDOW measured steps were.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from lite_trgrpo.config.schema import Config, Guards

WINDOW = 5  # steps in a row that turn a warning critical
GRAD_NORM = 10.0  # above it the gradient has blown up (before clipping)
KL = 2.0  # nats a token from the base (objective.beta > 0), or from the policy before one update
TRUNCATED = 0.95  # share of truncated answers at which all count as such
LENGTH = 0.9  # mean length that runs to the cap, as a share of the cap
SOLVED = 0.9  # share of answers from which on a policy that has stopped varying them is what one wants
LUCK = 1e-3  # chance below which silence is no luck
RISE = 1.2  # an answer this much longer than at the start has grown
NAMES = ("finite", "entropy", "grad_norm", "kl", "truncated", "update_kl", "signal", "length", "held_out")

NEARLY_ALL = 0.9  # share of truncated answers before training that explains why none is right

Line = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Alert:
    """A guard that is not ok."""

    name: str
    level: str
    """warning or critical"""
    advice: str


def alerts(
    history: Sequence[Line], evaluations: Sequence[Line], options: Guards, prompts: int, cap: int
) -> list[Alert]:
    """All guards that are not ok after the last line of `history` (metrics); `cap` is that of an answer, in tokens."""
    # After a roll-back the adapter is another one: what came before says nothing about it. Limits on single steps are
    # judged by the steps in which they were measured, so that a step without an update neither alarms nor interrupts.
    recent = history[restart(history) :]
    found = []
    for name, (beyond, advice) in _limits(options).items():
        measured = [value for line in recent if (value := beyond(line)) is not None]
        if beyond(recent[-1]):
            lasting = len(measured) >= WINDOW and all(measured[-WINDOW:])
            found.append(Alert(name, "critical" if lasting else "warning", advice))
    if _not_finite(recent[-1], "entropy_sampled"):
        found = [alert for alert in found if alert.name != "finite"]
        advice = "the policy itself gives no finite probabilities any more. Lower train.learning_rate"
        found.append(Alert("finite", "critical", advice))
    if _not_finite(recent[-1], "update_kl") or _above(recent[-1].get("update_kl"), KL):
        advice = f"one update moved the policy by more than {KL:g} nats a token. Lower train.learning_rate"
        found.append(Alert("update_kl", "critical", advice))
    if silence := _fell_silent(recent, WINDOW, prompts):
        advice = (
            f"for {silence} steps no prompt had answers of different reward, so nothing is learned any more. Lower "
            "train.learning_rate, or take prompts that are neither too easy nor too hard"
        )
        found.append(Alert("signal", "critical", advice))
    if _runs_to_the_cap(history, recent, options, cap):
        advice = (
            f"answers grow towards the cap of {cap} tokens. If reward does not grow with them, add the reward "
            "'overlong'; else raise rollout.max_new_tokens"
        )
        found.append(Alert("length", "warning", advice))
    if _without_held_out_gain(history, evaluations, WINDOW):
        advice = (
            "reward has risen, the held-out score has not: read rollouts.jsonl for answers that please the reward "
            "without being right, or train on more prompts"
        )
        found.append(Alert("held_out", "warning", advice))
    return found


def _limits(options: Guards) -> dict[str, tuple[Callable[[Line], bool | None], str]]:
    """Name -> (is this step beyond the limit? None: not measured in it), advice."""
    return {
        "finite": (
            lambda line: line["updates_skipped"] > 0,
            "loss, gradient or a probability was not a finite number, so the update was skipped. If it lasts, "
            "lower train.learning_rate or set model.dtype to float32",
        ),
        "entropy": (
            lambda line: _below(line.get("entropy_sampled"), options.entropy, line["solved"]),
            f"answers hardly vary any more (entropy below {options.entropy:g}), so there is little left to learn from. "
            "Lower train.learning_rate, or raise objective.clip_high",
        ),
        "grad_norm": (
            lambda line: _above(line["grad_norm"] or None, GRAD_NORM),
            f"the gradient is above {GRAD_NORM:g}. Lower train.learning_rate, or raise train.prompts_per_step",
        ),
        "kl": (
            lambda line: _above(line.get("kl"), KL),
            f"the policy is more than {KL:g} nats a token from its base. Lower train.learning_rate or raise "
            "objective.beta",
        ),
        "truncated": (
            lambda line: line["truncated"] >= TRUNCATED,
            "nearly every answer is truncated. Raise rollout.max_new_tokens; if it was better before, "
            "lower train.learning_rate",
        ),
    }


def _not_finite(line: Line, name: str) -> bool:
    """Whether a statistic was measured and came out NaN or infinite: JSON has neither, so the line holds None."""
    return name in line and line[name] is None


def _above(value: float | None, limit: float) -> bool | None:
    return None if value is None else value > limit


def _below(value: float | None, limit: float, solved: float) -> bool | None:
    return None if value is None else value < limit and solved < SOLVED


def _fell_silent(recent: Sequence[Line], window: int, prompts: int) -> int:
    """Steps for which no group has had a spread of rewards, if that is no luck given how many had before; else 0."""
    loud = [i for i, line in enumerate(recent) if line["groups_with_signal"]]
    steps = len(recent) - 1 - (loud[-1] if loud else len(recent))
    if steps < window or fmean(line["solved"] for line in recent[-steps:]) >= SOLVED:
        return 0
    share = fmean(line["groups_with_signal"] for line in recent[:-steps][-2 * window :])
    return steps if (1 - share) ** (steps * prompts) < LUCK else 0


def _runs_to_the_cap(history: Sequence[Line], recent: Sequence[Line], options: Guards, cap: int) -> bool:
    if len(recent) < WINDOW:
        return False
    first, now = (fmean(line["length_mean"] for line in part) for part in _ends(history, WINDOW))
    return now >= LENGTH * cap and now >= RISE * first


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
    """Those of the steps `saved` that can be fallen back on, newest first.

    Line i is of step i + 1, whose answers were sampled by the adapter of step i. It vouches for that adapter if it
    raised no alert (but for that of the update after it) and its answers differed in reward, or were right.
    """
    return [
        step
        for step, line in reversed(list(enumerate(history)))
        if step in saved
        and line["guards"].keys() <= {"update_kl"}
        and (line["groups_with_signal"] or line["solved"] >= SOLVED)
    ]


PROOF = 100  # answers without one that is right: fewer than 3 in 100 are, with 95 % confidence


def of_first_step(before: Mapping[str, Any], metrics: Mapping[str, Any], config: Config) -> str | None:
    """Why a run should end after its first step; None if it should go on.

    Judged from what it has sampled anyhow: the held-out score `before` training and the first step's `metrics`. One
    right answer among hundreds is enough to go on, so few of them prove nothing.
    """
    answers = len(before["rows"]) * (1 + config.eval.samples)
    if metrics["groups_with_signal"] > 0 or answers < PROOF:
        return None
    solved = sum((row["solved"] or 0) + (row.get("samples_solved") or 0) for row in before["rows"])
    if solved == answers:
        return f"{answers} of {answers} held-out answers right before training: take harder prompts in data.source"
    if solved:
        return None
    reason = "look at `lite-trgrpo check rewards` with the same options, take easier prompts or a larger base"
    if before["truncated"] >= NEARLY_ALL:
        reason = f"{before['truncated']:.0%} were truncated: raise rollout.max_new_tokens"
    return f"no right answer among {answers} held-out ones and no signal in the first step: {reason}"
