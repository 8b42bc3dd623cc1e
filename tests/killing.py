"""Runs trainings in forked children that kill themselves (SIGKILL) and are resumed, until each has come to its end.

    python -m tests.killing toy FOLDER KILLS     the toy policy on the trainer
    python -m tests.killing tiny FOLDER KILLS    a model of two layers by the command line, as FOLDER/tiny.toml says

FOLDER/whole is the undisturbed run, FOLDER/killed-0 and so on are the others. A kill falls at an event inside a
function: calls and returns of Python and C functions are events, so it can fall between any two of them, an fsync and
a rename for instance. Prints how many kills fell inside which function, as JSON.
"""

import json
import os
import random
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from lite_trgrpo.training import guards
from tests.test_trainer import run_toy

PLACES = ("_loop", "rollout", "_learn", "log_step", "save", "prune", "evaluate", "save_adapter")
TOY = {
    "train": {"steps": 8, "checkpoint_every": 1, "updates_per_batch": 2, "prompts_per_step": 2, "keep_checkpoints": 2},
    "rollout": {"group_size": 4},
    "eval": {"every": 3, "samples": 0},
    "guards": {"rollbacks": 3},
}
Run = Callable[[Path], None]


def toy(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    guards.WINDOW, guards.GRAD_NORM = 2, 0.12  # strict enough to roll it back, healthy as it is
    run_toy(folder, TOY, resume=True)


def tiny(folder: Path) -> None:
    from lite_trgrpo.cli import app

    new = ["--config", str(folder.parent / "tiny.toml"), "--output", str(folder)]
    started = (folder / "config.toml").exists()
    app(["train", *(["--resume", str(folder)] if started else new)], standalone_mode=False)


class Profile:
    """Counts the events inside each of PLACES; at event `at` inside `place` the process dies."""

    def __init__(self, place: str = "", at: int = 0) -> None:
        self.place, self.at = place, at
        self.depth, self.events = dict.fromkeys(PLACES, 0), dict.fromkeys(PLACES, 0)

    def __call__(self, frame, event, argument) -> None:
        name = frame.f_code.co_name
        if event == "call" and name in self.depth:
            self.depth[name] += 1
        for place, depth in self.depth.items():
            self.events[place] += depth > 0
        if self.place and self.events[self.place] == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        if event == "return" and name in self.depth:
            self.depth[name] -= 1


def killed(run: Run, folder: Path, profile: Profile) -> bool:
    """Whether a child that runs under the profile was killed by it; else it has come to the run's end."""
    child = os.fork()
    if child == 0:
        try:
            log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.setprofile(profile)
            run(folder)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    assert status == 0, folder.with_suffix(".log").read_text()
    return False


def main(run: Run, folder: Path, kills: int, steps: int) -> dict[str, int]:
    run(folder / "whole")  # in this process: what libraries import late, the children have
    whole = Profile()
    sys.setprofile(whole)
    run(folder / "counted")
    sys.setprofile(None)
    draw, fell, runs = random.Random(0), Counter[str](), 0
    while fell.total() < kills:
        place = PLACES[fell.total() % len(PLACES)]
        calls = 1 if place == "save_adapter" else steps / 2  # so far on average that a run comes to its end
        at = draw.randint(1, int(whole.events[place] / calls))
        if killed(run, folder / f"killed-{runs}", Profile(place, at)):
            fell[place] += 1
        else:
            runs += 1
    while killed(run, folder / f"killed-{runs}", Profile()):
        pass
    return dict(fell)


if __name__ == "__main__":
    torch.set_num_threads(1)
    kind, where, number = sys.argv[1:]
    print(json.dumps(main({"toy": toy, "tiny": tiny}[kind], Path(where), int(number), TOY["train"]["steps"])))
