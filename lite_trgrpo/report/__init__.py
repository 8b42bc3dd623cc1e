"""`report.html`: what a run was, what it learned and how, in one file. Written from the run folder alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lite_trgrpo.errors import LiteError, RunError, first_line
from lite_trgrpo.report import page, reading
from lite_trgrpo.store.disk import write_whole
from lite_trgrpo.store.run import Run

NAME = "report.html"


def write(run: Run) -> Path:
    """Write the page of one run into its folder, as far as the run is."""
    with _whole(run.folder):
        story = reading.read(run)
        text = page.of_run(story, reading.shown(run, story))
    return _written(run.folder / NAME, text)


def compare(runs: Sequence[Run], path: Path) -> Path:
    """Write one page about all of them."""
    with _whole(path.parent):
        text = page.of_runs([reading.read(run) for run in runs])
    return _written(path, text)


@contextmanager
def _whole(folder: Path) -> Iterator[None]:
    """Raises RunError where a file is JSON, but not what a run writes."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, LiteError):
            raise
        what = f"{type(error).__name__}: {first_line(error)}"
        raise RunError(f"a log of the run in {folder} is damaged ({what}); put it back") from None


def _written(path: Path, text: str) -> Path:
    try:
        write_whole(path, text)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}. Then type lite-trgrpo report again") from None
    return path
