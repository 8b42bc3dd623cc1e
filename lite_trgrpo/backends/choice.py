"""Which backend `model.backend = "auto"` is, and why: asked without loading either."""

import importlib.util

import torch

PIP_UNSLOTH = "pip install 'lite-trgrpo[unsloth]'"


def choose(wanted: str, device: str) -> tuple[str, str]:
    """-> (transformers or unsloth, the reason in a few words). device: `model.device`."""
    if wanted != "auto":
        return wanted, f"model.backend = {wanted}"
    if device == "cpu" or not torch.cuda.is_available():
        return "transformers", "unsloth needs a card that torch can use"
    if importlib.util.find_spec("unsloth") is None:
        return "transformers", f"unsloth is not installed ({PIP_UNSLOTH})"
    return "unsloth", "a card and the package are there"
