"""Decoding groups: a prompt is read once for all its answers, finished rows leave, waiting ones take their place."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lite_trgrpo.records import Sampling
from lite_trgrpo.rollout.attention import Attend, Packed
from lite_trgrpo.rollout.cache import GroupCache, bucket
from lite_trgrpo.rollout.sampling import draw, row_keys, uniforms

READ_AT_ONCE = 4096  # prompt tokens of one forward


class Decoder(Protocol):
    """The part of a model that the engine needs."""

    device: torch.device
    recurrent: bool
    """Whether some layers carry a state from token to token: their prompts are read one by one."""

    def hidden(self, ids: Tensor, positions: Tensor, groups: Attend) -> Tensor:
        """ids and positions [R, L] -> last hidden states [R, L, width]; `groups`: the attention, and layers' states."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, width] -> [N, V], at least fp32."""


@dataclass(slots=True, eq=False)
class Answer:
    """A completion while it grows."""

    prompt: int
    member: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False
    key: int = 0
    """Key of its random numbers."""


@dataclass(slots=True, eq=False)
class Line:
    """A prompt that has been read and still has answers to give."""

    prompt: int
    length: int
    last: Tensor
    """Hidden state of its last token, from which every answer's first token is drawn: [width]."""
    waiting: list[int]
    """Members that have not begun."""
    open: int
    """Members that have not finished."""


class Engine:
    """One queue of prompts, `sampling.members` answers each, decoded in at most `slots` rows."""

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        end_ids: frozenset[int],
        slots: int,
        wanted: Sequence[Sequence[int]] | None = None,
        grown: Callable[[Answer], None] = lambda answer: None,
    ) -> None:
        """`wanted`: which members of each prompt; all if not given. `grown` is called with each token of an answer."""
        self.decoder, self.prompts, self.sampling, self.end_ids = decoder, prompts, sampling, end_ids
        self.slots, self.max_lines = slots, line_count(slots, len(prompts))
        longest = max((len(prompt) for prompt in prompts), default=0)
        self.cache = GroupCache(slots, self.max_lines, sampling.max_new_tokens, longest)
        self._grown = grown
        self._wanted = [range(sampling.members)] * len(prompts) if wanted is None else wanted
        # prompts of like length at the same time: they are read up to the longest
        asked = [p for p in range(len(prompts)) if self._wanted[p]]
        self._queue = deque(sorted(asked, key=lambda p: len(prompts[p])))
        self._lines: list[Line] = []
        self._rows: list[tuple[Answer, Line]] = []  # a row's place in this list is its place in the cache

    def answers(self) -> Iterator[Answer]:
        """Every answer, as soon as it is finished."""
        while self._queue or self._lines:
            yield from self._admit()
            if self._rows:
                yield from self._step()

    @torch.no_grad()
    def _admit(self) -> list[Answer]:
        """Fill the free slots; -> answers that ended with their first token."""
        finished: list[Answer] = []
        # Free slots go to waiting answers of prompts that are read already; only then is another prompt read. So no
        # slot is idle while anybody waits, and no prompt takes memory before it is needed. A first token comes from the
        # prompt's last hidden state and may be the last: then its slot is free again within this loop.
        while len(self._rows) < self.slots and (any(line.waiting for line in self._lines) or self._can_read()):
            if not any(line.waiting for line in self._lines):
                self._read()
            begun: list[tuple[Answer, Line]] = []
            for line in self._lines:
                while line.waiting and len(self._rows) + len(begun) < self.slots:
                    begun.append((Answer(line.prompt, line.waiting.pop(0)), line))
            set_keys([answer for answer, _ in begun], self.sampling.key)
            line_of = {id(line): i for i, line in enumerate(self._lines)}
            self.cache.begin(len(self._rows), [line_of[id(line)] for _, line in begun])
            self._rows += begun
            logits = self.decoder.logits(torch.stack([line.last for _, line in begun]))
            finished += self._extend(begun, logits)
        return finished

    def _can_read(self) -> bool:
        return bool(self._queue) and len(self._lines) < self.max_lines

    def _read(self) -> None:
        """Read as many prompts as the free slots ask for, in one forward."""
        free, tokens = self.slots - len(self._rows), 0
        at_once = 0 if self.decoder.recurrent else READ_AT_ONCE  # a state would run on from prompt to prompt
        chosen: list[int] = []
        while (
            self._queue
            and len(self._lines) + len(chosen) < self.max_lines
            and len(chosen) * self.sampling.members < free
            and (not chosen or tokens + len(self.prompts[self._queue[0]]) <= at_once)
        ):
            tokens += len(self.prompts[self._queue[0]])
            chosen.append(self._queue.popleft())
        lengths = [len(self.prompts[p]) for p in chosen]
        self.cache.read_into([(len(self._lines) + i, length) for i, length in enumerate(lengths)])
        groups = Packed([(length, ()) for length in lengths], self.decoder.device, keep=self.cache)
        ids = torch.tensor([[i for p in chosen for i in self.prompts[p]]], device=self.decoder.device)
        hidden = self.decoder.hidden(ids, groups.positions, groups)[0]
        for p, length, span in zip(chosen, lengths, groups.spans, strict=True):
            members = list(self._wanted[p])
            self._lines.append(Line(p, length, hidden[span.stop - 1].clone(), members, len(members)))

    @torch.no_grad()
    def _step(self) -> list[Answer]:
        """One token for every row; -> the answers that are finished with it."""
        line_of = {id(line): i for i, line in enumerate(self._lines)}
        device, rows = self.decoder.device, self._rows
        prompts = [line.length for _, line in rows]
        stored = [len(answer.ids) - 1 for answer, _ in rows]  # the newest token is stored by this forward
        self.cache.arrange([line_of[id(line)] for _, line in rows], prompts, stored, device)
        ids = torch.tensor([[answer.ids[-1]] for answer, _ in rows], device=device)
        positions = torch.tensor([[p + s] for p, s in zip(prompts, stored, strict=True)], device=device)
        hidden = self.decoder.hidden(ids, positions, self.cache)
        return self._extend(rows, self.decoder.logits(hidden[:, 0]))

    def _extend(self, rows: Sequence[tuple[Answer, Line]], logits: Tensor) -> list[Answer]:
        """Draw each row's next token and let go of the rows that are finished."""
        finished = extend([answer for answer, _ in rows], logits, self.sampling, self.end_ids, self._grown)
        if finished:
            self._release({id(answer) for answer in finished})
        return finished

    def _release(self, finished: set[int]) -> None:
        """Rows and lines stay dense: the last one moves into a place that has become free."""
        # From the back, so that the row that moves into a gap has been looked at already. The cache moves the same way:
        # a row's place in `_rows` is its place there.
        for i in reversed(range(len(self._rows))):
            answer, line = self._rows[i]
            if id(answer) not in finished:
                continue
            line.open -= 1
            last, _ = self._rows[-1]
            self.cache.move_row(len(self._rows) - 1, i, len(last.ids) - 1)
            self._rows[i] = self._rows[-1]
            self._rows.pop()
        for i in reversed(range(len(self._lines))):
            if self._lines[i].open == 0:
                self.cache.move_line(len(self._lines) - 1, i, self._lines[-1].length)
                self._lines[i] = self._lines[-1]
                self._lines.pop()


def set_keys(answers: Sequence[Answer], key: tuple[int, ...]) -> None:
    numbers = np.array([(a.prompt, a.member) for a in answers], dtype=np.uint64).reshape(-1, 2)
    for answer, found in zip(answers, row_keys(key, numbers[:, 0], numbers[:, 1]).tolist(), strict=True):
        answer.key = found


def extend(
    answers: Sequence[Answer], logits: Tensor, sampling: Sampling, end_ids: frozenset[int],
    grown: Callable[[Answer], None],
) -> list[Answer]:  # fmt: skip
    """Draw the next token of each answer from its logits [B, V]; -> the answers that are finished with it."""
    uniform = None
    if not sampling.greedy:
        keys = np.array([answer.key for answer in answers], dtype=np.uint64)
        positions = np.array([len(answer.ids) for answer in answers])
        uniform = torch.from_numpy(uniforms(keys, positions)).to(logits.device)
    ids, logprobs = draw(logits, uniform, temperature=sampling.temperature)
    finished = []
    for answer, token, logprob in zip(answers, ids.tolist(), logprobs.tolist(), strict=True):
        if math.isnan(logprob) and end_ids:  # the model is ruined: end here, and let the guard `finite` see it
            token = min(end_ids)
        answer.ids.append(token)
        answer.logprobs.append(logprob)
        answer.stopped = token in end_ids
        grown(answer)
        if answer.stopped or len(answer.ids) == sampling.max_new_tokens:
            finished.append(answer)
    return finished


def line_count(slots: int, prompts: int) -> int:
    """Prompts held at a time: as many as rows, so that no slot is idle when each group is down to its last answer."""
    return max(1, min(slots, prompts))


def slot_count(prompts: Sequence[Sequence[int]], sampling: Sampling, token_bytes: int, state_bytes: int = 0) -> int:
    """The most rows, up to `sampling.max_rows`, whose keys and values fit `sampling.cache_bytes`; at least one.

    `token_bytes`: keys and values of one token in all layers; `state_bytes`: states of one sequence.
    """
    longest = max((len(prompt) for prompt in prompts), default=0)

    def needed(rows: int) -> int:
        lines = line_count(rows, len(prompts))
        tokens = rows * bucket(sampling.max_new_tokens) + lines * bucket(longest)
        return token_bytes * tokens + state_bytes * (rows + lines)

    wanted = min(sampling.max_rows, len(prompts) * sampling.members)
    return next((rows for rows in range(wanted, 1, -1) if needed(rows) <= sampling.cache_bytes), 1)
