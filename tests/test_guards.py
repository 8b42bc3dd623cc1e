"""Guards: silent on healthy runs, critical in every kind of trouble; falling back, and what comes out of it."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lite_trgrpo.config.loading import load
from lite_trgrpo.config.schema import Guards
from lite_trgrpo.store.run import Run
from lite_trgrpo.training import guards
from lite_trgrpo.training.stopping import Stopped
from tests.test_trainer import run_toy, without_clock
from tests.toy import ToyPolicy

# metrics of the demo on seeds 0, 1, 2, without what the guards do not read
DEMOS = json.loads((Path(__file__).parent / "healthy_demo.json").read_text())
WELL = {
    "updates_skipped": 0, "entropy_sampled": 0.8, "grad_norm": 0.5, "truncated": 0.1, "length_mean": 40.0,
    "groups_with_signal": 0.5, "solved": 0.3, "reward_mean": 0.3, "reward_std": 0.4, "guards": {},
}  # fmt: skip


def lit(changes: list[dict], evaluations=(), **options) -> dict[str, str]:
    """Name -> colour after these steps, each a healthy one with something changed; 4 prompts, a cap of 100 tokens."""
    history = [{**WELL, "step": i + 1, **change} for i, change in enumerate(changes)]
    return {alert.name: alert.level for alert in guards.alerts(history, evaluations, Guards(**options), 4, 100)}


@pytest.mark.parametrize("seed", DEMOS)
def test_healthy_demo_runs_raise_no_alarm_at_any_step(seed):
    history = [{**line, "guards": {}} for line in DEMOS[seed]["metrics"]]
    options = load("demo").guards
    for done in range(1, len(history) + 1):
        evaluations = [line for line in DEMOS[seed]["evaluations"] if line["step"] < done]
        assert guards.alerts(history[:done], evaluations, options, 4, 16) == [], done
    assert guards.alerts(history, DEMOS[seed]["evaluations"], options, 4, 16) == []


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("finite", {"updates_skipped": 1}),
        ("entropy", {"entropy_sampled": 0.005}),
        ("grad_norm", {"grad_norm": 11.0}),
        ("kl", {"kl": 2.5}),
        ("truncated", {"truncated": 1.0}),
    ],
)
def test_one_bad_step_warns_and_five_in_a_row_are_critical(name, bad):
    assert lit([{}] * 6) == {}
    assert lit([{}] * 6 + [bad]) == {name: "warning"}
    assert lit([{}] * 6 + [bad] * 4) == {name: "warning"}
    assert lit([{}] * 6 + [bad] * 5) == {name: "critical"}
    assert lit([{}] * 6 + [bad] * 5 + [{}]) == {}


def test_one_update_that_throws_the_policy_far_is_critical_at_once():
    assert lit([{}] * 6 + [{"update_kl": 2.1}]) == {"update_kl": "critical"}
    assert lit([{}] * 6 + [{"update_kl": 1.9}]) == lit([{}] * 6 + [{"update_kl": 0.0}]) == {}
    assert lit([{}] * 6 + [{"update_kl": None}]) == {"update_kl": "critical"}  # NaN in JSON
    assert lit([{}] * 6 + [{"entropy_sampled": None, "updates_skipped": 1}]) == {"finite": "critical"}


def test_a_step_without_a_measurement_neither_alarms_nor_interrupts():
    """A step without an update has a gradient of 0, which says nothing about the gradient."""
    high, none = {"grad_norm": 11.0}, {"grad_norm": 0.0}
    assert lit([{}] + [high, none] * 4 + [high]) == {"grad_norm": "critical"}
    assert lit([{}] + [high, none] * 4) == {}


def test_a_solved_task_may_stop_varying():
    still = {"entropy_sampled": 0.001, "groups_with_signal": 0.0, "solved": 0.95}
    assert lit([{}] * 6 + [still] * 20) == {}
    assert lit([{}] * 6 + [{**still, "solved": 0.85}] * 20) == {"entropy": "critical", "signal": "critical"}


def test_silence_is_an_alarm_when_it_is_no_luck():
    """4 prompts, half of the groups had signal: (1 / 2)^20 = 1e-6 for five silent steps; a tenth: 0.9^20 = 0.12."""
    silent = {"groups_with_signal": 0.0}
    assert lit([{}] * 6 + [silent] * 4) == {}
    assert lit([{}] * 6 + [silent] * 5) == {"signal": "critical"}
    assert lit([{"groups_with_signal": 0.1}] * 10 + [silent] * 5) == {}
    assert lit([{"groups_with_signal": 0.1}] * 10 + [silent] * 17) == {"signal": "critical"}  # 0.9^68 = 8e-4
    assert lit([silent] * 50) == {}  # a task that was never in reach is not a collapse


def test_answers_that_grow_to_the_cap_warn():
    assert lit([{}] * 6 + [{"length_mean": 92.0}] * 5) == {"length": "warning"}
    assert lit([{"length_mean": 92.0}] * 11) == {}  # they were that long from the start
    assert lit([{}] * 6 + [{"length_mean": 80.0}] * 5) == {}


def test_reward_without_held_out_gain_warns():
    risen = [{}] * 5 + [{"reward_mean": 0.7}] * 5
    flat, better = ({"step": 10, "gain": {"value": value}} for value in (0.0, 0.02))
    assert lit(risen, [{"step": 0}, flat]) == {"held_out": "warning"}
    assert lit(risen, [{"step": 0}, better]) == lit(risen, [{"step": 0}]) == lit([{}] * 10, [{"step": 0}, flat]) == {}


def test_every_alert_gives_advice_that_names_an_option():
    history = [{**WELL, "step": i, "kl": 9.0, "truncated": 1.0, "grad_norm": 99.0} for i in range(9)]
    for alert in guards.alerts(history, [], Guards(), 4, 100):
        assert any(section in alert.advice for section in ("train.", "rollout.", "objective."))


def test_what_came_before_a_roll_back_is_over_and_its_silent_steps_are_not_good():
    bad = {"truncated": 1.0}
    steps = [
        {},
        {},
        {"groups_with_signal": 0.0},
        bad,
        {**bad, "guards": {"truncated": "critical"}, "rolled_back_to": 1},
    ]
    assert lit([*steps, {}]) == {} and lit([*steps, bad]) == {"truncated": "warning"}
    history = [{**WELL, **change} for change in [*steps, {}]]
    history[3]["guards"] = {"truncated": "warning"}
    # line i vouches for step i: 2 was silent, 3 and 4 have alerts
    assert guards.good_steps(history, range(9)) == [5, 1, 0]
    assert guards.good_steps(history, {0, 4}) == [0]
    history[1]["guards"] = {"update_kl": "critical"}  # of the update that made the adapter of step 2
    assert guards.good_steps(history, range(9)) == [5, 1, 0]
    assert (guards.restart(history), guards.rollbacks(history)) == (5, 1)


# -- driven into collapse -----------------------------------------------------------------------------------

COLLAPSE = {  # a thousand times the rate at which the toy learns
    "train": {"learning_rate": 100.0, "steps": 25, "checkpoint_every": 5},
    "eval": {"every": 0, "samples": 0},
}


def test_a_collapse_is_noticed_rolled_back_and_ends_well(tmp_path):
    said: list[str] = []
    _, run = run_toy(tmp_path / "alone", COLLAPSE, said=said)
    assert said[0].startswith("guard 'update_kl' critical at step 1: one update moved the policy by more than 2 nats")
    assert not any("rolled_back_to" in line for line in run.metrics())
    assert sum(line["solved"] for line in run.metrics()[-5:]) / 5 < 0.5
    _, run = run_toy(tmp_path / "rescued", {**COLLAPSE, "guards": {"rollbacks": 10}})
    back = [line.get("rolled_back_to") for line in run.metrics()]
    assert back[:6] == [0, 0, 0, 0, 0, 5] and set(back[6:]) == {None}
    assert [line["learning_rate"] for line in run.metrics()[:7]] == [100 / 2**i for i in range(7)]
    assert sum(line["solved"] for line in run.metrics()[-5:]) / 5 > 0.9


def test_after_so_many_times_it_ends_with_the_last_good_adapter_and_says_why(tmp_path):
    with pytest.raises(Stopped) as caught:
        run_toy(tmp_path, {**COLLAPSE, "guards": {"rollbacks": 2}})
    assert str(caught.value) == "guard 'update_kl' after 2 roll-backs; the adapter is that of step 0"
    assert caught.value.code == 1
    assert [line["step"] for line in Run(tmp_path).metrics()] == [1, 2, 3]
    assert load_file(tmp_path / "adapter" / "adapter.safetensors")["adapter"].eq(0).all()  # as the toy starts


def test_a_run_killed_around_its_roll_backs_decides_alike(tmp_path):
    changes = {**COLLAPSE, "train": {**COLLAPSE["train"], "steps": 12}, "guards": {"rollbacks": 10}}
    whole, run = run_toy(tmp_path / "whole", changes)
    for killed_after in (3, 6, 9):
        with pytest.raises(KeyboardInterrupt):
            run_toy(tmp_path / "killed", changes, stop_after=killed_after, resume=killed_after > 3)
    resumed, again = run_toy(tmp_path / "killed", changes, resume=True)
    assert torch.equal(resumed.adapter, whole.adapter)
    assert without_clock(again.folder / "metrics.jsonl") == without_clock(run.folder / "metrics.jsonl")


def test_a_step_with_a_probability_that_is_no_number_is_skipped_logged_and_passed(tmp_path):
    class Broken(ToyPolicy):
        def sample(self, prompts, sampling, wanted):
            for p, member, completion in super().sample(prompts, sampling, wanted):
                if (p, member) == (0, 0) and sampling.key[2:3] == (1,):  # in the second step
                    completion = replace(completion, logprobs=(math.nan,) * len(completion.ids))
                yield p, member, completion

    changes = {"train": {"steps": 3, "checkpoint_every": 1}, "eval": {"samples": 0}}
    _, run = run_toy(tmp_path, changes, policy=Broken())
    metrics = run.metrics()
    assert [line["updates_skipped"] for line in metrics] == [0, 1, 0]
    assert [line["guards"] for line in metrics] == [{}, {"finite": "critical"}, {}]
    assert metrics[1]["entropy_sampled"] is None and "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    steps = [tmp_path / "checkpoints" / f"step-{step:06d}" / "adapter.safetensors" for step in (1, 2, 3)]
    assert steps[0].read_bytes() == steps[1].read_bytes() != steps[2].read_bytes()
