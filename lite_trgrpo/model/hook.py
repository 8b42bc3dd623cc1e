"""Our attention inside transformers' models: registered under a name, reached through the forward's `groups`."""

from typing import Any

import torch
from torch import Tensor, nn

from lite_trgrpo.rollout.attention import Attend

NAME = "lite-groups"
NO_MASK = torch.ones(1, 1, 1, 1, dtype=torch.bool)
"""Never read where `groups` is given; being 4-D it keeps transformers from building a mask of its own."""


def register() -> None:
    """Make NAME known to transformers: a forward with `groups=` goes through it, any other through its SDPA."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    groups: Attend | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention interface: [R, H, L, D] -> [R, L, H, D]."""
    if groups is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return found
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]
    if unknown:
        raise NotImplementedError(f"attention with {unknown[0]}")
    layer: Any = module.layer_idx
    scaling, window = options["scaling"], options.get("sliding_window")
    return groups.attend(layer, query, key, value, float(scaling), window), None
