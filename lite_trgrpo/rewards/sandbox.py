"""Scoring in a process that may hang, grow or die without taking the run with it.

`Sandbox` starts one worker (worker.py), hands it group after group, kills it at the deadline or beyond the memory limit
and starts another. It protects from accidents; a function that wants to do harm still runs with your rights.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

from lite_trgrpo.errors import MissingPackageError, RewardError
from lite_trgrpo.records import Group
from lite_trgrpo.rewards import serialization
from lite_trgrpo.rewards.process import DiedError, Process
from lite_trgrpo.rewards.scoring import combined
from lite_trgrpo.rewards.worker import group_message

LOADING_SECONDS = 300.0  # reward files may import large libraries, from a cold disk
REFUSALS = {kind.__name__: kind for kind in (RewardError, MissingPackageError)}


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a call gave no values."""

    kind: str
    """timeout, crash or error."""
    detail: str


@dataclass(frozen=True, slots=True)
class Call:
    """One function, to be called with some members of a group."""

    name: str
    group: Group
    members: Sequence[int]


class Sandbox:
    """A Scorer whose reward functions run in a process of their own. To be closed, or used in a `with`.

    functions, options, truncated_max_zero: as for `rewards.load`
    seconds: deadline for one answer and one function; a group has as many times that as it has answers
    memory: of the worker (bytes); `memory_limited` says whether this system keeps to it
    on_failure: what happens to an answer that a function does not get through, be it time-out, crash or exception.
        "skip": it counts as not gradable, "fail": RewardError, a number: the function's value for it
    pass_env: environment variables that reach the functions besides those that Python and its libraries need
    tell: is given a line for a person, once for each function and kind of failure

    Raises what `load` raises, from the constructor. Groups are scored one after the other, in the order they come.
    """

    def __init__(
        self,
        functions: Mapping[str, float],
        options: Mapping[str, Mapping[str, Any]],
        truncated_max_zero: bool = False,
        *,
        seconds: float,
        memory: int,
        on_failure: str | float = "skip",
        pass_env: Sequence[str] = (),
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.memory_limited = False
        self._weights = dict(functions)
        self._numbers = {name: i for i, name in enumerate(functions)}  # by which the worker knows them
        self._truncated_max_zero = truncated_max_zero
        self._setup = serialization.dumps(
            {
                "functions": self._weights,
                "options": serialization.pack({name: dict(given) for name, given in options.items()}),
                "truncated_max_zero": truncated_max_zero,
                "memory": memory,
            }
        )
        self._seconds = seconds
        self._on_failure = on_failure
        self._pass_env = pass_env
        self._sent = 0
        self._tell = tell
        self._reported: set[tuple[str, str]] = set()
        self._slow: set[str] = set()
        self._process: Process | None = None
        self._closed = False
        # All that talks to the worker happens in this one thread, so the rest is written as if nobody else existed
        self._keeper = ThreadPoolExecutor(1, thread_name_prefix="rewards")
        try:
            self._keeper.submit(self._renew).result()
        except BaseException:
            self.close()
            raise

    def start(self, group: Group) -> Future[Group]:
        """Score a group while the caller goes on; the future raises what `score` raises."""
        return self._keeper.submit(lambda: self._scored([group])[0])

    def score(self, groups: Sequence[Group]) -> list[Group]:
        """The same groups, in the same order, with `rewards`, `parts` and `failures` filled in.

        Raises RewardError for a function that returns anything but one finite number or None for each answer, whatever
        the policy: that is a mistake in the function, not an accident.
        """
        return self._keeper.submit(self._scored, groups).result()

    def close(self) -> None:
        """Kill the worker and what it started. Groups that wait are not scored."""
        self._closed = True
        if self._process is not None:
            self._process.kill()
        self._keeper.shutdown(cancel_futures=True)
        if self._process is not None:
            self._process.kill()  # one that was just being started

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    # -- groups -------------------------------------------------------------------------------------------

    def _scored(self, groups: Sequence[Group]) -> list[Group]:
        # Function by function over all groups, so that one that hangs costs one deadline, not one per group. A call is
        # a function and a group: the smallest unit whose values a function may legitimately make depend on each other.
        parts: list[dict[str, list[float]]] = [{name: [] for name in self._weights} for _ in groups]
        failures: list[dict[str, dict[int, str]]] = [{} for _ in groups]
        filled = [i for i, group in enumerate(groups) if group.completions]
        for name in self._weights:
            # A hang is looked into early; a function that proves to be only slow gets its full time from then on
            calls = [Call(name, groups[i], range(len(groups[i].completions))) for i in filled]
            patience = [self._seconds * (len(call.members) if name in self._slow else 1) for call in calls]
            for i, call, found in zip(filled, calls, self._called(calls, patience), strict=True):
                parts[i][name], failed = self._looked_into(call, found) if isinstance(found, Failure) else (found, {})
                if failed:
                    failures[i][name] = failed
        return [combined(*each[:2], self._weights, each[2]) for each in zip(groups, parts, failures, strict=True)]

    def _looked_into(self, call: Call, found: Failure) -> tuple[list[float], dict[int, str]]:
        """Values of a group whose first call failed, and what happened to those answers that have none.

        Values only ever come from a call with all answers of the group, or all that have not failed by themselves:
        a function may compare them with each other. Calls with one answer only look for those at fault.
        """
        failed: dict[int, str] = {}
        values: dict[int, float] = {}
        for i in call.members:
            # one that ended is asked again even if it was alone: the system may have killed it for want of memory
            known = len(call.members) == 1 and found.kind != "crash"
            alone = found if known else self._call(replace(call, members=[i]))
            if isinstance(alone, Failure):
                values[i] = self._treated(call, i, alone)
                failed[i] = alone.kind
        rest = [i for i in call.members if i not in failed]
        again = self._call(replace(call, members=rest)) if rest else []
        if isinstance(again, Failure):  # each can be graded, but not together
            values |= {i: self._treated(call, i, again) for i in rest}
            failed |= dict.fromkeys(rest, again.kind)
        else:
            values |= zip(rest, again, strict=True)
            if found.kind == "timeout" and not failed:
                self._slow.add(call.name)
        return [values[i] for i in call.members], dict(sorted(failed.items()))

    def _treated(self, call: Call, i: int, failure: Failure) -> float:
        """The policy: the value of an answer that a function did not get through. Tells the person the first time."""
        name, group = call.name, call.group
        text = repr(group.completions[i].text)
        sample = f"{group.example.origin}, completion {text if len(text) <= 80 else text[:79] + '…'}"
        what = f"reward '{name}' {failure.detail} for {sample}"
        if self._on_failure == "fail":
            raise RewardError(f"{what}. Fix it, or set rewards.on_failure to skip or to a number")
        if (name, failure.kind) not in self._reported:
            self._reported.add((name, failure.kind))
            given = "counts as ungradable" if self._on_failure == "skip" else f"gets {self._on_failure:g}"
            self._tell(
                f"{what}; the answer {given} (rewards.on_failure). Others that end so are counted in metrics.jsonl"
            )
        if isinstance(self._on_failure, str):
            return math.nan
        capped = self._truncated_max_zero and not group.completions[i].stopped
        return min(self._on_failure, 0.0) if capped else self._on_failure

    # -- the worker ---------------------------------------------------------------------------------------

    def _call(self, call: Call) -> list[float] | Failure:
        """One call, with its full time."""
        return self._called([call], [self._seconds * len(call.members)])[0]

    def _called(self, calls: Sequence[Call], seconds: Sequence[float]) -> list[list[float] | Failure]:
        """Each call's values, or why it has none. All are sent at once, so that the worker never waits for us."""
        found: list[list[float] | Failure] = []
        while len(found) < len(calls):
            process = self._process or self._renew()
            left = list(zip(calls, seconds, strict=True))[len(found) :]
            first = self._sent
            try:
                for call, limit in left:
                    message = {"reward": self._numbers[call.name], "group": _message(call), "seconds": limit}
                    process.send(serialization.dumps({**message, "call": self._sent}))
                    self._sent += 1
                for number, (_, limit) in enumerate(left, first):
                    found.append(_read(_reply(process, limit, number)))
            except DiedError as died:  # with it the calls after this one; they are sent to the next worker
                self._process = None
                found.append(Failure(died.kind, str(died)))
            except BaseException:  # replies are on their way, which must not be taken for those to later calls
                self._process = None
                process.kill()
                raise
        return found

    def _renew(self) -> Process:
        """A new worker that has loaded the functions."""
        if self._closed:
            raise RewardError("the process of the rewards has been closed")
        try:
            self._process = process = Process(self._pass_env)
            process.send(self._setup)
            reply = _reply(process, LOADING_SECONDS, None)
        except OSError as error:
            raise RewardError(f"the process of the rewards cannot be started: {error.strerror}") from None
        except DiedError as died:
            self._process = None
            raise RewardError(f"the process of the rewards {died} while it loaded {', '.join(self._weights)}") from None
        if "refused" in reply:
            raise _refusal(reply)
        self.memory_limited = reply["memory_limited"]
        return process


def _reply(process: Process, limit: float, number: int | None) -> dict[str, Any]:
    """The reply to call `number`, or to the set-up (None). Anything else on the pipe was written by a function, or by a
    process that it forked: then no later line of it can be trusted either.
    """
    line = process.receive(limit)
    try:
        reply = serialization.loads(line)
        if reply["call"] == number:
            return dict(reply)
    except (ValueError, TypeError, KeyError):
        pass
    process.kill()
    raise DiedError("crash", f"wrote {line[:40]!r} of its own into the pipe for the values")


def _message(call: Call) -> dict[str, Any]:
    try:
        return group_message(call.group, call.members)
    except TypeError as error:
        raise RewardError(
            f"{call.group.example.origin}: a column holds {error}, which cannot be handed to the process of the "
            "rewards; remove the column from the data, or write it as text or numbers"
        ) from None


def _read(reply: Mapping[str, Any]) -> list[float] | Failure:
    if "refused" in reply:
        raise _refusal(reply)
    if "raised" in reply:
        return Failure("error", f"raised {reply['raised']}")
    return [math.nan if value is None else value for value in reply["values"]]


def _refusal(reply: Mapping[str, Any]) -> Exception:
    """A RewardError of the worker, which the person has to fix."""
    kind, message = reply["refused"]
    return REFUSALS[kind](message)
