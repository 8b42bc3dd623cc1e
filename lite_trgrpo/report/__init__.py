"""`report.html`: what a run was, what it learned and how, in one file. Written from the run folder alone."""

from collections.abc import Sequence
from pathlib import Path

from lite_trgrpo.errors import RunError
from lite_trgrpo.report import page, reading
from lite_trgrpo.store.disk import write_whole
from lite_trgrpo.store.run import Run

NAME = "report.html"


def write(run: Run) -> Path:
    """Write the page of one run into its folder, as far as the run is."""
    story = reading.read(run)
    return _written(run.folder / NAME, page.of_run(story, reading.shown(run, story)))


def compare(runs: Sequence[Run], path: Path) -> Path:
    """Write one page about all of them."""
    return _written(path, page.of_runs([reading.read(run) for run in runs]))


def _written(path: Path, text: str) -> Path:
    try:
        write_whole(path, text)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}. Then type lite-trgrpo report again") from None
    return path
