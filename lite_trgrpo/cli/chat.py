"""TODO"""

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
    compare: Annotated[bool, typer.Option("--compare", help="Ask the base too: the same question to both")] = False,
) -> None:
    """Talk to the model, with or without an adapter. An empty line ends it.

    An adapter in a run's folder brings that run's options, where no preset or config is given. `/gold 42` scores the
    last answer against that gold one, `/new` begins a new conversation.
    Example: lite-trgrpo chat --adapter runs/demo/adapter --compare
    """
    from lite_trgrpo.config import loading

    resolved = loading.load(preset, config or run_options(preset, adapter), set_, {"model.adapter": adapter})
    if compare and resolved.model.adapter is None:
        raise typer.BadParameter("--compare needs an adapter to compare with: add --adapter runs/NAME/adapter")
    patience()
    from lite_trgrpo.terminal.chat import converse

    converse(resolved, compare)
