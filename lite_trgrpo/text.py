"""Untrusted text (of models, data and files) made safe to show; the SHA-256 by which a file is known again."""

import hashlib
import re
from pathlib import Path


def plain(text: str) -> str:
    """Text with every unprintable character as its escape: control characters, terminal sequences, bidi marks,
    lone surrogates. Line breaks stay.
    """
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def quoted(path: Path | str) -> str:
    """A path as a word of a command line, in double quotes where it needs any: in cmd.exe too."""
    return str(path) if re.fullmatch(r"[\w./\\:@%+=,~-]+", str(path)) else f'"{path}"'


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
