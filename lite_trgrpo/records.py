"""The records that flow through a run. Frozen, plain, free of torch.

Letters used in shapes everywhere: P prompts in a step, G completions in a group, B = P*G sequences,
T completion tokens (padded to the longest), V vocabulary.

    Example --encode--> Prompt --sample--> Completion * G --score--> Group --update--> adapter
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a data source."""

    prompt: str | list[Message]
    """A string (one user message) or a list of chat messages."""
    columns: Mapping[str, Any]
    """Every other column of the row, `answer` among them; handed to the reward functions."""
    origin: str
    """Origin of the row, for messages: `data.jsonl:12`."""

    @property
    def text(self) -> str:
        """The prompt as plain text: what decides whether two rows are the same question."""
        if isinstance(self.prompt, str):
            return self.prompt
        if len(self.prompt) == 1 and self.prompt[0]["role"] == "user":  # the model reads it as it reads the string
            return self.prompt[0]["content"]
        return "\n".join(f"{m['role']}: {m['content']}" for m in self.prompt)


@dataclass(frozen=True, slots=True)
class Prompt:
    """An example as the model reads it."""

    ids: tuple[int, ...]
    text: str
    """The ids decoded, special tokens included: the rendered template as the model reads it."""
    prefix: str = ""
    """Start of the answer that the template has already written (`<think>`); rewards see it before the completion."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer. The ids are the truth: the update uses them, never re-encoded text."""

    ids: tuple[int, ...]
    """At most `max_new_tokens`; the first end token is the last id, nothing follows it."""
    sampled: tuple[bool, ...]
    """Which ids the policy sampled, and so which are in the loss (all, unless a tool wrote some)."""
    logprobs: tuple[float, ...]
    """log-probability of each id under the distribution that it was drawn from."""
    text: str
    """The ids decoded, without end, padding and turn tokens."""
    stopped: bool
    """True if it ended with an end token, False if the token cap cut it off."""


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt, its G completions and, once scored, their rewards."""

    example: Example
    prompt: Prompt
    completions: Sequence[Completion]
    rewards: Sequence[float] = ()
    """Weighted sums; NaN = could not be graded, left out of the group's mean, std and count."""
    parts: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Each reward function's own values, unweighted, by name."""
    failures: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    """Completions at which a reward function failed, by function and place: timeout, crash or error."""

    def grades(self) -> Sequence[float]:
        """Values of the function that decides what is solved (it comes first); NaN: ungraded."""
        return next(iter(self.parts.values()))

    def graded(self) -> int:
        return sum(grade == grade for grade in self.grades())  # NaN is not equal to itself

    def solved(self, solved_at: float) -> list[bool]:
        """Whether each completion is solved; an ungraded one is not."""
        return [grade >= solved_at for grade in self.grades()]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn. The same key and the same policy give the same completions."""

    members: int
    """Completions a prompt (G in training)."""
    max_new_tokens: int
    temperature: float = 1.0
    greedy: bool = False
    """Take the most likely token; temperature still decides the log-probabilities that are returned."""
    max_rows: int = 128
    """At most this many completions are decoded side by side."""
    cache_bytes: int = 2**31
    """Memory for keys and values; decides how many of `max_rows` fit."""
    engine: Literal["groups", "generate", "vllm"] = "groups"
    """Ours, transformers' own as a reference, or unsloth's vLLM."""
    key: tuple[int, ...] = (0,)
    """Counters such as (seed, stream, step) from which every uniform number is computed."""
