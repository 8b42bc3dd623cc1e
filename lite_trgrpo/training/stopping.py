"""When a run ends before its last step: Ctrl-C, SIGTERM, or a time that was set."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from types import FrameType
from typing import Any

from lite_trgrpo.errors import ConfigError


class Stopped(KeyboardInterrupt):
    """The run ends here, its state saved; `code` is the exit code. No `except Exception` on the way holds it up."""

    def __init__(self, reason: str, code: int) -> None:
        super().__init__(reason)
        self.code = code


class Stop:
    """Asks a run to end. Entered, it listens to signals; the first is a request, the second ends the process.

    A request is answered at once inside `interruptible`, where nothing is changed that a checkpoint would hold, and
    at the next `interruptible` or `check` everywhere else: an update is never torn.
    """

    def __init__(self, max_hours: float | None = None, stop_at: datetime | None = None) -> None:
        self.max_hours, self.stop_at = max_hours, stop_at
        self.started = time.monotonic()  # does not count the time that the machine was suspended
        self._asked: Stopped | None = None
        self._open = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():  # the only one that signals reach
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
            if sys.platform != "win32":  # a closed terminal is no reason to end
                self._before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        if self._asked is not None:
            raise KeyboardInterrupt
        self._asked = Stopped(name, 130)
        if self._open:
            self._open = False
            raise self._asked

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside, a request raises Stopped wherever the program is."""
        self._open = True
        try:
            self.check()
            yield
        finally:
            self._open = False

    def check(self) -> None:
        """Raises Stopped if a signal came or a time has passed."""
        if self._asked is not None:
            raise self._asked
        if self.max_hours is not None and time.monotonic() - self.started >= self.max_hours * 3600:
            raise Stopped(f"--max-hours {self.max_hours:g}", 0)
        if self.stop_at is not None and datetime.now() >= self.stop_at:
            raise Stopped(f"--stop-at {self.stop_at:%H:%M}", 0)


def next_time(text: str, now: datetime) -> datetime:
    """`07:00` -> when it is that time next."""
    try:
        moment = datetime.strptime(text, "%H:%M")
    except ValueError:
        raise ConfigError(f"--stop-at {text!r} is not a time of day such as 07:00 or 23:30") from None
    then = now.replace(hour=moment.hour, minute=moment.minute, second=0, microsecond=0)
    return then if then > now else then + timedelta(days=1)
