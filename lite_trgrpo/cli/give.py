"""Commands for what is there already: report, export, presets."""

from pathlib import Path
from typing import Annotated

import typer

from lite_trgrpo.cli.app import app, command, presets_app


@app.command()
@command
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of runs; none: list those in runs/", metavar="[RUN ...]")
    ] = [],  # noqa: B006
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file of a comparison; default comparison.html")
    ] = None,
) -> None:
    """Write RUN/report.html and print its path; of several runs a comparison; without any list what there is.

    `train` writes it too, at every checkpoint and at the end.
    Example: lite-trgrpo report runs/demo
    """
    if output is not None and len(runs) < 2:
        raise typer.BadParameter(
            "--output is for a comparison: name two runs or more; one run's report is in its folder"
        )
    if not runs:
        from lite_trgrpo import listing

        for line in listing.runs(Path("runs")):
            print(line)
        return
    from lite_trgrpo import report as reports
    from lite_trgrpo.store.run import Run

    found = [Run.existing(run) for run in runs]
    print(reports.write(found[0]) if len(found) == 1 else reports.compare(found, output or Path("comparison.html")))


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
    from lite_trgrpo import config as options
    from lite_trgrpo.store.run import Run

    found = Run.existing(run)
    resolved = options.load(file=found.folder / "config.toml")
    from lite_trgrpo import screen
    from lite_trgrpo.sharing import publish
    from lite_trgrpo.sharing.export import Wanted

    wanted = Wanted(merge, gguf_type if gguf else None)
    if dry_run:
        files, text = publish.preview(found, resolved, wanted, push)
        print("\n".join([*files, "", text]), end="")
        screen.say("nothing was written or sent")
        return
    report = publish.deliver(found, resolved, wanted, push, private, screen.say)
    screen.show([screen.export_table(report)])
    if push is None:
        screen.say(f"next: lite-trgrpo export {run} --push USER/REPO --dry-run")


@presets_app.command(name="list")
@command
def presets_list(
    objectives: Annotated[bool, typer.Option("--objectives", help="List the objective recipes instead")] = False,
) -> None:
    """What each preset teaches, on which card, how long; or each objective's formula and source.

    Example: lite-trgrpo presets list
    """
    from lite_trgrpo import listing

    for line in listing.objectives() if objectives else listing.presets():
        print(line)


@presets_app.command(name="show")
@command
def presets_show(name: Annotated[str, typer.Argument(help="A preset's or objective's name")]) -> None:
    """Print a preset's file: a start for your own (--config).

    Example: lite-trgrpo presets show demo
    """
    from lite_trgrpo import config as options

    known = options.objective_path(name) if name in options.objectives() else options.preset_path(name)
    print(known.read_text(encoding="utf-8"), end="")
