"""Our product of a LoRA layer beside PEFT's own."""

import pytest
import torch

from lite_trgrpo.config.schema import Model
from lite_trgrpo.model.lora import add_lora, prepare
from tests.tiny import KINDS, tiny_model

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
