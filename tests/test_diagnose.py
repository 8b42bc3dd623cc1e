"""diagnose and compare: the numbers are gradients, and an arm that was stopped goes on."""

import json

import pytest
import torch
from typer.testing import CliRunner

from lite_trgrpo.build import encode
from lite_trgrpo.cli import app
from lite_trgrpo.config import loading
from lite_trgrpo.config.schema import Objective
from lite_trgrpo.model.oom import Limits
from lite_trgrpo.study import diagnose
from lite_trgrpo.training import loop
from lite_trgrpo.training.update import prepare_rows, update
from tests.test_trainer import BASE, EXAMPLES
from tests.toy import InProcess, ToyPolicy


@pytest.fixture
def sampled():
    config = loading.validate(BASE)
    policy = ToyPolicy()
    encoded, _ = encode(policy, EXAMPLES, 8)
    clock = {"rollout_s": 0.0, "reward_s": 0.0}
    groups, _ = loop.rollout(config, policy, encoded, InProcess({"exact": 1.0}), 0, clock)
    return policy, prepare_rows(groups, config.objective, 4)


class Recorder(torch.optim.SGD):
    """Keeps the gradient it was given and moves nothing."""

    def step(self, closure=None):
        self.seen = torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]])


def total_gradient(policy, rows, objective):
    optimizer = Recorder(policy.trainable().values(), lr=0.0)
    update(policy, optimizer, rows, objective, temperature=1.0, updates=1, limits=Limits(999, 1), max_grad_norm=1e9)
    return optimizer.seen


@pytest.mark.parametrize("budget", [5, 999])
def test_quartiles_add_up_to_the_gradient_of_the_update(sampled, budget):
    policy, rows = sampled
    result = diagnose.quartile_gradients(policy, rows, Objective(), 1.0, budget)
    assert result["tokens"] == sum(len(row.completion.ids) for row in rows)
    for reading, quartiles in result["readings"].items():
        assert sum(q["tokens"] for q in quartiles) == pytest.approx(1)
        assert sum(q["norm_share"] for q in quartiles) == pytest.approx(1)
        # |total| = sum of the projections of the parts on it
        total = total_gradient(policy, rows, Objective(weights=reading)).norm().item()
        assert sum(q["norm"] * q["cosine"] for q in quartiles) == pytest.approx(total, rel=1e-5)


def test_weights_of_one_change_nothing_and_others_do(sampled):
    policy, rows = sampled
    flat = diagnose.quartile_gradients(policy, rows, Objective(weight={"low": 1.0, "high": 1.0}), 1.0, 99)["readings"]
    for a, b in zip(flat["offset"], flat["none"], strict=True):
        assert a == pytest.approx(b)
    readings = diagnose.quartile_gradients(policy, rows, Objective(), 1.0, 99)["readings"]
    # a table has few different probabilities, so a quartile may be empty
    weights = {name: [round(q["weight"], 9) for q in quartiles if q["tokens"]] for name, quartiles in readings.items()}
    assert set(weights["none"]) == {1}
    assert weights["offset"] == sorted(weights["offset"]) and weights["offset"][0] < weights["offset"][-1]
    assert weights["reverse"] == sorted(weights["reverse"], reverse=True)


def test_norms_of_single_tokens(sampled):
    policy, rows = sampled
    found = diagnose.token_gradient_norms(policy, rows, 1.0, tokens=10)
    assert len(found) == 10
    assert [p for p, _ in found] == sorted(p for p, _ in found)
    for p, norm in found:
        # in a table of logits the gradient of log p is e_token - softmax: between 1 - p and sqrt 2 (1 - p) long
        assert (1 - p) <= norm + 1e-9 <= 2**0.5 * (1 - p) + 2e-9


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_diagnose_command(tiny_config, tmp_path):
    out = run("diagnose", "--config", tiny_config, "--prompts", 4, "--json", "--figure", tmp_path / "figure.svg")
    result = json.loads(out)
    assert set(result["readings"]) == {"none", "offset", "centred", "reverse"}
    assert (tmp_path / "figure.svg").read_text().startswith("<?xml")
    table = run("diagnose", "--config", tiny_config, "--prompts", 4)
    assert all(name in table for name in result["readings"])


def test_compare_refuses_arms_with_the_same_options(tiny_config, tmp_path):
    same = ["compare", "-c", tiny_config, "--objectives", "grpo,tr-grpo", "--seeds", "0", "-o", tmp_path / "c"]
    refused = CliRunner().invoke(app, [str(a) for a in (*same, "-s", "objective.weights=none")])
    assert refused.exit_code == 1 and "grpo" in refused.stderr and "--set" in refused.stderr


def test_a_figure_that_cannot_be_drawn_is_refused_first(tiny_config, tmp_path):
    arguments = ["diagnose", "--config", str(tiny_config), "--figure", str(tmp_path / "figure.docx")]
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 1 and "figure.docx" in refused.stderr and ".svg" in refused.stderr


def test_compare_is_fair_goes_on_and_refuses_other_options(tiny_config, tmp_path):
    arguments = ["compare", "-c", tiny_config, "--objectives", "grpo,tr-grpo", "--seeds", "0,1", "-o", tmp_path / "c"]
    table = run(*arguments)
    result = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert [one["objective"] for one in result["objectives"]] == ["grpo", "tr-grpo"]
    assert result["objectives"][0]["over_first"]["value"] == 0
    assert "| grpo" in table and "| tr-grpo" in table

    def first_groups(arm):
        lines = (tmp_path / "c" / arm / "rollouts.jsonl").read_text().splitlines()
        return [line for line in lines if json.loads(line)["step"] == 1]

    assert first_groups("grpo-s0") == first_groups("tr-grpo-s0") != first_groups("grpo-s1")
    before = (tmp_path / "c" / "grpo-s1" / "metrics.jsonl").stat().st_mtime_ns
    (tmp_path / "c" / "tr-grpo-s1" / "kl.json").unlink()
    config = tmp_path / "c" / "grpo-s0" / "config.toml"  # a base from the Hub is pinned there to its commit
    config.write_text(config.read_text().replace("[model]\n", '[model]\nrevision = "0123abc"\n', 1))
    assert run(*arguments) == table
    assert (tmp_path / "c" / "grpo-s1" / "metrics.jsonl").stat().st_mtime_ns == before
    refused = CliRunner().invoke(app, [str(a) for a in (*arguments, "-s", "train.learning_rate=1")])
    assert refused.exit_code == 1 and str(tmp_path / "c") in refused.stderr and "--output" in refused.stderr
