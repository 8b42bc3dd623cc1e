"""`check`: machine, memory and rewards before a run."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lite_trgrpo.cli.app import (
    ConfigOption,
    JsonOption,
    PresetOption,
    SetOption,
    VramOption,
    app,
    command,
    patience,
    size_in_bytes,
)

if TYPE_CHECKING:
    from lite_trgrpo.config.schema import Config


SECTIONS = ("machine", "memory", "rewards")  # of check, in the order they are looked at


@app.command()
@command
def check(
    sections: Annotated[
        list[str] | None, typer.Argument(metavar="SECTION", help="machine, memory or rewards; default: all of them")
    ] = None,
    preset: PresetOption = None,
    config: ConfigOption = None,
    set_: SetOption = [],  # noqa: B006
    vram: VramOption = None,
    fit: Annotated[
        Path | None, typer.Option("--fit", metavar="FILE", help="Write options that fit in memory to FILE")
    ] = None,
    scan: Annotated[
        int,
        typer.Option(
            "--scan", min=0, metavar="N", help="Measure how often the base model solves each of N prompts (0: off)"
        ),
    ] = 0,
    scan_file: Annotated[
        Path | None, typer.Option("--scan-file", help="File for the result; default: beside the data")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check a run before it starts: can it run here, does it fit, can it learn? Exit code 1 if not.

    machine: GPU, package versions and accelerated code. Needs no preset.
    memory: what each part will take. No weights are loaded.
    rewards: scores right answers and junk, then samples a few answers from the base model.
    With --vram or --fit only memory is checked, with --scan only rewards, unless you name sections.
    Example: lite-trgrpo check
    Example: lite-trgrpo check --preset math-1.5b --vram 8GB
    Example: lite-trgrpo check rewards --preset demo --scan 500
    """
    from lite_trgrpo.config import loading

    size = size_in_bytes(vram)
    if unknown := set(sections or ()) - set(SECTIONS):
        raise typer.BadParameter(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    only = ("memory",) if vram is not None or fit is not None else ("rewards",) if scan else SECTIONS
    nothing = not (preset or config or set_ or sections)
    loaded = None if nothing and only == SECTIONS else loading.load(preset, config, set_)
    patience()
    results: dict[str, Any] = {}
    fine = True
    for section in sections or only:
        if not fine:
            print(f"Skipped the {section} check: fix the problem above first", file=sys.stderr)
        elif section == "machine":
            results[section], fine = _check_machine(loaded, as_json)
        elif loaded is None:
            break
        elif section == "memory":
            results[section], fine = _check_memory(loaded, size, fit, as_json)
        else:
            results[section], fine = _check_rewards(loaded, scan, scan_file, as_json)
    if as_json:
        print(json.dumps(results))
    if not fine:
        raise typer.Exit(1)


def _check_machine(loaded: "Config | None", quiet: bool) -> tuple[dict[str, Any], bool]:
    """-> what there is, and whether the options can run on it."""
    from lite_trgrpo.check.machine import machine
    from lite_trgrpo.terminal import screen

    result = machine(loaded)
    if not quiet:
        screen.show(screen.machine_tables(result))
    return result, result["able"]


def _check_memory(loaded: "Config", size: int | None, fit: Path | None, quiet: bool) -> tuple[dict[str, Any], bool]:
    """-> the plan, and whether it fits or options that do were written."""
    from lite_trgrpo.check import memory
    from lite_trgrpo.config import loading
    from lite_trgrpo.errors import PlanError
    from lite_trgrpo.terminal import screen

    try:
        result, fitting = memory.check_memory(loaded, size)
    except PlanError as error:  # says nothing about whether it fits: no reason to stop
        print(f"memory: {error}", file=sys.stderr)
        return {"unplanned": str(error)}, True
    result["past"] = memory.past(loaded, Path("runs")) if size is None else None
    if not quiet:
        screen.show(screen.memory_tables(result))
        print(screen.memory_line(result))
        if result["past"]:
            print(screen.past_line(result["past"]))
    if fit is not None and fitting is not None:
        try:
            fit.write_text(loading.to_toml(fitting), encoding="utf-8")
        except OSError as error:
            raise typer.BadParameter(f"cannot write --fit {fit}: {error.strerror}") from None
        print(f"options that fit: {fit}; train with: lite-trgrpo train --config {fit}", file=sys.stderr)
    return result, result["fits"] or (fit is not None and fitting is not None)


def _check_rewards(loaded: "Config", scan: int, file: Path | None, quiet: bool) -> tuple[dict[str, Any], bool]:
    """-> what was found, and whether training can work."""
    from lite_trgrpo.check import learnable
    from lite_trgrpo.text import plain

    result = learnable.check_learnable(loaded, scan, file)
    if not quiet:
        print(plain("\n".join(learnable.report_lines(result))))
    return result, result["works"]
