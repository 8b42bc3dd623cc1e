"""Our attention inside transformers' models: registered under a name, reached through the forward's `groups`.

Layers that do not attend keep a state in transformers' cache object; `states_as_cache` makes one around our own.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lite_trgrpo.rollout.attention import Attend, States, product

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
    scaling, window, cap = options["scaling"], options.get("sliding_window"), options.get("softcap")
    if groups is None and cap is not None:  # which their SDPA would leave out
        return product(query, key, value, scaling, attention_mask, cap).transpose(1, 2), None
    if groups is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return found
    unknown = [name for name in ("s_aux", "position_bias") if options.get(name) is not None]
    if unknown:
        raise NotImplementedError(f"attention with {unknown[0]}")
    layer: Any = module.layer_idx
    return groups.attend(layer, query, key, value, float(scaling), window, cap), None


def has_states(config: Any) -> bool:
    """Whether some layers keep a state from token to token instead of keys and values, by the model's configuration."""
    from transformers import DynamicCache

    try:
        return any(hasattr(layer, "conv_states") for layer in DynamicCache(config=config).layers)
    except (LookupError, AttributeError):  # a kind of layer, or a config, that transformers' own cache does not know
        return False


def states_as_cache(config: Any, states: States) -> Any:
    """A cache of transformers whose recurrent layers hold `states`, which they change in place; empty: a new one."""
    from transformers import DynamicCache

    cache = DynamicCache(config=config)
    cache.update = lambda k, v, *_, **__: (k, v)  # keys and values are kept by `groups`
    for (layer, kind, number), state in states.items():
        held = cache.layers[layer]
        getattr(held, kind)[number] = state
        getattr(held, f"is_{kind}_initialized")[number] = held.has_previous_state[number] = True
        if kind == "conv_states":
            held.conv_kernel_size[number] = state.shape[-1]
    return cache


def states_in(cache: Any) -> States:
    """What its recurrent layers hold, by (layer, kind, number)."""
    return {
        (layer, kind, number): state
        for layer, held in enumerate(cache.layers) if hasattr(held, "conv_states")
        for kind in ("conv_states", "recurrent_states")
        for number, state in getattr(held, kind).items() if state is not None
    }  # fmt: skip
