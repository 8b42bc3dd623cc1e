"""Commands for what is there already: report, export, presets."""

from typing import Annotated

import typer

from lite_trgrpo.cli.app import command, presets_app


@presets_app.command(name="list")
@command
def presets_list(
    objectives: Annotated[bool, typer.Option("--objectives", help="List the objective recipes instead")] = False,
) -> None:
    """What each preset teaches, on which card, how long; or each objective's formula and source.

    Example: lite-trgrpo presets list
    """
    from lite_trgrpo.store import listing

    for line in listing.objectives() if objectives else listing.presets():
        print(line)


@presets_app.command(name="show")
@command
def presets_show(name: Annotated[str, typer.Argument(help="A preset's or objective's name")]) -> None:
    """Print a preset's file: a start for your own (--config).

    Example: lite-trgrpo presets show demo
    """
    from lite_trgrpo.config import loading

    known = loading.objective_path(name) if name in loading.objectives() else loading.preset_path(name)
    print(known.read_text(encoding="utf-8"), end="")
