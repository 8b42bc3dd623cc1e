"""Which backend `model.backend` is on this machine, why, and the policy from it."""

import importlib.util
import logging
from typing import TYPE_CHECKING

import torch

from lite_trgrpo.config.schema import Model
from lite_trgrpo.errors import ModelError, first_line
from lite_trgrpo.model.oom import ran_out

if TYPE_CHECKING:
    from lite_trgrpo.model.hf import TransformersPolicy

logger = logging.getLogger(__name__)


def choose(options: Model) -> tuple[str, str]:
    """-> (transformers or unsloth, the reason in a few words), without loading either."""
    if options.backend != "auto":
        return options.backend, f"model.backend = {options.backend}"
    if options.device == "cpu" or not torch.cuda.is_available():
        return "transformers", "unsloth needs a card that torch can use"
    if importlib.util.find_spec("unsloth") is None:
        return "transformers", "unsloth is not installed (pip install 'lite-trgrpo[unsloth]')"
    if options.adapter is not None:
        return "transformers", "it continues adapters"
    if options.quantization == "int8":
        return "transformers", "it has int8"
    return "unsloth", "a card and the package are there"


def settle(options: Model) -> tuple[str, str]:
    """`choose`, and unsloth imported where it is chosen: before transformers, so before anything else is loaded.

    Raises ModelError where unsloth was asked for by name and cannot be had.
    """
    name, why = choose(options)
    if name == "unsloth":
        from lite_trgrpo.model import unsloth

        if problem := unsloth.problem():
            if options.backend == "unsloth":
                raise ModelError(f"{problem}. Type --set model.backend=transformers")
            return "transformers", problem
    return name, why


def load(
    options: Model, *, seed: int, gradient_checkpointing: bool = False, longest: int = 0, vllm: bool = False
) -> "TransformersPolicy":
    """The policy from the backend that is chosen; where there is a choice a line says which and why.

    longest: tokens of a prompt with its answer; vllm: unsloth's is to sample.
    """
    name, why = settle(options)
    if vllm and name != "unsloth":
        raise ModelError(f"rollout.engine = vllm is unsloth's, and here {why}; type --set rollout.engine=groups")
    if name == "unsloth":
        from lite_trgrpo.model import unsloth

        try:
            policy = unsloth.load(
                options, seed=seed, gradient_checkpointing=gradient_checkpointing, longest=longest, vllm=vllm
            )
            logger.info(f"backend: unsloth ({why})")
            return policy
        except Exception as error:  # it patches other libraries, so anything may break
            if ran_out(error):
                raise
            if options.backend == "unsloth" or vllm:
                raise ModelError(f"unsloth: {first_line(error)}. Type --set model.backend=transformers") from None
            why = f"unsloth failed here: {first_line(error)}"
            torch.cuda.empty_cache()
    if torch.cuda.is_available() and options.device != "cpu":
        logger.info(f"backend: transformers ({why})")
    from lite_trgrpo.model import hf

    return hf.load(options, seed=seed, gradient_checkpointing=gradient_checkpointing)
