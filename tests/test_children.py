"""Killing `export` or a run leaves no process and no half folder behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.accidents import lite, train

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sends signals")


def started(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "TMPDIR": str(folder), "HF_HUB_OFFLINE": "1"}
    with (folder / "log").open("wb") as log:
        return subprocess.Popen([sys.executable, "-m", "lite_trgrpo", *words], env=environment, stderr=log, stdout=log)


def descendants(process: subprocess.Popen[bytes], named: str) -> list[psutil.Process]:
    """Those of its processes whose command line holds a word, once there are any."""
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True)
        if any(named in " ".join(child.cmdline()) for child in children):
            return children
        time.sleep(0.02)
    raise AssertionError(f"no {named}")


def all_gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=20)[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_killed_export_leaves_no_process_and_no_half_folder(tiny_config, tmp_path, number):
    assert train(tiny_config, tmp_path / "run", "train.steps=1", "train.learning_rate=0.05").exit_code == 0
    (tmp_path / "tmp").mkdir()
    export = started(tmp_path / "tmp", "export", str(tmp_path / "run"))
    children = descendants(export, "lite_trgrpo.export.verify")
    assert (tmp_path / "run" / ".export-part").exists()
    export.send_signal(number)
    assert export.wait(30) in (130, -number)
    assert all_gone(children)
    if number == signal.SIGTERM:  # after SIGKILL nobody is left to tidy up; the next export does
        assert not list((tmp_path / "tmp").glob("lite-trgrpo-*"))
        assert not (tmp_path / "run" / ".export-part").exists()
    done = lite("export", tmp_path / "run")
    assert done.exit_code in (0, 1) and not ((tmp_path / "run" / ".export-part").exists() and done.exit_code == 0)


def test_a_killed_run_leaves_no_process(tiny_config, tmp_path):
    run = started(
        tmp_path, "train", "--config", str(tiny_config), "--output", str(tmp_path / "run"), "--steps", "500", "--plain"
    )
    children = descendants(run, "rewards.worker")
    run.kill()
    run.wait()
    assert all_gone(children)
