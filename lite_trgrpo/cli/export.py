"""`export`: the adapter in the forms that others load."""

from pathlib import Path
from typing import Annotated

import typer

from lite_trgrpo.cli.app import app, command


@app.command()
@command
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run", metavar="RUN")],
    merge: Annotated[bool, typer.Option("--merge", help="Also write merged 16-bit weights")] = False,
    gguf: Annotated[
        bool, typer.Option("--gguf", help="Also write a GGUF and an Ollama Modelfile (needs llama.cpp)")
    ] = False,
    gguf_type: Annotated[str, typer.Option("--gguf-type", help="GGUF type: q8_0, f16 or q4_k_m")] = "q8_0",
    push: Annotated[
        str | None, typer.Option("--push", metavar="USER/REPO", help="Upload to this Hugging Face Hub repository")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create the Hub repository as private")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the files and the model card, and stop")] = False,
) -> None:
    """Export the adapter of a run to RUN/export. Each form is reloaded and compared with the trained model.

    Example: lite-trgrpo export runs/demo --merge --push USER/REPO
    """
    from lite_trgrpo.config import loading
    from lite_trgrpo.store.run import Run

    found = Run.existing(run)
    resolved = loading.load(file=found.folder / "config.toml")
    from lite_trgrpo.export import hub
    from lite_trgrpo.export.export import Wanted
    from lite_trgrpo.terminal import screen
    from lite_trgrpo.text import quoted

    wanted = Wanted(merge, gguf_type if gguf else None)
    if dry_run:
        files, text = hub.preview(found, resolved, wanted, push)
        print("\n".join([*files, "", text]), end="")
        screen.say("Nothing was written or sent")
        return
    report = hub.deliver(found, resolved, wanted, push, private, screen.say)
    screen.show([screen.export_table(report)])
    if push is None:
        screen.say(f"next: lite-trgrpo export {quoted(run)} --push USER/REPO --dry-run")
