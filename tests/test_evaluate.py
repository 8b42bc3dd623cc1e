"""Held-out scores: the intervals by hand, and what pass@1 and pass@k count."""

import math
import random
import re
from fractions import Fraction

import pytest

from lite_trgrpo.evaluate import Z, evaluate, paired_gain, wilson
from lite_trgrpo.model.policy import sample_all
from lite_trgrpo.records import Completion, Example, Prompt, Sampling
from tests.toy import InProcess, ToyPolicy

EXACT = InProcess({"exact": 1.0})


def flags(solved: int, n: int) -> list[bool]:
    return [True] * solved + [False] * (n - solved)


# -- intervals ----------------------------------------------------------------------------------------------


def test_z_leaves_two_and_a_half_percent_on_each_side():
    assert math.erfc(Z / math.sqrt(2)) == pytest.approx(0.05, rel=1e-12)


@pytest.mark.parametrize(
    ("solved", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.2775327998628892),  # z^2 / (n + z^2) = 3.8414588 / 13.8414588
        (10, 10, 0.7224672001371107, 1.0),  # n / (n + z^2)
        (5, 10, 0.2365930905, 0.7634069095),  # 1/2 -+ z / (2 sqrt(n + z^2)) = 0.5 -+ 0.9799820 / 3.7204111
        (1, 1, 0.2065493143772375, 1.0),  # 1 / (1 + z^2)
    ],
)
def test_wilson_gives_the_known_values(solved, n, low, high):
    result = wilson(flags(solved, n))
    assert result["value"] == solved / n
    assert (result["low"], result["high"]) == pytest.approx((low, high), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize(
    ("solved", "n"), [(0, 1), (1, 3), (0, 10), (3, 10), (10, 10), (17, 200), (199, 200), (200, 200)]
)
def test_the_ends_of_wilson_are_the_shares_that_lie_z_standard_errors_away(solved, n):
    """Its definition, in exact fractions: both ends x solve (p - x)^2 = z^2 x (1 - x) / n."""
    result = wilson(flags(solved, n))
    p, z = Fraction(solved, n), Fraction(Z)
    ends = Fraction(result["low"]), Fraction(result["high"])
    for end in ends:
        assert float((p - end) ** 2 - z * z * end * (1 - end) / n) == pytest.approx(0, abs=1e-15)
    assert 0 <= ends[0] <= p <= ends[1] + Fraction(1, 10**15) and ends[0] < ends[1] <= 1


def test_wilson_does_not_depend_on_the_order():
    assert wilson([True, False, False]) == wilson([False, False, True])


@pytest.mark.parametrize(
    ("before", "after", "mean", "interval"),
    [
        # one won of 4; with half a pair in each cell 1.5 won, 0.5 lost of 6
        ([0, 0, 1, 1], [1, 0, 1, 1], 0.25, (1 / 6, Z * math.sqrt(2 - 1 / 6) / 6)),
        # the mirror
        ([1, 0, 1, 1], [0, 0, 1, 1], -0.25, (-1 / 6, Z * math.sqrt(2 - 1 / 6) / 6)),
        # one won, one lost of 2: 1.5 each of 4
        ([0, 1], [1, 0], 0.0, (0.0, Z * math.sqrt(3) / 4)),
        # nothing won or lost of 3: half a pair each of 5, not certainty
        ([1, 0, 1], [1, 0, 1], 0.0, (0.0, Z / 5)),
    ],
)
def test_the_paired_gain_by_hand(before, after, mean, interval):
    gain = paired_gain([bool(b) for b in before], [bool(a) for a in after])
    middle, half = interval
    assert gain["value"] == mean
    assert (gain["low"], gain["high"]) == pytest.approx((middle - half, middle + half), rel=1e-12, abs=1e-15)


def test_a_gain_stays_within_what_a_difference_of_shares_can_be():
    gain = paired_gain([False], [True])
    assert gain["value"] == gain["high"] == 1.0 and -1.0 <= gain["low"] < 0.5


@pytest.mark.parametrize(("won", "lost"), [(0.05, 0.0), (0.1, 0.1), (0.3, 0.02)])
def test_its_interval_holds_the_truth_95_times_in_100_with_few_rows(won, lost):
    """Twenty rows, where the normal interval without the half pairs is often [0, 0]."""
    numbers, held = random.Random(0), 0
    for _ in range(2000):
        draws = [numbers.random() for _ in range(20)]
        gain = paired_gain([won <= u < won + lost for u in draws], [u < won for u in draws])
        held += gain["low"] <= won - lost <= gain["high"]
    assert held / 2000 > 0.93


def test_pairing_is_narrower_than_two_shares_apart():
    """The same 40 % and 50 %, first with 90 of 100 rows alike, then with the rows shuffled against each other."""
    before = flags(40, 100)
    alike, apart = paired_gain(before, flags(50, 100)), paired_gain(before, flags(50, 100)[::-1])
    assert alike["value"] == pytest.approx(apart["value"]) == pytest.approx(0.1)
    assert alike["high"] - alike["low"] < (apart["high"] - apart["low"]) / 2


def test_pairs_of_different_length_are_refused():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        paired_gain([True], [True, False])


# -- what is counted ----------------------------------------------------------------------------------------


class Scripted:
    """Answers word for word: greedy ones from one list, sampled ones from another. "..." at the end is cut off."""

    def __init__(self, greedy: list[str], sampled: list[list[str]]) -> None:
        self.script = {True: [[text] for text in greedy], False: sampled}
        self.asked: list[Sampling] = []

    def sample(self, prompts, sampling, wanted):
        self.asked.append(sampling)
        for p, texts in enumerate(self.script[sampling.greedy]):
            for m, text in enumerate(texts):
                yield p, m, self._completion(text)

    @staticmethod
    def _completion(text):
        length = len(text)
        return Completion((1,) * length, (True,) * length, (0.0,) * length, text, not text.endswith("..."))


HELDOUT = [(Example(f"q{i}", {"answer": gold}, f"t:{i}"), Prompt((i,), f"<q{i}>")) for i, gold in enumerate("abcd")]
SCRIPT = Scripted(["a", "x", "c", "long..."], [["a", "a", "x"], ["x", "b", "x"], ["x", "x", "x"], ["x", "x...", "x"]])
SAMPLING = Sampling(members=1, max_new_tokens=8, temperature=0.7, key=(3, 1))


def scores(samples: int = 3, rewards=EXACT, solved_at: float = 1.0) -> dict:
    SCRIPT.asked.clear()
    return evaluate(SCRIPT, HELDOUT, rewards, SAMPLING, samples=samples, solved_at=solved_at)


def test_progress_is_reported_prompt_by_prompt():
    told = []
    evaluate(SCRIPT, HELDOUT, EXACT, SAMPLING, samples=3, solved_at=1.0, progress=told.append)
    assert [re.findall(r"\d+", line) for line in told] == [[str(i), "4"] for i in (1, 2, 3, 4)] * 2
    assert told[:4] != told[4:]


def test_pass_1_is_the_share_of_solved_greedy_answers():
    assert scores()["pass@1"] == wilson([True, False, True, False])


def test_pass_k_is_the_share_of_rows_with_a_solved_sample():
    """Rows 0 and 1 have one at least; that the greedy answer of row 2 is right does not count here."""
    assert scores()["pass@3"] == wilson([True, True, False, False])


def test_sampled_pass_1_is_the_share_of_solved_samples():
    assert scores()["pass@1_sampled"] == 3 / 12


def test_truncation_and_length_are_those_of_the_greedy_answers():
    assert scores()["truncated"] == 1 / 4
    assert scores()["length_mean"] == (1 + 1 + 1 + 7) / 4


def test_rows_say_what_was_asked_answered_and_solved():
    common = {"stopped": True, "tokens": 1, "ids": [1]}
    assert scores()["rows"] == [
        common | {"prompt": "q0", "answer": "a", "greedy": "a", "solved": True, "samples_solved": 2},
        common | {"prompt": "q1", "answer": "b", "greedy": "x", "solved": False, "samples_solved": 1},
        common | {"prompt": "q2", "answer": "c", "greedy": "c", "solved": True, "samples_solved": 0},
        {"prompt": "q3", "answer": "d", "greedy": "long...", "solved": False, "samples_solved": 0}
        | {"stopped": False, "tokens": 7, "ids": [1] * 7},
    ]


def test_greedy_and_sampled_settings_differ_in_nothing_else():
    scores()
    greedy, sampled = SCRIPT.asked
    assert (greedy.greedy, greedy.members) == (True, 1)
    assert (sampled.greedy, sampled.members) == (False, 3)
    for asked in (greedy, sampled):
        assert (asked.temperature, asked.key, asked.max_new_tokens) == (0.7, (3, 1), 8)


def test_without_samples_only_the_greedy_answer_is_asked_for():
    result = scores(samples=0)
    assert len(SCRIPT.asked) == 1
    assert result.keys() == {"pass@1", "ungradable", "truncated", "length_mean", "rows"}
    assert "samples_solved" not in result["rows"][0]


def test_one_sample_does_not_replace_the_greedy_score():
    """With k = 1 the sampled pass@k has the name of the greedy pass@1."""
    one = Scripted(["a", "x", "c", "long..."], [["x"], ["x"], ["x"], ["x"]])
    result = evaluate(one, HELDOUT, EXACT, SAMPLING, samples=1, solved_at=1.0)
    assert result["pass@1"] == wilson([True, False, True, False])
    assert result["pass@1_sampled"] == 0


def test_solved_is_what_the_first_function_says():
    """The second gives 0 to every short answer; the sum of both would be another thing."""
    rewards = InProcess({"exact": 0.5, "overlong": 1.0}, {"overlong": {"max_tokens": 1, "buffer": 1}})
    assert scores(rewards=rewards)["pass@1"] == wilson([True, False, True, False])


@pytest.mark.parametrize(("solved_at", "solved"), [(1.0, [0, 0, 1, 0]), (0.5, [0, 1, 1, 0]), (0.0, [1, 1, 1, 0])])
def test_a_row_is_solved_from_the_threshold_on_and_if_graded(tmp_path, solved_at, solved):
    (tmp_path / "own.py").write_text(
        "def part(completions, **rest):\n    return [0, 0.5, 1, None][:len(completions)]\n"
    )
    rewards = InProcess({f"{tmp_path / 'own.py'}:part": 1.0})
    assert [row["solved"] for row in scores(0, rewards, solved_at)["rows"]] == [*map(bool, solved[:3]), None]


def test_what_cannot_be_graded_is_left_out_of_the_score_and_counted(tmp_path):
    (tmp_path / "own.py").write_text(
        "def some(completions, **rest):\n    return [1, None, 0, None][:len(completions)]\n"
    )
    result = scores(0, InProcess({f"{tmp_path / 'own.py'}:some": 1.0}))
    assert result["ungradable"] == 2 and result["pass@1"] == wilson([True, False])
    gain = paired_gain([True, None, False, False], [False, True, None, True])
    assert gain == paired_gain([True, False], [False, True])
    assert wilson([None, None]) == {"value": 0.0, "low": 0.0, "high": 1.0}


def test_the_toy_is_scored_by_its_own_answers_alike_every_time():
    """A real policy: pass@k grows with k, at least as many rows as the shares of its samples, and repeats exactly."""
    policy = ToyPolicy()
    examples = [Example(str(i), {"answer": "abc"[i % 3]}, f"toy:{i}") for i in range(6)]
    heldout = [(example, policy.encode(example.prompt)) for example in examples]
    few, many, again = (evaluate(policy, heldout, EXACT, SAMPLING, samples=k, solved_at=1.0) for k in (4, 64, 64))
    assert many == again
    assert 0 < many["pass@1_sampled"] <= many["pass@64"]["value"]
    assert few["pass@4"]["value"] <= many["pass@64"]["value"]  # the first four samples are the same
    for row, early in zip(many["rows"], few["rows"], strict=True):
        assert row["samples_solved"] >= early["samples_solved"]
    for row, (example, prompt) in zip(many["rows"], heldout, strict=True):
        [[answer]] = sample_all(policy, [prompt], Sampling(1, 8, greedy=True))
        assert row["greedy"] == answer.text
        assert row["solved"] == (answer.text == example.columns["answer"])
