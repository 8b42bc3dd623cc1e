"""The first signal ends a run with everything saved, the second at once; times that are set do as the first."""

import os
import re
import signal
import subprocess
import sys
import time
from datetime import datetime

import pytest
import torch
from safetensors.torch import load_file

from lite_trgrpo.errors import ConfigError
from lite_trgrpo.store import checkpoint
from lite_trgrpo.training.stopping import Stop, Stopped, next_time
from tests.test_trainer import run_toy, without_clock
from tests.toy import ToyPolicy

posix = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
CHANGES = {"train": {"steps": 6, "checkpoint_every": 4, "updates_per_batch": 2}, "eval": {"every": 3, "samples": 0}}


class Disturbed(ToyPolicy):
    """At its `at`-th call of `method` the process gets `signals`; notes how often the method came to its end."""

    def __init__(self, method: str, at: int, signals: list[int]) -> None:
        super().__init__()
        self.method, self.at, self.signals, self.begun, self.ended = method, at, signals, 0, 0

    def _disturb(self, method: str, work):
        if method != self.method:
            return work()
        self.begun += 1
        if self.begun == self.at:
            for number in self.signals:
                os.kill(os.getpid(), number)
                time.sleep(0)  # Python runs its handlers between two instructions
        result = work()
        self.ended += 1
        return result

    def sample(self, prompts, sampling, wanted):
        method = "evaluate" if sampling.greedy else "sample"
        yield from self._disturb(method, lambda: list(super(Disturbed, self).sample(prompts, sampling, wanted)))

    def logprobs(self, rows, temperature):
        return self._disturb("logprobs", lambda: super(Disturbed, self).logprobs(rows, temperature))


@posix
@pytest.mark.parametrize(
    ("method", "at", "number", "step", "abandoned"),
    [
        ("sample", 1, signal.SIGINT, 0, True),
        ("sample", 3, signal.SIGTERM, 2, True),
        ("sample", 6, signal.SIGINT, 5, True),
        ("evaluate", 1, signal.SIGTERM, 0, True),
        ("evaluate", 2, signal.SIGINT, 3, True),
        ("evaluate", 3, signal.SIGINT, 6, True),
        ("logprobs", 1, signal.SIGINT, 1, False),
        ("logprobs", 10, signal.SIGTERM, 3, False),
    ],
)
def test_a_signal_ends_a_run_that_goes_on_as_if_nothing_had_been(tmp_path, method, at, number, step, abandoned):
    """Sampling is abandoned; an update, once begun, is finished: `logprobs` is called three times in each."""
    whole, run = run_toy(tmp_path / "whole", CHANGES)
    disturbed = Disturbed(method, at, [number])
    with pytest.raises(Stopped) as caught, Stop() as stop:
        run_toy(tmp_path / "run", CHANGES, policy=disturbed, stop=stop)
    assert (str(caught.value), caught.value.code) == ("Ctrl-C" if number == signal.SIGINT else "SIGTERM", 130)
    assert disturbed.ended == (at - 1 if abandoned else 4 * step)
    saved = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert checkpoint.steps_done(saved) == step and not checkpoint.is_complete(saved)
    assert torch.equal(load_file(tmp_path / "run/adapter/adapter.safetensors")["adapter"], disturbed.adapter)
    resumed, again = run_toy(tmp_path / "run", CHANGES, resume=True)
    assert torch.equal(resumed.adapter, whole.adapter)
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert without_clock(again.folder / name) == without_clock(run.folder / name)
    assert (again.folder / "rollouts.jsonl").read_bytes() == (run.folder / "rollouts.jsonl").read_bytes()


@posix
@pytest.mark.parametrize("method", ["logprobs", "save"])
def test_the_second_signal_ends_it_at_once(tmp_path, method, monkeypatch):
    disturbed = Disturbed("logprobs", 10, [signal.SIGINT] * 2 if method == "logprobs" else [signal.SIGINT])
    if method == "save":  # while it saves what the first asked for
        save = checkpoint.save
        monkeypatch.setattr(
            checkpoint, "save", lambda f, s, *rest: os.kill(os.getpid(), signal.SIGINT) if s == 3 else save(f, s, *rest)
        )
    with pytest.raises(KeyboardInterrupt) as caught, Stop() as stop:
        run_toy(tmp_path / "run", {**CHANGES, "eval": {}}, policy=disturbed, stop=stop)
    assert caught.type is KeyboardInterrupt
    assert checkpoint.steps_done(checkpoint.newest(tmp_path / "run" / "checkpoints")) == 0


def test_a_time_that_is_over_stops_at_the_next_step_with_exit_code_0(tmp_path):
    for name, stop in (("hours", Stop(max_hours=1e-9)), ("at", Stop(stop_at=datetime(2026, 1, 1, 7, 30)))):
        with pytest.raises(Stopped) as caught:
            run_toy(tmp_path / name, CHANGES, stop=stop)
        assert caught.value.code == 0
        assert str(caught.value) == {"hours": "--max-hours 1e-09", "at": "--stop-at 07:30"}[name]
        assert checkpoint.newest(tmp_path / name / "checkpoints").name == "step-000000"


@pytest.mark.parametrize(
    ("text", "now", "then"),
    [
        ("07:00", "2026-11-22 06:59", "2026-11-22 07:00"),
        ("07:00", "2026-11-22 07:00", "2026-11-23 07:00"),
        ("7:05", "2026-12-31 23:00", "2027-01-01 07:05"),
        ("00:00", "2026-11-22 12:00", "2026-11-23 00:00"),
    ],
)
def test_a_time_of_day_is_the_next_one(text, now, then):
    assert next_time(text, datetime.fromisoformat(now)) == datetime.fromisoformat(then)


@pytest.mark.parametrize("text", ["7pm", "25:00", "07:60", "reward>0.9", ""])
def test_what_is_no_time_of_day_says_what_is(text):
    with pytest.raises(ConfigError, match=re.escape(f"--stop-at {text!r} is not a time of day such as 07:00")):
        next_time(text, datetime(2026, 1, 1))


@posix
def test_a_hang_up_is_ignored_and_handlers_are_put_back():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        stop.check()
    assert [signal.getsignal(number) for number in numbers] == before


# -- the whole command --------------------------------------------------------------------------------------


def start(log, *arguments) -> subprocess.Popen:
    with log.open("w") as file:
        command = [sys.executable, "-m", "lite_trgrpo", "train", *map(str, arguments)]
        return subprocess.Popen(command, stderr=file, stdout=subprocess.DEVNULL)


def wait_for(process: subprocess.Popen, log, word: str) -> None:
    while word not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)


@pytest.mark.slow
@posix
def test_ctrl_c_suspend_a_second_run_and_resume(tiny_config, tmp_path):
    folder, logs = tmp_path / "a run", [tmp_path / f"{i}.log" for i in range(3)]
    run = start(logs[0], "--config", tiny_config, "--output", folder, "--steps", 1000)
    wait_for(run, logs[0], "step 2/")
    run.send_signal(signal.SIGSTOP)
    assert start(logs[1], "--resume", folder).wait() == 1
    assert f"error: {folder} is in use by process {run.pid}: wait for it" in logs[1].read_text()
    run.send_signal(signal.SIGHUP)
    run.send_signal(signal.SIGCONT)
    wait_for(run, logs[0], "step 5/")
    run.send_signal(signal.SIGINT)
    asked = time.monotonic()
    assert run.wait() == 130
    assert time.monotonic() - asked < 30  # one, on a machine that has nothing else to do
    assert (
        logs[0]
        .read_text()
        .endswith(f'stopped by Ctrl-C, everything saved. Continue with: lite-trgrpo train --resume "{folder}"\n')
    )
    steps = checkpoint.steps_done(checkpoint.newest(folder / "checkpoints"))
    assert start(logs[2], "--resume", folder, "--steps", steps + 1).wait() == 0
    assert f"Continuing after step {steps} of {steps + 1}" in logs[2].read_text()


@pytest.mark.slow
@posix
def test_a_closed_terminal_does_no_harm(tiny_config, tmp_path):
    """The run is the foreground of a pseudo-terminal; its other side is closed while it works."""
    import pty

    folder = tmp_path / "run"
    child, terminal = pty.fork()
    if child == 0:
        arguments = ["--config", str(tiny_config), "--output", str(folder), "--steps", "30"]
        os.execv(sys.executable, [sys.executable, "-m", "lite_trgrpo", "train", *arguments])
    metrics = folder / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        os.read(terminal, 10_000)
    os.close(terminal)
    assert metrics.read_text().count("\n") < 30
    os.waitpid(child, 0)
    assert checkpoint.is_complete(checkpoint.newest(folder / "checkpoints"))
