"""Killed at any instant and resumed, a run is the one that was never killed: bit for bit, on CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lite_trgrpo.store.checkpoint import newest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks")
ROOT = Path(__file__).resolve().parent.parent


def without_clock(path: Path) -> list[dict]:
    return [{**json.loads(line), "clock": None} for line in path.read_text().splitlines()]


def outcome(run: Path) -> dict[str, object]:
    """All that must be equal, by name."""
    files = [run / "rollouts.jsonl", newest(run / "checkpoints") / "adapter.safetensors"]
    files += [newest(run / "checkpoints") / "optimizer.safetensors", *(run / "adapter").iterdir()]
    logs = {name: without_clock(run / name) for name in ("metrics.jsonl", "eval.jsonl")}
    return logs | {path.name: path.read_bytes() for path in files} | {"steps": newest(run / "checkpoints").name}


def kill(kind: str, folder: Path, kills: int) -> dict[str, int]:
    """Let `tests/killing.py` do it, compare every run with the undisturbed one; -> kills by place."""
    command = [sys.executable, "-m", "tests.killing", kind, str(folder), str(kills)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # a forked child has none of its parent's threads
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    whole = outcome(folder / "whole")
    assert len(whole["metrics.jsonl"]) == 8
    for run in (path for path in folder.glob("killed-*") if path.is_dir()):
        found = outcome(run)
        assert [name for name in whole if whole[name] != found[name]] == [], run
    return json.loads(done.stdout.splitlines()[-1])


def test_a_toy_killed_everywhere_ends_as_if_it_had_not_been(tmp_path):
    fell = kill("toy", tmp_path, 10)
    assert sum(fell.values()) == 10 and {"save", "rollout", "_learn", "evaluate", "save_adapter"} <= fell.keys()
    metrics = without_clock(tmp_path / "whole" / "metrics.jsonl")
    assert [line.get("rolled_back_to") for line in metrics] == [None] * 5 + [
        3,
        None,
        None,
    ]  # a roll-back is repeated too


@pytest.mark.slow
@pytest.mark.night
def test_a_run_killed_a_hundred_times_ends_like_one_that_was_not(tiny_config, tmp_path):
    settings = {"steps = 2": "steps = 8\ncheckpoint_every = 2\nkeep_checkpoints = 2", "[eval]": "[eval]\nevery = 4"}
    text = tiny_config.read_text()
    for old, new in settings.items():
        text = text.replace(old, new)
    tiny_config.write_text(text)
    assert sum(kill("tiny", tmp_path, 100).values()) == 100
