"""What a card must show. None of this has run on one yet; see the README."""

import json

import pytest
import torch
from typer.testing import CliRunner

from lite_trgrpo.backends import transformers as backend
from lite_trgrpo.cli import app
from lite_trgrpo.options import Model
from lite_trgrpo.policy import sample_all
from lite_trgrpo.records import Sampling
from tests.tiny import KINDS, tiny_model_folder

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("kind", KINDS)
def test_card_and_cpu_agree(tmp_path, kind, quantization):
    """The same ids scored in fp32 on both; nf4 rounds alike on both, up to its own kernels."""
    folder = tiny_model_folder(tmp_path / kind, kind)
    options = {"name": str(folder), "dtype": "float32", "quantization": quantization}
    card, cpu = (backend.load(Model(**options, device=device), seed=0) for device in ("cuda", "cpu"))
    prompt = card.encode("2 + 2")
    [[completion]] = sample_all(card, [prompt], Sampling(1, 16, key=(3,)))
    found = [policy.logprobs([(prompt.ids, completion.ids)], 1.0)[0].detach().cpu() for policy in (card, cpu)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-3 if quantization == "none" else 2e-2)
    torch.testing.assert_close(torch.tensor([completion.logprobs]), found[0], rtol=0, atol=1e-3)


def test_a_run_on_the_card(tiny_config, tmp_path):
    """bf16 or fp16, nf4, gradient checkpointing, paged 8-bit AdamW: what the larger presets use."""
    settings = ["model.quantization=nf4", "train.gradient_checkpointing=true", "model.device=cuda",
                "train.optimizer=paged-adamw-8bit"]  # fmt: skip
    flags = [word for setting in settings for word in ("--set", setting)]
    arguments = ["train", "--config", str(tiny_config), "--output", str(tmp_path / "run"), *flags]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 2 and all(line["clock"]["cuda_peak_mib"] > 0 for line in metrics)
    assert max(line.get("sampler_gap_mean", 0.0) for line in metrics) < 0.1
