"""The LoRA adapter: made or loaded by PEFT, its products by ourselves."""

import logging
import re
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lite_trgrpo.config.loading import adapter_folder
from lite_trgrpo.config.schema import Model
from lite_trgrpo.data.hub import fetch
from lite_trgrpo.errors import ModelError, first_line
from lite_trgrpo.model.weights import Located, some

logger = logging.getLogger(__name__)

FEW = 64  # rows


def with_lora(base: Any, options: Model, located: Located) -> Any:
    if options.adapter is not None:
        files = ["*.json", "*.safetensors"]
        folder = adapter_folder(options.adapter) or fetch(options.adapter, None, files, "model.adapter")
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            if not (folder / file).is_file():
                hint = f"; of this run give {folder / 'adapter'}" if (folder / "adapter" / file).is_file() else ""
                raise ModelError(f"{folder} is no LoRA adapter: it has no {file}{hint}")
        model = _with_stored(base, folder, located)
        made_for = model.peft_config["default"].base_model_name_or_path
        if made_for != located.upstream:  # shapes may fit all the same, as between a base and its instruct model
            logger.warning(f"the adapter was made for {made_for}, but the base here is {located.upstream}")
    else:
        model = add_lora(base, options)
    prepare(model)
    adapter = model.peft_config["default"]
    adapter.base_model_name_or_path, adapter.revision = located.upstream, located.revision
    if isinstance(adapter.target_modules, set):  # whose order is another in every process: the saved file would differ
        adapter.target_modules = sorted(adapter.target_modules)
    head = model.get_base_model().get_output_embeddings()
    if any(parameter.requires_grad for parameter in head.parameters()):
        raise ModelError("model.lora_targets names the output head, which must stay frozen; take it out of the list")
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # an adapter brings its own, a base may hide one in a nested config
            module.p = 0.0
    return model


def _with_stored(base: Any, folder: Path, located: Located) -> Any:
    """The base with the adapter in `folder`. Raises ModelError unless its tensors are those that its settings name: a
    missing one PEFT would leave at its start, so that a part of the adapter has no effect.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    try:
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            stored = set(file.keys())
        settings = PeftConfig.from_pretrained(str(folder))
        if isinstance(settings.target_modules, str) and settings.target_modules != "all-linear":
            # a regular expression of others could run forever; the tensors tell which modules it meant
            modules = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in stored}
            settings.target_modules, settings.exclude_modules = sorted(modules), None
        with warnings.catch_warnings():  # of missing tensors
            warnings.simplefilter("ignore")
            _must_be_names(settings.to_dict())
            model = PeftModel.from_pretrained(base, str(folder), is_trainable=True, config=settings)
        wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    except Exception as error:  # files of others: the libraries raise whatever they stumble over
        raise ModelError(
            f"the adapter {folder} does not fit {located.upstream}: {first_line(error)}. Its adapter_config.json "
            "names the base it was made for"
        ) from None
    for what, names in (("lacks", wanted - stored), ("has foreign", stored - wanted)):
        if names:
            raise ModelError(
                f"the adapter {folder} {what} {len(names)} tensors ({some(sorted(names))}): adapter_model.safetensors "
                "is not the file of its adapter_config.json. Copy both again"
            )
    return model


def _must_be_names(settings: Mapping[str, Any]) -> None:
    """PEFT takes these for regular expressions, which can be made to run forever."""
    for option in ("exclude_modules", "layers_pattern", "modules_to_save", "rank_pattern", "alpha_pattern"):
        given = settings.get(option) or []
        for name in [given] if isinstance(given, str) else given:
            if not re.fullmatch(r"[\w.^$-]*", name):
                raise ValueError(f"{option} holds the regular expression {name!r:.80}, where only names are read")


def add_lora(base: Any, options: Model) -> Any:
    """A fresh adapter: B = 0, so the policy starts as its base."""
    # PEFT imports bitsandbytes, which warns of an optional CPU kernel that it did not find
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=options.lora_rank, lora_alpha=options.lora_alpha, lora_dropout=0.0, use_rslora=options.rslora,
        target_modules=_targets(base, options.lora_targets), task_type="CAUSAL_LM",
    )  # fmt: skip
    try:
        model = get_peft_model(base, lora)
    except ValueError as error:
        raise ModelError(f"model.lora_targets = {options.lora_targets!r}: {error}") from None
    return model


def _targets(base: Any, wanted: list[str]) -> list[str]:
    """Names for PEFT. In a model for images or sounds too: of layers of the language model alone."""
    from transformers.pytorch_utils import Conv1D

    decoder = base.get_decoder()
    prefix = next(name for name, module in base.named_modules() if module is decoder)
    modules = {f"{prefix}.{name}".lstrip("."): module for name, module in decoder.named_modules()}
    linear = [name for name, module in modules.items() if isinstance(module, (nn.Linear, Conv1D))]
    if wanted != ["all-linear"]:
        named = [name for name in linear if any(f".{name}".endswith(f".{target}") for target in wanted)]
        return named if named and base.config.get_text_config() is not base.config else wanted
    experts = [
        f"{name}.{weight}" for name, module in modules.items() for weight, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim == 3 and "expert" in f"{name}.{type(module).__name__}".lower()
    ]  # fmt: skip
    if experts:
        raise ModelError(
            f"model.lora_targets = all-linear cannot reach the experts of {base.config.model_type!r} (tensors such as "
            f"{experts[0]}); to train its attention alone, type "
            """--set "model.lora_targets=['q_proj','k_proj','v_proj','o_proj']\""""
        )
    return linear


def prepare(model: nn.Module) -> None:
    """The adapter in fp32, as bf16 weights would lose updates of 1e-5; and plain layers get our product, other kinds
    keep PEFT's.
    """
    from peft.tuners.lora import LoraLayer

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and isinstance(layer.base_layer, nn.Linear):
            only = list(layer.lora_A) == layer.active_adapters == ["default"]
            if only and not layer.lora_variant and layer.lora_B["default"].bias is None:
                layer.forward = partial(_forward, layer, layer.forward)


def _forward(layer: Any, original: Callable[..., Tensor], x: Tensor, *args: Any, **options: Any) -> Tensor:
    """x [..., in] -> [..., out], in the type of x; the adapter's fp32 weights are rounded to it, as autocast would.

    PEFT's multiplies and adds at the layer's full width, and beside a bf16 base it keeps an fp32 copy of the input of
    each layer for backward. In fp16 gradients could underflow: there PEFT's product stays. For the few rows of a
    decoding step the weights stay in fp32: rounding them costs more than it saves.
    """
    if layer.disable_adapters or layer.merged or x.dtype == torch.float16:
        return original(x, *args, **options)
    flat = x.flatten(0, -2)
    out: Tensor = layer.base_layer(flat)
    a, b, scaling = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    if x.dtype == torch.bfloat16 and len(flat) <= FEW and not torch.is_grad_enabled():
        out.add_(flat.float() @ a.t() @ b.t(), alpha=scaling)
    else:
        out.addmm_(flat @ a.to(out.dtype).t(), b.to(out.dtype).t(), alpha=scaling)
    return out.unflatten(0, x.shape[:-1])
