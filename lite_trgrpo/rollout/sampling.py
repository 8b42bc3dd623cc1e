"""Drawing a token. Every draw is a pure function of counters: no generator has a state that could be lost.

The uniform number of a token depends on (seed, stream, step, prompt, member, position) alone. So rows can be
regrouped, a run can be resumed, and a step can be replayed, and the same tokens come out (up to rounding of logits).
"""

import numpy as np
import torch
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(key: np.ndarray, counter: np.ndarray | int) -> np.ndarray:
    """splitmix64's finaliser over (key, counter): uint64 arrays in, uint64 out, broadcast."""
    with np.errstate(over="ignore"):  # wrapping around is what the hash wants
        z = key + _GOLDEN * (np.asarray(counter).astype(np.uint64) + np.uint64(1))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def row_keys(key: tuple[int, ...], prompts: np.ndarray, members: np.ndarray) -> np.ndarray:
    """One uint64 per row from a key such as (seed, stream, step) and the row's prompt and member numbers."""
    base = np.zeros(1, dtype=np.uint64)
    for part in key:
        base = mix(base, part)
    return mix(mix(base, prompts), members)


def uniforms(keys: np.ndarray, position: np.ndarray | int) -> np.ndarray:
    """[B] row keys, position(s) of the token in its completion -> [B] float64 in [0, 1)."""
    return (mix(keys, position) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw(logits: Tensor, uniform: Tensor | None, *, temperature: float) -> tuple[Tensor, Tensor]:
    """[B, V] logits, [B] uniforms (None: the most likely token) -> ids [B], log q [B].

    q is softmax(logits / temperature). The draw inverts the cumulative distribution: torch.multinomial takes several
    times longer over a wide vocabulary.

    Where logits are NaN or +inf, q does not exist: any id of the vocabulary is returned, and log q is NaN.
    """
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1.0:
        scaled = scaled / temperature
    # no pass over the vocabulary that is not needed: with 32 rows each takes a hundredth of a step
    scaled = scaled - scaled.amax(-1, keepdim=True)
    weights = scaled.exp()  # q, not normalised
    if uniform is None:
        ids = weights.argmax(-1, keepdim=True)
        total = weights.sum(-1, keepdim=True)
    else:
        cumulative = weights.cumsum(-1)
        total = cumulative[:, -1:]
        below = torch.nextafter(total, torch.zeros_like(total))  # rounding must not put the target on the total
        target = torch.minimum(uniform.to(total.dtype).unsqueeze(-1) * total, below)
        # right=True: the first entry above the target, so an id of probability 0 is never drawn
        ids = torch.searchsorted(cumulative, target, right=True)
        # In a row of NaN the search ends beyond the vocabulary; `gather` would raise, and on CUDA lose the context.
        ids = ids.clamp(max=logits.shape[-1] - 1)
    return ids.squeeze(-1), (scaled.gather(-1, ids) - total.log()).squeeze(-1)
