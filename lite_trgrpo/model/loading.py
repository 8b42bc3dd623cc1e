"""Loading a base model in 32, 16, 8 or 4 bits."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lite_trgrpo.config.schema import Model
from lite_trgrpo.errors import ModelError, first_line
from lite_trgrpo.model.oom import ran_out
from lite_trgrpo.model.weights import Located, locate_config, must_be_whole, stored_quantization

logger = logging.getLogger(__name__)


def resolve_device(wanted: str) -> torch.device:
    """`auto` takes the card if torch can use one. A card asked for and not usable is an error."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            f"model.device = cuda, but torch {torch.__version__} sees no usable card. Install a CUDA build of torch "
            "(pytorch.org/get-started), or type --set model.device=cpu"
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())  # with its number, which limits on memory ask for


def resolve_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 where the card has it, else float16 (Turing); float32 on CPU."""
    if wanted != "auto":
        return getattr(torch, wanted)
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_config(options: Model) -> Any:
    """The base's transformers configuration, without its weights."""
    folder = locate_config(options)
    return _read_config(folder, options)


def _read_config(folder: Path, options: Model) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=options.trust_remote_code)
    except Exception as error:  # files of others: the libraries raise whatever they stumble over
        raise ModelError(f"{folder} is no model that transformers knows: {first_line(error)}") from None


def load_base(located: Located, options: Model, device: torch.device, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # see lora.add_lora
    config = _read_config(located.folder, options)
    no_dropout(config)
    quantization = None
    if stored := stored_quantization(located.folder):
        logger.warning(
            f"{options.name} is already quantised ({stored}): it is used as it is. Its adapter can be exported, but "
            "neither merged weights nor a GGUF. For those set model.name to the unquantised model"
        )
    elif options.quantization == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    elif options.quantization == "int8":
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    try:
        model, loaded = class_of(config).from_pretrained(
            located.folder, config=config, dtype=dtype, device_map={"": device},
            quantization_config=quantization, use_safetensors=True,
            trust_remote_code=options.trust_remote_code, output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # as above
        if ran_out(error):
            raise
        raise ModelError(f"{options.name} could not be loaded: {first_line(error)}") from None
    must_be_whole(options.name, loaded)
    if (quantization or stored) and device.type == "cpu":
        for parameter in model.parameters():
            if parameter.is_floating_point():  # embeddings and norms: as part of the file they would hold all of it
                parameter.data = parameter.data.clone()
    if quantization or stored:
        keep_gradients_on_cpu(model)
        unpack_8_bits(model)
    return model


def class_of(config: Any) -> Any:
    """The auto class for a checkpoint: for one that reads images too the whole model, since an adapter for the language
    model alone would name layers in a way that the whole model does not know.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    several = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and config.get_text_config() is not config
    return AutoModelForImageTextToText if several else AutoModelForCausalLM


def no_dropout(config: Any) -> None:
    """Any dropout would make the ratio differ from 1 before the first update."""
    for name in vars(config):
        if name.endswith(("dropout", "_pdrop")) and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)


def unpack_8_bits(model: nn.Module) -> None:
    """Let 8-bit layers multiply their unpacked weights.

    bitsandbytes rounds their inputs to 8 bits too: sampling and update of one policy then differ by 0.12 nats a token
    (SmolLM2-135M), more than twice what 8-bit weights cost.
    """
    from bitsandbytes.nn import Linear8bitLt

    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            module.forward = partial(_unpacked_product, module)


def _unpacked_product(layer: Any, x: Tensor) -> Tensor:
    found: Tensor = _Int8Product.apply(x, layer.weight.data, layer.weight.SCB)
    return found if layer.bias is None else found + layer.bias


class _Int8Product(torch.autograd.Function):
    """x [*, in], weight [out, in] in int8, the largest magnitude of each row [out] -> [*, out] in x's type. Backward
    unpacks again, keeping nothing.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, largest: Tensor) -> Tensor:
        ctx.packed = weight, largest
        return x @ _unpacked(weight, largest, x.dtype).t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        weight, largest = ctx.packed
        return gradients[0] @ _unpacked(weight, largest, gradients[0].dtype), None, None


def _unpacked(weight: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) * (largest / 127).to(dtype).unsqueeze(1)


def keep_gradients_on_cpu(model: nn.Module) -> None:
    """Clear the flag under which bitsandbytes loses gradients on CPU.

    On processors with avx512_bf16, bitsandbytes 0.50 repacks every 4-bit layer at its first forward in eval mode;
    from then on no gradient passes through the base weights, silently: sample, then train, is exactly that order.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
