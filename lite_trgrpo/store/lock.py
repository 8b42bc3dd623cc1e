"""One run folder, one process: a lock that the system drops when its owner ends, however it ends."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lite_trgrpo.errors import RunError

TAKEN = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
BEYOND = 1 << 30  # Windows forbids others to read what is locked, so the lock lies beyond the process number


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder/.lock`; RunError at once if another process does. The file stays and blocks nothing by itself."""
    try:
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise RunError(
            f"cannot write into {folder}: {error.strerror}; mend that, or give --output another folder"
        ) from None
    try:
        try:
            _take(descriptor)
        except OSError as error:
            if error.errno in TAKEN:
                owner = os.pread(descriptor, 20, 0) if sys.platform != "win32" else os.read(descriptor, 20)
                raise RunError(
                    f"{folder} is in use by process {owner.decode(errors='replace').strip() or '?'}: wait until that "
                    "has ended, or stop it"
                ) from None
            # a file system without locks (some network folders): no reason not to train
        with suppress(OSError):  # a full disk: the number is only for the message above
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 0, os.SEEK_SET)
            os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        os.lseek(descriptor, BEYOND, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
