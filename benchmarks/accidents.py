"""Runs of a tiny model through random accidents: does each come to its end, as if nothing had happened?

    python benchmarks/accidents.py            200 runs, about 20 minutes on one core
    python benchmarks/accidents.py --runs 20 --seed 1

Every run meets one to three accidents of tests/accidents.py (a signal, a full disk, a library that fails, a killed
reward process, no memory, a clock set back) or a SIGKILL, each at a random event; between two parts its folder is
sometimes damaged. Then it is resumed until it ends. The result must be that of an undisturbed run, bit for bit; after
"no memory" it may differ by rounding, so only its end is checked.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from measure import where

from lite_trgrpo.store import checkpoint
from tests.accidents import ACCIDENTS, DAMAGES, at_call, differences, lite, logged, tiny_run, train
from tests.accidents import loop as training

KILLED = "SIGKILL"


def part(config: Path, run: Path, name: str | None, event: int) -> int:
    """One part of a run, in a child that the accident may kill; -> its exit code, -9 when it was killed."""
    child = os.fork()
    if child == 0:
        patch = pytest.MonkeyPatch()
        if name == KILLED:
            place = random.choice(["update", "rollout", "evaluate"])
            at_call(patch, training, place, event, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        elif name:
            ACCIDENTS[name].happens(patch, event)
        started = (run / "config.toml").exists()
        done = lite("train", "--resume", run, "--plain") if started else train(config, run)
        text = done.output
        if "Traceback" in text or (done.exit_code == 1 and "--resume" not in text.splitlines()[-1]):
            run.with_suffix(".log").write_text(text)
            os._exit(99)
        os._exit(done.exit_code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def ended(run: Path) -> bool:
    newest = checkpoint.newest(run / "checkpoints") if (run / "checkpoints").exists() else None
    return newest is not None and checkpoint.is_complete(newest)


def story(config: Path, run: Path, whole: Path, draw: random.Random, met: Counter[str]) -> str:
    """One run and its accidents; -> what is wrong with it, empty if nothing is."""
    exact, told = True, []
    for _ in range(draw.randint(1, 3)):
        name = draw.choice([*ACCIDENTS, KILLED])
        first, last = (1, 4) if name == KILLED else (ACCIDENTS[name].first, ACCIDENTS[name].events)
        event = draw.randint(first, last)
        code = part(config, run, name, event)
        told.append(f"{name} ({event})")
        if code == 99:
            return f"{name}: {run.with_suffix('.log').read_text()[-300:]}"
        exact = exact and (name == KILLED or ACCIDENTS[name].same)
        met[name] += 1
        if ended(run):
            break
        if len(list((run / "checkpoints").glob("step-*"))) > 1 and draw.random() < 0.3:
            damage = draw.choice(list(DAMAGES))
            DAMAGES[damage](run)
            told.append(damage)
            met[damage] += 1
    if not ended(run) and (code := part(config, run, None, 0)) != 0:
        return f"{told}: resumed, it ended with exit code {code}"
    if [line["step"] for line in logged(run)] != list(range(1, 7)):
        return f"{told}: steps are missing or twice there"
    wrong = differences(run, whole) if exact else []
    return f"{told}: not as the undisturbed one: {', '.join(wrong)}" if wrong else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw, met, bad = random.Random(options.seed), Counter[str](), 0
    folder = Path(tempfile.mkdtemp())
    config, whole = tiny_run(folder), folder / "whole"
    assert train(config, whole).exit_code == 0
    for i in range(options.runs):
        random.seed(i)
        if wrong := story(config, folder / f"run-{i}", whole, draw, met):
            bad += 1
            print(f"run {i}: {wrong}", flush=True)
    print(where())
    print(f"\n{options.runs} runs, seed {options.seed}: {options.runs - bad} of {options.runs} ended as they should\n")
    print("| accident or damage | times |\n| --- | ---: |")
    for name, times in met.most_common():
        print(f"| {name} | {times} |")
    children = len(psutil.Process().children(recursive=True))
    print(f"\nprocesses left behind: {children}")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
