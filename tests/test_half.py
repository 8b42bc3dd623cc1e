"""float16, the type of every card without bfloat16: gradients neither vanish nor overflow, activations are checked."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lite_trgrpo.config.schema import Model, Objective
from lite_trgrpo.model import hf
from lite_trgrpo.model.oom import Limits
from lite_trgrpo.records import Completion
from lite_trgrpo.training import update as module
from lite_trgrpo.training.update import Row, loss_scale, update
from tests.accidents import lite, train
from tests.tiny import tiny_model_folder


def rows_with(denominator: float) -> list[Row]:
    """Two prompts, two answers each, one of them good; divided by the `denominator` of a large step."""
    rows = []
    for p, prompt in enumerate([(5, 6, 7), (8, 9, 10, 11)]):
        for m, advantage in enumerate((1.0, -1.0)):
            ids = tuple(12 + 5 * p + 3 * m + t for t in range(6))
            rows.append(Row(prompt, Completion(ids, (True,) * 6, (-3.0,) * 6, "", True), advantage, denominator))
    return rows


def gradient(folder, dtype: str, denominator: float, limits: Limits) -> torch.Tensor:
    """The adapter's gradient of a step as the optimizer gets it, times the denominator."""
    policy = hf.load(Model(name=str(folder), dtype=dtype, lora_rank=4), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    parameters, seen = list(policy.trainable().values()), []
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad.flatten().clone() for p in parameters))
    update(
        policy, optimizer, rows_with(denominator), Objective(weights="none"),
        temperature=1.0, updates=1, limits=limits, max_grad_norm=1e9,
    )  # fmt: skip
    return torch.cat(seen).double() * denominator


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("half") / "model")


@pytest.mark.parametrize("denominator", [4.0, 1024.0, 262_144.0, 2.0**22])
def test_the_gradient_in_float16_does_not_depend_on_the_denominator(folder, denominator):
    exact = gradient(folder, "float32", denominator, Limits(999, 64))
    half = gradient(folder, "float16", denominator, Limits(999, 64))
    assert torch.cosine_similarity(half, exact, dim=0) > 0.999
    assert half.norm().item() == pytest.approx(exact.norm().item(), rel=0.02)


def test_without_the_scale_a_large_denominator_loses_the_gradient_in_float16(folder, monkeypatch):
    exact = gradient(folder, "float32", 2.0**22, Limits(999, 64))
    monkeypatch.setattr(module, "loss_scale", lambda rows, limits: 1.0)
    assert torch.cosine_similarity(gradient(folder, "float16", 2.0**22, Limits(999, 64)), exact, dim=0) < 0.9


def test_the_scale_changes_nothing_in_float32(folder, monkeypatch):
    scaled = gradient(folder, "float32", 262_144.0, Limits(999, 64))
    monkeypatch.setattr(module, "loss_scale", lambda rows, limits: 1.0)
    assert torch.equal(gradient(folder, "float32", 262_144.0, Limits(999, 64)), scaled)


def test_an_overflow_lowers_the_scale_and_loses_no_step(folder, monkeypatch):
    exact = gradient(folder, "float32", 1024.0, Limits(999, 64))
    real = loss_scale
    monkeypatch.setattr(module, "loss_scale", lambda rows, limits: real(rows, limits) * 2.0**20)  # beyond 65,504
    limits = Limits(999, 64)
    half = gradient(folder, "float16", 1024.0, limits)
    assert limits.lowered > 0 and limits.as_dict()["lowered"] == limits.lowered
    assert torch.cosine_similarity(half, exact, dim=0) > 0.999
    again = Limits(999, 64)
    again.resume(limits.as_dict())
    assert again.lowered == limits.lowered


def test_a_run_in_float16_trains_and_resumes(tiny_config, tmp_path):
    whole = train(tiny_config, tmp_path / "whole", "model.dtype=float16")
    assert whole.exit_code == 0, whole.output
    train(tiny_config, tmp_path / "run", "model.dtype=float16", "train.steps=3")
    resumed = lite("train", "--resume", tmp_path / "run", "--set", "train.steps=6")
    assert resumed.exit_code == 0, resumed.output
    weights = [load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("whole", "run")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert not any(line["updates_skipped"] for line in lines)


def test_activations_beyond_float16_are_an_error_that_names_the_dtype(folder, tiny_config, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    loud = {name: 3e4 * t if "down_proj" in name else t for name, t in tensors.items()}
    model = tmp_path / "model"  # the one that tiny_config names
    save_file(loud, model / "model.safetensors", metadata={"format": "pt"})
    done = train(tiny_config, tmp_path / "run", "model.dtype=float16", "train.steps=1")
    assert done.exit_code == 1 and "model.dtype=float32" in done.stderr, done.output
    assert train(tiny_config, tmp_path / "run", "train.steps=1").exit_code == 0
