"""`init`: a data file of one's own becomes a config that says what was guessed, or a line that says what to mend."""

import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lite_trgrpo.check import proposal, rewards
from lite_trgrpo.cli import app
from lite_trgrpo.config import loading
from lite_trgrpo.data.examples import load_examples
from lite_trgrpo.model import weights
from tests.tiny import gsm8k_rows, tiny_model_folder
from tests.toy import InProcess

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """In a folder of its own, on a machine that has converted no base yet: lengths are guessed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LITE_TRGRPO_CACHE", str(tmp_path / "cache"))


def init(*arguments):
    return CliRunner(env={"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, ["init", *arguments])


def jsonl(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def test_the_example_data_become_a_config_that_passes():
    shutil.copy(ROOT / "examples" / "own_data.jsonl", "own.jsonl")
    result = init("own.jsonl")
    assert (result.exit_code, result.stdout) == (0, ""), result.output
    assert "lite-trgrpo check --config own.toml" in result.stderr
    config = loading.load(file=Path("own.toml"))
    assert "# prompt_format = " in Path("own.toml").read_text()  # for a base that brings no template
    assert (config.data.prompt, config.data.answer, config.rewards.functions) == ("prompt", "answer", {"number": 1.0})
    assert config.model == loading.load("demo").model  # there is no card here
    examples, _ = load_examples(config.data, config.eval.rows)
    scorer = InProcess(config.rewards.functions)
    assert not any(
        r.broken
        for r in (rewards.of_data(examples, config.eval.rows, config), rewards.of_rewards(examples, scorer, config))
    )


def test_every_line_has_a_comment_that_says_why_or_what():
    jsonl("mine.jsonl", gsm8k_rows(30))
    assert init("mine.jsonl").exit_code == 0
    text = Path("mine.toml").read_text().splitlines()
    settings = [i for i, line in enumerate(text) if " = " in line and not line.startswith("#")]
    assert len(settings) > 10 and all(text[i - 1].startswith("# ") for i in settings)
    above = {line.split(" = ")[0]: text[i - 1] for i, line in enumerate(text) if i in settings}
    assert "question, answer" in above["prompt"] and "30 rows" in text[1]


ASKED = {"prompt": "Which?", "answer": "x"}


@pytest.mark.parametrize(
    ("rows", "columns", "reward"),
    [
        (gsm8k_rows(20), ("question", "answer"), "number"),
        ([{"id": 7, "Problem": "Solve.", "solution": "so \\boxed{\\frac{1}{2}}"}], ("Problem", "solution"), "math"),
        ([{"id": 7, "problem": "Solve.", "level": 5, "gold": "x^2 + 1"}], ("problem", "gold"), "math"),
        ([{"q": "Is there a longer text than this one?", "a": "no"}], ("q", "a"), "exact"),
        ([{"prompt": "How much?", "answer": 3.5}], ("prompt", "answer"), "number"),
        ([{"prompt": "How much?", "answer": "$1,234.50"}], ("prompt", "answer"), "number"),
        ([{"prompt": "Which letter?", "answer": "B"}], ("prompt", "answer"), "exact"),
        ([{"prompt": "Sort c, a, b.", "answer": "a b c"}], ("prompt", "answer"), "exact"),
        ([{"prompt": "When?", "answer": "5 May"}], ("prompt", "answer"), "exact"),
        ([{"messages": [{"role": "user", "content": "2 + 2?"}], "label": "4"}], ("messages", "label"), "number"),
        ([{"question": f"{i} + 2?", "ground_truth": str(i + 2), "difficulty": i % 3} for i in range(20)],
         ("question", "ground_truth"), "number"),
        ([{"data_source": "dapo", "prompt": [{"role": "user", "content": f"{i} + 2?"}], "ability": "MATH",
           "reward_model": {"ground_truth": str(i + 2), "style": "rule"}} for i in range(20)],
         ("prompt", "reward_model.ground_truth"), "number"),
        ([{"d": {"question": "2 + 2?", "answer": "4"}}], ("d.question", "d.answer"), "number"),
        ([{"instruction": "Add the numbers.", "input": f"{i} + 2?", "output": str(i + 2)} for i in range(20)],
         ("input", "output"), "number"),
        ([{"prompt": f"{i} - 9?", "answer": f"\u2013 {9 - i}"} for i in range(9)], ("prompt", "answer"), "number"),
        ([{"prompt": "Combien ?", "answer": "10 000"}], ("prompt", "answer"), "number"),
    ],
)  # fmt: skip
def test_columns_and_reward_are_guessed(rows, columns, reward):
    found = proposal.propose(jsonl("x.jsonl", rows), None)
    config = proposal.validated(found)
    assert (config.data.prompt, config.data.answer) == columns
    assert list(config.rewards.functions) == [reward]


def test_a_csv_file_is_read_too():
    Path("t.csv").write_text('Question,Answer,note\n"What is 2 + 2, then?",4,easy\nWhat is 5 + 5?,10,\n')
    assert init("t.csv", "--output", "c.toml").exit_code == 0
    assert tomllib.loads(Path("c.toml").read_text())["data"]["prompt"] == "Question"


def test_long_texts_are_not_for_a_built_in():
    found = proposal.propose(
        jsonl("x.jsonl", [{"prompt": "Tell!", "answer": "a story of " + "many words " * 20}]), None
    )
    assert "examples/own_reward.py" in found.reasons["rewards.functions"]


def test_an_instruction_in_every_prompt_is_left_alone():
    rows = [{"prompt": f"{i} + 2? Answer with the number.", "answer": str(i + 2)} for i in range(9)]
    config = proposal.validated(proposal.propose(jsonl("x.jsonl", rows), None))
    assert (config.data.system, config.eval.rows) == (None, 1)


def test_a_form_that_the_prompts_ask_for_is_left_alone():
    rows = [{"prompt": "2 + 2? End with `#### number`.", "answer": "4"}]
    assert proposal.validated(proposal.propose(jsonl("x.jsonl", rows), None)).data.system is None


def test_no_prompt_of_usual_length_is_left_out():
    rows = [{"prompt": "word " * n, "answer": "4"} for n in (3, 50, 200)]
    config = proposal.validated(proposal.propose(jsonl("x.jsonl", rows), None))
    assert 250 < config.data.max_prompt_tokens < 400


@pytest.mark.slow
def test_with_the_bases_tokenizer_at_hand_prompts_are_counted(monkeypatch):
    source = jsonl("x.jsonl", [{"prompt": "word " * 50, "answer": "4"}])
    guessed = proposal.propose(source, None)
    monkeypatch.delenv("LITE_TRGRPO_CACHE")
    weights.locate(loading.load("demo").model)
    counted = proposal.propose(source, None)
    assert counted.reasons["data.max_prompt_tokens"] != guessed.reasons["data.max_prompt_tokens"]


@pytest.fixture
def tiny_presets(tmp_path, monkeypatch):
    """The presets, with a random model of a few layers as base; one of them is tried."""
    base = tiny_model_folder(tmp_path / "base")
    folder = tmp_path / "presets"
    shutil.copytree(loading.presets_folder(), folder)
    for path in folder.glob("*.toml"):
        path.write_text(re.sub(r'name = "Qwen/[^"]+"', f'name = "{base.as_posix()}"', path.read_text("utf-8")), "utf-8")
    monkeypatch.setattr(loading, "presets_folder", lambda: folder)
    monkeypatch.setattr(proposal, "BASES", ("math-7b",))


@pytest.mark.parametrize(("size", "preset"), [("4GB", "math-7b"), ("1.05GB", "demo")])
def test_the_base_is_one_that_fits_the_card_by_its_plan(tiny_presets, size, preset):
    assert init(jsonl("x.jsonl", gsm8k_rows(20)), "--vram", size).exit_code == 0
    config = loading.load(file=Path("x.toml"))
    assert config.model == loading.load(preset).model
    asked = proposal.BRIEF["number"] if preset == "demo" else proposal.STEPS
    assert config.data.system == asked and config.train.steps > 0


@pytest.mark.slow
@pytest.mark.parametrize(("size", "preset"), [("24GB", "math-7b"), ("5GB", "math-4b"), ("3.5GB", "math-1.5b")])
def test_the_base_is_the_largest_that_fits_the_card_without_the_hub(size, preset):
    assert init(jsonl("x.jsonl", gsm8k_rows(20)), "--vram", size).exit_code == 0
    assert loading.load(file=Path("x.toml")).model == loading.load(preset).model


def test_the_demos_base_is_not_asked_to_reason_in_the_room_of_an_answer():
    rows = [{"problem": "Solve.", "gold": "x^2 + 1"}]
    config = proposal.validated(proposal.propose(jsonl("x.jsonl", rows), None))
    assert (config.rewards.functions, config.rollout.max_new_tokens) == ({"math": 1.0}, 64)
    assert config.data.system == proposal.BRIEF["math"] != proposal.STEPS


def test_few_labels_are_named_in_the_prompt_with_a_small_cap():
    """Else the model is never told what it may answer, and nothing is solved."""
    rows = [
        {"review": f"Film number {i} was quite a thing to see.", "label": ["good", "bad"][i % 2]} for i in range(40)
    ]
    config = proposal.validated(proposal.propose(jsonl("x.jsonl", rows), None))
    assert config.data.system == "Answer with one of: bad, good. Write nothing else."
    assert (config.data.prompt, list(config.rewards.functions), config.rollout.max_new_tokens) == (
        "review",
        ["exact"],
        8,
    )


def test_a_long_question_leaves_room_for_a_long_answer():
    rows = [{"question": "word " * 150, "answer": "because so\n#### 42"}, {"question": "And?", "answer": "#### 7"}]
    assert proposal.validated(proposal.propose(jsonl("x.jsonl", rows), None)).rollout.max_new_tokens > 200


def test_the_bases_are_presets():
    assert set(proposal.BASES) <= set(loading.presets())


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "x.jsonl"),
        ("not json\n", "x.jsonl:1"),
        ('{"instruction": "Add.", "input": "1, 2", "output": "3"}\n{"instruction": "?", "input": "", "output": "3"}\n',
         "jq -c '{prompt: (.instruction"),
        ('{"question": "2 + 2?", "answer": "4"}\n{"question": "3 + 3?", "answer": null, "source": "book"}\n',
         "row 2 has None"),
        ('{"question": "2 + 2?", "answer": ["4"], "level": 3}\n', "'answer' should hold the answers, but row 1"),
        ("".join(f'{{"quiz": "Is {i} prime?", "verdict": "{i % 2}"}}\n' for i in range(20)), "'verdict' has only 2"),
        ('{"question": "2 + 2?", "level": "4", "source": "x"}\n', "answers"),
        ('{"prompt": "Tell me a story."}\n', "examples/own_reward.py"),
        ('{"n": 3}\n', "prompts"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "answer": "b"}\n',
         "'messages'"),
        ('{"prompt": "a", "answer": "1"}\n{"prompt": "b"}\n', "answers"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_says_what_to_mend(text, named):
    Path("x.jsonl").write_text(text)
    result = init("x.jsonl")
    assert result.exit_code == 1 and named in result.stderr, result.output
    assert not Path("x.toml").exists()


def test_nothing_is_overwritten():
    Path("x.toml").write_text("mine")
    result = init(jsonl("x.jsonl", [ASKED]))
    assert result.exit_code == 2 and "x.toml" in result.stderr and "--output" in result.stderr
    assert Path("x.toml").read_text() == "mine"


def test_a_missing_file_is_named():
    result = init("none.jsonl")
    assert result.exit_code == 1 and "none.jsonl" in result.stderr
