"""Random numbers as a function of counters, and the draw of a token from them."""

import itertools
import math

import numpy as np
import pytest
import torch

from lite_trgrpo.rollout.sampling import draw, row_keys, uniforms

MASK = 2**64 - 1
BELOW_ONE = 1 - 2.0**-53  # the largest number that `uniforms` can give


def splitmix(key: int, counter: int) -> int:
    """splitmix64 (Steele, Lea, Flood 2014): the counter-th output of the generator whose state starts at key."""
    z = (key + 0x9E3779B97F4A7C15 * (counter + 1)) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def expected_uniform(key: tuple[int, ...], prompt: int, member: int, position: int) -> float:
    """The counters hashed one after the other; the upper 53 bits of the last hash are the number."""
    state = 0
    for counter in (*key, prompt, member, position):
        state = splitmix(state, counter)
    return (state >> 11) / 2**53


def keys_of(key: tuple[int, ...], prompts: int, members: int) -> np.ndarray:
    grid = np.array(list(itertools.product(range(prompts), range(members))), dtype=np.uint64)
    return row_keys(key, grid[:, 0], grid[:, 1])


def chi_squared(observed: np.ndarray, expected: np.ndarray) -> float:
    """The statistic in standard deviations from its mean: it has mean k - 1 and variance 2 (k - 1)."""
    freedom = len(observed) - 1
    return (((observed - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


# -- uniform numbers ----------------------------------------------------------------------------------------


def test_the_reference_here_is_splitmix64():
    """Its published outputs for seed 1234567."""
    assert [splitmix(1234567, i) for i in range(3)] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("key", [(0,), (0, 0, 0), (7, 1, 250), (2**63, 2, 3), (2**64 - 1,)])
def test_numbers_are_pinned_so_that_a_run_resumes_alike_under_any_version(key):
    for row, (prompt, member) in zip(keys_of(key, 3, 4), itertools.product(range(3), range(4)), strict=True):
        for position in (0, 1, 511):
            assert uniforms(row[None], position)[0] == expected_uniform(key, prompt, member, position)


def test_numbers_are_uniform_over_rows_and_positions():
    """600,000 numbers: mean 1/2 and variance 1/12 within 4 standard errors, 1,000 bins by chi-squared within 4."""
    keys = keys_of((3, 0, 17), 100, 30)
    numbers = np.concatenate([uniforms(keys, position) for position in range(200)])
    n = len(numbers)
    assert numbers.dtype == np.float64 and numbers.min() >= 0 and numbers.max() < 1
    assert abs(numbers.mean() - 1 / 2) < 4 * math.sqrt(1 / 12 / n)
    assert abs(numbers.var() - 1 / 12) < 4 * math.sqrt(1 / 180 / n)  # E u^4 - (E u^2)^2 of u - 1/2 is 1/80 - 1/144
    assert abs(chi_squared(np.histogram(numbers, 1000, (0, 1))[0], np.full(1000, n / 1000))) < 4


def number_at(seed: int, stream: int, step: int, prompt: int, member: int, position: int) -> float:
    return uniforms(row_keys((seed, stream, step), np.uint64([prompt]), np.uint64([member])), position)[0]


@pytest.mark.parametrize("counter", ["seed", "stream", "step", "prompt", "member", "position"])
def test_numbers_are_uniform_and_uncorrelated_along_each_counter(counter):
    """5,000 numbers with one counter running and the rest at 0: what a weak hash of small integers would fail."""
    others = dict.fromkeys(("seed", "stream", "step", "prompt", "member", "position"), 0)
    numbers = np.array([number_at(**(others | {counter: i})) for i in range(5000)])
    assert abs(chi_squared(np.histogram(numbers, 50, (0, 1))[0], np.full(50, 100.0))) < 4
    for lag in (1, 2, 8):
        assert abs(np.corrcoef(numbers[:-lag], numbers[lag:])[0, 1]) < 4 / math.sqrt(len(numbers))


def test_no_two_places_of_a_run_share_a_number():
    """3 seeds, 2 streams, 5 steps, 4 prompts, 5 members, 6 positions: 3,600 places; swapped counters are among them."""
    numbers = [
        uniforms(keys_of(key, 4, 5), position)
        for key in itertools.product(range(3), range(2), range(5)) for position in range(6)
    ]  # fmt: skip
    assert len(np.unique(np.concatenate(numbers))) == 3 * 2 * 5 * 4 * 5 * 6


@pytest.mark.parametrize("changed", range(6))
def test_any_counter_changes_the_number(changed):
    counters = [5, 1, 30, 2, 3, 40]
    before = number_at(*counters)
    counters[changed] += 1
    assert number_at(*counters) != before


def test_a_row_has_its_number_whoever_is_beside_it():
    keys = keys_of((1, 0, 2), 4, 4)
    assert (uniforms(keys[::-1], 3) == uniforms(keys, 3)[::-1]).all()
    assert (uniforms(keys[5:7], 3) == uniforms(keys, 3)[5:7]).all()


# -- drawing ------------------------------------------------------------------------------------------------


def drawn(logits, uniform, **options):
    """ids and log p for one row of logits (repeated for each uniform)."""
    uniform = torch.as_tensor(uniform, dtype=torch.float64)
    rows = torch.as_tensor(logits, dtype=torch.float64).expand(len(uniform), -1)
    return draw(rows, uniform, **({"temperature": 1.0} | options))


def logits_of(probs) -> torch.Tensor:
    return torch.tensor(probs, dtype=torch.float64).log()


GRID = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000  # every uniform number, more or less


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_those_of_the_softmax(temperature):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(20, generator=generator, dtype=torch.float64) * 2
    numbers = np.concatenate([uniforms(keys_of((9, 0, 4), 50, 20), position) for position in range(50)])
    ids, _ = drawn(logits, numbers, temperature=temperature)
    probs = torch.softmax(logits / temperature, -1).numpy()
    assert abs(chi_squared(np.bincount(ids, minlength=20), probs * len(numbers))) < 4


def test_the_number_picks_the_id_whose_interval_it_lies_in():
    """p = 0.2, 0.5, 0.3: [0, 0.2) is 0, [0.2, 0.7) is 1, [0.7, 1) is 2."""
    ids, _ = drawn(logits_of([0.2, 0.5, 0.3]), [0.0, 0.19, 0.21, 0.69, 0.71, BELOW_ONE])
    assert ids.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2.0**-25, BELOW_ONE])
def test_an_id_of_probability_zero_is_never_drawn(dtype, uniform):
    """At the ends and in the middle; just below 1 a float32 rounds up to 1, beyond the last id with a share."""
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 0.0, -torch.inf]], dtype=dtype)
    ids, logprobs = draw(logits, torch.tensor([uniform], dtype=torch.float64), temperature=1.0)
    assert ids.item() in (1, 3)
    assert logprobs.isfinite().all()


def test_a_wide_vocabulary_is_drawn_evenly_in_float32():
    """Cumulative sums of 150,000 small shares round; every id must still have its place."""
    numbers = uniforms(keys_of((2, 0, 0), 8, 8), 0)
    logits = torch.zeros(1, 150_000).expand(len(numbers), -1)
    ids, logprobs = draw(logits, torch.from_numpy(numbers), temperature=1.0)
    torch.testing.assert_close(ids.double() / 150_000, torch.from_numpy(numbers), rtol=0, atol=1e-3)
    torch.testing.assert_close(logprobs, torch.full((len(numbers),), -math.log(150_000)), rtol=1e-5, atol=0)


def test_without_a_number_the_likeliest_is_taken():
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(2))
    ids, logprobs = draw(logits, None, temperature=0.7)
    assert torch.equal(ids, logits.argmax(-1))
    torch.testing.assert_close(logprobs, torch.log_softmax(logits / 0.7, -1).amax(-1))


@pytest.mark.parametrize("temperature", [0.8, 1.0, 1.2])
def test_the_log_probability_is_that_of_the_distribution_drawn_from(temperature):
    logits = logits_of([0.10, 0.25, 0.05, 0.40, 0.20])
    ids, logprobs = drawn(logits, GRID[::100], temperature=temperature)
    assert set(ids.tolist()) == {0, 1, 2, 3, 4}
    expected = torch.log_softmax(logits / temperature, -1)
    torch.testing.assert_close(logprobs, expected[ids], rtol=1e-12, atol=1e-15)


def test_low_temperature_comes_near_to_greedy_and_high_to_even():
    logits = logits_of([0.2, 0.5, 0.3])
    assert drawn(logits, GRID, temperature=0.02)[0].unique().tolist() == [1]
    shares = torch.bincount(drawn(logits, GRID, temperature=1000.0)[0], minlength=3) / len(GRID)
    torch.testing.assert_close(shares, torch.full((3,), 1 / 3), rtol=0, atol=1e-3)


def test_a_row_is_drawn_alike_whoever_is_beside_it():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(40, 17, generator=generator)
    uniform = torch.rand(40, generator=generator, dtype=torch.float64)
    order = torch.randperm(40, generator=generator)
    ids, logprobs = draw(logits, uniform, temperature=0.9)
    for rows in (order, order[:1], order[5:9]):
        some, some_logprobs = draw(logits[rows], uniform[rows], temperature=0.9)
        assert torch.equal(some, ids[rows])
        assert torch.equal(some_logprobs, logprobs[rows])


def test_half_precision_logits_are_scored_in_float32():
    """In bfloat16 itself log p would have two or three digits."""
    logits = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.bfloat16)
    _, logprobs = draw(logits, None, temperature=1.0)
    assert logprobs.dtype == torch.float32
    # log(e^3 / (e + e^2 + e^3)) = -log(1 + e^-1 + e^-2)
    assert logprobs.item() == pytest.approx(-math.log(1 + math.exp(-1) + math.exp(-2)), rel=1e-6)
