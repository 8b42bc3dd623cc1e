"""Power cuts, full disks and vanished folders: the last good checkpoint is used, or there is a clear word."""

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from lite_trgrpo.errors import RunError
from lite_trgrpo.store import checkpoint
from lite_trgrpo.store.lock import locked
from lite_trgrpo.store.run import Run
from tests.test_trainer import run_toy, without_clock

CHANGES = {"train": {"steps": 6, "checkpoint_every": 2}, "eval": {"every": 4, "samples": 0}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run_toy(tmp_path_factory.mktemp("whole") / "run", CHANGES)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run killed after step 5: checkpoints after 0, 2 and 4 steps."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    with pytest.raises(KeyboardInterrupt):
        run_toy(folder, CHANGES, stop_after=5)
    assert [path.name[-1] for path in sorted((folder / "checkpoints").iterdir())] == ["0", "2", "4"]
    return folder


def damages(content: bytes):
    """Shorter, or with one bit flipped: at the start, in the middle, at the end."""
    for keep in (0, 1, len(content) // 2, len(content) - 1):
        yield content[:keep]
    for place in (0, len(content) // 2, len(content) - 1):
        yield content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :]


@pytest.mark.parametrize("file", ["adapter.safetensors", "optimizer.safetensors", "state.json"])
def test_after_a_power_cut_the_checkpoint_before_is_used(whole, killed, tmp_path, file):
    content = (killed / "checkpoints" / "step-000004" / file).read_bytes()
    for i, damaged in enumerate(damages(content)):
        folder = tmp_path / str(i)
        shutil.copytree(killed, folder)
        (folder / "checkpoints" / "step-000004" / file).write_bytes(damaged)
        assert checkpoint.torn(folder / "checkpoints") == [folder / "checkpoints" / "step-000004"]
        assert checkpoint.newest(folder / "checkpoints").name == "step-000002"
    resumed, run = run_toy(folder, CHANGES, resume=True)
    assert torch.equal(resumed.adapter, whole[0].adapter)
    assert without_clock(run.folder / "metrics.jsonl") == without_clock(whole[1].folder / "metrics.jsonl")
    assert checkpoint.torn(run.checkpoints) == []


@pytest.mark.parametrize("log", ["metrics.jsonl", "rollouts.jsonl", "eval.jsonl"])
def test_a_log_that_lost_its_end_is_a_clear_refusal(killed, tmp_path, log):
    """The checkpoint counts on it; to lengthen it with zeros again, as truncate would, is no way out."""
    shutil.copytree(killed, tmp_path / "run")
    path = tmp_path / "run" / log
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RunError, match=rf"{log}.* 100 bytes.*--output"):
        run_toy(tmp_path / "run", CHANGES, resume=True)
    path.unlink()
    with pytest.raises(RunError, match=rf"{log}.* 0 bytes"):
        run_toy(tmp_path / "run", CHANGES, resume=True)


@pytest.mark.parametrize("log", ["metrics.jsonl", "eval.jsonl"])
def test_a_log_with_other_content_is_a_clear_refusal(killed, tmp_path, log):
    shutil.copytree(killed, tmp_path / "run")
    path = tmp_path / "run" / log
    path.write_bytes(b"\xff{" + path.read_bytes()[2:])
    with pytest.raises(RunError, match=f"{log}.*--output"):
        run_toy(tmp_path / "run", CHANGES, resume=True)


def test_half_a_line_after_the_checkpoint_is_cut_off(whole, killed, tmp_path):
    shutil.copytree(killed, tmp_path / "run")
    for log in ("metrics.jsonl", "rollouts.jsonl", "eval.jsonl"):
        with (tmp_path / "run" / log).open("a") as file:
            file.write('{"step": 6, "rew')
    resumed, _ = run_toy(tmp_path / "run", CHANGES, resume=True)
    assert torch.equal(resumed.adapter, whole[0].adapter)


# -- disks --------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MB of its own."""
    if shutil.which("mount") is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def fill(disk: Path, free: int) -> Path:
    """Leave so many bytes free; -> the file to delete."""
    ballast = disk / "ballast"
    ballast.write_bytes(b"x" * (shutil.disk_usage(disk).free - free))
    return ballast


@pytest.mark.parametrize("free", [4096 * pages for pages in range(1, 14)])
def test_a_disk_that_fills_in_mid_checkpoint_leaves_the_ones_before(whole, killed, small_disk, free):
    """In the logs, in a file of the checkpoint, in the adapter. With room again it goes on as if nothing had been."""
    shutil.copytree(killed, small_disk / "run")
    ballast = fill(small_disk, free)
    with contextlib.suppress(RunError):
        run_toy(small_disk / "run", CHANGES, resume=True)
        assert free >= 4 * 4096, "it was not full"
    assert checkpoint.newest(small_disk / "run" / "checkpoints") is not None
    assert not list((small_disk / "run" / "checkpoints").glob(".part-*"))
    ballast.unlink()
    if not checkpoint.is_complete(checkpoint.newest(small_disk / "run" / "checkpoints")):
        resumed, run = run_toy(small_disk / "run", CHANGES, resume=True)
        assert torch.equal(resumed.adapter, whole[0].adapter)
        assert (run.folder / "rollouts.jsonl").read_bytes() == (whole[1].folder / "rollouts.jsonl").read_bytes()


def test_a_full_disk_says_what_to_do(killed, small_disk):
    shutil.copytree(killed, small_disk / "run")
    fill(small_disk, 0)
    with pytest.raises(RunError) as caught:
        run_toy(small_disk / "run", CHANGES, resume=True)
    assert "No space left on device" in str(caught.value)
    assert "lite-trgrpo train --resume" in str(caught.value)


def test_a_folder_that_vanishes_is_one_message(tmp_path):
    def vanish(metrics):
        if metrics["step"] == 3:
            shutil.rmtree(tmp_path / "run")

    with pytest.raises(RunError, match=r"rollouts\.jsonl.*No such file.*--resume"):
        run_toy(tmp_path / "run", CHANGES, on_step=vanish)


@pytest.mark.skipif(os.name != "posix", reason="no remounting")
def test_a_disk_that_becomes_read_only_is_one_message(killed, small_disk):
    shutil.copytree(killed, small_disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(RunError, match="Read-only file system"):
        run_toy(small_disk / "run", CHANGES, resume=True)
    assert checkpoint.newest(small_disk / "run" / "checkpoints").name == "step-000004"
    with pytest.raises(RunError, match=str(small_disk / "run")), locked(small_disk / "run"):
        pass


# -- one folder, one run ------------------------------------------------------------------------------------


def test_a_lock_holds_others_off_and_dies_with_its_owner(tmp_path):
    taken = pytest.raises(RunError, match=rf"{tmp_path}.*\b{os.getpid()}\b")
    with locked(tmp_path), taken, locked(tmp_path):
        pass
    with locked(tmp_path):  # the file that stays behind blocks nothing
        pass


def test_a_lock_file_left_behind_blocks_nothing(tmp_path):
    (tmp_path / ".lock").write_text("999999\n")
    with locked(tmp_path):
        pass


def test_a_run_killed_before_its_first_checkpoint_starts_over(whole, tmp_path):
    run_toy(tmp_path / "run", CHANGES)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    resumed, run = run_toy(tmp_path / "run", CHANGES, resume=True)
    assert torch.equal(resumed.adapter, whole[0].adapter)
    assert [line["step"] for line in Run(run.folder).metrics()] == [1, 2, 3, 4, 5, 6]
