"""The optimizer and its learning rate by step."""

import math
from typing import Any

import torch
from torch import nn

from lite_trgrpo.config.schema import Train


def learning_rate_at(step: int, options: Train) -> float:
    """Linear warm-up over `warmup_steps`, then constant, or linear or cosine decay to 0 after the last step."""
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    progress = (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps)
    factors = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return options.learning_rate * factors[options.schedule]


def make_optimizer(parameters: list[nn.Parameter], options: Train) -> torch.optim.Optimizer:
    """AdamW over the adapter. LoRA's Adam state is small, so fp32 is the default; 8 bits are an option."""
    settings: dict[str, Any] = {"lr": options.learning_rate, "weight_decay": options.weight_decay}
    if options.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **settings)
    import bitsandbytes.optim as bnb

    kind = {"adamw-8bit": bnb.AdamW8bit, "paged-adamw-8bit": bnb.PagedAdamW8bit}[options.optimizer]
    return kind(parameters, **settings)
