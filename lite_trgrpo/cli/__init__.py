"""The command line. Commands are short; what is heavy is imported inside them, so that --help is instant."""

from lite_trgrpo.cli import work, look, give  # noqa: F401, I001 (they put their commands into the app; --help keeps the order)
from lite_trgrpo.cli.app import app


def main() -> None:
    app()
