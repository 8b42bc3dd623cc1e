"""Rewards: built-ins against tables of gold answers, loading, TRL's calling convention, strict returns."""

import json
import math
import sys
import threading
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lite_trgrpo.config import loading
from lite_trgrpo.errors import MissingPackageError, RewardError
from lite_trgrpo.records import Completion, Example, Group, Prompt
from lite_trgrpo.rewards import BUILTINS, Reward, Sandbox, gym, load, score

ROOT = Path(__file__).parent.parent


def group(texts: Sequence[str], prompt: Any = "6 * 7?", prefix: str = "", row: int = 1, **columns: Any) -> Group:
    """A group with the given answers; each has as many token ids as characters."""
    completions = [Completion(tuple(range(len(t))), (True,) * len(t), (-1.0,) * len(t), t, stopped=True) for t in texts]
    return Group(Example(prompt, columns, f"data.jsonl:{row}"), Prompt((1, 2), str(prompt), prefix), completions)


def reward(function: Callable[..., Any], weight: float = 1.0, name: str = "mine", **options: Any) -> Reward:
    return Reward(name, function, weight, options)


def built_in(name: str, text: str, gold: Any = "42", metadata: Any = None, **options: Any) -> float | None:
    """One answer's value; None if it is not gradable."""
    (scored,) = score([group([text], answer=gold, metadata=metadata)], load({name: 1.0}, {name: options}))
    return None if math.isnan(scored.rewards[0]) else scored.rewards[0]


# -- built-ins: a gold answer scores full marks, a corrupted one less --------------------------------------

NUMBER = [
    # gold, right, wrong
    ("42", "The answer is 42.", "The answer is 43."),
    ("#### 42", "42", "4"),
    ("6 * 7 = 42\n#### 42", "6 * 7 = 42", "42 / 7 = 6"),
    ("1,234", "1234", "1 and 234"),
    ("1234", "It costs $1,234.00!", "It costs $1,234.01!"),
    ("-5", "x=-5", "x=5"),
    ("-5", "It is \u22125", "12-5"),
    ("5", "12-5", "x = -5"),
    ("-$5.50", "-5.5", "5.5"),
    (".5", "0.50", "50"),
    ("0.1", "0.10", "0.1000001"),
    (42, "42", "42.5"),
    (0.5, "0.5", "5"),
    (1e-07, "0.0000001", "1"),
    ("50%", "50 percent", "5"),
    ("9007199254740993", "9007199254740993", "9007199254740992"),  # equal as floats
    ("3", "1 2 3", "1, 2, 3, 4"),  # only the last of many counts
    ("42", "**42**", "no number at all"),
    ("42", "42", ""),
    # faults of public data sets and of other alphabets: a sign or a thousand that was lost
    ("-5", "\u7b54\u6848\u662f-5", "\u7b54\u6848\u662f5"),
    ("- 5", "-5", "5"),
    ("\u20135", "-5", "5"),
    ("\uff0d5", "-5", "5"),
    ("5", "pages 3\u20135", "pages 3 and -5"),
    (r"\boxed{1{,}234}", "1,234", "234"),
    (r"1\,234", "1234", "234"),
    ("10\u202f000", "10 000 is 10\u00a0000", "0"),
    ("10 000", "il y en a 10 000", "il y en a 000"),
    ("so\n#### 10 000", "il y en a 10 000", "il y en a 000"),
    ("12", "3 12", "312"),
    ("\uff11\uff12", "12", "2"),
]


@pytest.mark.parametrize(("gold", "right", "wrong"), NUMBER)
def test_number(gold: Any, right: str, wrong: str) -> None:
    assert built_in("number", right, gold) == 1.0
    assert built_in("number", wrong, gold) == 0.0


NO_TEXT = [None, "", "#### ", math.nan, ["2"], {"a": 2}, True]


@pytest.mark.parametrize("gold", [*NO_TEXT, "Paris", "1/2", "3 or 4", "10 1/2"])
def test_number_needs_exactly_one_gold_number(gold: str | None) -> None:
    assert built_in("number", "2", gold) is None


MATH = [
    ("Because 6 * 7 is 42.\n#### 42", "so the answer is 42", "so the answer is 7"),
    ("42", r"\boxed{42} apples, not 41", r"\boxed{41} apples, not 42"),
    ("42", "<think>7</think><answer>42</answer>", "<think>42</think><answer>7</answer>"),
    ("42", r"\boxed{42}. The final answer is $41$.", r"\boxed{41}. The final answer is $42$."),
    ("42", "x = 42", r"\boxed{41}\boxed{42}"),  # boxing several does not help
    (r"\frac{1}{2}", "0.5", r"\frac{1}{3}"),
    ("1/2", r"$\frac{2}{4}$", "2"),
    (r"$\frac{1}{2}$", "1/2", "1"),
    (r"\boxed{3\pi}", r"\boxed{3 \pi}", "3"),
    (r"\$1,000.00", "It costs $1000", "It costs $100"),
    ("$1,000.00", r"\$1,000", r"\$1"),
    ("1,000", "1000", "1"),
    (r"2^{10}", "1024", "2"),
    ("x^2+1", "<answer>1 + x^2</answer>", "<answer>x^2</answer>"),
    ("(-1, 3]", r"\boxed{(-1, 3]}", r"\boxed{3}"),
    (r"\{1,2\}", r"\boxed{\{2,1\}}", r"\boxed{1}"),
    ("-5", "-5", "5"),
    ("sqrt(2)", r"$\sqrt{2}$", "2"),
    ("42%", "42%", "41%"),
    (7, "7", ""),
    # faults of math-verify and of how people write, each of which was graded against a part of the gold answer
    (r"10\,000", r"\boxed{10000}", r"\boxed{0}"),
    ("10000", r"\boxed{10\,000}", r"\boxed{0}"),
    ("10 000", r"\boxed{10000}", r"\boxed{0}"),
    ("10\u202f000", "$10{,}000$", r"\boxed{10}"),
    ("1e-08", r"\boxed{10^{-8}}", r"\boxed{e-8}"),
    (1e-08, "$0.00000001$", r"\boxed{0}"),
    ("5e3", r"\boxed{5000}", r"\boxed{15e}"),
    ("10 1/2", r"\boxed{10.5}", r"\boxed{11/2}"),
    ("10.5", "The answer is $10 1/2$", "The answer is $5 1/2$"),
    ("10\u00bd", r"\boxed{\frac{21}{2}}", r"\boxed{10}"),
    ("2\u221a3", r"\boxed{2\sqrt{3}}", r"\boxed{2}"),
    (r"2\sqrt{3}", "\\boxed{2\u221a3}", r"\boxed{2}"),
    ("10\u207b\u2077", r"\boxed{0.0000001}", r"\boxed{10}"),
    ("0.0000001", r"\boxed{0.0000001}", r"\boxed{0.0000002}"),
    ("\u2013 5", r"\boxed{-5}", r"\boxed{5}"),
    ("1/3", r"\boxed{0.333333}", r"\boxed{0.34}"),
]


@pytest.mark.parametrize(("gold", "right", "wrong"), MATH)
def test_math(gold: Any, right: str, wrong: str) -> None:
    assert built_in("math", right, gold) == 1.0
    assert built_in("math", wrong, gold) == 0.0


@pytest.mark.parametrize(
    "gold", [*NO_TEXT, "Paris", "not enough information", "???", "No", "Yes", "1.000.000,5", "\u4e94"]
)
def test_math_without_a_readable_gold_answer_is_not_gradable(gold: str | None) -> None:
    assert built_in("math", r"\boxed{42}", gold) is None


def test_math_reads_only_the_end_of_a_long_answer() -> None:
    assert built_in("math", "x" * 5000 + " so 42") == 1.0
    assert built_in("math", "so 42" + " x" * 5000) == 0.0


def test_math_works_outside_of_the_main_thread() -> None:
    """Its time-outs are signals; in a thread they once scored every answer 0 without a word."""
    values: list[float | None] = []
    thread = threading.Thread(target=lambda: values.append(built_in("math", r"\boxed{42}")))
    thread.start()
    thread.join(timeout=20)
    assert values == [1.0]


def test_exact() -> None:
    assert built_in("exact", "  a \n b ", "a b") == 1.0
    assert built_in("exact", "a b.", "a b") == 0.0
    assert built_in("exact", "PARIS", "Paris") == 0.0
    assert built_in("exact", "PARIS", "Paris", casefold=True) == 1.0
    assert built_in("exact", "5", 5) == 1.0
    assert built_in("exact", "None", None) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        ("\n<think>\na\n</think>\n\n<answer></answer>\n", 1.0),
        ("<think>a</think><answer>b</answer>.", 0.0),
        ("Well. <think>a</think><answer>b</answer>", 0.0),
        ("<think>a</think> so <answer>b</answer>", 0.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a<answer>b</answer></think>", 0.0),
        ("<think>a</think><think>a</think><answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0.0),
        ("<think>a</think><answer>b", 0.0),
        ("", 0.0),
    ],
)
def test_format(text: str, value: float) -> None:
    assert built_in("format", text) == value


def test_format_with_other_tags() -> None:
    assert built_in("format", "<plan>a</plan> <code>b</code>", tags=["plan", "code"]) == 1.0
    assert built_in("format", "<think>a</think><answer>b</answer>", tags=["plan", "code"]) == 0.0


@pytest.mark.parametrize(
    ("tokens", "value"),
    [(0, 0.0), (60, 0.0), (61, -0.025), (80, -0.5), (99, -0.975), (100, -1.0), (101, -1.0), (500, -1.0)],
)
def test_overlong_falls_over_the_buffer(tokens: int, value: float) -> None:
    """max 100, buffer 40: (60 - 61) / 40 = -0.025, (60 - 80) / 40 = -0.5, (60 - 99) / 40 = -0.975."""
    assert built_in("overlong", "x" * tokens, max_tokens=100, buffer=40) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "gold", "right", "corrupted"),
    [
        ("number", "42", "42", "24"),
        ("math", "42", "42", "24"),
        ("exact", "42", "42", "24"),
        ("format", "42", "<think></think><answer>42</answer>", "<think></think>42"),
        ("knights-and-knaves", "Zoe is a fool", "<think></think><answer>Zoe is a fool</answer>", "Zoe is a fool"),
        ("reasoning-gym", "42", "42", "24"),
        ("overlong", "42", "42", "4" * 90),
    ],
)
def test_every_built_in_gives_gold_more_than_a_corrupted_answer(
    name: str, gold: str, right: str, corrupted: str
) -> None:
    options = {"max_tokens": 100, "buffer": 50} if name == "overlong" else {}
    metadata = {"source_dataset": "chain_sum"}
    full = built_in(name, right, gold, metadata, **options)
    less = built_in(name, corrupted, gold, metadata, **options)
    assert full is not None and less is not None and full > less


def test_the_table_above_has_every_built_in() -> None:
    table = next(m for m in test_every_built_in_gives_gold_more_than_a_corrupted_answer.pytestmark)
    assert {row[0] for row in table.args[1]} == set(BUILTINS)


# -- reasoning-gym -----------------------------------------------------------------------------------------

TASKS = ["chain_sum", "letter_counting", "gcd", "spell_backward", "number_sorting", "count_bits", "simple_equations"]
EVALUATING = gym.EVALUATED_LISTS + gym.EVALUATED_ARITHMETIC + gym.EVALUATED_ALGEBRA


@pytest.mark.parametrize("task", [*TASKS, *EVALUATING, "knights_knaves", "sentence_reordering"])
def test_reasoning_gym_gold_answers_have_full_marks(task: str) -> None:
    reasoning_gym = pytest.importorskip("reasoning_gym")
    rows = reasoning_gym.create_dataset(task, size=3, seed=11)
    groups = [
        group([row["answer"], f"<answer>{row['answer']}</answer>", "zzz"], **row) for row in (rows[i] for i in range(3))
    ]
    for scored in score(groups, load({"reasoning-gym": 1.0}, {})):
        first = scored.rewards[0] if "\n" not in scored.example.columns["answer"] else 1.0
        assert (first, scored.rewards[1]) == (1.0, 1.0)
        assert scored.rewards[2] < 0.5


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer> 12 </answer> and <answer>13\n14</answer> 15", "13\n14"),
        (r"\boxed{1} then \boxed{\frac{1}{2}} done", r"\frac{1}{2}"),
        ("The answer is 12. I hope", "12. I hope"),
        ("The answer is: 12", "12"),
        ("Answer: 11\nFinal answer: 12\nBye", "12"),
        ("First\n\n 12 \n", "12"),
        (r"\boxed{1 never closed", r"\boxed{1 never closed"),
        ("", ""),
    ],
)
def test_extract(text: str, answer: str) -> None:
    assert gym.extract(text) == answer


def test_the_answer_is_extracted_before_it_is_scored() -> None:
    """The task's own scorer gave "The answer is 12" one eighth."""
    for task in ("chain_sum", "spell_backward"):
        assert built_in("reasoning-gym", "The answer is 12", "12", {"source_dataset": task}) == 1.0
        assert built_in("reasoning-gym", "12.", "12", {"source_dataset": task}) == 1.0


ATTACK = "open({path!r}, 'w').close() or [1]"


@pytest.mark.parametrize("task", EVALUATING)
def test_the_answer_is_never_run_as_code(task: str, tmp_path: Path) -> None:
    """Nine of reasoning-gym's scorers end in `eval(answer)`; the next test lets one of them open the file."""
    reasoning_gym = pytest.importorskip("reasoning_gym")
    row = reasoning_gym.create_dataset(task, size=1, seed=1)[0]
    file = tmp_path / "opened"
    text = f"<answer>{ATTACK.format(path=str(file))}</answer>"
    (scored,) = score([group([text, "9**9**9**9**9", "(9**99)**99**99"], **row)], load({"reasoning-gym": 1.0}, {}))
    assert not file.exists()
    assert max(scored.rewards) <= 0.05


def test_the_attack_would_work_on_the_bare_scorer(tmp_path: Path) -> None:
    """Or the test above could not fail."""
    reasoning_gym = pytest.importorskip("reasoning_gym")
    row = reasoning_gym.create_dataset("n_queens", size=1, seed=1)[0]
    file = tmp_path / "opened"
    reasoning_gym.get_score_answer_fn("n_queens")(ATTACK.format(path=str(file)), row)
    assert file.exists()


@pytest.mark.parametrize(
    ("task", "answer", "harmless"),
    [
        ("chain_sum", "anything()", True),  # its scorer compares text
        ("spiral_matrix", "[1, 2, -3]", True),
        ("n_queens", "_ Q\nQ _", True),
        ("n_queens", "[x for x in y]", False),
        ("n_queens", "1" * 501, False),
        ("countdown", "(82 + 20) / 3.5 - 50", True),
        ("countdown", "9**9", False),
        ("countdown", "int", False),
        ("simple_integration", "-9*x**8/10 + 3*x**(3/2) + sin(2*x) + C", True),
        ("simple_integration", "9**9**9", False),
        ("simple_integration", "9**999", False),
        ("simple_integration", "x.real", False),
        ("simple_integration", "ｅｖａｌ(x)", False),  # noqa: RUF001 - Python reads these letters as eval
        ("simple_integration", "N(exp(x))", False),
        ("simple_integration", "(((9**9)**99)**99)**99", False),
    ],
)
def test_is_harmless(task: str, answer: str, harmless: bool) -> None:
    assert gym.is_harmless(task, answer) is harmless


def test_a_raising_scorer_gives_0_and_a_broken_row_is_an_error() -> None:
    reasoning_gym = pytest.importorskip("reasoning_gym")
    row = reasoning_gym.create_dataset("prime_factorization", size=1, seed=1)[0]
    assert built_in("reasoning-gym", "zzz", row["answer"], row["metadata"]) == 0.0  # int("zzz")
    with pytest.raises(RewardError, match=r"reasoning-gym.*KeyError"):
        built_in("reasoning-gym", "2", "2", {"source_dataset": "tower_of_hanoi"})  # no num_disks


@pytest.mark.parametrize(("metadata", "named"), [(None, "None"), ({}, "{}"), ({"source_dataset": "nope"}, "'nope'")])
def test_reasoning_gym_rows_must_name_their_task(metadata: Any, named: str) -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(RewardError, match=rf"{named}.*data\.source = reasoning-gym:"):
        built_in("reasoning-gym", "1", "1", metadata)


def test_reasoning_gym_without_a_gold_answer() -> None:
    assert built_in("reasoning-gym", "1", None, {"source_dataset": "propositional_logic"}) is None


def test_reasoning_gym_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'lite-trgrpo\[data\]'"):
        load({"reasoning-gym": 1.0}, {})


# -- loading -----------------------------------------------------------------------------------------------

OWN = """
from __future__ import annotations
import asyncio
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

@dataclass
class Point:
    x: int

with open(__file__ + ".ran", "a") as log:
    log.write("once ")

def length(completions, bonus=0.0, **columns):
    return [len(text) + bonus for text in completions]

def strict(completions):
    return [1.0 for _ in completions]

async def later(completions):
    await asyncio.sleep(0)
    return [1.0 for _ in completions]

class Judge:
    def __call__(self, completions, **columns):
        return [2.0 for _ in completions]

judge = Judge()

def double(x):
    return 2.0 * x

def pooled(completions, **columns):
    with ProcessPoolExecutor(1) as pool:
        return list(pool.map(double, [len(text) for text in completions]))

constant = 3
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    file = tmp_path / "own.py"
    file.write_text(OWN)
    return str(file)


def test_a_function_out_of_a_file(own: str) -> None:
    name = f"{own}:length"
    rewards = load({name: 2.0, f"{own}:strict": 1.0}, {name: {"bonus": 0.5}})
    (scored,) = score([group(["abc", ""])], rewards)
    assert scored.parts == {name: (3.5, 0.5), f"{own}:strict": (1.0, 1.0)}
    assert Path(own + ".ran").read_text() == "once "
    assert scored.rewards == (8.0, 2.0)  # 2 * 3.5 + 1, 2 * 0.5 + 1


@pytest.mark.parametrize(("name", "value"), [("later", 1.0), ("judge", 2.0), ("pooled", 6.0)])
def test_functions_as_people_write_them(own: str, name: str, value: float) -> None:
    """Awaited where they are `async`; an object that can be called; with processes that find them by name again."""
    file = Path(own).rename(Path(own).with_name(f"as_people_write_{name}.py"))  # no other test has loaded it
    with Sandbox({f"{file}:{name}": 1.0}, {}, seconds=20, memory=2**30) as scorer:
        (scored,) = scorer.score([group(["abc"])])
    assert scored.rewards == (value,)


def test_a_reward_file_imports_its_neighbours_and_hides_no_library(tmp_path: Path) -> None:
    (tmp_path / "helper_mod.py").write_text("def same(a, b):\n    return a.strip() == b.strip()\n")
    (tmp_path / "json.py").write_text("raise RuntimeError\n")  # never imported: the folder comes last
    (tmp_path / "uses.py").write_text(
        "import json\nfrom helper_mod import same\n"
        "def reward(completions, answer, **_):\n    return [float(same(*pair)) for pair in zip(completions, answer)]\n"
    )
    with Sandbox({f"{tmp_path / 'uses.py'}:reward": 1.0}, {}, seconds=20, memory=2**30) as scorer:
        (scored,) = scorer.score([group([" 4"], answer="4")])
    assert scored.rewards == (1.0,)


def failing(name: str, options: dict[str, Any] | None = None) -> str:
    with pytest.raises(RewardError) as caught:
        load({name: 1.0}, {name: options or {}})
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_unknown_names_say_what_there_is(own: str, tmp_path: Path) -> None:
    message = failing("nubmer")
    assert "'nubmer'" in message and "'number'" in message
    assert all(name in message for name in BUILTINS)
    message = failing(f"{tmp_path}/onw.py:length")
    assert "onw.py" in message and "'own.py'" in message
    message = failing(f"{own}:lenght")
    assert "'lenght'" in message and "'length'" in message and "length, strict" in message
    message = failing(own)
    assert f"{own}:" in message and "length, strict" in message
    assert "'constant'" in failing(f"{own}:constant")
    assert "is a class" in failing(f"{own}:Judge") and "Judge()" in failing(f"{own}:Judge")
    assert "pyproject.toml" in failing(f"{ROOT}/pyproject.toml:x")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import not_a_module_x", "not_a_module_x"),
        ("def broken(:", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_a_file_that_cannot_be_imported(body: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text(body)
    assert message in failing(f"{file}:f")
    assert str(file.resolve()) not in sys.modules


def test_options_are_checked_when_loaded(own: str) -> None:
    message = failing(f"{own}:length", {"bonsu": 1})
    assert "'bonsu'" in message and "'bonus'" in message
    assert "'completions'" in failing(f"{own}:strict", {"completions": ["mine"]})
    assert "'tolerance'" in failing("number", {"tolerance": 1})
    message = failing("exact", {"answer": "x"})
    assert "'answer'" in message and "casefold" in message
    message = failing("overlong")
    assert "max_tokens" in message and "buffer" in message
    for wrong in ({"max_tokens": 10, "buffer": 0}, {"max_tokens": 10, "buffer": 11}, {"max_tokens": 9.5, "buffer": 1}):
        assert "1 <= buffer <= max_tokens" in failing("overlong", wrong)
    for tags in ("think", [], ["a", "a"], ["<a>"], [1, ""]):
        assert "tags" in failing("format", {"tags": tags})


def test_weights_must_be_finite_and_not_all_0() -> None:
    for weight in (math.inf, math.nan):
        with pytest.raises(RewardError, match=rf"number.*{weight}"):
            load({"number": weight}, {})
    with pytest.raises(RewardError, match=r"(?s)number.*exact"):
        load({"number": 0.0, "exact": 0.0}, {})
    assert [r.weight for r in load({"number": 0.0, "exact": -1.0}, {})] == [0.0, -1.0]


def test_a_column_named_like_an_option_is_not_the_option() -> None:
    batch = [group(["<think></think><answer></answer>"], tags=["maths"], casefold=True, answer="x")]
    (scored,) = score(batch, load({"format": 1.0, "exact": 1.0}, {}))
    assert scored.parts == {"format": (1.0,), "exact": (0.0,)}


# -- TRL's calling convention ------------------------------------------------------------------------------


def test_what_a_function_is_called_with() -> None:
    calls: list[dict[str, Any]] = []

    def spy(**given: Any) -> list[float]:
        calls.append(given)
        return [1.0] * len(given["completions"])

    chat = [{"role": "user", "content": "Hi"}]
    groups = [
        group(["a", "bb"], prompt="6 * 7?", answer="42", prompts="no", completion="no"),
        group(["c"], prompt=chat, prefix="<think>", level=3),
    ]
    scored = score(groups, [reward(spy)])
    assert calls == [
        {
            "prompts": ["6 * 7?", "6 * 7?", chat],
            "completions": ["a", "bb", [{"role": "assistant", "content": "<think>c"}]],
            "completion_ids": [[0], [0, 1], [0]],
            "answer": ["42", "42", None],
            "level": [None, None, 3],
        }
    ]
    assert [g.rewards for g in scored] == [(1.0, 1.0), (1.0,)]
    assert [g.example for g in scored] == [g.example for g in groups]


def test_a_function_gets_only_the_names_it_has() -> None:
    def narrow(completions: list[str], answer: list[str], level: int = 7) -> list[float]:
        assert level == 7
        return [float(text == gold) for text, gold in zip(completions, answer, strict=True)]

    (scored,) = score([group(["42", "41"], answer="42", other="x")], [reward(narrow)])
    assert scored.rewards == (1.0, 0.0)


def test_a_function_cannot_change_what_the_next_one_sees() -> None:
    def vandal(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        prompts[0][0]["content"] = completions[0][0]["content"] = "changed"
        columns["answer"].clear()
        return [1.0]

    def witness(prompts: list[Any], completions: list[Any], answer: list[str]) -> list[float]:
        assert (prompts[0][0]["content"], completions[0][0]["content"], answer) == ("Hi", "a", ["42"])
        return [1.0]

    batch = [group(["a"], prompt=[{"role": "user", "content": "Hi"}], answer="42")]
    score(batch, [reward(vandal, name="vandal"), reward(witness, name="witness")])
    assert batch[0].example.text == "Hi"


def test_built_ins_read_chat_completions_and_the_prefix() -> None:
    chat = [{"role": "user", "content": "6 * 7?"}]
    rewards = load({"format": 1.0, "math": 1.0}, {})
    for prompt in ("6 * 7?", chat):
        texts = ["6 * 7</think><answer>42</answer>"]
        with_prefix, without = score(
            [group(texts, prompt, prefix="<think>", answer="42"), group(texts, prompt, answer="42")], rewards
        )
        assert (with_prefix.rewards, without.rewards) == ((2.0,), (1.0,))


def test_a_missing_column_is_named() -> None:
    with pytest.raises(RewardError, match=r"'number'.*data\.jsonl:1.*solution.*data\.answer"):
        score([group(["42"], solution="42")], load({"number": 1.0}, {}))


def test_nothing_to_score() -> None:
    rewards = load({"number": 1.0}, {})
    assert score([], rewards) == []
    (scored,) = score([group([])], rewards)
    assert (scored.rewards, scored.parts) == ((), {"number": ()})


# -- totals and returned values ----------------------------------------------------------------------------


def given(*values: Any) -> Callable[..., Any]:
    return lambda completions, **columns: list(values)


def test_totals_are_weighted_sums_over_the_graded_parts() -> None:
    rewards = [
        reward(given(1.0, 1.0, None, None), 2.0, "a"),
        reward(given(0.5, None, 0.5, None), -3.0, "b"),
        reward(given(9.0, 9.0, 9.0, 9.0), 0.0, "shown only"),
    ]
    first, second = score([group(["w", "x"]), group(["y", "z"], row=2)], rewards)
    assert first.rewards == (0.5, 2.0)  # 2 * 1 - 3 * 0.5, 2 * 1
    assert second.rewards[0] == -1.5  # -3 * 0.5
    assert math.isnan(second.rewards[1])  # the part of weight 0 does not make it graded
    assert first.parts["shown only"] == (9.0, 9.0)
    assert math.isnan(first.parts["b"][1]) and second.parts["b"][0] == 0.5


def test_order_of_groups_does_not_matter() -> None:
    groups = [group(["42", "41"], answer="42"), group(["7"], answer="7", row=2), group(["1", "2"], answer="2", row=3)]
    rewards = load({"number": 1.0, "exact": 0.5}, {})
    together = score(groups, rewards)
    assert together == [score([g], rewards)[0] for g in groups] == score(groups[::-1], rewards)[::-1]
    assert [g.rewards for g in together] == [(1.5, 0.0), (1.5,), (0.0, 1.5)]


@pytest.mark.parametrize("value", [1, True, Decimal(1), np.float32(1), np.int64(1), np.array(1.0)])
def test_numbers_of_any_kind_are_numbers(value: Any) -> None:
    (scored,) = score([group(["a"])], [reward(given(value))])
    assert scored.rewards == (1.0,) and type(scored.rewards[0]) is float


def test_tuples_and_arrays_are_lists() -> None:
    for returned in ((1.0, 0.0), np.array([1.0, 0.0])):
        (scored,) = score([group(["a", "b"])], [reward(lambda completions, r=returned: r)])
        assert scored.rewards == (1.0, 0.0)


@pytest.mark.parametrize("returned", [1.0, None, "11", b"11", {"a": 1, "b": 2}, {1.0, 0.0}, (x for x in (1.0, 0.0))])
def test_what_is_no_list_is_refused(returned: Any) -> None:
    with pytest.raises(RewardError, match=rf"'mine'.*{type(returned).__name__}.*data\.jsonl:1.*\b2\b"):
        score([group(["a", "b"])], [reward(lambda completions: returned)])


@pytest.mark.parametrize("values", [(), (1.0,), (1.0, 1.0, 1.0)])
def test_a_list_of_another_length_is_never_broadcast(values: tuple[float, ...]) -> None:
    with pytest.raises(RewardError, match=rf"'mine'.*\b{len(values)}\b.*\b2\b.*data\.jsonl:1"):
        score([group(["a", "b"])], [reward(given(*values))])


@pytest.mark.parametrize("value", ["1.0", b"1", [1.0], {}, 1j, 10**400, object()])
def test_what_is_no_number_is_refused_with_its_sample(value: Any) -> None:
    with pytest.raises(RewardError, match=rf"'mine'.*{type(value).__name__}.*data\.jsonl:2.*'bad'"):
        score([group(["good"]), group(["bad"], row=2)], [reward(given(1.0, value))])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_what_is_not_finite_is_refused_with_its_sample(value: float) -> None:
    with pytest.raises(RewardError, match=r"'mine'.*-?(nan|inf).*data\.jsonl:2.*'bad'.*None"):
        score([group(["good"]), group(["bad"], row=2)], [reward(given(1.0, value))])


def test_a_long_completion_is_shortened_in_the_message() -> None:
    with pytest.raises(RewardError) as caught:
        score([group(["word " * 1000])], [reward(given("x"))])
    assert len(str(caught.value)) < 400 and "word word" in str(caught.value)


def test_an_exception_is_chained() -> None:
    def broken(completions: list[str]) -> list[float]:
        return [1 / 0]

    with pytest.raises(RewardError, match=r"'mine'.*ZeroDivisionError.*data\.jsonl:1") as caught:
        score([group(["a"])], [reward(broken)])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


# -- the example -------------------------------------------------------------------------------------------


def test_the_example_gives_gold_full_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    settings = loading.load("demo", Path("examples/own.toml"))
    rewards = load(settings.rewards.functions, settings.rewards.options)
    rows = [json.loads(line) for line in Path(settings.data.source).read_text().splitlines()]
    assert len(rows) == len({row["prompt"] for row in rows}) == 60
    for row in rows:
        texts = [row["answer"], row["other"], f"{row['answer']}, not {row['other']}", "", row["answer"] + " so" * 10]
        (scored,) = score([group(texts, row.pop("prompt"), **row)], rewards)
        assert scored.rewards == (1.0, 0.0, 0.0, 0.0, 0.0)
