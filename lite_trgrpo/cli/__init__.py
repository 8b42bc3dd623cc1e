"""The command line, one file per command. What is slow to import is imported inside them, so that --help is instant."""

# The order of these imports is the order of the commands in --help.
from lite_trgrpo.cli import demo, train, eval, chat, check, init, diagnose, compare, report, export, presets  # noqa: F401, I001
from lite_trgrpo.cli.app import app


def main() -> None:
    import signal

    # A plain SIGTERM ends as Ctrl-C does: what was started is ended, and what is half written is removed
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app()
