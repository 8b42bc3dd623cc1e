"""Which prompts teach most: those that are solved about half of the time. Remembered by the prompt's number."""

from collections.abc import Mapping, Sequence

CHOICE = 4  # prompts looked at for each one that is taken


class SolveRates:
    """How often each prompt was tried and solved so far in a run."""

    def __init__(self, counts: Mapping[int, tuple[int, int]] | None = None) -> None:
        self.counts = {} if counts is None else dict(counts)

    def note(self, prompt: int, solved: int, tried: int) -> None:
        before = self.counts.get(prompt, (0, 0))
        self.counts[prompt] = (before[0] + solved, before[1] + tried)

    def nearest_half(self, candidates: Sequence[int], wanted: int) -> list[int]:
        """The `wanted` candidates whose solve rate is nearest to one half, in their order; one never tried counts as
        that, so new prompts come first.
        """

        def distance(prompt: int) -> float:
            solved, tried = self.counts.get(prompt, (0, 0))
            return abs(solved / tried - 0.5) if tried else 0.0

        chosen = sorted(range(len(candidates)), key=lambda i: distance(candidates[i]))[:wanted]
        return [candidates[i] for i in sorted(chosen)]
