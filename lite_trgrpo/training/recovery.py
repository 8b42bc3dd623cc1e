"""Saving a run at work, and falling back on what was saved."""

import time
from typing import Any

from lite_trgrpo.store import checkpoint
from lite_trgrpo.training import guards
from lite_trgrpo.training.state import Job, Metrics


def save_if_due(job: Job) -> None:
    """At the start, after an evaluation, and by number of steps or minutes."""
    every, minutes = job.config.train.checkpoint_every, job.config.train.checkpoint_minutes
    late = minutes > 0 and time.monotonic() - job.saved_at >= 60 * minutes
    if job.saved != job.step and (late or job.step in _regular(job, every)):
        save(job)


def save(job: Job, *, complete: bool = False, **more: Any) -> None:
    """Write a checkpoint, with `more` in its state, and prune; `complete`: adapter and all scores are there."""
    logs = job.run.offsets()
    marks = {"logs": logs, "logs_sha256": job.run.digests(logs)}
    state = {**marks, "complete": complete, "limits": job.limits.as_dict(), **more}
    checkpoint.save(job.run.checkpoints, job.step, job.trainable, job.optimizer, state)
    job.saved, job.saved_at = job.step, time.monotonic()
    best = max(job.evaluations, key=score_of, default=None)
    kept = _good_steps(job)[:1] + ([best["step"]] if best else [])
    checkpoint.prune(job.run.checkpoints, job.step, job.config.train.keep_checkpoints, kept)
    job.listener.saved()


def finish(job: Job, *, complete: bool) -> None:
    """The adapter comes first: the checkpoint holds its SHA-256, and a complete one says that it is there."""
    adapter = checkpoint.save_adapter(job.policy.save_adapter, job.run.adapter)
    save(job, complete=complete, adapter=adapter)


def score_of(line: Metrics) -> float:
    """The score by which evaluations are ranked."""
    return line["pass@1"]["value"]


def watch(job: Job, metrics: Metrics) -> str | None:
    """Read the guards and roll back if one is critical; -> why the run must end here, if it must."""
    config, options = job.config, job.config.guards
    alerts = guards.alerts(
        job.history, job.evaluations, options, config.train.prompts_per_step, config.rollout.max_new_tokens
    )
    before = job.history[-2]["guards"] if len(job.history) > 1 else {}
    metrics["guards"] = {alert.name: alert.level for alert in alerts}
    for alert in alerts:
        if before.get(alert.name) not in (alert.level, "critical"):
            job.listener.warned(f"guard '{alert.name}' {alert.level} at step {metrics['step']}: {alert.advice}")
    critical = [alert for alert in alerts if alert.level == "critical"]
    if not (critical and options.rollbacks) or (good := _fall_back(job)) is None:
        return None
    metrics["rolled_back_to"] = good
    if (count := guards.rollbacks(job.history)) > options.rollbacks:
        return f"guard '{critical[0].name}' after {options.rollbacks} roll-backs; the adapter is that of step {good}"
    job.listener.warned(
        f"rolled back to the adapter of step {good} ({count} of at most {options.rollbacks} times); the learning "
        "rate is halved"
    )
    return None


def _fall_back(job: Job) -> int | None:
    """Put adapter and optimizer back to the newest good checkpoint; -> its step, None if there is none."""
    for step in _good_steps(job):
        path = checkpoint.at_step(job.run.checkpoints, step)
        if checkpoint.is_whole(path):
            checkpoint.load(path, job.trainable, job.optimizer)
            return step
    return None


def _good_steps(job: Job) -> list[int]:
    """Steps whose checkpoint can be fallen back on, newest first."""
    return guards.good_steps(job.history, _regular(job, job.config.train.checkpoint_every))


def _regular(job: Job, every: int) -> set[int]:
    """Steps up to now at which any run of these options has a checkpoint, whenever it was stopped."""
    return {0, *(range(0, job.step + 1, every) if every else ()), *(line["step"] for line in job.evaluations)}
