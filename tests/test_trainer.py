"""The loop on a toy policy: it learns, and what must not matter does not."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lite_trgrpo.build import encode
from lite_trgrpo.config import loading
from lite_trgrpo.config.schema import Train
from lite_trgrpo.errors import RunError
from lite_trgrpo.records import Example
from lite_trgrpo.store.checkpoint import newest
from lite_trgrpo.store.run import Run
from lite_trgrpo.training import loop
from lite_trgrpo.training.optimizer import learning_rate_at
from lite_trgrpo.training.state import Listener
from lite_trgrpo.training.stopping import Stop
from tests.toy import InProcess, ToyPolicy

BASE = {
    "model": {"name": "toy"},
    "data": {"source": "toy.jsonl"},
    "rewards": {"functions": {"exact": 1.0}},
    "rollout": {"group_size": 8, "max_new_tokens": 4},
    "train": {"steps": 60, "prompts_per_step": 5, "learning_rate": 0.1, "checkpoint_every": 10},
    "eval": {"samples": 2},
}
# the answer to every digit is the letter below it, then the end
EXAMPLES = [Example(str(i), {"answer": "abc"[i % 3]}, f"toy:{i}") for i in range(6)]


def run_toy(
    folder: Path,
    changes: dict | None = None,
    stop_after: int | None = None,
    resume: bool = False,
    policy: ToyPolicy | None = None,
    stop: Stop | None = None,
    said: list[str] | None = None,
    on_step: Callable[[dict], None] = lambda metrics: None,
):
    """Train the toy; -> (policy, run). After the step `stop_after` it is killed, before a checkpoint."""
    settings = {section: {**values, **(changes or {}).get(section, {})} for section, values in BASE.items()}
    for section, values in (changes or {}).items():
        settings.setdefault(section, values)
    config = loading.validate(settings)
    policy = policy or ToyPolicy()
    encoded, _ = encode(policy, EXAMPLES, 8)
    run = Run(folder)
    if not resume:
        Run.vacant(folder).create()
        run.describe(config, {})

    def killer(metrics, groups):
        on_step(metrics)
        if metrics["step"] == stop_after:
            raise KeyboardInterrupt

    warned = [].append if said is None else said.append
    listener = Listener(
        step=killer, doing=lambda what: None, evaluated=lambda line: None, warned=warned, saved=lambda: None
    )
    loop.train(
        config, policy, encoded, encoded, InProcess(config.rewards.functions, config.rewards.options), run, listener,
        stop or Stop(), resume=newest(run.checkpoints) if resume else None,
    )  # fmt: skip
    return policy, run


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_clock(path: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "clock"} for line in lines(path)]


@pytest.mark.parametrize("objective", [
    {}, {"weights": "none"}, {"weights": "centred", "aggregation": "token"}, {"placement": "ratio"},
    {"beta": 0.01}, {"advantage": "rloo", "aggregation": "constant"},
])  # fmt: skip
def test_the_toy_learns(tmp_path, objective):
    _, run = run_toy(tmp_path / "run", {"objective": objective})
    before, after = run.evaluations()[0], run.evaluations()[-1]
    assert before["pass@1"]["value"] < 0.4
    assert after["pass@1"]["value"] >= 5 / 6
    assert after["pass@1_sampled"] > 2 * before["pass@1_sampled"]


def test_a_flipped_sign_would_unlearn(tmp_path):
    """The mirror of the test above: with the reward negated the right answers vanish."""
    _, run = run_toy(tmp_path / "run", {"rewards": {"functions": {"exact": -1.0}}})
    assert run.evaluations()[-1]["pass@1_sampled"] < 0.05


def test_same_seed_same_run_other_seed_other_run(tmp_path):
    runs = [run_toy(tmp_path / str(i), {"train": {"steps": 5, "seed": seed}})[1] for i, seed in enumerate([3, 3, 4])]
    logs = [without_clock(run.folder / "metrics.jsonl") for run in runs]
    rollouts = [(run.folder / "rollouts.jsonl").read_text() for run in runs]
    assert logs[0] == logs[1] != logs[2]
    assert rollouts[0] == rollouts[1] != rollouts[2]


@pytest.mark.parametrize("changes", [{}, {"train": {"updates_per_batch": 2}, "objective": {"beta": 0.01}}])
def test_killed_and_resumed_equals_never_killed(tmp_path, changes):
    changes = {**changes, "train": {"steps": 12, "checkpoint_every": 5, **changes.get("train", {})}}
    whole, run = run_toy(tmp_path / "whole", changes)
    with pytest.raises(KeyboardInterrupt):
        run_toy(tmp_path / "killed", changes, stop_after=7)
    resumed, again = run_toy(tmp_path / "killed", changes, resume=True)
    assert torch.equal(whole.adapter, resumed.adapter)
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert without_clock(run.folder / name) == without_clock(again.folder / name)
    assert (run.folder / "rollouts.jsonl").read_text() == (again.folder / "rollouts.jsonl").read_text()


@pytest.mark.parametrize("changes", [
    {"objective": {"aggregation": "sequence"}}, {"objective": {"aggregation": "token", "beta": 0.1}},
    {"train": {"updates_per_batch": 2}},
])  # fmt: skip
def test_micro_batches_never_matter(tmp_path, changes):
    adapters = []
    for budget in (1, 13, 10_000):
        train = {"steps": 4, **changes.get("train", {}), "micro_batch_tokens": budget}
        adapters.append(run_toy(tmp_path / str(budget), {**changes, "train": train})[0].adapter)
    # Adam divides by the gradient's own size, so the 1e-16 of a changed order of summation may grow a little
    torch.testing.assert_close(adapters[0], adapters[2], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(adapters[1], adapters[2], rtol=1e-9, atol=1e-9)


def test_equal_rewards_cost_no_forward_and_move_nothing(tmp_path):
    policy, run = run_toy(tmp_path / "run", {"rewards": {"functions": {"exact": 0.0, "overlong": 1.0}, "options": {
        "overlong": {"max_tokens": 100, "buffer": 10}}}, "train": {"steps": 3}})  # fmt: skip
    assert policy.calls == []
    assert policy.adapter.eq(0).all()
    assert [line["groups_with_signal"] for line in lines(run.folder / "metrics.jsonl")] == [0, 0, 0]


def test_the_logged_numbers_are_right(tmp_path):
    _, run = run_toy(tmp_path / "run", {"train": {"steps": 2}})
    metrics = lines(run.folder / "metrics.jsonl")[0]
    groups = [line for line in lines(run.folder / "rollouts.jsonl") if line["step"] == 1]
    answers = [answer for group in groups for answer in group["completions"]]
    assert len(groups) == 5 and len(answers) == 40
    assert metrics["reward_mean"] == pytest.approx(sum(a["reward"] for a in answers) / 40)
    assert metrics["solved"] == sum(a["parts"]["exact"] == 1 for a in answers) / 40
    assert metrics["truncated"] == sum(not a["stopped"] for a in answers) / 40
    assert metrics["tokens"] == sum(len(a["ids"]) for a in answers)
    assert metrics["sampler_gap_max"] < 1e-12  # the toy's sampler is its scorer
    assert 1 <= metrics["weight_mean"] <= 1.4
    # r = 1 and sum of A = 0 in each group, yet the loss is not 0: every answer is divided by its own length
    for group in groups:
        for answer in group["completions"]:
            assert answer["parts"]["exact"] == float(answer["text"] == group["answer"])


def test_truncated_answers_can_be_left_out(tmp_path):
    changes = {
        "rollout": {"max_new_tokens": 2},
        "objective": {"mask_truncated": True, "beta": 0.1},
        "train": {"steps": 1},
    }
    policy, run = run_toy(tmp_path / "run", changes)
    groups = lines(run.folder / "rollouts.jsonl")
    stopped = sum(answer["stopped"] for group in groups for answer in group["completions"])
    assert 0 < stopped < 40
    assert sum(policy.calls) == stopped


def test_a_run_folder_is_not_overwritten(tmp_path):
    run_toy(tmp_path / "run", {"train": {"steps": 1}})
    with pytest.raises(RunError, match="--resume"):
        run_toy(tmp_path / "run", {"train": {"steps": 1}})


def test_learning_rate_schedules():
    train = Train(steps=10, warmup_steps=2, learning_rate=1.0, schedule="linear")
    assert [learning_rate_at(step, train) for step in (0, 1, 2, 6)] == [0.5, 1.0, 1.0, 0.5]
    cosine = train.model_copy(update={"schedule": "cosine"})
    assert learning_rate_at(6, cosine) == pytest.approx(0.5)
    assert learning_rate_at(9, train.model_copy(update={"schedule": "constant"})) == 1.0


def test_groups_without_signal_are_replaced_in_bounded_rounds(tmp_path):
    changes = {"rollout": {"top_up_rounds": 2, "group_size": 4}, "train": {"steps": 6, "checkpoint_every": 3}}
    policy, run = run_toy(tmp_path / "run", changes)
    groups = lines(run.folder / "rollouts.jsonl")
    for metrics in lines(run.folder / "metrics.jsonl"):
        sampled = [group for group in groups if group["step"] == metrics["step"]]
        spread = [len({answer["reward"] for answer in group["completions"]}) > 1 for group in sampled]
        first, taught = spread[:5], sum(spread)
        assert len(sampled) == 5 if all(first) else len(sampled) > 5
        assert taught <= 5 and len(sampled) <= 15
        asked = [group["origin"] for group in sampled]
        assert set(asked[:5]).isdisjoint(asked[5:]) and len(set(asked[5:])) == len(asked[5:])  # none is asked again
        assert metrics["groups_with_signal"] == taught / len(sampled)
    with pytest.raises(KeyboardInterrupt):
        run_toy(tmp_path / "killed", changes, stop_after=5)
    resumed, again = run_toy(tmp_path / "killed", changes, resume=True)
    assert torch.equal(policy.adapter, resumed.adapter)
    assert (again.folder / "rollouts.jsonl").read_text() == (run.folder / "rollouts.jsonl").read_text()
