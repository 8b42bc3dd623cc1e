"""Attention over groups: a prompt is read once, however many answers follow it.

transformers lets a model's attention be replaced by a function. Ours hands queries, keys and values of each layer to an
object that travels with the forward: `Packed` here for reading prompts and for the update, `rollout.cache.GroupCache`
for decoding. Everything outside attention works on single tokens, so a batch needs no padding: it is one row

    [prompt | answer 1 | ... | answer G | next prompt | ...]

in which an answer sees its prompt and itself, and positions go on from the prompt in each answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

StateName = tuple[int, str, int]  # layer, kind, number
States = Mapping[StateName, Tensor]
"""What layers without keys and values (convolutions, linear attention) carry from token to token: [R, ...] each."""


class Attend(Protocol):
    """One layer's attention, and the states of layers that do not attend. H query heads, K key-value heads, D head
    size.
    """

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None, cap: float | None = None
    ) -> Tensor:
        """q [R, H, L, D], k and v [R, K, L, D] -> [R, L, H, D]; a query sees at most `window` keys, itself included.

        `cap` bends scores: cap * tanh(score / cap), as in Gemma 2.
        """

    def states(self) -> States:
        """States that the forward continues and overwrites in place; empty: it starts from nothing."""

    def keep_states(self, states: States) -> None:
        """Receive the states after a forward that started from nothing."""


class Keep(Protocol):
    """A receiver of the keys and values of a packed row, or of the states after a row that is one prompt."""

    def keep(self, layer: int, k: Tensor, v: Tensor) -> None:
        """k and v [K, N, D] of all N tokens of the row."""

    def keep_states(self, states: States) -> None:
        """`states` [1, ...] after the last token of the row."""


@dataclass(frozen=True, slots=True)
class Span:
    """Place of a prompt and its answers in the packed row: lengths, one after the other."""

    start: int
    prompt: int
    answers: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.start + self.prompt + sum(self.answers)


class Packed:
    """Attention of a packed row without padding, R = 1."""

    def __init__(self, groups: Sequence[tuple[int, Sequence[int]]], device: torch.device, keep: Keep | None = None):
        """`groups`: (prompt length, answer lengths) in the order of the row; an answer may have length 0."""
        self.spans: list[Span] = []
        positions: list[Tensor] = []
        for prompt, answers in groups:
            self.spans.append(Span(self.spans[-1].stop if self.spans else 0, prompt, tuple(n for n in answers if n)))
            positions += [torch.arange(prompt), *(torch.arange(prompt, prompt + n) for n in answers)]
        self.positions = torch.cat(positions).unsqueeze(0).to(device)  # [1, N]
        self._padded = [_padding(span, device) for span in self.spans]
        self._keep = keep
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}  # the same in every layer

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None, cap: float | None = None
    ) -> Tensor:
        if self._keep is not None:
            self._keep.keep(layer, k[0], v[0])
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
            # What attention would keep for backward is the prompt's keys once for each answer: rather repeat it.
            found: Tensor = checkpoint(
                self._attend, q, k, v, scaling, window, cap, use_reentrant=False, preserve_rng_state=False
            )
            return found
        return self._attend(q, k, v, scaling, window, cap)

    def states(self) -> States:
        return {}

    def keep_states(self, states: States) -> None:
        if self._keep is not None:
            self._keep.keep_states(states)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None, cap: float | None) -> Tensor:
        q, k, v = q[0], k[0], v[0]  # [H, N, D]
        parts = []
        for span, padding in zip(self.spans, self._padded, strict=True):
            prompt = slice(span.start, span.start + span.prompt)
            mask = None if window is None or span.prompt <= window else self._mask(span.prompt, span.prompt, window)
            parts.append(_causal(q[:, prompt], k[:, prompt], v[:, prompt], scaling, mask, cap))
            if padding is not None:
                longest = max(span.answers)
                mask = self._mask(longest, span.prompt + longest, window)
                parts.append(_answers(q, k, v, prompt, *padding, scaling, mask, cap))
        return torch.cat(parts).unsqueeze(0)

    def _mask(self, queries: int, keys: int, window: int | None) -> Tensor:
        key = (queries, keys, window)
        if key not in self._masks:
            self._masks[key] = visible(*key, self.positions.device)
        return self._masks[key]


def _padding(span: Span, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """-> for [answers, longest] places their index in the row (an answer's end repeats its last); the real places."""
    if not span.answers:
        return None
    longest, start = max(span.answers), span.start + span.prompt
    index, real = [], []
    for i, length in enumerate(span.answers):
        index.append([start + min(t, length - 1) for t in range(longest)])
        real += [i * longest + t for t in range(length)]
        start += length
    return torch.tensor(index, device=device), torch.tensor(real, device=device)


def _causal(q: Tensor, k: Tensor, v: Tensor, scaling: float, mask: Tensor | None, cap: float | None) -> Tensor:
    """[H, L, D], [K, L, D] -> [L, H, D], each place seeing itself and what is before it."""
    return product(q[None], k[None], v[None], scaling, mask, cap)[0].transpose(0, 1)


def _answers(
    q: Tensor, k: Tensor, v: Tensor, prompt: slice, index: Tensor, real: Tensor, scaling: float, mask: Tensor,
    cap: float | None,
) -> Tensor:  # fmt: skip
    """The answers of one group side by side, padded inside attention alone -> [their tokens, H, D]."""
    answers, longest = index.shape

    def beside(x: Tensor) -> Tensor:  # [*, N, D] -> [answers, *, longest, D]; index_select's backward is the quick one
        return x.index_select(1, index.flatten()).unflatten(1, (answers, longest)).transpose(0, 1)

    k, v = (torch.cat([x[:, prompt].expand(answers, -1, -1, -1), beside(x)], dim=2) for x in (k, v))
    out = product(beside(q), k, v, scaling, mask, cap)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, real)


def product(q: Tensor, k: Tensor, v: Tensor, scaling: float, mask: Tensor | None, cap: float | None) -> Tensor:
    """q [R, H, L, D], k and v [R, K, keys, D], mask of what is seen [*, L, keys], none: causal -> [R, H, L, D]."""
    k, v = _repeat(k, q.shape[1]), _repeat(v, q.shape[1])
    if cap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling)
    if mask is None:
        mask = visible(q.shape[-2], k.shape[-2], None, q.device)
    scores = bent((q * scaling) @ k.transpose(-1, -2), cap)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)  # not -inf: a pad sees nothing, and would be NaN
    return torch.softmax(scores, -1).to(q.dtype) @ v


def bent(scores: Tensor, cap: float | None) -> Tensor:
    """Scores in at least fp32, none beyond `cap`."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return scores if cap is None else cap * torch.tanh(scores / cap)


def visible(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """[queries, keys] bool: the queries are the last of the keys; each sees itself, what is before, within `window`."""
    distance = torch.arange(keys - queries, keys, device=device).unsqueeze(1) - torch.arange(keys, device=device)
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def _repeat(x: Tensor, heads: int) -> Tensor:
    """[..., K, L, D] -> [..., H, L, D]: grouped queries share keys; not every kernel knows that by itself."""
    return x if x.shape[-3] == heads else x.repeat_interleave(heads // x.shape[-3], dim=-3)
