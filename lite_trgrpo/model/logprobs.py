"""Log-probabilities of given tokens without ever holding [B, T, V].

The vocabulary is 50,000 to 250,000 wide: the full logits of a step cost gigabytes. Here hidden states go through the
head a chunk of tokens at a time. A token's log-probability is one number that depends on one hidden state, so its whole
derivative is a vector as wide as that state: it is computed while the logits are at hand, and backward only scales it.
No logits are kept, none are computed twice.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 256  # tokens whose logits exist at once: 256 * 151,936 * 4 bytes = 148 MiB, and as much for probabilities


def selected_logprobs(
    hidden: Tensor, ids: Tensor, head: Callable[[Tensor], Tensor], temperature: float, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """hidden [N, H], ids [N] -> log p of the ids and entropy, both [N] in fp32 (or fp64 for a fp64 model).

    `head` maps [n, H] to new logits [n, V], which are overwritten, and holds no trainable weight. The entropy (nats)
    carries no gradient, and the gradient none of its own.
    """
    found: tuple[Tensor, Tensor] = _Selected.apply(hidden, ids, head, temperature, chunk)
    return found


class _Selected(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, ids: Tensor, head: Callable[[Tensor], Tensor], temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        logprobs = hidden.new_empty(len(ids), dtype=torch.promote_types(hidden.dtype, torch.float32))
        entropy = torch.empty_like(logprobs)
        wanted = ctx.needs_input_grad[0]
        derivative = torch.empty_like(hidden if wanted else hidden[:0])
        for part in (slice(i, i + chunk) for i in range(0, len(ids), chunk)):
            logprobs[part], entropy[part], gradient = _chunk(hidden[part], ids[part], head, temperature, wanted)
            if gradient is not None:
                derivative[part] = gradient
        ctx.save_for_backward(derivative)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (derivative,) = ctx.saved_tensors
        return (derivative * gradients[0].unsqueeze(-1)).to(derivative.dtype), None, None, None, None


def _chunk(
    hidden: Tensor, ids: Tensor, head: Callable[[Tensor], Tensor], temperature: float, wanted: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """-> log p [n], entropy [n], and if `wanted` d log p / d hidden [n, H]."""
    hidden = hidden.detach().requires_grad_(wanted)
    with torch.set_grad_enabled(wanted):
        logits = head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    with torch.no_grad():
        scaled = logits.detach()  # [n, V], from here on in the same memory
        if temperature != 1.0:
            scaled.div_(temperature)
        scaled.sub_(scaled.amax(-1, keepdim=True))
        place = ids.unsqueeze(-1)
        selected = scaled.gather(-1, place).squeeze(-1)
        probs = scaled.exp()
        total = probs.sum(-1)
        logprobs = selected - total.log()
        entropy = total.log() - torch.linalg.vecdot(probs, scaled) / total  # H = log Z - sum p logit
        if not wanted:
            return logprobs, entropy, None
        # d log p / d logits = (one-hot - p) / temperature
        probs.div_(total.unsqueeze(-1).mul(-temperature))
        probs.scatter_add_(-1, place, torch.full_like(place, 1 / temperature, dtype=probs.dtype))
    return logprobs, entropy, torch.autograd.grad(logits, hidden, probs)[0]


class Head:
    """A frozen output head whose logits are fp32 also where its weights are not: [N, H] -> [N, V].

    Logits rounded to bf16 alone would move log-probabilities by 0.02 (nats), as much as all other rounding together.
    """

    def __init__(self, layer: nn.Linear, soft_cap: float | None) -> None:
        self.layer, self.soft_cap = layer, soft_cap

    def __call__(self, hidden: Tensor) -> Tensor:
        weight, bias = self.layer.weight, self.layer.bias
        logits = _product(hidden, weight) if weight.dtype.itemsize < 4 else F.linear(hidden.to(weight.dtype), weight)
        if bias is not None:
            logits = logits + bias
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)


def _rows_at_once(weight: Tensor) -> int:
    """Rows of the head converted at a time, so that no fp32 copy of it exists; on a CPU few enough to stay in cache."""
    return 1024 if weight.device.type == "cpu" else 4096


class _Fp32Product(torch.autograd.Function):
    """hidden [N, H], weight [V, H] in 16 bits -> [N, V] in fp32. Backward converts the blocks again, keeping none."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.weight, ctx.dtype = weight, hidden.dtype
        # One product instead of blocks. PyTorch promises it for CUDA; AMD cards are called `cuda` too.
        if hidden.is_cuda and not torch.version.hip and hidden.dtype == weight.dtype:
            return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        hidden = hidden.float()
        rows = _rows_at_once(weight)
        logits = hidden.new_empty(len(hidden), len(weight))
        for block, part in zip(weight.split(rows), logits.split(rows, -1), strict=True):
            torch.mm(hidden, block.float().t(), out=part)
        return logits

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        rows = _rows_at_once(ctx.weight)
        parts, blocks = gradients[0].split(rows, -1), ctx.weight.split(rows)
        total = parts[0] @ blocks[0].float()
        for part, block in zip(parts[1:], blocks[1:], strict=True):
            total.addmm_(part, block.float())
        return total.to(ctx.dtype), None


def _product(hidden: Tensor, weight: Tensor) -> Tensor:
    found: Tensor = _Fp32Product.apply(hidden, weight.detach())
    return found
