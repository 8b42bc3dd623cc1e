"""TODO"""

from pathlib import Path
from typing import Annotated

import typer

from lite_trgrpo.cli.app import app, command


@app.command()
@command
def export(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run", metavar="RUN")],
    merge: Annotated[bool, typer.Option("--merge", help="Merged 16-bit safetensors too")] = False,
    gguf: Annotated[bool, typer.Option("--gguf", help="A GGUF and an Ollama Modelfile too (needs llama.cpp)")] = False,
    gguf_type: Annotated[str, typer.Option("--gguf-type", help="q8_0, f16 or q4_k_m")] = "q8_0",
    push: Annotated[
        str | None, typer.Option("--push", metavar="USER/REPO", help="Put it on the Hugging Face Hub")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Of the repository on the Hub")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the files and the card, and stop")] = False,
) -> None:
    """Write RUN/export: the adapter as others load it, loaded again in a fresh process and compared.

    Example: lite-trgrpo export runs/demo --merge --push USER/REPO
    """
    from lite_trgrpo.config import loading
    from lite_trgrpo.store.run import Run

    found = Run.existing(run)
    resolved = loading.load(file=found.folder / "config.toml")
    from lite_trgrpo.export import hub
    from lite_trgrpo.export.export import Wanted
    from lite_trgrpo.terminal import screen

    wanted = Wanted(merge, gguf_type if gguf else None)
    if dry_run:
        files, text = hub.preview(found, resolved, wanted, push)
        print("\n".join([*files, "", text]), end="")
        screen.say("nothing was written or sent")
        return
    report = hub.deliver(found, resolved, wanted, push, private, screen.say)
    screen.show([screen.export_table(report)])
    if push is None:
        screen.say(f"next: lite-trgrpo export {run} --push USER/REPO --dry-run")
