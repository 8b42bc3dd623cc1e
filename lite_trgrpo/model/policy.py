"""Policy: all that the trainer knows about a model. Backends implement it; so does a ten-line table in the tests."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from lite_trgrpo.model.oom import Limits, free, ran_out
from lite_trgrpo.records import Completion, Message, Prompt, Sampling

Sequences = Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
"""Rows of (prompt ids, completion ids)."""


class Policy(Protocol):
    @property
    def packs(self) -> bool:
        """Whether `logprobs` reads the prompt of several rows once; else rows are padded to the longest."""

    def encode(self, prompt: str | list[Message]) -> Prompt:
        """Render the prompt with the model's template and tokenise it, without adding special tokens twice."""

    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, wanted: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, int, Completion]]:
        """Yield (prompt, member, completion) of the members `wanted` of each prompt, once finished; no gradient."""

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each id by itself, special tokens too."""

    def logprobs(self, rows: Sequences, temperature: float) -> tuple[Tensor, Tensor]:
        """log p of the completion ids and entropy (nats), both [B, T], zero beyond a row's own length.

        The log-probabilities carry a gradient to the adapter unless the caller is under `torch.no_grad()`.
        """

    def reference(self) -> AbstractContextManager[object]:
        """Inside, the adapter is off: the policy is its own base model."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """The adapter's master weights (fp32) by name, in a fixed order."""

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter as others read it (plain PEFT for language models)."""


def sample_groups(
    policy: Policy, prompts: Sequence[Prompt], sampling: Sampling, limits: Limits | None = None
) -> Iterator[tuple[int, list[Completion]]]:
    """For every prompt its number and `sampling.members` completions, as soon as they are whole.

    Where memory runs out, finished completions are kept and the rest drawn again, fewer side by side; `limits` come
    down with it. Raises OutOfMemoryError where one at a time does not fit.
    """
    limits = limits or Limits(sys.maxsize, sampling.max_rows)
    found: list[dict[int, Completion]] = [{} for _ in prompts]
    missing = [list(range(sampling.members)) for _ in prompts]
    while any(missing):
        rows = min(sampling.max_rows, sum(map(len, missing)), limits.rows)
        try:
            for p, member, completion in policy.sample(prompts, replace(sampling, max_rows=rows), missing):
                found[p][member] = completion
                if len(found[p]) == sampling.members:
                    yield p, [found[p][m] for m in range(sampling.members)]
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            limits.fewer_rows(rows)
        else:
            return
        missing = [[m for m in range(sampling.members) if m not in group] for group in found]
        free()


def sample_all(
    policy: Policy, prompts: Sequence[Prompt], sampling: Sampling, limits: Limits | None = None
) -> list[list[Completion]]:
    """For every prompt, in order, its completions."""
    groups = dict(sample_groups(policy, prompts, sampling, limits))
    return [groups[p] for p in range(len(prompts))]
