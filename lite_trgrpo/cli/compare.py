"""`compare`: several objectives on the same prompts, weights and seeds."""

import json
from pathlib import Path
from typing import Annotated

import typer

from lite_trgrpo.cli.app import ConfigOption, PresetOption, SetOption, app, command
from lite_trgrpo.text import quoted
from lite_trgrpo.training.stopping import Stopped


@app.command()
@command
def compare(
    objectives: Annotated[
        str, typer.Option("--objectives", help="Objectives, comma-separated (`lite-trgrpo presets list --objectives`)")
    ],
    preset: PresetOption = None,
    config: ConfigOption = None,
    set_: SetOption = [],  # noqa: B006
    seeds: Annotated[str, typer.Option("--seeds", help="Seeds, comma-separated")] = "0,1,2",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the runs, the table and the figure")
    ] = Path("runs/compare"),
) -> None:
    """Train with several objectives from the same prompts, initial weights and seeds, and compare.

    Run the same command again to continue after an interruption.
    Example: lite-trgrpo compare --preset demo --objectives grpo,constant,tr-grpo,reverse
    """
    from lite_trgrpo.config import loading

    if not all(seed.strip().isdigit() for seed in seeds.split(",")):
        raise typer.BadParameter(f"--seeds {seeds!r} is not a list of numbers such as 0,1,2")
    # arms that replace prompts would not see the same ones; one at half the learning rate would be another
    same = {"rollout.top_up_rounds": 0, "guards.rollbacks": 0}
    arms = {
        (name, int(seed)): loading.load(preset, config, set_, {**same, "train.seed": int(seed)}, name)
        for seed in seeds.split(",")
        for name in (objective.strip() for objective in objectives.split(","))
    }
    from lite_trgrpo.report import figures
    from lite_trgrpo.study import compare as comparing
    from lite_trgrpo.terminal import screen

    picture = output / "compare.svg"
    figures.check(picture)
    try:
        result = comparing.run_arms(arms, output)
    except Stopped as stopped:
        if stopped.code == 1:  # a guard: the same command would end in the same way
            raise
        raise Stopped(
            f"the comparison in {output} is interrupted, everything saved. Continue with the same command: "
            f"lite-trgrpo compare --objectives {quoted(objectives)} ... --output {quoted(output)}",
            stopped.code,
        ) from None
    (output / "compare.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    screen.show([screen.comparison_table(result["objectives"])])
    figures.comparison(result["curves"], picture)
