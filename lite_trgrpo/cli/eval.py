"""`eval`: held-out scores."""

import json
from typing import Annotated

import typer

from lite_trgrpo.cli.app import (
    AdapterOption,
    ConfigOption,
    PresetOption,
    SetOption,
    app,
    command,
    patience,
    run_options,
)


@app.command(name="eval")
@command
def evaluate(
    preset: PresetOption = None,
    config: ConfigOption = None,
    adapter: AdapterOption = None,
    set_: SetOption = [],  # noqa: B006
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the scores and every row with its answer as JSON")
    ] = False,
) -> None:
    """Score an adapter, or the base model, on held-out rows.

    If the adapter is in a run folder and you give no --preset or --config, the options of that run are used.
    Example: lite-trgrpo eval --adapter runs/demo/adapter
    """
    from lite_trgrpo.config import loading

    resolved = loading.load(preset, config or run_options(preset, adapter), set_, {"model.adapter": adapter})
    patience()
    from lite_trgrpo import session

    result = session.evaluate(resolved)
    if as_json:
        print(json.dumps(result, default=str))
        return
    from lite_trgrpo.terminal.screen import score_table, show

    show([score_table(result, resolved.model.adapter or f"{resolved.model.name}, no adapter")])
