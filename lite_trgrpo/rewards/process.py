"""A process that answers lines with lines, or is killed: nothing of a person's functions runs in ours."""

import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress

from lite_trgrpo.rewards.worker import OUT_OF_MEMORY, kill_descendants

# The worker finds the modules that this process finds. `-m` would look into the current folder first, and `PYTHONPATH`
# would reach the programs that a reward function starts.
_COMMAND = "import sys; sys.path[:] = sys.argv[1:]; from lite_trgrpo.rewards.worker import main; main()"

_NEW_GROUP = 0
if sys.platform == "win32":
    _NEW_GROUP = subprocess.CREATE_NEW_PROCESS_GROUP

# Variables that Python, its libraries and the system need to work: where things lie, language, threads. Proxies are not
# among them, since their URLs may hold passwords.
_PASSED = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|TERM|TZ|LANG|LANGUAGE|LC_\w+|TMPDIR|TEMP|TMP|XDG_\w+_HOME|LITE_TRGRPO_CACHE"
    r"|VIRTUAL_ENV|CONDA_PREFIX|LD_LIBRARY_PATH|DYLD_\w+|SSL_CERT_(FILE|DIR)|CUDA_(HOME|PATH)|MPLCONFIGDIR|NLTK_DATA"
    r"|(OMP|MKL|OPENBLAS|NUMEXPR)_NUM_THREADS|TOKENIZERS_PARALLELISM"
    r"|HF_(HOME|HUB_CACHE|HUB_OFFLINE|DATASETS_CACHE|DATASETS_OFFLINE)|TRANSFORMERS_OFFLINE"
    r"|SYSTEMROOT|SYSTEMDRIVE|WINDIR|COMSPEC|PATHEXT|APPDATA|LOCALAPPDATA|PROGRAMDATA|PROGRAMFILES\S*|USERPROFILE"
    r"|NUMBER_OF_PROCESSORS|PROCESSOR_\w+",
    re.IGNORECASE,
)


def environment(ours: Mapping[str, str], passed: Sequence[str] = ()) -> dict[str, str]:
    """The worker's environment variables: those of ours in a list of harmless ones, and those that the person names in
    `rewards.pass_env`; no card is to be seen.
    """
    kept = {name: value for name, value in ours.items() if _PASSED.fullmatch(name) or name in passed}
    # Sets of text keep their order from one worker to the next, so that the same answer gets the same reward
    return kept | {"CUDA_VISIBLE_DEVICES": "", "PYTHONHASHSEED": "0"}


class DiedError(Exception):
    """The worker was killed at its deadline, or ended by itself; `kind` is timeout or crash."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


class Process:
    """One worker: lines are sent, a reply is received for each. After a DiedError it is of no further use.

    Raises OSError when the system starts no more processes.
    """

    def __init__(self, passed: Sequence[str] = ()) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(os.environ, passed),
            # A Ctrl-C in the terminal is for us, and what a reward function starts can be killed together with it
            start_new_session=True,
            creationflags=_NEW_GROUP,
        )
        # Windows cannot wait for a pipe with a deadline, and a pipe that is full blocks its writer: so two threads
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._replies: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        for pump in (self._write, self._read):
            threading.Thread(target=pump, daemon=True).start()

    def send(self, line: bytes) -> None:
        """Never waits; lines sent while the worker is busy keep it busy."""
        self._requests.put(line)

    def receive(self, seconds: float) -> bytes:
        """The reply to the first line that has none yet; raises DiedError if it does not come within that time."""
        try:
            reply = self._replies.get(timeout=seconds)
        except queue.Empty:
            self.kill()
            raise DiedError("timeout", f"gave no answer within {seconds:g} s") from None
        if not reply.endswith(b"\n"):
            raise DiedError("crash", _how_it_ended(self.kill()))
        return reply

    def kill(self) -> int:
        """End it and whatever it started; -> its exit status, negative for a signal."""
        if self._process.returncode is None:
            kill_descendants(self._process.pid)
            with suppress(ProcessLookupError, PermissionError):  # it has gone already; macOS says it the second way
                if sys.platform == "win32":
                    self._process.kill()
                else:
                    os.killpg(self._process.pid, signal.SIGKILL)
        self._requests.put(None)
        return self._process.wait()

    def _write(self) -> None:
        assert self._process.stdin
        with suppress(OSError), self._process.stdin as pipe:
            for line in iter(self._requests.get, None):
                pipe.write(line)
                pipe.flush()

    def _read(self) -> None:
        assert self._process.stdout
        with self._process.stdout as pipe:
            for line in pipe:
                self._replies.put(line)
        self._replies.put(b"")


def _how_it_ended(status: int) -> str:
    if status == OUT_OF_MEMORY:
        return "needed more memory than rewards.memory allows"
    if status >= 0:
        return f"ended its process (exit code {status})"
    try:
        return f"ended its process ({signal.Signals(-status).name})"
    except ValueError:
        return f"ended its process (signal {-status})"
