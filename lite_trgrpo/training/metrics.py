"""Statistics of a step, beside those of the update."""

import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean, pstdev
from typing import Any

import psutil
import torch

from lite_trgrpo.records import Group


def has_signal(group: Group) -> bool:
    """Whether its graded answers differ in reward: else every advantage is 0."""
    return len({reward for reward in group.rewards if not math.isnan(reward)}) > 1


def of_rollout(groups: Sequence[Group], solved_at: float) -> dict[str, Any]:
    """Means over a step's completions; ungradable ones are counted apart."""
    completions = [completion for group in groups for completion in group.completions]
    rewards = [reward for group in groups for reward in group.rewards if not math.isnan(reward)]
    parts = {
        f"reward/{name}": fmean(values)
        for name in groups[0].parts
        if (values := [v for group in groups for v in group.parts[name] if not math.isnan(v)])
    }
    return {
        "reward_mean": fmean(rewards) if rewards else None,
        "reward_std": pstdev(rewards) if rewards else None,
        **parts,
        "solved": fmean(solved for group in groups for solved in group.solved(solved_at)),
        "groups_with_signal": fmean(has_signal(group) for group in groups),
        "truncated": fmean(not completion.stopped for completion in completions),
        "ungradable": len(completions) - len(rewards),
        "entropy_sampled": -fmean(logprob for completion in completions for logprob in completion.logprobs),
        "length_mean": fmean(len(completion.ids) for completion in completions),
        "length_max": max(len(completion.ids) for completion in completions),
    }


def finite(value: Any) -> Any:
    """The same with None for NaN and infinity, in lists and dicts too: JSON has neither."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def timed(clock: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds that pass inside to `clock[name]`."""
    started = time.perf_counter()
    yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    clock[name] += time.perf_counter() - started


def memory() -> dict[str, float]:
    """MiB: of the process now and at its peak, and of tensors on the card, where there is one."""
    process = psutil.Process().memory_info()
    found = {"rss_mib": process.rss / 2**20, "rss_peak_mib": _peak(process) / 2**20}
    if torch.cuda.is_initialized():
        found["cuda_mib"] = torch.cuda.memory_allocated() / 2**20
        found["cuda_peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return found


def _peak(process: Any) -> int:
    """Most resident memory that the process has had (bytes)."""
    if sys.platform == "win32":
        return int(process.peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(process.rss, peak if sys.platform == "darwin" else 1024 * peak)
