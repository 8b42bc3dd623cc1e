"""Commands that look, before and beside a run: check, init, diagnose, compare."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lite_trgrpo.cli.app import AdapterOption, ConfigOption, JsonOption, PresetOption, SetOption, app, command, patience

if TYPE_CHECKING:
    from lite_trgrpo.options import Config

VramOption = Annotated[
    str | None, typer.Option("--vram", metavar="SIZE", help="Plan for a card of this size, e.g. 8GB")
]
SECTIONS = ("machine", "memory", "rewards")  # of check, in the order they are looked at


@app.command()
@command
def check(
    sections: Annotated[
        list[str] | None, typer.Argument(metavar="SECTION", help="machine, memory, rewards; all if none is named")
    ] = None,
    preset: PresetOption = None,
    config: ConfigOption = None,
    set_: SetOption = [],  # noqa: B006
    vram: VramOption = None,
    fit: Annotated[Path | None, typer.Option("--fit", metavar="FILE", help="Write options that fit to a file")] = None,
    scan: Annotated[
        int, typer.Option("--scan", min=0, help="Measure how often the base solves so many training prompts")
    ] = 0,
    scan_file: Annotated[
        Path | None, typer.Option("--scan-file", help="Where that is kept; default beside the data")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Before a run: can it run here, will it fit, can it learn? Exit code 1 if not, with what to change.

    machine: card, versions, paths taken; all there is without a preset.
    memory: by part, before any weight is loaded.
    rewards: right answers must get full marks, junk less; then a few answers of the base.
    Example: lite-trgrpo check
    Example: lite-trgrpo check --preset math-1.5b --vram 8GB
    Example: lite-trgrpo check rewards --preset demo --scan 500
    """
    from lite_trgrpo import config as options

    size = _bytes(vram)
    if unknown := set(sections or ()) - set(SECTIONS):
        raise typer.BadParameter(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    only = ("memory",) if vram is not None or fit is not None else ("rewards",) if scan else SECTIONS
    nothing = not (preset or config or set_ or sections)
    loaded = None if nothing and only == SECTIONS else options.load(preset, config, set_)
    patience()
    results: dict[str, Any] = {}
    fine = True
    for section in sections or only:
        if not fine:
            print(f"{section} was not looked at, for what is wrong already", file=sys.stderr)
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


def _bytes(vram: str | None) -> int | None:
    from lite_trgrpo.options import memory_bytes

    try:
        return None if vram is None else memory_bytes(vram)
    except ValueError as error:
        raise typer.BadParameter(f"--vram {vram!r} {error}") from None


def _check_machine(loaded: "Config | None", quiet: bool) -> tuple[dict[str, Any], bool]:
    """-> what there is, and whether the options can run on it."""
    from lite_trgrpo import screen
    from lite_trgrpo.machine import machine

    result = machine(loaded)
    if not quiet:
        screen.show(screen.machine_tables(result))
    return result, result["able"]


def _check_memory(loaded: "Config", size: int | None, fit: Path | None, quiet: bool) -> tuple[dict[str, Any], bool]:
    """-> the plan, and whether it fits or options that do were written."""
    from lite_trgrpo import check as checks
    from lite_trgrpo import config as options
    from lite_trgrpo import screen

    result, fitting = checks.memory(loaded, size)
    result["past"] = checks.past(loaded, Path("runs")) if size is None else None
    if not quiet:
        screen.show(screen.memory_tables(result))
        print(screen.memory_line(result))
        if result["past"]:
            print(screen.past_line(result["past"]))
    if fit is not None and fitting is not None:
        fit.write_text(options.to_toml(fitting), encoding="utf-8")
        print(f"options that fit: {fit}; train with: lite-trgrpo train --config {fit}", file=sys.stderr)
    return result, result["fits"] or (fit is not None and fitting is not None)


def _check_rewards(loaded: "Config", scan: int, file: Path | None, quiet: bool) -> tuple[dict[str, Any], bool]:
    """-> what was found, and whether training can work."""
    from lite_trgrpo import screen
    from lite_trgrpo.preflight import survey, told

    result = survey.look(loaded, scan, file)
    if not quiet:
        print(screen.plain("\n".join(told.lines(result))))
    return result, result["works"]


@app.command()
@command
def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Your data: .jsonl, .csv or .parquet")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The config to write; default NAME.toml for NAME.jsonl")
    ] = None,
    vram: VramOption = None,
) -> None:
    """Look at a data file, guess columns and reward, choose a base for this machine, and write a config for it.

    Example: lite-trgrpo init examples/own_data.jsonl
    """
    output = output or Path(f"{file.stem}.toml")
    if output.exists():
        raise typer.BadParameter(f"{output} is there already; move it away, or give another --output")
    size = _bytes(vram)
    from lite_trgrpo import screen
    from lite_trgrpo.preflight import proposal

    proposed = proposal.propose(str(file), size)
    proposal.validated(proposed)
    try:
        output.write_text(proposal.written(proposed, str(file)), encoding="utf-8")
    except OSError as error:
        raise typer.BadParameter(f"cannot write {output}: {error.strerror}") from None
    screen.say(f"{output}: {proposed.summary}")
    screen.say(f"next:\n  lite-trgrpo check --config {output}\n  lite-trgrpo train --config {output}")


@app.command()
@command
def diagnose(
    preset: PresetOption = None,
    config: ConfigOption = None,
    adapter: AdapterOption = None,
    set_: SetOption = [],  # noqa: B006
    prompts: Annotated[int, typer.Option("--prompts", min=1, help="Training prompts to sample groups for")] = 8,
    figure: Annotated[Path | None, typer.Option("--figure", help="Draw it into this .svg or .png file")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure on your model whether unlikely tokens dominate the gradient, and what the weights change.

    Example: lite-trgrpo diagnose --preset demo --figure diagnosis.svg
    """
    from lite_trgrpo import config as options

    resolved = options.load(preset, config, set_, {"model.adapter": adapter})
    from lite_trgrpo import figures, screen, session

    if figure is not None:
        figures.check(figure)
    result = session.diagnose(resolved, prompts)
    if figure is not None:
        figures.diagnosis(result, figure)
    if as_json:
        print(json.dumps(result))
    else:
        screen.show(screen.diagnosis_table(result))


@app.command()
@command
def compare(
    objectives: Annotated[str, typer.Option("--objectives", help="Objective recipes, separated by commas")],
    preset: PresetOption = None,
    config: ConfigOption = None,
    set_: SetOption = [],  # noqa: B006
    seeds: Annotated[str, typer.Option("--seeds", help="Values of train.seed, separated by commas")] = "0,1,2",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the arms, table and figure")] = Path(
        "runs/compare"
    ),
) -> None:
    """Train the same run under several objectives: same prompts, same initial weights, same seeds.

    Stopped and called again it goes on where it was.
    Example: lite-trgrpo compare --preset demo --objectives grpo,constant,tr-grpo,reverse
    """
    from lite_trgrpo import config as options

    if not all(seed.strip().isdigit() for seed in seeds.split(",")):
        raise typer.BadParameter(f"--seeds {seeds!r} is not a list of numbers such as 0,1,2")
    # arms that replace or choose prompts would not see the same ones; one at half the learning rate would be another
    same = {"rollout.top_up_rounds": 0, "train.prefer_half": False, "guards.rollbacks": 0}
    arms = {
        (name, int(seed)): options.load(preset, config, set_, {**same, "train.seed": int(seed)}, name)
        for seed in seeds.split(",")
        for name in (objective.strip() for objective in objectives.split(","))
    }
    from lite_trgrpo import compare as comparing
    from lite_trgrpo import figures, screen

    picture = output / "compare.svg"
    figures.check(picture)
    result = comparing.run_arms(arms, output)
    (output / "compare.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    screen.show([screen.comparison_table(result["objectives"])])
    figures.comparison(result["curves"], picture)
