"""The Knights and Knaves reward: its four scores, its readings, and reasoning-gym's own puzzles."""

import pytest

from lite_trgrpo.rewards.puzzles import PAIRS, knights_and_knaves

GOLD = "Zoey is a knight, and Oliver is a knave."
FULL, WRONG, UNREADABLE, UNFORMATTED = 3.0, -0.5, -1.0, -3.0  # 1 + 2, 1 - 1.5, 1 - 2, -1 - 2


def grade(completion: str, gold: str | None = GOLD) -> float | None:
    return knights_and_knaves(["?"], [completion], [[1]], answer=[gold])[0]


def answered(text: str) -> str:
    return f"<think>Suppose Zoey lies.</think>\n<answer>{text}</answer>"


@pytest.mark.parametrize(
    "text",
    [
        GOLD,
        "Zoey is a knight, Oliver is a knave",
        "oliver is a KNAVE and zoey is a Knight",
        "(1) Zoey is a knight\n(2) Oliver is a knave",
        "- **Zoey**: knight\n- **Oliver**: knave",
        "Zoey = Knight; Oliver = Knave",
        "Zoey is a **knight**. Oliver is a **knave**.",
        "So: Zoey is an knight, and Oliver is a knave",
    ],
)
def test_a_right_answer_in_any_wording_has_full_marks(text: str) -> None:
    assert grade(answered(text)) == FULL


@pytest.mark.parametrize(
    "text",
    [
        "Zoey is a knave, and Oliver is a knave.",
        "Zoey is a knight, and Oliver is a knight.",
        "Zoey is a knave, and Oliver is a knight.",
        "Zoey is a saint, and Oliver is a sinner.",  # roles of another puzzle
    ],
)
def test_a_wrong_role_is_wrong(text: str) -> None:
    assert grade(answered(text)) == WRONG


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I do not know.",
        "Zoey is a knight.",  # Oliver is missing
        "Zoey is a knight, and Oliver is a knave, and Emma is a knave.",  # nobody asked about Emma
        "Zoey is a knight/knave, and Oliver is a knight/knave",  # copied from the question
        "Zoey is a knight, Zoey is a knave, Oliver is a knave",  # both ways
        "Zoey is a knight or a knave, and Oliver is a knave.",
        "Zoey is not a knave, and Oliver is a knave.",
        "knight, knave",
        "Zoey and Oliver are knights",
    ],
)
def test_hedges_and_gaps_are_unreadable(text: str) -> None:
    assert grade(answered(text)) == UNREADABLE


@pytest.mark.parametrize(
    "completion",
    [
        GOLD,
        f"<answer>{GOLD}</answer>",
        f"<think>so</think><answer>{GOLD}",  # cut off
        f"<answer>{GOLD}</answer><think>so</think>",
        f"<think>a</think><think>b</think><answer>{GOLD}</answer>",
        f"<think>a</think><answer>Zoey is a knave</answer><answer>{GOLD}</answer>",
        f"<think>a</think><answer>{GOLD}</answer> I am sure.",
        "",
    ],
)
def test_an_answer_in_a_wrong_format_is_not_read(completion: str) -> None:
    assert grade(completion) == UNFORMATTED


@pytest.mark.parametrize("gold", [None, "", "No valid solution exists."])
def test_without_a_gold_answer_there_is_no_grade(gold: str | None) -> None:
    assert grade(answered(GOLD), gold) is None


def test_every_score_is_told_apart() -> None:
    assert len({FULL, WRONG, UNREADABLE, UNFORMATTED}) == 4
    assert FULL > WRONG > UNREADABLE > UNFORMATTED


@pytest.fixture(scope="module")
def puzzles() -> list[dict]:
    reasoning_gym = pytest.importorskip("reasoning_gym")
    rows = reasoning_gym.create_dataset("knights_knaves", size=40, seed=7, n_people=4)
    return [rows[i] for i in range(40)]


def test_gold_has_full_marks_and_one_swapped_role_has_less(puzzles: list[dict]) -> None:
    other = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
    wordings = set()
    for row in puzzles:
        first, _, rest = row["answer"].partition(",")
        role = first.split()[-1]
        wordings.add(role)
        swapped = f"{first.removesuffix(role)}{other[role]},{rest}"
        assert grade(answered(row["answer"]), row["answer"]) == FULL
        assert grade(answered(swapped), row["answer"]) == WRONG
        shown = row["question"].partition('answer like: "')[2].rstrip('")')
        assert grade(answered(shown), row["answer"]) == UNREADABLE
    assert len(wordings) > 7  # several of the seven pairs, both roles


def test_the_table_of_roles_is_reasoning_gyms() -> None:
    module = pytest.importorskip("reasoning_gym.logic.knights_knaves")
    assert {role for pair in PAIRS for role in pair} == module.VALID_ROLES
