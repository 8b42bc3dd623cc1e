"""`train`: a new run, or one that continues."""

import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import typer

from lite_trgrpo.cli.app import (
    ConfigOption,
    ObjectiveOption,
    PresetOption,
    SeedOption,
    SetOption,
    app,
    command,
    patience,
)
from lite_trgrpo.training.stopping import Stop, next_time


@app.command()
@command
def train(
    preset: PresetOption = None,
    config: ConfigOption = None,
    set_: SetOption = [],  # noqa: B006 (typer copies it)
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Run folder; default: runs/NAME-TIME, NAME of the preset or config"),
    ] = None,
    objective: ObjectiveOption = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Set train.steps")] = None,
    seed: SeedOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print all options as they would be used, and stop")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in RUN, or the newest unfinished run in runs/")
    ] = False,
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="Run folder to continue; only with --resume")
    ] = None,
    max_hours: Annotated[float | None, typer.Option("--max-hours", help="Save and stop after this many hours")] = None,
    stop_at: Annotated[
        str | None, typer.Option("--stop-at", metavar="HH:MM", help="Save and stop at this time of day")
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Print one line per step instead of the live panel")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print metrics and evaluations as JSON lines")] = False,
) -> None:
    """Train a LoRA adapter, with a live panel on a terminal.

    Example: lite-trgrpo train --preset demo --output runs/demo
    Example: lite-trgrpo train --resume runs/demo
    """
    from lite_trgrpo.config import loading

    if max_hours is not None and not max_hours > 0:
        raise typer.BadParameter(f"--max-hours {max_hours:g} must be above 0")
    stop = Stop(max_hours, next_time(stop_at, datetime.now()) if stop_at is not None else None)
    named = {"train.steps": steps, "train.seed": seed}
    if resume:
        if preset or config or output or objective:
            raise typer.BadParameter("--resume takes its options from the run. Change one with --set SECTION.KEY=VALUE")
        from lite_trgrpo.store import resuming

        run = resuming.to_resume(run)
        resolved, changed = resuming.options_of(run, set_, named)
        for line in changed:
            print(f"changed: {line}", file=sys.stderr)
    else:
        if run:
            raise typer.BadParameter(f"unexpected argument '{run}'. {_meant(run)}")
        resolved = loading.load(preset, config, set_, named, objective)
    if dry_run:
        print(loading.to_toml(resolved), end="")
        return
    patience()
    from lite_trgrpo import session
    from lite_trgrpo.terminal import screen
    from lite_trgrpo.text import quoted

    name = preset or (config.stem if config else "run")
    output = output or Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    show: Literal["panel", "plain", "json"] = "json" if as_json else "plain" if plain else "panel"
    evaluations = session.train(resolved, output, run, stop, show).evaluations()
    if len(evaluations) > 1 and not as_json:
        screen.show(screen.comparison(evaluations[0], evaluations[-1]))
        folder = run or output
        adapter = quoted(folder / "adapter")
        screen.say(f"next: lite-trgrpo chat --adapter {adapter} --compare, or lite-trgrpo export {quoted(folder)}")


def _meant(stray: Path) -> str:
    """What an argument without --resume was probably meant to be."""
    if stray.suffix == ".toml":
        return f"Did you mean --config {stray}?"
    if stray.is_file():
        return f"For data type: lite-trgrpo init {stray}; for options: --config {stray}"
    return f"Did you mean --preset {stray}, or --resume {stray} to continue a run?"
