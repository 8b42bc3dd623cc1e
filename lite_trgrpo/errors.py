"""One exception family. Every message says what, the value got, what is allowed, and what to type next.

Each child is also the standard type that a library user would expect to catch. The command line prints the
message on one line and exits with 1; nothing else formats errors.
"""


class LiteError(Exception):
    """Something known went wrong; the message tells the person what to do."""


class ConfigError(LiteError, ValueError):
    """A preset, file or override does not describe a valid run. Holds all problems, one a line."""


class DataError(LiteError, ValueError):
    """A data source is missing, empty, or has a row that cannot be used."""


class OutOfMemoryError(LiteError, MemoryError):
    """Even the smallest piece of work does not fit."""


class RewardError(LiteError, ValueError):
    """A reward function cannot be loaded, or returned something that is no reward."""


class ModelError(LiteError, RuntimeError):
    """A model cannot be loaded or does not do what the method needs."""


class PlanError(LiteError, RuntimeError):
    """The memory of a run cannot be planned for this model. No reason not to train it."""


class HubError(LiteError, ConnectionError):
    """The Hugging Face Hub is unreachable, or refuses."""


class MissingPackageError(LiteError, ImportError):
    """An optional package is needed; the message carries the pip line."""


class RunError(LiteError, RuntimeError):
    """A run folder or checkpoint cannot be written, read or continued."""


class ExportError(LiteError, RuntimeError):
    """An export cannot be made, or does not do what the run's adapter does."""


FOREIGN = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""Errors that a model's own code may raise when it is called in a way that it was not written for."""


def first_line(error: BaseException) -> str:
    """The first line of an error of another library, without the full stop."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
