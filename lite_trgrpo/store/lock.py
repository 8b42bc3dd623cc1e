"""One run folder, one process: a lock that the system drops when its owner ends, however it ends."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from lite_trgrpo.errors import RunError


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder/.lock`; RunError at once if another process does. The file stays and blocks nothing by itself."""
    lock = _taken(folder)
    try:
        with suppress(OSError):  # a full disk
            _owner(folder).write_text(f"{os.getpid()}\n", encoding="utf-8")
        yield
    finally:
        lock.release()


def in_use(folder: Path) -> bool:
    """Whether another process works in this run folder."""
    try:
        _taken(folder).release()
    except RunError:
        return True
    return False


def _taken(folder: Path) -> FileLock:
    """The lock of a run folder, taken. Raises RunError."""
    lock = FileLock(folder / ".lock", blocking=False)
    try:
        lock.acquire()
    except Timeout:
        owner = _owner(folder)
        pid = owner.read_text(encoding="utf-8").strip() if owner.is_file() else "?"
        raise RunError(f"{folder} is in use by process {pid}: wait for it, or stop it") from None
    except OSError as error:
        raise RunError(f"cannot write into {folder}: {error.strerror}; free it, or give --output another one") from None
    except NotImplementedError:
        pass  # a file system without locks (some network folders) is no reason not to train
    return lock


def _owner(folder: Path) -> Path:
    """Holds the process number for the message: the lock file is emptied by whoever tries to take it."""
    return folder / ".pid"
