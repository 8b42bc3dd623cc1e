"""`init`: a config for a data file."""

from pathlib import Path
from typing import Annotated

import typer

from lite_trgrpo.cli.app import VramOption, app, command, size_in_bytes


@app.command()
@command
def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Data file: .jsonl, .csv or .parquet")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Config file to write; default: NAME.toml for NAME.jsonl")
    ] = None,
    vram: VramOption = None,
) -> None:
    """Write a config for a data file: find its columns, choose a reward and a base model for this machine.

    Example: lite-trgrpo init examples/own_data.jsonl
    """
    output = output or Path(f"{file.stem}.toml")
    if output.exists():
        raise typer.BadParameter(f"{output} already exists. Type --output with another name")
    size = size_in_bytes(vram)
    from lite_trgrpo.check import proposal
    from lite_trgrpo.terminal import screen

    proposed = proposal.propose(str(file), size)
    proposal.validated(proposed)
    try:
        output.write_text(proposal.written(proposed, str(file)), encoding="utf-8")
    except OSError as error:
        raise typer.BadParameter(f"cannot write {output}: {error.strerror}") from None
    screen.say(f"{output}: {proposed.summary}")
    screen.say(f"next:\n  lite-trgrpo check --config {output}\n  lite-trgrpo train --config {output}")
