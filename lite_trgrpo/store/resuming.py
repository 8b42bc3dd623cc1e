"""Finding the run that is to go on, and whether what it finds today is what it was started with."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lite_trgrpo.config.loading import MAY_CHANGE, load
from lite_trgrpo.config.schema import Config
from lite_trgrpo.errors import ConfigError, RunError
from lite_trgrpo.store import checkpoint
from lite_trgrpo.store.lock import in_use
from lite_trgrpo.store.run import Run, run_folders

logger = logging.getLogger(__name__)

ROUNDING = ("revision", "device", "processor", "dtype", "backend", "versions")


def to_resume(run: Path | None) -> Path:
    """The folder of this run, or of the newest unfinished one in `runs`."""
    if run is None:
        run = newest_unfinished(Path("runs"))
        logger.info(f"Continuing {run}")
    return Run.existing(run).folder


def newest_unfinished(folder: Path) -> Path:
    """The run that was written last among those below `folder` that are neither complete nor in use."""
    runs = run_folders(folder)
    written = {run: max(path.stat().st_mtime for path in run.iterdir()) for run in runs}
    for run in sorted(runs, key=lambda run: written[run], reverse=True):
        found = checkpoint.newest(run / "checkpoints")
        if (found is None or not checkpoint.is_complete(found)) and not in_use(run):
            return run
    raise RunError(
        f"no unfinished run in {folder.absolute()}; continue a finished one with --resume RUN and a larger --steps"
    )


def options_of(folder: Path, overrides: Sequence[str], named: Mapping[str, Any]) -> tuple[Config, list[str]]:
    """The options of the run in `folder` with what is given over them -> options, and what changed, for the person."""
    file = folder / "config.toml"
    before, after = load(file=file), load(None, file, overrides, named)
    was, now = before.model_dump(), after.model_dump()
    changed = {
        f"{section}.{key}": f"{section}.{key}: {old!r} -> {now[section][key]!r}"
        for section, values in was.items()
        for key, old in values.items()
        if old != now[section][key]
    }
    if refused := [line for name, line in changed.items() if name not in MAY_CHANGE]:
        raise ConfigError(
            f"{'; '.join(refused)}: this cannot change in a resumed run. {_from_its_adapter(Run(folder))}. "
            f"What may change: {', '.join(sorted(MAY_CHANGE))}"
        )
    return after, list(changed.values())


def _from_its_adapter(run: Run) -> str:
    """How to start another run from what this one has learned. A killed run has checkpoints, but no adapter yet."""
    found = checkpoint.newest(run.checkpoints)
    if found is None and not run.adapter.exists():
        return "It has no checkpoint yet, so start again with another --output"
    start = f'start a new one from its adapter with --set "model.adapter={run.adapter}"'
    if run.adapter.exists() or found is None:
        return start[0].upper() + start[1:]
    done = checkpoint.steps_done(found)
    return f'Write its adapter with `lite-trgrpo train --resume "{run.folder}" --steps {done}`, then {start}'


def checkpoint_of(run: Run, steps: int) -> tuple[Path | None, int]:
    """The checkpoint from which a run continues, and the steps done; None and 0 if it ended before its first one.

    A complete run is refused.
    """
    for path in checkpoint.torn(run.checkpoints):
        logger.info(f"{path} is damaged and was skipped")
    found = checkpoint.newest(run.checkpoints)
    if found is None and any(run.checkpoints.glob("step-*")):
        raise RunError(f"{run.folder} has no whole checkpoint to continue from; start again with another --output")
    done = 0 if found is None else checkpoint.steps_done(found)
    if found is not None and (done > steps or (done == steps and checkpoint.is_complete(found))):
        raise RunError(f"{run.folder} has done {done} of {steps} steps. Type --steps with a larger number")
    logger.info(f"Continuing after step {done} of {steps}")
    return found, done


def cut_back(run: Run, found: Path | None) -> None:
    """Set the logs back to the checkpoint `found`, or to nothing: what a killed run wrote after it goes."""
    state = {"logs": {}} if found is None else checkpoint.state_of(found)
    run.cut_back(state["logs"], state.get("logs_sha256"))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What bears on the last bits of a result and is not as in `before` (run.json), one line each."""
    return [
        f"{key} was {before[key]}, now it is {now[key]}" for key in ROUNDING if before.get(key, now[key]) != now[key]
    ]


def changed_files(before: Mapping[str, Any], now: Mapping[str, Any], kind: str) -> str:
    """Names of the files of this kind that are not those of run.json any more, with both digests; empty: none."""
    was, found = before.get("files", now["files"])[kind], now["files"][kind]
    return ", ".join(
        f"{name} (SHA-256 {was.get(name, 'none'):.8} then, {found.get(name, 'none'):.8} now)"
        for name in sorted(was.keys() | found.keys())
        if was.get(name) != found.get(name)
    )


def compare_facts(run: Run, facts: Mapping[str, Any]) -> None:
    """A resumed run needs the same rows and base weights. Changed rewards are a warning, as they may be a correction;
    other versions or another machine only cost the last bits.
    """
    before = run.facts()
    if not before:
        logger.warning(
            f"{run.folder / 'run.json'} is missing or damaged, so nothing says whether data and base are those of "
            "the start"
        )
    if changed := changed_files(before, facts, "base"):
        raise RunError(
            f"the files of the base have changed since {run.folder} was started: {changed}. Put them back, or start "
            "again with another --output"
        )
    if before.get("prompts", facts["prompts"]) != facts["prompts"]:
        raise RunError(
            f"the data have changed since {run.folder} was started ({before['prompts']} then, "
            f"{facts['prompts']} now): put the data back, or start again with another --output"
        )
    for kind in ("rewards", "adapter"):
        if changed := changed_files(before, facts, kind):
            logger.warning(f"{kind}: changed since {run.folder} was started, and used as they are now: {changed}")
    for line in differences(before, facts):
        logger.warning(f"{line}: the run continues, but not bit for bit")
