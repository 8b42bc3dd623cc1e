"""Weights, adapters and tokenizers that are not whole or not each other's are refused where they are loaded."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from typer.testing import CliRunner

from lite_trgrpo.cli import app
from lite_trgrpo.config.schema import Model
from lite_trgrpo.errors import ModelError
from lite_trgrpo.export import export
from lite_trgrpo.model import hf
from lite_trgrpo.model.weights import locate, stored_quantization
from tests.runs import finished_run
from tests.tiny import VOCABULARY, tiny_model_folder

WEIGHTS = "adapter_model.safetensors"
FOREIGN = "base_model.model.visual.q_proj.lora_A.weight"


@pytest.fixture
def model(tmp_path):
    return tiny_model_folder(tmp_path / "base", "llama")


@pytest.fixture
def adapter(model, tmp_path):
    hf.load(Model(name=str(model), lora_rank=4), seed=0).save_adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(file: Path, change) -> None:
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def without(part: str):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


# -- the base -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(("part", "count"), [("0.mlp.down_proj", 1), ("", 21)], ids=["one gone", "empty header"])
def test_a_base_with_missing_tensors_is_refused_and_they_are_named(model, part, count, quantization):
    """transformers fills them with random numbers and goes on."""
    edit(model / "model.safetensors", without(part))
    with pytest.raises(ModelError, match=rf"\b{count} tensors .*{part}") as refused:
        hf.load(Model(name=str(model), lora_rank=4, quantization=quantization), seed=0)
    assert str(model) in str(refused.value)


def test_unexpected_tensors_of_a_base_are_named(model, caplog):
    edit(model / "model.safetensors", lambda tensors: tensors | {"visual.patch": torch.zeros(2)})
    hf.load(Model(name=str(model), lora_rank=4), seed=0)
    assert "visual.patch" in caplog.text


@pytest.mark.slow
def test_train_and_resume_refuse_a_base_with_missing_tensors(tiny_config, tmp_path):
    weights, run = tmp_path / "model" / "model.safetensors", tmp_path / "run"
    whole = weights.read_bytes()
    edit(weights, without("down_proj"))
    refused = CliRunner().invoke(app, ["train", "--config", str(tiny_config), "--output", str(run)])
    assert refused.exit_code == 1 and "down_proj" in refused.stderr and not run.exists()
    weights.write_bytes(whole)
    assert CliRunner().invoke(app, ["train", "--config", str(tiny_config), "--output", str(run)]).exit_code == 0
    edit(weights, without("down_proj"))
    refused = CliRunner().invoke(app, ["train", "--resume", str(run), "--steps", "3"])
    assert refused.exit_code == 1 and "down_proj" in refused.stderr


# -- adapters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (without("layers.1.mlp.up_proj"), r"\b2 tensors .*layers\.1\.mlp\.up_proj"),
        (without("layers.0.self_attn.q_proj.lora_B"), r"\b1 tensors .*q_proj\.lora_B"),
        (lambda tensors: tensors | {FOREIGN: torch.zeros(2)}, r"\b1 tensors .*visual"),
    ],
    ids=["a layer gone", "half a pair", "foreign"],
)
def test_an_adapter_with_missing_or_foreign_tensors_is_refused(model, adapter, change, named):
    edit(adapter / WEIGHTS, change)
    with pytest.raises(ModelError, match=named):
        hf.load(Model(name=str(model), adapter=str(adapter)), seed=0)


def test_eval_refuses_an_adapter_with_missing_tensors(tiny_config, tmp_path):
    run = tmp_path / "run"
    assert CliRunner().invoke(app, ["train", "--config", str(tiny_config), "--output", str(run)]).exit_code == 0
    edit(run / "adapter" / WEIGHTS, without("down_proj"))
    refused = CliRunner().invoke(app, ["eval", "--adapter", str(run / "adapter")])
    assert refused.exit_code == 1 and "down_proj" in refused.stderr


def rewrite(adapter: Path, **settings) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


BOMB = r"(\w+\.?)+\.0\.(.+)+(q|k|v|o|gate|up|down)_proj!"


def test_a_regular_expression_for_the_modules_is_never_run(model, adapter):
    """`re` has no time limit, so the names of the tensors take its place."""
    expected = hf.load(Model(name=str(model), adapter=str(adapter)), seed=0).trainable()
    rewrite(adapter, target_modules=BOMB)
    started = time.monotonic()
    found = hf.load(Model(name=str(model), adapter=str(adapter)), seed=0).trainable()
    assert time.monotonic() - started < 20
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("setting", [{"exclude_modules": BOMB}, {"rank_pattern": {BOMB: 4}}], ids=["text", "table"])
def test_regular_expressions_in_other_settings_of_an_adapter_are_refused(model, adapter, setting):
    rewrite(adapter, **setting)
    with pytest.raises(ModelError, match=next(iter(setting))):
        hf.load(Model(name=str(model), adapter=str(adapter)), seed=0)


# -- tokenizers ---------------------------------------------------------------------------------------------


def test_a_token_beyond_the_embedding_is_refused_before_there_is_a_run(tiny_config, tmp_path):
    folder = tmp_path / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|task|>"])
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("<|task|>" + (folder / "chat_template.jinja").read_text())
    words = ["train", "--config", str(tiny_config), "--output", str(tmp_path / "run")]
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 1 and "<|task|>" in refused.stderr
    assert str(VOCABULARY) in refused.stderr and not (tmp_path / "run").exists()


def test_a_tokenizer_longer_than_the_embedding_is_refused(model):
    settings = json.loads((model / "config.json").read_text()) | {"vocab_size": 320}
    (model / "config.json").write_text(json.dumps(settings))
    cut = ("model.embed_tokens.weight", "lm_head.weight")
    edit(model / "model.safetensors", lambda tensors: tensors | {name: tensors[name][:320].clone() for name in cut})
    with pytest.raises(ModelError, match=r"383.* 320\b"):
        hf.load(Model(name=str(model), lora_rank=4), seed=0)


# -- bases that are already in 4 bits -----------------------------------------------------------------------


@pytest.fixture
def four_bits(model):
    """The tiny base as a folder of nf4 weights."""
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(model, quantization_config=settings).save_pretrained(model.parent / "nf4")
    for path in model.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            shutil.copyfile(path, model.parent / "nf4" / path.name)
    return model.parent / "nf4"


@pytest.mark.parametrize("command", ["train --output run", pytest.param("check rewards", marks=pytest.mark.slow)])
def test_a_base_in_4_bits_is_said_before_training(tiny_config, four_bits, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    said = (
        CliRunner()
        .invoke(app, [*command.split(), "--config", str(tiny_config), "--set", f"model.name={four_bits}"])
        .stderr
    )
    assert "4 bits" in said and "merged" in said


def test_gradients_pass_through_a_base_in_4_bits(four_bits):
    policy = hf.load(Model(name=str(four_bits), lora_rank=4), seed=0)
    prompt = policy.encode("1 + 1")
    policy.logprobs([(prompt.ids, (30, 40, 50))], 1.0)[0].sum().backward()
    assert all(p.grad.any() for name, p in policy.trainable().items() if "lora_B" in name)
    assert not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in policy.model.modules())


def test_export_of_a_base_in_4_bits_refuses_a_merge_at_once(four_bits):
    run, config = finished_run(four_bits.parent / "r")
    config = config.changed("model", name=str(four_bits))
    with pytest.raises(export.ExportError, match="4 bits"):
        export.export(run, config, export.Wanted(merged=True), lambda line: None)
    located = locate(Model(name=str(four_bits)))
    assert stored_quantization(located.folder) == "bitsandbytes, 4 bits"


@pytest.mark.slow
def test_a_base_in_4_bits_is_not_scored_a_second_time_as_unquantised(four_bits):
    run, config = finished_run(four_bits.parent / "r", name=str(four_bits), quantization="nf4")
    report = export.export(run, config, export.Wanted(), lambda line: None)
    assert report["forms"] == {} and "4 bits" in report["quantization"]


def test_a_damaged_gguf_is_one_line_wherever_it_is_damaged(tmp_path, monkeypatch):
    """Mutations of the header: lengths, types, offsets. Leftovers of a killed conversion are swept on the way."""
    monkeypatch.setenv("LITE_TRGRPO_CACHE", str(tmp_path / "cache"))
    left = tmp_path / "cache" / "gguf" / "abcdef01-part-99999999-xyz"
    left.mkdir(parents=True)
    older = left.with_name("abcdef01-part-1x2y3z")  # of a version that did not write its process into the name
    older.mkdir()
    writer = GGUFWriter(tmp_path / "whole.gguf", "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_tensor("token_embd.weight", np.zeros((4, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content = (tmp_path / "whole.gguf").read_bytes()
    for place in range(0, 96, 4):
        (tmp_path / "bad.gguf").write_bytes(content[:place] + b"\xff\xff\xff\x7f" + content[place + 4 :])
        with pytest.raises(ModelError, match=r"bad\.gguf"):
            locate(Model(name=str(tmp_path / "bad.gguf")))
    assert not left.exists() and list((tmp_path / "cache" / "gguf").glob("*-part-*")) == [older]
