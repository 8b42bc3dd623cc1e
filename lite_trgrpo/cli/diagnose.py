"""`diagnose`: the gradient by token probability."""

import json
from pathlib import Path
from typing import Annotated

import typer

from lite_trgrpo.cli.app import AdapterOption, ConfigOption, JsonOption, PresetOption, SetOption, app, command


@app.command()
@command
def diagnose(
    preset: PresetOption = None,
    config: ConfigOption = None,
    adapter: AdapterOption = None,
    set_: SetOption = [],  # noqa: B006
    prompts: Annotated[int, typer.Option("--prompts", min=1, help="Number of training prompts to sample")] = 8,
    figure: Annotated[Path | None, typer.Option("--figure", help="Draw the result into this .svg or .png file")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure how much of the gradient unlikely tokens contribute, with and without token weights.

    Example: lite-trgrpo diagnose --preset demo --figure diagnosis.svg
    """
    from lite_trgrpo.config import loading

    resolved = loading.load(preset, config, set_, {"model.adapter": adapter})
    from lite_trgrpo.report import figures
    from lite_trgrpo.study.diagnose import measure_gradients
    from lite_trgrpo.terminal import screen

    if figure is not None:
        figures.check(figure)
    result = measure_gradients(resolved, prompts)
    if figure is not None:
        figures.diagnosis(result, figure)
    if as_json:
        print(json.dumps(result))
    else:
        screen.show(screen.diagnosis_table(result))
