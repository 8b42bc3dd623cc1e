"""Micro-batches: every row once, a prompt counted once for each batch, no more tokens than the budget."""

import itertools
import random

from lite_trgrpo.model.packing import by_length, by_prompt


def pair(row):
    return row[0], row[1]


def cost(batch):
    """Tokens that a packed forward reads at most: each prompt once, each answer whole."""
    return sum(map(len, {row[0] for row in batch})) + sum(len(row[1]) for row in batch)


def random_rows(draw):
    """Rows (prompt, completion, number): ragged groups, their members scattered, some completions empty."""
    lengths = [draw.choice([1, 2, 5, 20, 90]) for _ in range(draw.randint(1, 8))]
    prompts = [tuple([p] * length) for p, length in enumerate(lengths)]
    rows = [(prompt, (7,) * draw.choice([0, 1, 3, 10, 60])) for prompt in prompts for _ in range(draw.randint(1, 9))]
    draw.shuffle(rows)
    return [(*row, number) for number, row in enumerate(rows)]


def check(rows, budget):
    batches = list(by_prompt(rows, pair, budget))
    assert sorted(row[2] for batch in batches for row in batch) == list(range(len(rows))), "every row exactly once"
    assert all(batch for batch in batches)
    assert all(cost(batch) <= budget or len(batch) == 1 for batch in batches)
    for prompt in {row[0] for row in rows}:
        group = [row for row in rows if row[0] == prompt]
        parts = [batch for batch in batches if any(row[0] == prompt for row in batch)]
        assert len(parts) == 1 or cost(group) > budget, "a group that fits is never divided"
    for first, second in itertools.pairwise(batches):
        shared = {row[0] for row in first} & {row[0] for row in second}
        assert not shared or cost([*first, second[0]]) > budget, "a group is divided only where the budget ends"


def test_what_holds_for_any_rows_and_any_budget():
    draw = random.Random(0)
    for budget in [1, 2, 10, 50, 120, 200, 500, 10**6] * 50:
        check(random_rows(draw), budget)


def test_a_prompt_counts_once_in_a_batch():
    rows = [((1,) * 10, (2,) * 5) for _ in range(6)]
    assert [len(batch) for batch in by_prompt(rows, pair, 40)] == [6]  # 10 + 6 * 5
    assert [len(batch) for batch in by_prompt(rows, pair, 39)] == [5, 1]
    assert [len(batch) for batch in by_prompt(rows, pair, 25)] == [3, 3]  # the second part reads the prompt again
    assert [len(batch) for batch in by_prompt(rows, pair, 14)] == [1] * 6


def test_longest_first_and_the_order_within_a_group_stays():
    rows = [((1,), (5,) * 3, 0), ((2,) * 8, (5,) * 9, 1), ((1,), (5,) * 2, 2), ((2,) * 8, (5,), 3)]
    assert [[row[2] for row in batch] for batch in by_prompt(rows, pair, 18)] == [[1, 3], [0, 2]]
    assert [[row[2] for row in batch] for batch in by_prompt(rows, pair, 24)] == [[1, 3, 0, 2]]


def test_no_rows_no_batches():
    assert list(by_prompt([], pair, 10)) == []


def test_batches_by_length_hold_what_the_budget_pads():
    draw = random.Random(0)
    for budget in [1, 10, 50, 200, 10**6] * 20:
        rows = random_rows(draw)
        batches = list(by_length(rows, pair, budget))
        assert sorted(row[2] for batch in batches for row in batch) == list(range(len(rows)))
        lengths = [[len(row[0]) + len(row[1]) for row in batch] for batch in batches]
        in_order = list(itertools.chain(*lengths))
        assert in_order == sorted(in_order, reverse=True)
        assert all(max(batch) * len(batch) <= budget or len(batch) == 1 for batch in lengths)
        assert all(max(first) * (len(first) + 1) > budget for first, _ in itertools.pairwise(lengths)), (
            "batches are full"
        )
