"""Micro-batches: rows of like length together, under a budget of tokens. They never change a result."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Row = TypeVar("Row")


def by_length(rows: Sequence[Row], tokens: Callable[[Row], int], budget: int) -> Iterator[list[Row]]:
    """As many rows as fit `budget` tokens, padding counted; a row longer than the budget stands alone."""
    batch: list[Row] = []
    for row in sorted(rows, key=tokens, reverse=True):  # longest first: what does not fit shows at once
        if batch and (len(batch) + 1) * tokens(batch[0]) > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
