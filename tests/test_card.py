"""The scripts for a CUDA card follow the code: each imports, and smoke and graph run tiny on a CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CARD = Path(__file__).resolve().parents[1] / "benchmarks" / "card"


def python(*words: str) -> str:
    """stdout of a script of that folder, on the CPU with tiny shapes."""
    env = os.environ | {"CARD_CPU": "1", "PYTHONPATH": os.pathsep.join([str(CARD.parents[1]), str(CARD.parent)])}
    done = subprocess.run([sys.executable, *words], cwd=CARD, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_script_imports():
    names = sorted(path.stem for path in CARD.glob("*.py"))
    assert names == ["beside", "graph", "kit", "scores", "smoke", "steps", "unsloth_try"]
    python("-c", "".join(f"import {name}\n" for name in names))


@pytest.mark.parametrize(("script", "parts"), [("smoke.py", 12), ("graph.py", 2)])
def test_a_script_runs_on_the_cpu(script, parts):
    said = python(script)
    assert "[FAIL" not in said, said
    assert len(re.findall(r"^\[ok ", said, flags=re.MULTILINE)) == parts
    if script == "graph.py":  # the recorded step draws what the plain one draws
        assert re.findall(r"(\d+) of (\d+) answers equal", said) == [("8", "8"), ("64", "64")] * 2
