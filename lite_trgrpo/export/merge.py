"""W + scaling * B A, tensor by tensor: a base and its adapter as one 16-bit model, without ever holding the model.

DoRA (arXiv 2402.09353) gives the rows of that sum lengths of their own.
Works on files alone (safetensors in, safetensors out), on the CPU: no model class is loaded.
"""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lite_trgrpo.errors import ExportError

SHARD = 2**30  # bytes of a shard that is written, and so of what is held
PREFIX = "base_model.model."  # PEFT's, before the name of a module
LENGTHS = ".lora_magnitude_vector"  # PEFT's name for DoRA's
# what a plain LoRA pair does not express: (PEFT's setting, its value where it is off)
OFF = {
    "bias": "none", "lora_bias": False, "modules_to_save": None, "alpha_pattern": {},
    "target_parameters": None, "trainable_token_indices": None, "layer_replication": None,
}  # fmt: skip
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
Stored = dict[str, tuple[Path, tuple[int, ...]]]
"""The tensors of a model's folder: name -> file and shape."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter as it lies in a folder."""

    settings: dict[str, Any]
    """adapter_config.json"""
    tensors: dict[str, Tensor]

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Module name -> A [r, in] and B [out, r]. Raises ExportError where the adapter holds anything else."""
        odd = [f"{key} = {self.settings[key]!r}" for key, off in OFF.items() if (self.settings.get(key) or off) != off]
        ends = tuple(f".lora_{side}.weight" for side in "AB")
        modules = {name.removesuffix(end) for name in self.tensors for end in ends if name.endswith(end)}
        wanted = {f"{module}.lora_{side}.weight" for module in modules for side in "AB"}
        if self.settings.get("use_dora"):
            wanted |= {f"{module}{LENGTHS}" for module in modules}
        odd += sorted(self.tensors.keys() ^ wanted)[:3]
        if odd or not modules:
            raise ExportError(f"only plain LoRA on linear layers can be merged; this adapter has {', '.join(odd)}")
        return {
            module.removeprefix(PREFIX): (
                self.tensors[f"{module}.lora_A.weight"].float(), self.tensors[f"{module}.lora_B.weight"].float(),
            ) for module in sorted(modules)
        }  # fmt: skip

    def merged(self, module: str, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """[out, in] in fp32, for the module's weight in any type."""
        found = weight.float() + self.delta(a, b)
        if (lengths := self.tensors.get(f"{PREFIX}{module}{LENGTHS}")) is None:
            return found
        rows = 0 if self.settings.get("fan_in_fan_out") else 1
        return found * (lengths.float().unsqueeze(rows) / found.norm(dim=rows, keepdim=True))

    def delta(self, a: Tensor, b: Tensor) -> Tensor:
        """scaling * B A, [out, in]: alpha / r, or alpha / sqrt(r) with rsLoRA; transposed for GPT-2's Conv1D."""
        rank = a.shape[0]
        scaling = self.settings["lora_alpha"] / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)
        product = scaling * (b @ a)
        return product.T if self.settings.get("fan_in_fan_out") else product


def read_adapter(folder: Path) -> Adapter:
    """Raises ExportError where a file is missing or damaged."""
    try:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        return Adapter(settings, load_file(folder / "adapter_model.safetensors"))
    except (OSError, ValueError, SafetensorError) as error:
        raise ExportError(f"{folder} holds no whole LoRA adapter: {error}") from None


def stored_tensors(folder: Path) -> Stored:
    """From the files' heads; no tensor is read."""
    found: Stored = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: (path, tuple(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118
    return found


def merge(base: Path, adapter: Adapter, output: Path) -> None:
    """Write the merged model, its tokenizer and its config into the new folder `output`.

    A base in 16 bits keeps its type, one in 32 bits becomes bfloat16; sums are made in float32. Raises ExportError
    where the adapter's names or shapes are not the base's.
    """
    stored, pairs = stored_tensors(base), adapter.pairs()
    _must_fit(base, stored, adapter, pairs)
    settings = json.loads((base / "config.json").read_text(encoding="utf-8"))
    kept = HALVES.get(settings.get("dtype", settings.get("torch_dtype", "float32")))
    output.mkdir(parents=True)
    shards = _shards({name: 2 * math.prod(shape) for name, (_, shape) in stored.items()})
    places: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        tensors = {name: _merged(stored[name][0], name, adapter, pairs, kept) for name in names}
        save_file(tensors, output / file, metadata={"format": "pt"})
        (output / file).chmod(0o644)  # safetensors lets nobody else read it
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        (output / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    settings.pop("torch_dtype", None)
    settings["dtype"] = str(kept or torch.bfloat16).removeprefix("torch.")
    (output / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    _copy_the_rest(base, output)


def _must_fit(base: Path, stored: Stored, adapter: Adapter, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    turned = -1 if adapter.settings.get("fan_in_fan_out") else 1
    for module, (a, b) in pairs.items():
        wanted = (b.shape[0], a.shape[1])[::turned]
        found = stored.get(f"{module}.weight", (base, None))[1]
        if found != wanted:
            what = "no such tensor" if found is None else f"one of shape {list(found)}"
            raise ExportError(
                f"the adapter changes {module}.weight of shape {list(wanted)}, but {base} has {what}: it was trained "
                "on another base, or these weights are quantised"
            )


def _merged(
    path: Path, name: str, adapter: Adapter, pairs: Mapping[str, tuple[Tensor, Tensor]], kept: torch.dtype | None
) -> Tensor:
    with safe_open(path, "pt") as file:
        tensor: Tensor = file.get_tensor(name)
    dtype = torch.bfloat16 if kept is None and tensor.dtype == torch.float32 else tensor.dtype
    module = name.removesuffix(".weight")
    if (pair := pairs.get(module)) is not None:
        tensor = adapter.merged(module, tensor, *pair)
    return tensor.to(dtype).contiguous()


def _shards(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names in order, cut where a shard would exceed `SHARD` bytes."""
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = SHARD
        shards[-1].append(name)
        room -= size
    return shards


def _copy_the_rest(base: Path, output: Path) -> None:
    """Tokenizer, chat template, generation config, code: small files, never pickles nor other weights."""
    for path in base.iterdir():
        small = path.suffix in (".json", ".model", ".txt", ".jinja", ".py")
        if small and path.name != "config.json" and not path.name.endswith(".index.json") and path.is_file():
            shutil.copyfile(path, output / path.name)  # by content: in the Hub's cache they are links
