"""What can happen to a run in a night, as patches of the real machinery; tests and benchmarks/accidents.py share them.

Each strikes at the n-th event of its kind (steps of decoding, updates, checkpoints ...) and once only.
"""

import errno
import functools
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from lite_trgrpo import report
from lite_trgrpo.cli import app
from lite_trgrpo.model.hf import TransformersPolicy
from lite_trgrpo.rewards.process import Process
from lite_trgrpo.rollout import engine
from lite_trgrpo.store import checkpoint
from lite_trgrpo.training import loop
from tests.tiny import tiny_model_folder

NIGHT = ("train.steps=6", "train.checkpoint_every=1", "guards.rollbacks=3", "eval.every=3")
Patch = pytest.MonkeyPatch


def tiny_run(folder: Path) -> Path:
    """A config file for a whole run of a second: a random model, twelve prompts, a reward from a file."""
    model = tiny_model_folder(folder / "model")
    data, reward, path = folder / "data.jsonl", folder / "reward.py", folder / "tiny.toml"
    data.write_text("".join(json.dumps({"prompt": f"{i} + 1", "answer": str(i + 1)}) + "\n" for i in range(12)))
    reward.write_text("def length(completion_ids, **_):\n    return [sum(ids) % 3 for ids in completion_ids]\n")
    path.write_text(
        f'[model]\nname = "{model}"\nlora_rank = 4\n[data]\nsource = "{data}"\n'
        f'[rewards]\nfunctions = {{ "{reward}:length" = 1.0 }}\n[rollout]\ngroup_size = 4\nmax_new_tokens = 6\n'
        "[train]\nsteps = 2\nprompts_per_step = 3\npreflight = false\n[eval]\nrows = 4\nsamples = 0\n"
    )
    return path


def lite(*words):
    return CliRunner(env={"COLUMNS": "300", "NO_COLOR": "1"}).invoke(app, [str(word) for word in words])


def train(config: Path, folder: Path, *overrides: str):
    settings = [word for override in (*NIGHT, *overrides) for word in ("--set", override)]
    return lite("train", "--config", config, "--output", folder, "--plain", *settings)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def logged(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    """Every line of a log but its clock; raises where one is torn or not JSON."""

    def refuse(constant):
        raise ValueError(constant)

    lines = (folder / name).read_text().splitlines()
    return [{**json.loads(line, parse_constant=refuse), "clock": None} for line in lines]


def differences(run: Path, whole: Path) -> list[str]:
    """What a run left that is not, bit for bit, what the undisturbed one did."""
    mine, theirs = tensors(run), tensors(whole)
    found = [] if mine.keys() == theirs.keys() and all(mine[k].equal(theirs[k]) for k in mine) else ["adapter"]
    found += [name for name in ("metrics.jsonl", "eval.jsonl") if logged(run, name) != logged(whole, name)]
    same = (run / "rollouts.jsonl").read_bytes() == (whole / "rollouts.jsonl").read_bytes()
    return found if same else [*found, "rollouts.jsonl"]


# -- how an accident happens --------------------------------------------------------------------------------


def at_call(patch: Patch, owner: object, name: str, n: int, strike: Callable, after: bool = False) -> None:
    """`strike`, with the call's arguments, before or after the n-th call of a function of the product."""
    real, calls = getattr(owner, name), 0

    @functools.wraps(real)
    def called(*given, **options):
        nonlocal calls
        calls += 1
        if calls == n and not after:
            strike(*given)
        result = real(*given, **options)
        if calls == n and after:
            strike(*given)
        return result

    patch.setattr(owner, name, called)


def ask_to_end(*_) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def no_room(*_) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def half_written(content, path, *_) -> None:
    Path(path).write_bytes(b"x" * 100)
    no_room()


def library_fails(*_) -> None:
    raise ValueError("CUBLAS_STATUS_EXECUTION_FAILED when calling gemm\nand a second line")


def reward_killed(process: Process, *_) -> None:
    os.kill(process._process.pid, signal.SIGKILL)


def half_a_line(log: str, patch: Patch, n: int) -> None:
    """The disk is full in the middle of what is appended to a log."""
    real, calls = Path.open, 0

    def opened(self, mode="r", *rest, **options):
        nonlocal calls
        file = real(self, mode, *rest, **options)
        if self.name == log and mode == "a":
            calls += 1
            if calls == n:

                def writelines(lines, write=file.write):
                    text = "".join(lines)
                    write(text[: len(text) // 2])
                    no_room()

                return _Full(file, writelines)
        return file

    patch.setattr(Path, "open", opened)


class _Full:
    """A file whose `writelines` fails half-way."""

    def __init__(self, file, writelines):
        self.file, self.writelines = file, writelines

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def clock_set_back(patch: Patch, n: int) -> None:
    real, calls = time.time, 0

    def set_back() -> float:
        nonlocal calls
        calls += 1
        return real() - (1e6 if calls >= n else 0.0)

    patch.setattr(time, "time", set_back)


def no_memory(*_) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@dataclass(frozen=True)
class Accident:
    """What happens, and what the run does about it."""

    happens: Callable[[Patch, int], None]
    n: int
    """The event at which it strikes, so that it is in mid-run."""
    events: int
    """Events of its kind in the run, about."""
    code: int
    """Exit code."""
    word: str
    """Part of what is said."""
    same: bool = True
    """Whether the result, resumed where the run ended, is bit for bit that of the undisturbed run."""
    first: int = 1
    """Its first event after loading, where a failure is another story: a self-check that falls back, a refusal."""


def _call(owner: object, name: str, strike: Callable, after: bool = False) -> Callable[[Patch, int], None]:
    return lambda patch, n: at_call(patch, owner, name, n, strike, after)


ACCIDENTS = {
    "SIGTERM while sampling": Accident(_call(engine.Engine, "_step", ask_to_end), 31, 80, 130, "train --resume"),
    "SIGTERM in an update": Accident(_call(loop, "update", ask_to_end), 3, 6, 130, "train --resume"),
    "SIGTERM in an evaluation": Accident(_call(loop, "evaluate", ask_to_end), 2, 3, 130, "train --resume"),
    "SIGTERM in a checkpoint": Accident(_call(checkpoint, "save", ask_to_end), 3, 6, 130, "train --resume"),
    "the reward process is killed": Accident(_call(Process, "receive", reward_killed), 9, 25, 0, "", first=2),
    "the reward process is killed in an evaluation": Accident(
        _call(Process, "receive", reward_killed), 15, 25, 0, "", first=2
    ),
    "a full disk in a checkpoint": Accident(_call(checkpoint, "save_file", half_written), 5, 12, 1, "No space left"),
    "a full disk in the adapter": Accident(
        _call(TransformersPolicy, "save_adapter", no_room), 1, 1, 1, "No space left"
    ),
    "a full disk in the metrics": Accident(functools.partial(half_a_line, "metrics.jsonl"), 4, 6, 1, "metrics.jsonl"),
    "a full disk in the rollouts": Accident(
        functools.partial(half_a_line, "rollouts.jsonl"), 4, 6, 1, "rollouts.jsonl"
    ),
    "a full disk in the scores": Accident(functools.partial(half_a_line, "eval.jsonl"), 2, 3, 1, "eval.jsonl"),
    "a full disk in the report": Accident(_call(report, "write_whole", no_room), 2, 6, 0, "report"),
    "the clock is set back": Accident(clock_set_back, 10, 40, 0, ""),
    "a library fails while sampling": Accident(
        _call(engine.Engine, "_step", library_fails), 41, 80, 1, "error.txt", first=12
    ),
    "a library fails in the update": Accident(
        _call(TransformersPolicy, "logprobs", library_fails), 6, 12, 1, "error.txt"
    ),
    "a library fails after the update": Accident(
        _call(loop, "update", library_fails, after=True), 4, 6, 1, "error.txt"
    ),
    "a library fails in an evaluation": Accident(_call(loop, "evaluate", library_fails), 2, 3, 1, "error.txt"),
    "no memory in a step of decoding": Accident(
        _call(engine.Engine, "_step", no_memory), 41, 80, 0, "", same=False, first=12
    ),
    "no memory in the update": Accident(_call(TransformersPolicy, "logprobs", no_memory), 6, 12, 0, "", same=False),
}


# -- what is found in the morning ---------------------------------------------------------------------------


def half_a_line_in_every_log(run: Path) -> None:
    for name in ("metrics.jsonl", "rollouts.jsonl", "eval.jsonl"):
        if (run / name).exists():
            with (run / name).open("a") as file:
                file.write('{"step": 9, "rew')


def garbage_in_every_log(run: Path) -> None:
    for name in ("metrics.jsonl", "rollouts.jsonl", "eval.jsonl"):
        if (run / name).exists():
            with (run / name).open("ab") as file:
                file.write(b"\0\xff{]\n[1]\n")


def flipped_bit(run: Path) -> None:
    path = max((run / "checkpoints").glob("step-*")) / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def lost_state(run: Path) -> None:
    (max((run / "checkpoints").glob("step-*")) / "state.json").unlink()


def leftovers(run: Path) -> None:
    (run / "checkpoints" / ".part-abc").mkdir()
    (run / "checkpoints" / ".part-abc" / "adapter.safetensors").write_bytes(b"x")
    (run / ".lock").write_text("999999\n")
    (run / ".adapter-part").mkdir()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "half a line in every log": half_a_line_in_every_log,
    "garbage behind what the checkpoint counts on": garbage_in_every_log,
    "a flipped bit in the newest checkpoint": flipped_bit,
    "no state.json in the newest checkpoint": lost_state,
    "leftovers of a killed save and a lock file": leftovers,
}
