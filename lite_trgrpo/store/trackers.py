"""Sends a run's numbers to TensorBoard, Weights & Biases or trackio. Off unless `train.track` names one."""

import logging
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lite_trgrpo.errors import MissingPackageError, RunError, first_line

logger = logging.getLogger(__name__)

PROJECT = "lite-trgrpo"  # under which wandb and trackio keep all runs together

Line = Mapping[str, Any]
Log = Callable[[int, dict[str, float]], None]


def check(kind: str | None) -> None:
    """Raises MissingPackageError where `kind` needs a package that is not there."""
    if kind is not None and find_spec(kind) is None:
        raise MissingPackageError(f"train.track = {kind} needs the package {kind}: pip install {kind}")


@contextmanager
def tracked(
    kind: str | None, folder: Path, options: Mapping[str, Any], done: int | None
) -> Iterator[Callable[[Line], None]]:
    """Yields a function that takes each line of metrics.jsonl and eval.jsonl.

    options: shown as the run's configuration
    done: steps of a resumed run, which goes on under its name; None for a new one

    A tracker that cannot start raises RunError. One that fails later is let go of, with a warning: the same numbers are
    in the run folder.
    """
    if kind is None:
        yield lambda line: None
        return
    try:
        with redirect_stdout(sys.stderr):  # they chat; our stdout is for data
            log, close = _STARTS[kind](folder, options, done)
    except Exception as error:  # libraries of others raise what they like
        raise RunError(f"train.track = {kind} cannot start: {first_line(error)}. Unset it to train without") from None
    working = True

    def guarded(act: Callable[[], None]) -> None:
        nonlocal working
        try:
            if working:
                with redirect_stdout(sys.stderr):
                    act()
        except Exception as error:  # as above; hours of training must not be lost with it
            working = False
            logger.warning(f"{kind} failed and gets no more metrics from this run: {first_line(error)}")

    try:
        yield lambda line: guarded(lambda: log(line["step"], numbers(line)))
    finally:
        guarded(close)


def numbers(line: Line) -> dict[str, float]:
    """The numbers of a line by name: `reward_mean`, `clock/rollout_s`; for an evaluation `eval/pass@1/low`."""
    prefix = "eval/" if "rows" in line else ""
    flat: dict[str, Any] = {}
    for name, value in line.items():
        if isinstance(value, Mapping):
            flat |= {name if key == "value" else f"{name}/{key}": part for key, part in value.items()}
        elif name != "step":
            flat[name] = value
    return {prefix + name: float(value) for name, value in flat.items() if isinstance(value, (int, float))}


def _tensorboard(folder: Path, options: Mapping[str, Any], done: int | None) -> tuple[Log, Callable[[], None]]:
    """Event files in the run folder: `tensorboard --logdir runs`."""
    from torch.utils.tensorboard import SummaryWriter

    purged = None if done is None else done + 1  # what was written after the checkpoint is written again
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purged)

    def log(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log, writer.close


def _wandb(folder: Path, options: Mapping[str, Any], done: int | None) -> tuple[Log, Callable[[], None]]:
    import wandb

    kept = folder / "wandb-id"  # a name may be taken by an older run; the id is this one's
    if done is None or not kept.exists():
        kept.write_text(secrets.token_hex(4), encoding="utf-8")
    run = wandb.init(
        project=PROJECT, name=folder.name, id=kept.read_text(encoding="utf-8").strip(), dir=str(folder),
        config=dict(options), resume="allow", settings=wandb.Settings(console="off", silent=True),
    )  # fmt: skip
    run.define_metric("*", step_metric="step")  # wandb's own counter refuses steps that are done again
    return (lambda step, values: run.log({"step": step, **values})), run.finish


def _trackio(folder: Path, options: Mapping[str, Any], done: int | None) -> tuple[Log, Callable[[], None]]:
    import trackio

    run = trackio.init(
        project=PROJECT, name=folder.name, config=dict(options), resume="never" if done is None else "allow",
        embed=False, auto_log_cpu=False, auto_log_gpu=False,
    )  # fmt: skip
    return (lambda step, values: run.log(values, step=step)), trackio.finish


_STARTS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
