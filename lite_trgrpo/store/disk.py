"""Write files whole: on the disk before anything relies on them."""

import os
from pathlib import Path

AFTERWARDS = "checkpoints made before are intact: fix that, then continue with `lite-trgrpo train --resume`"
"""The way out, in errors about a disk that refuses."""


def sync(path: Path) -> None:
    """Wait until a file or a folder's list of names is on the disk. Windows cannot open a folder, and need not."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Replace a file's text: after a power cut it holds the old one or the new one, never half of either."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    sync(part)
    part.replace(path)
    sync(path.parent)
