"""Keys and values while groups are decoded: those of a prompt once, those of an answer in a place of its own.

Nothing grows by concatenation: both stores are allocated at their full size, and attention reads them up to the longest
entry that is alive. Live rows and live prompts are kept dense: what leaves is overwritten by the last.

Layers that do not attend (convolutions, linear attention) have a state of fixed size instead of keys and values. A
prompt's is stored once as well, and copied into the row of each answer when it begins.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lite_trgrpo.rollout.attention import StateName, States, bent

BUCKET = 16  # lengths are rounded up to this, so that shapes change every 16th token only


class GroupCache:
    """Rows are answers, lines are prompts. Allocated layer by layer when the first prompt passes through."""

    def __init__(self, rows: int, lines: int, row_tokens: int, line_tokens: int) -> None:
        self.size = (rows, lines, bucket(row_tokens), bucket(line_tokens))
        self.rows: dict[int, tuple[Tensor, Tensor]] = {}  # by layer keys and values [rows, K, row_tokens, D]
        self.lines: dict[int, tuple[Tensor, Tensor]] = {}  # [lines, K, line_tokens, D]
        self.row_states: dict[StateName, Tensor] = {}  # [rows, ...]
        self.line_states: dict[StateName, Tensor] = {}  # [lines, ...]
        self._reading: Sequence[tuple[int, int]] = ()
        self._masks: dict[int | None, Tensor] = {}

    # -- reading prompts ------------------------------------------------------------------------------------

    def read_into(self, lines: Sequence[tuple[int, int]]) -> None:
        """The next packed row holds prompts of these (line, length), one after the other."""
        self._reading = lines

    def keep(self, layer: int, k: Tensor, v: Tensor) -> None:
        if layer not in self.lines:
            rows, lines, row_tokens, line_tokens = self.size
            heads, _, width = k.shape  # which may differ from layer to layer
            self.rows[layer] = k.new_zeros(rows, heads, row_tokens, width), v.new_zeros(rows, heads, row_tokens, width)
            self.lines[layer] = (
                k.new_zeros(lines, heads, line_tokens, width), v.new_zeros(lines, heads, line_tokens, width)
            )  # fmt: skip
        start = 0
        for line, length in self._reading:
            for store, read in zip(self.lines[layer], (k, v), strict=True):
                store[line, :, :length] = read[:, start : start + length]
            start += length

    def keep_states(self, states: States) -> None:
        [(line, _)] = self._reading
        for name, state in states.items():
            if name not in self.line_states:
                self.row_states[name] = state.new_zeros(self.size[0], *state.shape[1:])
                self.line_states[name] = state.new_zeros(self.size[1], *state.shape[1:])
            self.line_states[name][line] = state[0]

    # -- beginning and leaving ------------------------------------------------------------------------------

    def begin(self, first: int, lines: Sequence[int]) -> None:
        """The rows from `first` on begin to answer the prompts in these lines."""
        for name, store in self.row_states.items():
            store[first : first + len(lines)] = self.line_states[name][list(lines)]

    def move_row(self, source: int, target: int, tokens: int) -> None:
        self._move(self.rows, self.row_states, source, target, tokens)

    def move_line(self, source: int, target: int, tokens: int) -> None:
        self._move(self.lines, self.line_states, source, target, tokens)

    def _move(
        self, stores: dict[int, tuple[Tensor, Tensor]], states: dict[StateName, Tensor],
        source: int, target: int, tokens: int,
    ) -> None:  # fmt: skip
        if source == target:
            return
        for pair in stores.values():
            for store in pair:
                store[target, :, :tokens] = store[source, :, :tokens]
        for state in states.values():
            state[target] = state[source]

    # -- decoding -------------------------------------------------------------------------------------------

    def arrange(
        self, lines: Sequence[int], prompts: Sequence[int], tokens: Sequence[int], device: torch.device
    ) -> None:
        """Before each step: for every row its line, that prompt's length, and the answer's tokens already stored."""
        # Rows lie in the order in which slots became free. `_place` says where each one lies when rows are stacked by
        # prompt, `_width` apart; places of prompts with fewer answers stay empty (zeros).
        members = [0] * (max(lines) + 1)
        places = []
        for line in lines:
            places.append(members[line])
            members[line] += 1
        self._lines, self._width = len(members), max(members)
        layout = torch.tensor([lines, places, prompts, tokens], device=device)
        self._place = layout[0] * self._width + layout[1]
        # whole groups in order, as at the start: the rows lie as the lines want them
        self._dense = [line * self._width + place for line, place in zip(lines, places, strict=True)] == list(
            range(self._lines * self._width)
        )
        self._prompts, self._tokens = layout[2], layout[3]
        self._row = torch.arange(len(lines), device=device)
        self._line_tokens, self._row_tokens = bucket(max(prompts)), bucket(max(tokens) + 1)
        self._masks = {}

    def states(self) -> States:
        """See `attention.Attend`: the first B of each store, so that what a layer writes is in its place."""
        return {name: store[: len(self._row)] for name, store in self.row_states.items()}

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None, cap: float | None = None
    ) -> Tensor:
        """One new token a row, R = B; see `attention.Attend`."""
        # A row sees two stretches of keys: its prompt's, stored once for the group, and its own. Scores of both go into
        # one softmax. For the prompt's part the rows of a group are stacked, so that its keys are read once for all of
        # them: one product per prompt instead of one per answer. Stored lengths differ, so both parts are read up to
        # the longest and masked.
        (row_k, row_v), (line_k, line_v) = self.rows[layer], self.lines[layer]
        rows, heads, _, width = q.shape
        row_k[self._row, :, self._tokens] = k[:, :, 0]
        row_v[self._row, :, self._tokens] = v[:, :, 0]
        row_k, row_v = (x[:rows, :, : self._row_tokens] for x in (row_k, row_v))
        line_k, line_v = (x[: self._lines, :, : self._line_tokens] for x in (line_k, line_v))
        # scaled before the product: q k^T itself may be beyond fp16
        q = (q * scaling).view(rows, k.shape[1], -1, width)  # the queries that share a key-value head side by side
        shared = self._by_row(self._by_line(q) @ line_k.transpose(-1, -2))
        scores = bent(torch.cat([shared, q @ row_k.transpose(-1, -2)], -1), cap) + self._mask(window)
        weights = torch.softmax(scores, -1).to(q.dtype)
        shared, own = weights.split([self._line_tokens, self._row_tokens], -1)
        out = own @ row_v + self._by_row(self._by_line(shared) @ line_v)
        return out.reshape(rows, 1, heads, width)

    def _by_line(self, x: Tensor) -> Tensor:
        """[B, K, n, *] -> [lines, K, members * n, *]: the rows of a prompt in one product with its keys."""
        _, heads, n, last = x.shape
        if not self._dense:
            spread = x.new_zeros(self._lines * self._width, heads, n, last)
            spread[self._place] = x
            x = spread
        x = x.view(self._lines, self._width, heads, n, last).transpose(1, 2)
        return x.reshape(self._lines, heads, self._width * n, last)

    def _by_row(self, x: Tensor) -> Tensor:
        """The way back: [lines, K, members * n, *] -> [B, K, n, *]."""
        lines, heads, _, last = x.shape
        x = x.view(lines, heads, self._width, -1, last).transpose(1, 2)
        x = x.reshape(lines * self._width, heads, -1, last)
        return x if self._dense else x[self._place]

    def _mask(self, window: int | None) -> Tensor:
        """[B, 1, 1, line_tokens + row_tokens]: 0 where a row's new token sees a key, -inf elsewhere; once a step."""
        if window not in self._masks:
            key = torch.arange(self._line_tokens + self._row_tokens, device=self._tokens.device)
            own = key - self._line_tokens  # below 0: a key of the prompt
            position = torch.where(own < 0, key, self._prompts[:, None] + own)  # [B, keys]
            now = (self._prompts + self._tokens)[:, None]
            seen = torch.where(own < 0, key < self._prompts[:, None], position <= now)
            if window is not None:
                seen &= now - position < window
            mask = torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, -torch.inf)
            self._masks[window] = mask[:, None, None]
        return self._masks[window]


def bucket(tokens: int) -> int:
    return -(-tokens // BUCKET) * BUCKET
