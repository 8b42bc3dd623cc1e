"""The process in which reward functions run. It reads a line, calls one function, writes a line, and so on.

The first line holds what `load` and the limits need, each of the others a function's number and a group:

    {"functions", "options", "truncated_max_zero", "memory"}
                                                     -> {"memory_limited": bool} or {"refused": [class, message]}
    {"reward": number, "group": ..., "seconds": ..., "call": number}
                                                     -> {"values": [number or null], "call"}, or "raised" or "refused"

It ends with its parent, whose pipe then closes, and with all that its functions started.
"""

import faulthandler
import math
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, BinaryIO

import psutil

from lite_trgrpo.errors import LiteError
from lite_trgrpo.records import Completion, Example, Group, Prompt
from lite_trgrpo.rewards import serialization
from lite_trgrpo.rewards.loading import Reward, load
from lite_trgrpo.rewards.scoring import FunctionRaisedError, values

OUT_OF_MEMORY = 77  # exit status
PR_SET_CHILD_SUBREAPER = 36  # of prctl
GRACE = 5.0  # seconds beyond a deadline after which a worker whose parent does not kill it ends itself


def main() -> None:
    """Answer lines until the pipe closes."""
    requests, replies, me = *_take_pipes(), os.getpid()
    _adopt_orphans()
    threading.Thread(target=_end_with_parent, args=(requests,), daemon=True).start()
    rewards: list[Reward] = []
    try:
        for line in requests:
            message = serialization.loads(line)
            reply = _call(message, rewards) if "reward" in message else _load(message, rewards)
            if os.getpid() != me:  # a function forked, and its child came back here: the reply is the parent's to give
                os._exit(0)
            replies.write(serialization.dumps({**reply, "call": message.get("call")}))
            replies.flush()
    except MemoryError:  # whatever took it may still hold it: only a new process is as good as new
        os._exit(OUT_OF_MEMORY)
    _end()


def group_message(group: Group, members: Sequence[int]) -> dict[str, Any]:
    """The part of these group members that a reward function can see. Raises TypeError for a column of an odd type."""
    chosen = [group.completions[i] for i in members]
    return {
        "origin": group.example.origin,
        "prompt": group.example.prompt,
        "columns": serialization.pack(dict(group.example.columns)),
        "prefix": group.prompt.prefix,
        "texts": [completion.text for completion in chosen],
        "ids": [completion.ids for completion in chosen],
        "stopped": [completion.stopped for completion in chosen],
    }


def _group(message: Mapping[str, Any]) -> Group:
    parts = zip(message["ids"], message["texts"], message["stopped"], strict=True)
    return Group(
        Example(message["prompt"], serialization.unpack(message["columns"]), message["origin"]),
        Prompt((), "", message["prefix"]),
        [Completion(tuple(ids), (), (), text, stopped) for ids, text, stopped in parts],
    )


def _load(message: Mapping[str, Any], rewards: list[Reward]) -> dict[str, Any]:
    limited = _limit_memory(message["memory"])
    try:
        rewards += load(message["functions"], serialization.unpack(message["options"]), message["truncated_max_zero"])
    except LiteError as error:
        return _refusal(error)
    return {"memory_limited": limited}


def _call(message: Mapping[str, Any], rewards: Sequence[Reward]) -> dict[str, Any]:
    reward, group = rewards[message["reward"]], _group(message["group"])
    _end_after(message["seconds"] + GRACE)
    try:
        return {"values": [None if math.isnan(value) else value for value in values(reward, [group])]}
    except MemoryError:
        raise
    except FunctionRaisedError as error:
        if isinstance(error.__cause__, MemoryError):
            raise MemoryError from None
        return {"raised": _described(error.__cause__ or error)}
    except LiteError as error:
        return _refusal(error)
    except BaseException as error:  # SystemExit and whatever else a function may think of
        return {"raised": _described(error)}
    finally:
        _end_after(None)


def _refusal(error: LiteError) -> dict[str, Any]:
    return {"refused": [type(error).__name__, str(error)]}


def _described(error: BaseException) -> str:
    """`KeyError: 'x' (own.py line 3)`, on one line and without terminal escapes: model text may stand in it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)} line {frames[-1].lineno})" if frames else ""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:500]) + place


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """The pipes to the parent, out of reach of `print` and `input`, which from now on lead nowhere."""
    pipes = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)
    return pipes


def _end_with_parent(requests: BinaryIO) -> None:
    """Read the pipe in a thread of its own, so that its end is seen while a function runs.

    It waits for the end of the pipe and reads nothing, so the thread that runs the functions never waits for it.
    Windows has no such wait; there the deadline is the end.
    """
    if sys.platform != "win32":
        poll = select.poll()
        poll.register(requests, 0)
        poll.poll()
        _end()


def _end() -> None:
    """End this process with all that its functions started."""
    kill_descendants(os.getpid())
    if sys.platform != "win32":
        os.killpg(0, signal.SIGKILL)


def _adopt_orphans() -> None:
    """On Linux: a process that a function left behind becomes a child of this one, so that it is found and ended."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def kill_descendants(pid: int) -> None:
    """Kill what a process started and what that started, in whatever session or group it is by now."""
    with suppress(psutil.Error):
        for child in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.Error):
                child.kill()


def _end_after(seconds: float | None) -> None:
    """End this process then, though the parent is gone and no Python runs, as in 9**9**9**9. None: do not."""
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_REAL, seconds or 0)  # nobody catches the signal
    elif seconds is None:
        faulthandler.cancel_dump_traceback_later()
    else:
        faulthandler.dump_traceback_later(seconds, exit=True, file=2)


def _limit_memory(size: int) -> bool:
    """Whether this system keeps a process under `size` bytes.

    RLIMIT_DATA counts what is written to. RLIMIT_AS would count the libraries too, of which a CUDA build of torch maps
    several GB only by being imported.
    """
    if sys.platform != "linux":  # Windows has no such limit, macOS does not keep it
        return False
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (size, size))
    return True
