"""A run at work: what it works with, and how far it is."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lite_trgrpo.config.schema import Config
from lite_trgrpo.model.oom import Limits
from lite_trgrpo.model.policy import Policy
from lite_trgrpo.records import Example, Group, Prompt
from lite_trgrpo.rewards import Scorer
from lite_trgrpo.store.run import Run
from lite_trgrpo.training.stopping import Stop

Encoded = list[tuple[Example, Prompt]]
Metrics = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Listener:
    """Callbacks for whoever watches; the loop itself prints nothing."""

    step: Callable[[Metrics, Sequence[Group]], None]
    """A step is done: what is logged of it, and its groups."""
    doing: Callable[[str], None]
    """Called with the new activity, in a word or two."""
    evaluated: Callable[[Metrics], None]
    warned: Callable[[str], None]
    saved: Callable[[], None]
    """After each checkpoint: everything in the run folder is as it stands."""


@dataclass(slots=True)
class Job:
    """Everything that the loop needs; `step` and what follows it change."""

    config: Config
    policy: Policy
    training: Encoded
    heldout: Encoded
    scorer: Scorer
    run: Run
    listener: Listener
    stop: Stop
    trainable: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    limits: Limits
    step: int = 0
    """Steps that are done."""
    torn: bool = False
    """Adapter or logs hold a part of the next step, so a checkpoint now would be of no step."""
    history: list[Metrics] = field(default_factory=list)
    """Lines of metrics.jsonl: entry i is of step i + 1."""
    evaluations: list[Metrics] = field(default_factory=list)
    saved: int | None = None
    """The step of the newest checkpoint."""
    saved_at: float = field(default_factory=time.monotonic)
