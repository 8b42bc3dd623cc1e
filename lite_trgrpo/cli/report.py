"""`report`: the HTML report of a run, or a comparison."""

from pathlib import Path
from typing import Annotated

import typer

from lite_trgrpo.cli.app import app, command


@app.command()
@command
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Run folders; none: list the runs in runs/", metavar="[RUN]...")
    ] = [],  # noqa: B006
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File for a comparison of two or more runs; default: comparison.html"),
    ] = None,
) -> None:
    """Write an HTML report of a run, or a comparison of two or more. Without RUN, list the runs in runs/.

    `train` also writes RUN/report.html at every checkpoint and at the end.
    Example: lite-trgrpo report runs/demo
    Example: lite-trgrpo report runs/a runs/b -o both.html
    """
    if output is not None and len(runs) < 2:
        raise typer.BadParameter("--output needs two runs or more; the report of one run is in its folder")
    if not runs:
        from lite_trgrpo.store import listing

        for line in listing.runs(Path("runs")):
            print(line)
        return
    from lite_trgrpo import report as reports
    from lite_trgrpo.store.run import Run

    found = [Run.existing(run) for run in runs]
    print(reports.write(found[0]) if len(found) == 1 else reports.compare(found, output or Path("comparison.html")))
