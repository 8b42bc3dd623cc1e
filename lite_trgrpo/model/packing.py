"""Micro-batches: answers to one prompt, or of like length, under a budget of tokens. They never change a result."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Row = TypeVar("Row")
Ids = tuple[int, ...]


def batches(
    rows: Sequence[Row], ids: Callable[[Row], tuple[Ids, Ids]], budget: int, packs: bool
) -> Iterator[list[Row]]:
    """Batches as a policy reads them: `packs` says whether it reads a shared prompt once, or pads every row."""
    return (by_prompt if packs else by_length)(rows, ids, budget)


def by_prompt(rows: Sequence[Row], ids: Callable[[Row], tuple[Ids, Ids]], budget: int) -> Iterator[list[Row]]:
    """Batches of rows that fit `budget` tokens, where a prompt counts once; a row longer than the budget stands alone.

    `ids`: the prompt and the completion of a row. A group that fits is never divided; one that does not is, and its
    prompt counts (and is read) in each part. Longest first: what does not fit in memory shows at once.
    """
    groups: dict[Ids, list[Row]] = {}
    for row in rows:
        groups.setdefault(ids(row)[0], []).append(row)

    def tokens(prompt: Ids) -> int:
        return len(prompt) + sum(len(ids(row)[1]) for row in groups[prompt])

    # First fit in order of size: a group is added while it fits whole. One that is larger than the budget is cut
    # between rows, and `read` says whether the prompt must be counted again. Order and cuts change no result: every
    # row has its own denominator, fixed by the whole step.
    batch: list[Row] = []
    used = 0
    for prompt in sorted(groups, key=tokens, reverse=True):
        if batch and used + tokens(prompt) > budget:
            yield batch
            batch, used = [], 0
        read = False  # whether this batch holds the prompt
        for row in groups[prompt]:
            cost = len(ids(row)[1]) + (0 if read else len(prompt))
            if batch and used + cost > budget:
                yield batch
                batch, used, cost = [], 0, len(ids(row)[1]) + len(prompt)
            batch.append(row)
            used, read = used + cost, True
    if batch:
        yield batch


def by_length(rows: Sequence[Row], ids: Callable[[Row], tuple[Ids, Ids]], budget: int) -> Iterator[list[Row]]:
    """Batches for rows that are padded to their longest: it costs `budget` tokens at most, or the row stands alone.
    Longest first, as above.
    """
    batch: list[Row] = []
    width = 0  # of the batch: its first row's
    for row in sorted(rows, key=lambda row: sum(map(len, ids(row))), reverse=True):
        if batch and width * (len(batch) + 1) > budget:
            yield batch
            batch = []
        width = width if batch else sum(map(len, ids(row)))
        batch.append(row)
    if batch:
        yield batch
