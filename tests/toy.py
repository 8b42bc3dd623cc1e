"""A policy small enough to read: a table of next-token logits. It learns in a second, on the trainer's own loop."""

from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from lite_trgrpo.model.logprobs import selected_logprobs
from lite_trgrpo.records import Completion, Prompt
from lite_trgrpo.rewards import load, score
from lite_trgrpo.rollout.sampling import draw, row_keys, uniforms

VOCABULARY = "012345abc$"  # "$" ends an answer
END = VOCABULARY.index("$")


class ToyPolicy:
    """logits of the next token = table[last token]; the adapter is added to a frozen random base table."""

    packs = True

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        size = len(VOCABULARY)
        generator = torch.Generator().manual_seed(seed)
        self.base = torch.randn(size, size, generator=generator, dtype=dtype)
        self.base[:6, 6:] += 2  # after a digit mostly letters, after a letter mostly the end:
        self.base[6:, END] += 2  # right answers are rare, but they do occur
        self.adapter = nn.Parameter(torch.zeros(size, size, dtype=dtype))
        self.adapter_on = True
        self.calls: list[int] = []  # rows of each forward with gradient

    def _table(self) -> torch.Tensor:
        return self.base + self.adapter if self.adapter_on else self.base

    def encode(self, prompt: str | list) -> Prompt:
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        return Prompt(tuple(VOCABULARY.index(c) for c in text), text)

    def pieces(self, ids):
        return [VOCABULARY[i] for i in ids]

    @torch.no_grad()
    def sample(self, prompts, sampling, wanted):
        for p, prompt in enumerate(prompts):
            for m in wanted[p]:
                yield p, m, self._answer(p, prompt, m, sampling)

    def _answer(self, number, prompt, member, sampling):
        key = row_keys(sampling.key, np.array([number], dtype=np.uint64), np.array([member], dtype=np.uint64))
        ids, logprobs, last = [], [], prompt.ids[-1]
        for position in range(sampling.max_new_tokens):
            uniform = None if sampling.greedy else torch.from_numpy(uniforms(key, position))
            token, logprob = draw(self._table()[[last]], uniform, temperature=sampling.temperature)
            last = int(token)
            ids.append(last)
            logprobs.append(float(logprob))
            if last == END:
                break
        text = "".join(VOCABULARY[i] for i in ids if i != END)
        return Completion(tuple(ids), (True,) * len(ids), tuple(logprobs), text, last == END)

    def logprobs(self, rows, temperature):
        if torch.is_grad_enabled():
            self.calls.append(len(rows))
        flat = [selected_logprobs(
            self._table()[[prompt[-1], *completion[:-1]]],  # its rows are hidden states and logits at once
            torch.tensor(completion), torch.clone, temperature,
        ) for prompt, completion in rows]  # fmt: skip
        return tuple(nn.utils.rnn.pad_sequence(list(part), batch_first=True) for part in zip(*flat, strict=True))

    @contextmanager
    def reference(self):
        self.adapter_on = False
        yield
        self.adapter_on = True

    def trainable(self):
        return {"adapter": self.adapter}

    def save_adapter(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"adapter": self.adapter.detach()}, folder / "adapter.safetensors")


class InProcess:
    """A Scorer without a process of its own: starting one would take longer than these runs do."""

    def __init__(self, functions, options=None):
        self.rewards = load(functions, options or {})

    def start(self, group):
        future = Future()
        future.set_result(score([group], self.rewards)[0])
        return future

    def score(self, groups):
        return score(groups, self.rewards)
