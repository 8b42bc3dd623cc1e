"""Our product of a LoRA layer beside PEFT's own."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText
from typer.testing import CliRunner

from lite_trgrpo.cli import app
from lite_trgrpo.config.schema import Model
from lite_trgrpo.errors import ModelError
from lite_trgrpo.model.lora import add_lora, prepare
from lite_trgrpo.model.policy import sample_all
from lite_trgrpo.records import Prompt, Sampling
from tests.test_backend import policy_of
from tests.tiny import KINDS, MULTIMODAL, tiny_model, tiny_model_folder

IDS = torch.arange(5, 45).view(2, 20)


def adapted(kind, dtype=torch.float64, *, ours, adapter_dtype=torch.float64, **options):
    """The same weights, whatever the types and whoever multiplies."""
    model = add_lora(tiny_model(kind).to(dtype), Model(name="-", lora_rank=4, **options))
    if ours:
        prepare(model)
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable(model).values():
        drawn = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = drawn.to(adapter_dtype)
    return model


def trainable(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def result(model):
    logits = model(input_ids=IDS, use_cache=False).logits
    logits.square().mean().backward()
    return logits.detach(), {name: parameter.grad for name, parameter in trainable(model).items()}


@pytest.mark.parametrize("options", [{}, {"rslora": True, "lora_targets": ["q_proj", "down_proj"]}])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_peft(kind, options):
    (expected, gradients), (found, ours) = (result(adapted(kind, ours=who, **options)) for who in (False, True))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-10, atol=1e-14)
        assert gradient.abs().sum() > 0


def test_adapter_can_be_turned_off():
    model = adapted("llama", ours=True)
    with torch.no_grad(), model.disable_adapter():
        off = model(input_ids=IDS).logits
    torch.testing.assert_close(off, tiny_model("llama").double()(input_ids=IDS).logits, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(off, model(input_ids=IDS).logits)


def test_bf16_base_gradients_are_fp32_and_as_exact_as_those_of_peft():
    _, exact = result(adapted("qwen2", ours=False))

    def error(who):
        _, found = result(adapted("qwen2", torch.bfloat16, ours=who, adapter_dtype=torch.float32))
        assert {gradient.dtype for gradient in found.values()} == {torch.float32}
        return sum((found[name] - exact[name]).square().sum() for name in exact).sqrt()

    assert error(True) < 1.3 * error(False)


def test_fewer_bytes_are_kept_for_backward_beside_a_bf16_base():
    """PEFT with fp32 adapter weights keeps an fp32 copy of each layer's input."""

    def kept(who):
        model, found = adapted("llama", torch.bfloat16, ours=who, adapter_dtype=torch.float32), []

        def pack(tensor):
            found.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(input_ids=IDS, use_cache=False)
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in found}.values())

    assert kept(True) < 0.8 * kept(False)


def test_what_is_no_plain_layer_keeps_the_product_of_peft():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, use_dora=True, target_modules="all-linear"))
    prepare(model)
    assert not any("forward" in vars(module) for module in model.modules())


# -- which layers get one -----------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj", "out_proj", "proj"]], ids=str)
@pytest.mark.parametrize("kind", MULTIMODAL)
def test_adapter_of_a_multimodal_model_is_in_its_language_model_alone(tmp_path, kind, targets):
    """Layers of the tower for images have the same names. Others load the saved adapter on the whole model."""
    base = tiny_model_folder(tmp_path / "base", kind)
    policy = policy_of(base, lora_targets=targets)
    assert policy.network.by_groups
    assert policy.trainable() and all(".language_model." in name for name in policy.trainable())
    [answers] = sample_all(policy, [Prompt(tuple(range(3, 12)), "")], Sampling(2, 6))
    policy.logprobs([((5, 6, 7), answer.ids) for answer in answers], 1.0)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in policy.trainable().values())
    policy.save_adapter(tmp_path / "adapter")
    whole = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(whole, tmp_path / "adapter").eval()
    found = {name: p for name, p in loaded.named_parameters() if "lora_" in name}
    assert found.keys() == policy.trainable().keys()
    assert all(torch.equal(p, policy.trainable()[name]) for name, p in found.items())
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=IDS).logits, policy.model.eval()(input_ids=IDS).logits)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*MULTIMODAL, "lfm2", "bamba"])
def test_a_run_through_the_command_line_trains_every_kind(tmp_path, tiny_config, kind):
    base = tiny_model_folder(tmp_path / "base", kind)
    given = ["--config", str(tiny_config), "--set", f"model.name={json.dumps(str(base))}"]
    done = CliRunner().invoke(app, ["train", *given, "--plain", "--output", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def tiny_experts():
    return CONFIG_MAPPING["qwen3_moe"](
        vocab_size=384, hidden_size=64, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
        initializer_range=0.2, bos_token_id=None, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip


def test_experts_are_refused_by_check_and_train_before_weights_are_loaded(tmp_path, tiny_config):
    tiny_model_folder(tmp_path / "base", model=AutoModelForCausalLM.from_config(tiny_experts()))
    for path in (tmp_path / "base").glob("*.safetensors"):
        path.unlink()
    given = ["--config", str(tiny_config), "--set", f"model.name={json.dumps(str(tmp_path / 'base'))}"]
    for command in (["check", "memory"], ["train", "--output", str(tmp_path / "run")]):
        done = CliRunner().invoke(app, [*command, *given])
        assert done.exit_code == 1 and "model.lora_targets" in done.output, done.output
        assert "Traceback" not in done.output and "q_proj" in done.output


def test_attention_alone_is_trained_beside_experts(tmp_path):
    base = tiny_model_folder(tmp_path, model=AutoModelForCausalLM.from_config(tiny_experts()).float())
    with pytest.raises(ModelError, match="all-linear"):
        policy_of(base)
    policy = policy_of(base, lora_targets=["q_proj", "k_proj", "v_proj", "o_proj"])
    assert policy.network.by_groups
    assert len(policy.trainable()) == 2 * 2 * 4
