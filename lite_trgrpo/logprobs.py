"""Log-probabilities of given tokens without ever holding [B, T, V].

The vocabulary is 50,000 to 250,000 wide: the full logits of a step cost gigabytes. Here hidden states go through the
head a chunk of tokens at a time, and backward computes each chunk again instead of keeping it.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK = 256  # tokens whose logits exist at once: 256 * 151,936 * 4 bytes = 148 MiB


def selected_logprobs(
    hidden: Tensor, ids: Tensor, head: Callable[[Tensor], Tensor], temperature: float, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """hidden [N, H], ids [N] -> log p of the ids and entropy, both [N] in fp32 (or fp64 for a fp64 model).

    `head` maps [n, H] to logits [n, V] and holds no trainable weight. The entropy (nats) carries no gradient.
    """
    parts = [
        checkpoint(_chunk_logprobs, part, part_ids, head, temperature, use_reentrant=False, preserve_rng_state=False)
        for part, part_ids in zip(hidden.split(chunk), ids.split(chunk), strict=True)
    ]
    if not parts:
        empty = hidden.new_zeros(0, dtype=torch.promote_types(hidden.dtype, torch.float32))
        return empty, empty
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def _chunk_logprobs(
    hidden: Tensor, ids: Tensor, head: Callable[[Tensor], Tensor], temperature: float
) -> tuple[Tensor, Tensor]:
    logits = head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # [n, V]
    if temperature != 1.0:  # a pass over all of it
        logits = logits / temperature
    normaliser = torch.logsumexp(logits, -1)  # [n]
    logprobs = logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - normaliser
    with torch.no_grad():
        # H = log Z - sum p logit
        entropy = normaliser - (torch.exp(logits - normaliser.unsqueeze(-1)) * logits).sum(-1)
    return logprobs, entropy


class Head:
    """A frozen output head whose logits are fp32 also where its weights are not: [N, H] -> [N, V].

    Logits rounded to bf16 alone would move log-probabilities by 0.02 (nats), as much as all other rounding together.
    """

    BLOCK = 4096  # rows of the weight converted at a time, so that no fp32 copy of it exists

    def __init__(self, layer: nn.Linear, soft_cap: float | None) -> None:
        self.layer, self.soft_cap = layer, soft_cap

    def __call__(self, hidden: Tensor) -> Tensor:
        weight, bias = self.layer.weight, self.layer.bias
        logits = _product(hidden, weight) if weight.dtype.itemsize < 4 else F.linear(hidden.to(weight.dtype), weight)
        if bias is not None:
            logits = logits + bias
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)


class _Fp32Product(torch.autograd.Function):
    """hidden [N, H], weight [V, H] in 16 bits -> [N, V] in fp32. Backward converts the blocks again, keeping none."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.weight, ctx.dtype = weight, hidden.dtype
        hidden = hidden.float()
        return torch.cat([hidden @ block.float().t() for block in weight.split(Head.BLOCK)], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        parts = gradients[0].split(Head.BLOCK, -1)
        blocks = ctx.weight.split(Head.BLOCK)
        total = parts[0] @ blocks[0].float()
        for part, block in zip(parts[1:], blocks[1:], strict=True):
            total.addmm_(part, block.float())
        return total.to(ctx.dtype), None


def _product(hidden: Tensor, weight: Tensor) -> Tensor:
    found: Tensor = _Fp32Product.apply(hidden, weight.detach())
    return found
