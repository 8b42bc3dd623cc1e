"""Whole commands on a tiny real model: what a run leaves, what is said where, what comes after it."""

import json
import tomllib

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lite_trgrpo.cli import app
from lite_trgrpo.config import loading


def call(*arguments, stdin=None):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    assert result.exit_code == 0, result.stderr
    return result


def greedy(evaluation):
    return [row["greedy"] for row in evaluation["rows"]]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def run(tiny_config, tmp_path):
    folder = tmp_path / "run"
    return folder, call("train", "--config", tiny_config, "--output", folder, "--set", "eval.samples=2")


def test_what_a_run_leaves(run, tiny_config):
    folder, _ = run
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock", ".pid", "adapter", "checkpoints", "config.toml", "eval.jsonl", "metrics.jsonl", "report.html",
        "rollouts.jsonl", "run.json",
    ]  # fmt: skip
    # what was resolved at the start is written down: a resumed run decodes in the same batches
    expected = loading.load(file=tiny_config, overrides=["eval.samples=2", "rollout.cache_mib=2048"])
    assert loading.load(file=folder / "config.toml") == expected
    facts = json.loads((folder / "run.json").read_text())
    assert {**facts["prompts"], "sha256": 64} == {"training": 8, "heldout": 4, "too_long": 0, "sha256": 64}
    assert facts["versions"]["torch"] == torch.__version__
    before, after = lines(folder / "eval.jsonl")
    assert (before["step"], after["step"]) == (0, 2)
    assert {"pass@1", "pass@2", "gain"} <= after.keys()
    assert [row["prompt"] for row in before["rows"]] == [row["prompt"] for row in after["rows"]]
    heldout = {row["prompt"] for row in before["rows"]}
    rollouts = lines(folder / "rollouts.jsonl")
    assert len(rollouts) == 2 * 3 and all(len(group["completions"]) == 4 for group in rollouts)
    assert not heldout & {group["prompt"] for group in rollouts}
    model = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")  # plain PEFT, base and adapter
    assert any(p.abs().sum() > 0 for name, p in model.named_parameters() if "lora_B" in name)


def test_talk_goes_to_stderr_and_results_to_stdout(run):
    _, result = run
    assert "<|im_start|>user" in result.stderr  # one prompt as the model reads it
    assert "step 2/2" in result.stderr and "before training" in result.stderr
    assert "gain in pass@1" in result.stdout and "step" not in result.stdout


def test_same_seed_same_run(run, tiny_config, tmp_path):
    folder, _ = run
    call("train", "--config", tiny_config, "--output", tmp_path / "again", "--set", "eval.samples=2")
    for name in ("metrics.jsonl", "eval.jsonl"):
        first, second = ([{**line, "clock": None} for line in lines(f / name)] for f in (folder, tmp_path / "again"))
        assert first == second
    assert (folder / "rollouts.jsonl").read_text() == (tmp_path / "again" / "rollouts.jsonl").read_text()


def test_a_run_goes_on(run, tiny_config, tmp_path):
    folder, _ = run
    call("train", "--resume", folder, "--steps", 4)
    call("train", "--config", tiny_config, "--output", tmp_path / "whole", "--steps", 4, "--set", "eval.samples=2")
    assert [line["step"] for line in lines(folder / "metrics.jsonl")] == [1, 2, 3, 4]
    for a, b in zip(lines(folder / "rollouts.jsonl"), lines(tmp_path / "whole" / "rollouts.jsonl"), strict=True):
        assert a == b
    adapters = [(f / "adapter" / "adapter_model.safetensors").read_bytes() for f in (folder, tmp_path / "whole")]
    assert adapters[0] == adapters[1]
    assert tomllib.loads((folder / "config.toml").read_text())["train"]["steps"] == 4


def test_a_finished_run_says_how_to_go_on(run):
    folder, _ = run
    before = (folder / "config.toml").read_text()
    refused = CliRunner().invoke(app, ["train", "--resume", str(folder), "--steps", "1"])
    assert refused.exit_code == 1 and "--steps" in refused.stderr
    assert (folder / "config.toml").read_text() == before


def test_export_takes_the_adapter_that_the_last_checkpoint_records_and_no_other(run):
    folder, _ = run
    state = json.loads((folder / "checkpoints" / "step-000002" / "state.json").read_text())
    assert state["adapter"].keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert CliRunner().invoke(app, ["export", str(folder), "--dry-run"]).exit_code == 0
    weights = folder / "adapter" / "adapter_model.safetensors"
    save_file({name: -tensor for name, tensor in load_file(weights).items()}, weights)
    refused = CliRunner().invoke(app, ["export", str(folder)])
    assert refused.exit_code == 1 and weights.name in refused.stderr and "SHA-256" in refused.stderr


def test_resume_refuses_a_changed_base_and_names_changed_rewards(run, tmp_path):
    folder, _ = run
    reward, weights = tmp_path / "reward.py", tmp_path / "model" / "model.safetensors"
    reward.write_text(reward.read_text() + "# edited\n")
    assert "reward.py" in call("train", "--resume", folder, "--steps", 3).stderr
    assert "reward.py" not in call("train", "--resume", folder, "--steps", 4).stderr
    tensors = load_file(weights)
    save_file({name: 1.01 * tensor for name, tensor in tensors.items()}, weights, metadata={"format": "pt"})
    before = (folder / "config.toml").read_text(), (folder / "metrics.jsonl").read_text()
    refused = CliRunner().invoke(app, ["train", "--resume", str(folder), "--steps", "5"])
    assert refused.exit_code == 1 and "model.safetensors" in refused.stderr and "config.json" not in refused.stderr
    assert ((folder / "config.toml").read_text(), (folder / "metrics.jsonl").read_text()) == before


def test_the_gradient_norms_running_variance(run):
    metrics = lines(run[0] / "metrics.jsonl")
    norms = [line["grad_norm"] for line in metrics]
    assert metrics[0]["grad_norm_variance"] == 0
    assert metrics[1]["grad_norm_variance"] == pytest.approx(((norms[0] - norms[1]) / 2) ** 2)


def test_8_bit_adamw_trains_and_goes_on(tiny_config, tmp_path):
    eight = ["--config", tiny_config, "--set", "train.optimizer=adamw-8bit", "--set", "eval.rows=0"]
    call("train", *eight, "--output", tmp_path / "a")
    call("train", "--resume", tmp_path / "a", "--steps", 3)
    call("train", *eight, "--output", tmp_path / "b", "--steps", 3)
    adapters = [(tmp_path / run / "adapter" / "adapter_model.safetensors").read_bytes() for run in "ab"]
    assert adapters[0] == adapters[1]


def test_eval_scores_base_and_adapter(run, tiny_config):
    folder, _ = run
    scored = json.loads(call("eval", "--config", tiny_config, "--adapter", folder / "adapter", "--json").stdout)
    assert [row["greedy"] for row in scored["rows"]] == [
        row["greedy"] for row in lines(folder / "eval.jsonl")[-1]["rows"]
    ]
    base = json.loads(call("eval", "--config", tiny_config, "--json").stdout)
    assert greedy(base) == greedy(lines(folder / "eval.jsonl")[0])
    assert "pass@1" in call("eval", "--config", tiny_config).stdout


def test_scoring_rows_that_the_run_was_trained_on_is_said(run, tiny_config):
    """With another eval.rows other rows are held out, so most of them were in training."""
    scored = ("eval", "--config", tiny_config, "--adapter", run[0] / "adapter", "--set")
    assert "data.seed 0" in call(*scored, "eval.rows=5").stderr
    assert "trained on" not in call(*scored, "eval.rows=4").stderr


def test_chat_answers_until_an_empty_line(run, tiny_config):
    folder, _ = run
    out = call(
        "chat", "--config", tiny_config, "--adapter", folder / "adapter", stdin="2 + 2\nand 3?\n\nnever\n"
    ).stdout
    assert out.count("> ") == 3


def test_a_cut_off_answer_earns_nothing_with_truncated_max_zero(tiny_config, tmp_path):
    call(
        "train",
        "-c",
        tiny_config,
        "-o",
        tmp_path / "r",
        "-s",
        "rewards.truncated_max_zero=true",
        "-s",
        "eval.rows=0",
        "--steps",
        1,
    )
    answers = [a for group in lines(tmp_path / "r" / "rollouts.jsonl") for a in group["completions"]]
    assert any(sum(a["ids"]) % 3 for a in answers if not a["stopped"]), "the reward of some would not be 0"
    assert all(a["reward"] == (sum(a["ids"]) % 3 if a["stopped"] else 0) for a in answers)


def test_nf4_run_repeats_and_reloads_equal(tiny_config, tmp_path):
    settings = ["--config", tiny_config, "--set", "model.quantization=nf4"]
    call("train", *settings, "--output", tmp_path / "r")
    scored = json.loads(call("eval", *settings, "--adapter", tmp_path / "r" / "adapter", "--json").stdout)
    assert greedy(scored) == greedy(lines(tmp_path / "r" / "eval.jsonl")[-1])
