"""The run folder: what a run leaves behind, and where a later one finds it."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lite_trgrpo.config.loading import to_toml
from lite_trgrpo.config.schema import Config
from lite_trgrpo.errors import RunError
from lite_trgrpo.records import Completion, Group
from lite_trgrpo.store.disk import AFTERWARDS, sync, write_whole
from lite_trgrpo.text import quoted

LOGS = ("metrics.jsonl", "rollouts.jsonl", "eval.jsonl")


class Run:
    """`config.toml`, `run.json`, the three logs, `checkpoints/`, `adapter/`, `best/`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.adapter = folder / "adapter"
        self.best = folder / "best"
        self._hashed: dict[str, tuple[int, Any]] = {}  # bytes of each log that were hashed, and the hash of them

    @classmethod
    def vacant(cls, folder: Path) -> "Run":
        """A run that is not there yet. A folder that already holds one is refused."""
        if (folder / "config.toml").exists():
            raise RunError(
                f"{folder} already holds a run. Continue it with `lite-trgrpo train --resume {quoted(folder)}`, or "
                "give --output another folder"
            )
        return cls(folder)

    @classmethod
    def existing(cls, folder: Path) -> "Run":
        if not (folder / "config.toml").is_file():
            inside = (folder.parent / "config.toml").is_file() and (folder.parent / "run.json").is_file()
            way = f"give {folder.parent}, the run it lies in" if inside else "look for one with: lite-trgrpo report"
            raise RunError(f"{folder} holds no run (no config.toml); {way}")
        return cls(folder)

    def create(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot write into {self.folder}: {error.strerror}; give --output another folder") from None

    def describe(self, config: Config, facts: Mapping[str, Any]) -> None:
        """`config.toml` and `run.json`: the options, and what was resolved from them (revision, versions, counts)."""
        try:
            write_whole(self.folder / "run.json", json.dumps(facts, indent=1))
            write_whole(self.folder / "config.toml", to_toml(config))
        except OSError as error:
            raise RunError(f"cannot write into {self.folder}: {error.strerror}; {AFTERWARDS}") from None

    def facts(self) -> dict[str, Any]:
        """Content of `run.json`; empty where it is missing or broken."""
        try:
            found = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def log_step(
        self, metrics: Mapping[str, Any], groups: Sequence[Group], pieces: Callable[[Sequence[int]], list[str]]
    ) -> None:
        """One line of metrics.jsonl; one line of rollouts.jsonl for each group.

        `pieces` gives the text of single tokens: one answer of the step gets it, to be shown token by token.
        """
        lines = [{"step": metrics["step"], **_rollout_line(group)} for group in groups]
        if groups:
            g, m = _to_show(groups)
            shown = groups[g].completions[m]
            lines[g]["completions"][m] |= {"logprobs": _rounded(shown), "pieces": pieces(shown.ids)}
        self._append("rollouts.jsonl", lines)
        self._append("metrics.jsonl", [metrics])

    def log_eval(self, line: Mapping[str, Any]) -> None:
        self._append("eval.jsonl", [line])

    def offsets(self) -> dict[str, int]:
        """Bytes in each log now, on the disk; a checkpoint keeps them, so that a resumed run writes no step twice."""
        found = {}
        for name in LOGS:
            path = self.folder / name
            try:
                if path.exists():
                    sync(path)
                    found[name] = path.stat().st_size
            except OSError as error:
                raise RunError(f"cannot write {path}: {error.strerror}; {AFTERWARDS}") from None
        return found

    def digests(self, offsets: Mapping[str, int]) -> dict[str, str]:
        """SHA-256 of the first `offsets` bytes of each log. Only what was appended since the last call is read."""
        found = {}
        for name, end in offsets.items():
            start, digest = self._hashed.get(name, (0, hashlib.sha256()))
            if start > end:
                start, digest = 0, hashlib.sha256()
            with (self.folder / name).open("rb") as file:
                file.seek(start)
                while block := file.read(min(2**20, end - start)):
                    digest.update(block)
                    start += len(block)
            self._hashed[name] = start, digest
            found[name] = digest.hexdigest()
        return found

    def cut_back(self, offsets: Mapping[str, int], digests: Mapping[str, str] | None = None) -> None:
        """Set the logs back to a checkpoint's `offsets`. Refused where a log has lost or changed what the checkpoint
        counts on; `digests`: what `digests` gave for it then.
        """
        for name in LOGS:
            path = self.folder / name
            size = path.stat().st_size if path.exists() else 0
            if size < offsets.get(name, 0):
                raise RunError(
                    f"{path} has {size} bytes, but its checkpoint was made with {offsets[name]}: it was cut or "
                    "replaced. Put it back, or start again with another --output"
                )
        wanted = digests or {}
        found = self.digests({name: offsets[name] for name in wanted})
        for name in wanted:
            if found[name] != wanted[name]:
                raise RunError(
                    f"{self.folder / name} is not what it was at its checkpoint: its first {offsets[name]} bytes have "
                    "another SHA-256. Put it back, or start again with another --output"
                )
        for name in LOGS:
            if (path := self.folder / name).exists():
                try:
                    with path.open("r+b") as file:
                        file.truncate(offsets.get(name, 0))
                except OSError as error:
                    raise RunError(f"cannot write {path}: {error.strerror}; {AFTERWARDS}") from None

    def evaluations(self) -> list[dict[str, Any]]:
        return self._lines("eval.jsonl")

    def metrics(self) -> list[dict[str, Any]]:
        return self._lines("metrics.jsonl")

    def last_rollouts(self) -> list[dict[str, Any]]:
        """The lines of rollouts.jsonl of its last step, read from the end: the file may hold gigabytes."""
        path, size = self.folder / "rollouts.jsonl", 2**18
        try:
            with path.open("rb") as file:
                end = file.seek(0, os.SEEK_END)
                while True:
                    start = file.seek(max(0, end - size))
                    lines = file.read(end - start).split(b"\n")[start > 0 : -1]  # whole ones
                    steps = [line.partition(b",")[0] for line in lines]
                    if start == 0 or (steps and steps[0] != steps[-1]):
                        return [json.loads(line) for line, step in zip(lines, steps, strict=True) if step == steps[-1]]
                    size *= 4
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise RunError(f"cannot read {path}: {error}. Put it back, or start again with another --output") from None

    def _lines(self, name: str) -> list[dict[str, Any]]:
        """Lines of a log, but for a last one without its end: it is being written now, or was when the power failed."""
        path = self.folder / name
        try:
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            found = [json.loads(line) for line in text.split("\n")[:-1]]
            if not all(isinstance(line, dict) and isinstance(line.get("step"), int) for line in found):
                raise ValueError("a line is no JSON object with a step")
            return found
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(f"cannot read {path}: {error}. Put it back, or start again with another --output") from None

    def _append(self, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        try:
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line, default=str) + "\n" for line in lines)
        except OSError as error:
            raise RunError(f"cannot write {self.folder / name}: {error.strerror}; {AFTERWARDS}") from None


def run_folders(folder: Path) -> list[Path]:
    """Every run below `folder`, however deep: `compare` puts its runs into a folder of their own."""
    return [path.parent for path in folder.rglob("config.toml")]


def _rollout_line(group: Group) -> dict[str, Any]:
    differ = _differ(group)
    return {
        "origin": group.example.origin,
        "prompt": group.example.text,
        "answer": group.example.columns.get("answer"),
        "completions": [
            {
                "text": completion.text,
                "ids": list(completion.ids),
                "stopped": completion.stopped,
                "reward": _number(reward, None),
                "parts": {name: _number(part[i], None) for name, part in group.parts.items()},
                **({"logprobs": _rounded(completion)} if differ else {}),
                **({"failures": failed} if (failed := _failures(group, i)) else {}),
            }
            for i, (completion, reward) in enumerate(zip(group.completions, group.rewards, strict=True))
        ],
    }


def _to_show(groups: Sequence[Group]) -> tuple[int, int]:
    """Group and member of the answer that is shown: of the first that teach something the best, of these the rarest."""
    g = next((i for i, group in enumerate(groups) if _differ(group)), 0)
    answers = zip(groups[g].rewards, groups[g].completions, strict=True)
    ranks = [(_number(reward, -math.inf), -sum(c.logprobs) / len(c.logprobs)) for reward, c in answers]
    return g, ranks.index(max(ranks))


def _differ(group: Group) -> bool:
    """Whether its answers differ in reward, so that something is learned from them."""
    return len({reward for reward in group.rewards if reward == reward}) > 1


def _rounded(completion: Completion) -> list[float | None]:
    """Four digits: half the room, and as much as a colour can show."""
    return [round(logprob, 4) if math.isfinite(logprob) else None for logprob in completion.logprobs]


def _number(value: float, otherwise: Any) -> Any:
    """NaN is no JSON."""
    return otherwise if math.isnan(value) else value


def _failures(group: Group, i: int) -> dict[str, str]:
    """Reward functions that failed at completion i, and what happened."""
    return {name: failed[i] for name, failed in group.failures.items() if i in failed}
