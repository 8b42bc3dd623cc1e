"""Policy: all that the trainer knows about a model. Backends implement it; so does a ten-line table in the tests."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from lite_trgrpo.records import Completion, Message, Prompt, Sampling

Sequences = Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
"""Rows of (prompt ids, completion ids)."""


class Policy(Protocol):
    def encode(self, prompt: str | list[Message]) -> Prompt:
        """Render the prompt with the model's template and tokenise it, without adding special tokens twice."""

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[tuple[int, list[Completion]]]:
        """For every prompt its number and `sampling.members` completions, as soon as they are whole; no gradient."""

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


def sample_all(policy: Policy, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
    """For every prompt, in order, its completions."""
    groups = dict(policy.sample(prompts, sampling))
    return [groups[p] for p in range(len(prompts))]
