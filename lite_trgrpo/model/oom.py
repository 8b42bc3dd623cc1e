"""Out of memory: recognise it, free what can be freed, and come down to smaller pieces."""

import gc
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

from lite_trgrpo.errors import OutOfMemoryError

# what torch, oneDNN and the C++ library say on a CPU; on a card there is torch.OutOfMemoryError
WORDS = (
    "can't allocate memory",
    "not enough memory",
    "std::bad_alloc",
    "could not create a memory",
    "out of memory",
    "alloc_failed",
)


@dataclass(slots=True)
class Limits:
    """How much is done at a time, and how large gradients may be. Lowered when memory or a 16-bit number's range runs
    out, kept from then on and in checkpoints; no result changes but by rounding.
    """

    tokens: int
    """Tokens of one micro-batch of the update."""
    rows: int
    """Answers decoded side by side."""
    options: Sequence[Any] = ()
    """Values of the options that bear on memory, when the run was started or resumed."""
    lowered: int = 0
    """Powers of two by which the loss scale is below what the denominators allow: larger gradients had overflowed."""

    def fewer_tokens(self, used: int, rows: int) -> None:
        """After a micro-batch of `rows` answers, `used` tokens with their prompts, did not fit.

        An answer that is alone already gets one more chance, after what others held has been freed.
        """
        if rows <= 1 and self.tokens < used:
            raise OutOfMemoryError(advice("one answer and its gradient do", "rollout.max_new_tokens"))
        self.tokens = min(self.tokens, used) // 2

    def fewer_rows(self, used: int) -> None:
        if used <= 1:
            raise OutOfMemoryError(advice("decoding one answer at a time does", "rollout.cache_mib"))
        self.rows = used // 2

    def resume(self, saved: Mapping[str, Any]) -> None:
        """Come down to what memory had allowed an earlier part of the run, unless an option that bears on memory has
        changed since: then what fits is found out anew.
        """
        if saved.get("options", self.options) == self.options:  # older checkpoints name no options
            self.tokens, self.rows = min(self.tokens, saved["tokens"]), min(self.rows, saved["rows"])
        self.lowered = saved.get("lowered", 0)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def advice(what: str, option: str) -> str:
    """The message of an OutOfMemoryError: what does not fit, the option to lower, what else helps."""
    return (
        f"out of memory: {what} not fit. Lower {option} or data.max_prompt_tokens, set model.quantization = nf4 or "
        "train.gradient_checkpointing = true, or close what else uses the card; `lite-trgrpo check` shows what fits"
    )


def ran_out(error: BaseException) -> bool:
    """Whether the error says that there was no memory, on the card or on the machine."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in WORDS)


def free() -> None:
    """Give back what nothing refers to. To be called outside of the `except`, whose traceback keeps tensors alive."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def cap(limit: int, device: torch.device) -> bool:
    """Let allocations beyond `limit` bytes fail, so that they can be met; -> False where the system cannot."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.mem_get_info(device)[1]), device)
        return True
    if sys.platform != "linux":
        return False
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    return True


def total(device: torch.device) -> int:
    """Bytes of the card, or of the machine."""
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else psutil.virtual_memory().total
