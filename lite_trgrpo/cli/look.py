"""Commands that look, before and beside a run: check, diagnose, compare."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from lite_trgrpo.cli.app import AdapterOption, ConfigOption, JsonOption, PresetOption, SetOption, app, command


@app.command()
@command
def check(
    preset: PresetOption = None,
    config: ConfigOption = None,
    set_: SetOption = [],  # noqa: B006
    vram: Annotated[
        str | None, typer.Option("--vram", metavar="SIZE", help="Plan for a card of this size, e.g. 8GB")
    ] = None,
    fit: Annotated[Path | None, typer.Option("--fit", metavar="FILE", help="Write options that fit to a file")] = None,
    as_json: JsonOption = False,
) -> None:
    """Will it fit? Memory by part, before any weight is loaded; what to change if it does not. Exit code 1 if so.

    Example: lite-trgrpo check --preset math-1.5b --vram 8GB
    """
    from lite_trgrpo import config as options
    from lite_trgrpo.options import memory_bytes

    try:
        size = None if vram is None else memory_bytes(vram)
    except ValueError as error:
        raise typer.BadParameter(f"--vram {vram!r} {error}") from None
    loaded = options.load(preset, config, set_)
    from lite_trgrpo import check as checks
    from lite_trgrpo import screen

    result, fitting = checks.memory(loaded, size)
    if as_json:
        print(json.dumps(result))
    else:
        screen.show(screen.memory_tables(result))
        print(screen.memory_line(result))
    if fit is not None and fitting is not None:
        fit.write_text(options.to_toml(fitting), encoding="utf-8")
        print(f"options that fit: {fit}; train with: lite-trgrpo train --config {fit}", file=sys.stderr)
    elif not result["fits"]:
        raise typer.Exit(1)


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
