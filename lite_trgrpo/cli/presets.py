"""`presets`: list and print presets and objectives."""

from typing import Annotated

import typer

from lite_trgrpo.cli.app import command, presets_app


@presets_app.command(name="list")
@command
def presets_list(
    objectives: Annotated[bool, typer.Option("--objectives", help="List objectives instead")] = False,
) -> None:
    """List presets with task, base model, GPU and time, or objectives with formula and source.

    Example: lite-trgrpo presets list
    """
    from lite_trgrpo.store import listing

    for line in listing.objectives() if objectives else listing.presets():
        print(line)


@presets_app.command(name="show")
@command
def presets_show(name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a preset or an objective")]) -> None:
    """Print a preset or objective as TOML, as a start for your own config.

    Example: lite-trgrpo presets show demo
    """
    from lite_trgrpo.config import loading

    known = loading.objective_path(name) if name in loading.objectives() else loading.preset_path(name)
    print(known.read_text(encoding="utf-8"), end="")
