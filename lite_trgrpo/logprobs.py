"""Log-probabilities of given tokens without ever holding [B, T, V].

The vocabulary is 50,000 to 250,000 wide: the full logits of a step cost gigabytes. Here hidden states go through the
head a chunk of tokens at a time, and backward computes each chunk again instead of keeping it.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 256  # tokens whose logits exist at once: 256 * 151,936 * 4 bytes = 148 MiB


def selected_logprobs(
    hidden: Tensor, ids: Tensor, head: Callable[[Tensor], Tensor], temperature: float, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """hidden [N, H], ids [N] -> log p of the ids and entropy, both [N] in fp32 (or fp64 for a fp64 model).

    `head` maps [n, H] to logits [n, V] and holds no trainable weight. The entropy (nats) carries no gradient.
    """
    parts = [
        checkpoint(_chunk_logprobs, part, part_ids, head, temperature, use_reentrant=False)
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
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature  # [n, V]
    normaliser = torch.logsumexp(logits, -1)  # [n]
    logprobs = logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - normaliser
    with torch.no_grad():
        # H = log Z - sum p logit
        entropy = normaliser - (torch.exp(logits - normaliser.unsqueeze(-1)) * logits).sum(-1)
    return logprobs, entropy
