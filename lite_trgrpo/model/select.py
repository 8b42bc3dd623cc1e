"""Which backend `model.backend` is for a run, why, and the policy from it."""

import logging
from typing import TYPE_CHECKING

import torch

from lite_trgrpo.config.schema import Model
from lite_trgrpo.errors import ModelError, first_line
from lite_trgrpo.model.oom import ran_out

if TYPE_CHECKING:
    from lite_trgrpo.model.hf import TransformersPolicy

logger = logging.getLogger(__name__)


def choose(options: Model, vllm: bool = False) -> tuple[str, str]:
    """-> (transformers or unsloth, the reason in a few words), without loading either. vllm: unsloth's is to sample."""
    if options.backend != "auto":
        return options.backend, f"model.backend = {options.backend}"
    if vllm:
        return "unsloth", "rollout.engine = vllm"
    return "transformers", "our engine samples groups and packs the update there"


def settle(options: Model, vllm: bool = False) -> str:
    """The name that `choose` gives, and unsloth imported where it is that: before transformers and all else.

    Raises ModelError where unsloth cannot be had. Nothing falls back to the other backend in the same process: unsloth
    has replaced parts of the other libraries by then.
    """
    name, _ = choose(options, vllm)
    if vllm and name != "unsloth":
        raise ModelError(
            "rollout.engine = vllm is unsloth's, and model.backend = transformers; type --set rollout.engine=groups"
        )
    if name == "unsloth":
        from lite_trgrpo.model import unsloth

        if problem := unsloth.problem():
            raise ModelError(f"{problem}. Type {_without(vllm)}")
    return name


def load(
    options: Model, *, seed: int, gradient_checkpointing: bool = False, longest: int = 0, vllm: bool = False
) -> "TransformersPolicy":
    """The policy from that backend. longest: tokens of a prompt with its answer; vllm: as for `choose`."""
    name = settle(options, vllm)
    if torch.cuda.is_available() and options.device != "cpu":
        logger.info(f"backend: {name} ({choose(options, vllm)[1]})")
    if name == "transformers":
        from lite_trgrpo.model import hf

        return hf.load(options, seed=seed, gradient_checkpointing=gradient_checkpointing)
    from lite_trgrpo.model import unsloth

    try:
        return unsloth.load(
            options, seed=seed, gradient_checkpointing=gradient_checkpointing, longest=longest, vllm=vllm
        )
    except Exception as error:  # it patches other libraries, so anything may break
        if ran_out(error):
            raise
        raise ModelError(f"unsloth: {first_line(error)}. Type {_without(vllm)}") from None


def _without(vllm: bool) -> str:
    return (
        "--set rollout.engine=groups --set model.backend=transformers" if vllm else "--set model.backend=transformers"
    )
