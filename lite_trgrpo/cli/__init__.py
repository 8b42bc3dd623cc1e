"""The command line, one file per command. What is slow to import is imported inside them, so that --help is instant."""

# The order of these imports is the order of the commands in --help.
from lite_trgrpo.cli import demo, train, eval, chat, check, init, diagnose, compare, report, export, presets  # noqa: F401, I001
from lite_trgrpo.cli.app import app


def main() -> None:
    app()
