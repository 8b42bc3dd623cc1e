"""Before a run: will it fit?"""

from typing import Any

import psutil
import torch

from lite_trgrpo.backends.loading import load_config, resolve_device, resolve_dtype
from lite_trgrpo.options import Config
from lite_trgrpo.plan import fitting, plan

CARD_OVERHEAD = 600 * 2**20  # a CUDA context and what its libraries keep; an assumption until measured on a card
DESKTOP = 512 * 2**20  # left for what else the card shows


def memory(config: Config, vram: int | None) -> tuple[dict[str, Any], Config | None]:
    """What the run will take against what there is (bytes), and options that fit if these do not.

    vram: of a card to plan for; None: this machine's card, or its memory. Prompts are taken as long as
    `data.max_prompt_tokens` allows.
    -> {"parts", "peak", "available", "slots", "fits", "changes" (None: nothing helps)}
    """
    device = torch.device("cuda") if vram is not None else resolve_device(config.model.device)
    assumed = config.model.dtype == "auto" and vram is not None
    dtype = torch.bfloat16 if assumed else resolve_dtype(config.model.dtype, device)
    shape, longest = load_config(config.model), config.data.max_prompt_tokens
    overhead, available = _room(device, vram)
    found = plan(config, shape, dtype, longest)
    parts = {name: getattr(found, name) for name in ("weights", "adapter", "cache", "rollout", "update")}
    result = {
        "parts": {**parts, "overhead": overhead},
        "peak": found.peak + overhead,
        "available": available,
        "slots": found.slots,
        "fits": found.peak + overhead <= available,
        "changes": [],
    }
    if result["fits"]:
        return result, config
    fit = fitting(config, shape, dtype, longest, available - overhead)
    result["changes"] = None if fit is None else fit[1]
    return result, None if fit is None else fit[0]


def _room(device: torch.device, vram: int | None) -> tuple[int, int]:
    """-> what the libraries themselves take, and what there is for the run (bytes)."""
    if vram is not None:
        return CARD_OVERHEAD, vram - DESKTOP
    if device.type == "cuda":
        return CARD_OVERHEAD, torch.cuda.mem_get_info(device)[0] - DESKTOP
    taken = psutil.Process().memory_info().rss
    return taken, psutil.virtual_memory().available + taken
