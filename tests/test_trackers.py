"""Trackers: off unless asked, a missing package is said at once, what they are sent, and that a resumed run goes on."""

import sqlite3

import pytest
from typer.testing import CliRunner

from lite_trgrpo.cli import app
from lite_trgrpo.errors import MissingPackageError, RunError
from lite_trgrpo.store import trackers

STEP = {
    "step": 3, "reward_mean": 0.5, "grad_norm": None, "weight_histogram": [0.5, 0.5], "guards": {"kl": "critical"},
    "clock": {"rollout_s": 2.0},
}  # fmt: skip
EVALUATION = {
    "step": 3, "pass@1": {"value": 0.5, "low": 0.25, "high": 0.75}, "truncated": 0, "rows": [],
    "clock": {"eval_s": 9.0},
}  # fmt: skip


def test_only_numbers_are_sent_and_evaluations_under_their_own_name():
    assert trackers.numbers(STEP) == {"reward_mean": 0.5, "clock/rollout_s": 2.0}
    assert trackers.numbers(EVALUATION) == {
        "eval/pass@1": 0.5, "eval/pass@1/low": 0.25, "eval/pass@1/high": 0.75, "eval/truncated": 0.0,
        "eval/clock/eval_s": 9.0,
    }  # fmt: skip


def test_without_one_nothing_happens(tmp_path):
    trackers.check(None)
    with trackers.tracked(None, tmp_path, {}, None) as log:
        log(STEP)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_said_before_anything_is_loaded(monkeypatch, tmp_path):
    from lite_trgrpo import session

    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    monkeypatch.setattr(session, "policy_of", lambda config: pytest.fail("the model was loaded first"))
    given = ["train", "-p", "demo", "-o", str(tmp_path / "run"), "-s", "train.track=wandb"]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 1
    assert "train.track = wandb" in result.stderr and "pip install wandb" in result.stderr
    assert not (tmp_path / "run").exists()
    with pytest.raises(MissingPackageError):
        trackers.check("trackio")


def test_a_tracker_that_cannot_start_raises_and_one_that_fails_later_warns(monkeypatch, tmp_path, caplog):
    calls = []

    def failing(*given):
        raise OSError("no network")

    def log(step, values):
        calls.append(step)
        raise OSError("no network")

    monkeypatch.setitem(trackers._STARTS, "wandb", failing)
    with (
        pytest.raises(RunError, match=r"train\.track = wandb.*no network"),
        trackers.tracked("wandb", tmp_path, {}, None),
    ):
        pytest.fail("it started")
    monkeypatch.setitem(trackers._STARTS, "wandb", lambda *given: (log, lambda: calls.append("closed")))
    with trackers.tracked("wandb", tmp_path, {}, None) as send:
        send(STEP)
        send(STEP)
    assert calls == [3]
    assert sum("wandb" in record.getMessage() for record in caplog.records) == 1


def test_tensorboard_holds_a_run_that_was_resumed(tmp_path):
    """Steps after the checkpoint are written twice, and the second time counts."""
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for done, steps in ((None, (1, 2, 3)), (1, (2, 3, 4))):
        with trackers.tracked("tensorboard", tmp_path, {}, done) as log:
            for step in steps:
                log({"step": step, "reward_mean": step / (10 if done else 100)})
            log(EVALUATION)
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    values = [(event.step, round(event.value, 6)) for event in found.Scalars("reward_mean")]
    assert values == [(1, 0.01), (2, 0.2), (3, 0.3), (4, 0.4)]
    assert "eval/pass@1" in found.Tags()["scalars"]


def test_trackio_keeps_one_run_when_it_is_resumed(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="pip install trackio")
    folder = tmp_path / "mine"
    folder.mkdir()
    for done, steps in ((None, (1, 2)), (2, (3,))):
        with trackers.tracked("trackio", folder, {"train": {"steps": 3}}, done) as log:
            for step in steps:
                log({"step": step, "reward_mean": 0.5})
    [path] = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(path) as database:
        rows = database.execute("select run_name, step from metrics order by step").fetchall()
    assert rows == [("mine", 1), ("mine", 2), ("mine", 3)]


def test_wandb_keeps_its_id_when_a_run_is_resumed(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for done in (None, 2):
        with trackers.tracked("wandb", tmp_path, {"train": {"steps": 3}}, done) as log:
            log({"step": 1 + (done or 0), "reward_mean": 0.5})
        ids.append((tmp_path / "wandb-id").read_text())
    assert ids[0] == ids[1] and len(list((tmp_path / "wandb").glob(f"offline-run-*-{ids[0]}"))) == 2
