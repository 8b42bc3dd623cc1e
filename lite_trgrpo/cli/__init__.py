"""The command line, one file per command. What is slow to import is imported inside them, so that --help is instant."""

import signal

# The order of these imports is the order of the commands in --help.
from lite_trgrpo.cli import chat, check, compare, demo, diagnose, eval, export, init, presets, report, train  # noqa: F401
from lite_trgrpo.cli.app import app


def main() -> None:
    # A plain SIGTERM ends as Ctrl-C does: what was started is ended, and what is half written is removed
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app()
