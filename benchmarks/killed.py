"""The demo killed with SIGKILL thirty times on its way, beside the demo left alone.

    python benchmarks/killed.py FOLDER > benchmarks/killed.txt        (Linux; half an hour on one core)

Every fifth kill waits until a checkpoint is being written, the others fall anywhere: in loading, rollouts, updates. At
the end all must be equal byte for byte, but for the clock: adapter, optimizer, metrics, scores, every sampled answer.
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from measure import where

from lite_trgrpo.store.checkpoint import newest

KILLS, EVERY = 30, 1
COMMAND = [sys.executable, "-m", "lite_trgrpo", "train"]
NEW = ["--preset", "demo", "--seed", "0", "--set", f"train.checkpoint_every={EVERY}"]


def start(words: list[str], log: Path) -> "subprocess.Popen[bytes]":
    with log.open("ab") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # the same number every time: sums depend on it
        return subprocess.Popen([*COMMAND, *words], stdout=file, stderr=file, env=environment)


def kill_one(run: Path, draw: random.Random, writing: bool) -> str | None:
    """-> in what it was killed; None: it came to its end before."""
    started = (run / "config.toml").exists()
    child = start(["--resume", str(run)] if started else [*NEW, "--output", str(run)], run.with_suffix(".log"))
    ends = time.monotonic() + draw.uniform(10, 40)
    while not started and child.poll() is None and newest(run / "checkpoints") is None:
        time.sleep(0.05)  # the scores before the first step take longer than a life here
    while child.poll() is None and time.monotonic() < ends + (60 if writing else 0):
        if writing and time.monotonic() > ends - 5 and any((run / "checkpoints").glob(".part-*")):
            break
        time.sleep(0.001 if writing else 0.05)
    if child.poll() is not None:
        assert child.returncode == 0, run.with_suffix(".log").read_text()[-2000:]
        return None
    torn = any((run / "checkpoints").glob(".part-*"))
    child.kill()
    child.wait()
    return "a checkpoint half written" if torn else "anything else"


def outcome(run: Path) -> dict[str, object]:
    last = newest(run / "checkpoints")
    assert last is not None
    files = [run / "rollouts.jsonl", last / "adapter.safetensors", last / "optimizer.safetensors"]
    files += sorted((run / "adapter").iterdir())
    logs = {
        name: [{**json.loads(line), "clock": None} for line in (run / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "eval.jsonl")
    }
    return {**logs, **{path.name: path.read_bytes() for path in files}, "checkpoint": last.name}


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("folder", type=Path)
    folder = arguments.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    whole, run, draw, fell = folder / "whole", folder / "killed", random.Random(0), Counter[str]()
    if not (whole / "adapter").exists():
        assert start([*NEW, "--output", str(whole)], whole.with_suffix(".log")).wait() == 0
    while fell.total() < KILLS:
        place = kill_one(run, draw, writing=fell.total() % 5 == 4)
        if place is None:
            sys.exit(f"{run} came to its end after {fell.total()} kills")
        fell[place] += 1
        with contextlib.suppress(AttributeError):
            print(f"{fell.total()}: {place}, newest {newest(run / 'checkpoints').name}", file=sys.stderr, flush=True)
    assert start(["--resume", str(run)], run.with_suffix(".log")).wait() == 0
    expected, found = outcome(whole), outcome(run)
    differing = [name for name in expected if expected[name] != found.get(name)]
    print(
        f"{where()}\n\n{KILLS} kills: {dict(fell)}\ncompared: {', '.join(expected)}\ndiffering: {differing or 'none'}"
    )
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
