"""`chat`: talk to a model."""

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


@app.command()
@command
def chat(
    preset: PresetOption = None,
    config: ConfigOption = None,
    adapter: AdapterOption = None,
    set_: SetOption = [],  # noqa: B006
    compare: Annotated[bool, typer.Option("--compare", help="Ask the base model the same questions")] = False,
) -> None:
    """Talk to a model, with or without an adapter. An empty line ends the conversation.

    If the adapter is in a run folder and you give no --preset or --config, the options of that run are used. Type
    `/gold 42` to score the last answer against the right answer 42, `/new` to start a new conversation.
    Example: lite-trgrpo chat --adapter runs/demo/adapter --compare
    """
    from lite_trgrpo.config import loading

    resolved = loading.load(preset, config or run_options(preset, adapter), set_, {"model.adapter": adapter})
    if compare and resolved.model.adapter is None:
        raise typer.BadParameter("--compare needs an adapter to compare with: add --adapter runs/NAME/adapter")
    patience()
    from lite_trgrpo.terminal.chat import converse

    converse(resolved, compare)
