"""Every place where we read or replace the insides of another library, one row each.

Such a place may move in any release, and some then fail without a sign: gradients vanish, a part of an adapter is
skipped, a plan counts nothing. Where a row fails, look at the named line of ours before the range in pyproject.toml is
widened.
"""

import inspect
import io
import sys

import pytest
import torch
from torch import nn


def _bitsandbytes_4_bits():
    """model/loading.keep_gradients_on_cpu: bitsandbytes decides by this flag whether it repacks a layer."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(64, 64)
    assert hasattr(layer, "support_avx512bf16_for_cpu")
    assert "support_avx512bf16_for_cpu" in inspect.getsource(bnb.nn.Linear4bit.forward)


def _bitsandbytes_8_bits():
    """model/loading._unpacked_product: a weight is int8 times the largest magnitude of its row over 127."""
    import bitsandbytes as bnb

    weight = torch.randn(64, 64)
    layer = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")
    if layer.weight.data.dtype != torch.int8:  # packed at the first product, where the device is the CPU
        layer(torch.zeros(1, 64, dtype=torch.float32))
    assert layer.weight.data.dtype == torch.int8
    unpacked = layer.weight.data.float() * (layer.weight.SCB / 127).unsqueeze(1)
    assert (unpacked - weight).abs().max() < 0.02 * weight.abs().max()


def _peft_lora_layers():
    """model/lora.prepare and _forward: what a plain LoRA layer of one adapter consists of."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"]))
    [layer] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert list(layer.lora_A) == list(layer.lora_B) == list(layer.scaling) == layer.active_adapters == ["default"]
    assert layer.lora_A["default"].weight.shape == (2, 8) and layer.lora_B["default"].weight.shape == (8, 2)
    assert layer.lora_variant == {} and not layer.merged and not layer.disable_adapters
    assert isinstance(layer.base_layer, nn.Linear)


def _peft_variants():
    """model/lora.prepare: every other kind of layer names itself in `lora_variant`, so it keeps PEFT's product."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"], use_dora=True))
    [layer] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert list(layer.lora_variant) == ["default"]


def _torch_fake_tensors():
    """check/plan: tensors without storage that a mode can count."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            seen.append(found)
            return found

    with FakeTensorMode(), Counting():
        product = torch.ones(4, 8) @ torch.ones(8, 2)
    assert product.shape == (4, 2) and seen
    storage = product.untyped_storage()
    assert storage.nbytes() == 32 and isinstance(storage._cdata, int)


def _transformers_attention():
    """model/network.attend_by_groups: the attention of a model has a name and can be replaced by one of ours."""
    from tests.tiny import tiny_model

    model = tiny_model()
    own = model.config._attn_implementation
    assert isinstance(own, str)
    from lite_trgrpo.model.hook import NAME, register

    register()
    model.set_attn_implementation(NAME)
    assert model.config._attn_implementation == NAME
    model.set_attn_implementation(own)


def _transformers_states():
    """model/hook.states_as_cache: recurrent layers keep these, and say by these flags that they hold something."""
    from transformers import DynamicCache

    from tests.tiny import tiny_model

    config = tiny_model("lfm2").config
    layers = [layer for layer in DynamicCache(config=config).layers if hasattr(layer, "conv_states")]
    assert layers
    for name in ("conv_states", "has_previous_state", "is_conv_states_initialized", "conv_kernel_size"):
        assert hasattr(layers[0], name), name


def _transformers_quantised_marks():
    """model/weights._convert: what stops transformers from saving a model that came from a GGUF."""
    from transformers import PreTrainedModel

    source = inspect.getsource(PreTrainedModel.save_pretrained)
    assert "hf_quantizer" in source


def _rich_proxied_file():
    """terminal/screen: the stream behind rich's, for lines that the panel must not swallow."""
    from rich.console import Console
    from rich.file_proxy import FileProxy

    assert FileProxy(Console(file=io.StringIO()), sys.stderr).rich_proxied_file is sys.stderr


def _trl_private_methods():
    """integrations/trl: the methods that TRGRPOTrainer replaces or calls, with the arguments that it gives."""
    from trl import GRPOTrainer

    wanted = {
        "_tokenize_prompts": ["prompts"],
        "_calculate_rewards": [],
        "_generate_and_score_completions": ["inputs"],
        "_get_per_token_logps_and_entropies": ["model", "batch_size", "compute_entropy"],
        "_compute_loss": ["model", "inputs"],
    }
    for name, arguments in wanted.items():
        assert set(arguments) <= set(inspect.signature(getattr(GRPOTrainer, name)).parameters), name


PLACES = {
    name[1:]: place for name, place in list(globals().items()) if name.startswith("_") and inspect.isfunction(place)
}


@pytest.mark.parametrize("place", PLACES)
def test_a_private_place_is_where_we_look_for_it(place):
    PLACES[place]()
