"""How often the base solves each prompt: measured once, kept beside the data, and what training makes of it."""

import json

import pytest
from typer.testing import CliRunner

from lite_trgrpo.cli import app
from lite_trgrpo.config import loading
from lite_trgrpo.data import difficulty
from lite_trgrpo.data.examples import load_examples
from lite_trgrpo.errors import DataError
from lite_trgrpo.records import Example


def call(*arguments):
    result = CliRunner(env={"COLUMNS": "300"}).invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("solved", "tried", "teaches"),
    [(0, 8, False), (1, 8, True), (8, 8, False), (1, 10, True), (9, 10, True), (1, 11, False), (0, 0, False)],
)
def test_prompts_between_a_tenth_and_nine_tenths_teach(solved, tried, teaches):
    assert difficulty.teaches((solved, tried)) is teaches


def test_a_prompt_is_known_by_what_the_model_is_asked():
    plain, other = Example("2 + 2", {}, "a:1"), Example("2 + 2", {"answer": "5"}, "b:7")
    told = Example([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2"}], {}, "a:1")
    assert difficulty.key(plain) == difficulty.key(other) != difficulty.key(told)


@pytest.mark.parametrize(
    ("source", "file"),
    [("my.jsonl", "my.scan.jsonl"), ("data/x.csv", "data/x.scan.jsonl"), ("openai/gsm8k", "openai-gsm8k.scan.jsonl"),
     ("org/set-v1.0", "org-set-v1-0.scan.jsonl"), ("builtin:addition", "builtin-addition.scan.jsonl")],
)  # fmt: skip
def test_where_it_is_kept(source, file):
    assert difficulty.default_file(source).as_posix() == file


def test_training_takes_only_prompts_of_medium_difficulty(tmp_path):
    """Every tenth prompt was solved 3 of 8 times, the others never, always, or were not scanned."""
    loaded = loading.load("demo")
    training, heldout = load_examples(loaded.data, 20)
    counts = {0: (3, 8), 1: (0, 8), 2: (8, 8)}
    text = "".join(difficulty.line(e, *counts[i % 10], "base") for i, e in enumerate(training) if i % 10 in counts)
    (tmp_path / "s.jsonl").write_text(text)
    config = loading.load("demo", overrides=[f"data.scan={tmp_path / 's.jsonl'}"])
    assert load_examples(config.data, 20) == (training[::10], heldout)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no scan"),
        ("{}\n", "s.jsonl:1"),
        ("", "none of 1500 training prompts is solved between 10% and 90% of the time \\(0 of them are in the scan\\)"),
    ],
)
def test_a_scan_that_is_of_no_use_says_so(tmp_path, text, message):
    if text is not None:
        (tmp_path / "s.jsonl").write_text(text)
    config = loading.load("demo", overrides=[f"data.scan={tmp_path / 's.jsonl'}"])
    with pytest.raises(DataError, match=message):
        load_examples(config.data, 0)


@pytest.fixture
def guessing(tiny_config, tmp_path):
    """Of the tiny config, with a reward that depends on the prompt and a little on the answer, so that rates differ."""
    (tmp_path / "reward.py").write_text(
        "def length(prompts, completions, answer, **_):\n"
        "    return [float(c == a or (len(c) + int(p[0])) % 4 > 1) for p, c, a in zip(prompts, completions, answer)]\n"
    )
    return tiny_config


def test_check_scans_goes_on_and_training_follows(guessing, tmp_path):
    """More prompts are the same and some others; what is known is not sampled again. Training sees no other prompt."""
    file = tmp_path / "data.scan.jsonl"
    call("check", "--config", guessing, "--scan", 3)
    first = file.read_text()
    file.write_text(first + '{"prompt": "0')  # as if it had been killed in the middle of a line
    result = json.loads(call("check", "--config", guessing, "--scan", 50, "--json").stdout)["rewards"]["scan"]
    assert file.read_text().startswith(first) and len(first.splitlines()) == 3
    rows = rows_of(file)
    assert len(rows) == len({row["prompt"] for row in rows}) == result["scanned"] == 8  # 4 of 12 are held out
    assert all(row["tried"] == 4 and row["model"] == str(tmp_path / "model") for row in rows)
    teaching = {row["prompt"] for row in rows if 0 < row["solved"] < 4}
    assert 0 < len(teaching) < 8 and result["teaching"] == len(teaching)
    call("train", "--config", guessing, "-o", tmp_path / "r", "-s", f"data.scan={file}", "--steps", 3)
    seen = {difficulty.key(Example(row["prompt"], {}, "")) for row in rows_of(tmp_path / "r" / "rollouts.jsonl")}
    assert seen == teaching


def test_a_scan_of_another_model_is_not_added_to(guessing, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"prompt": "x", "solved": 1, "tried": 2, "model": "other/base"}) + "\n")
    result = CliRunner().invoke(app, ["check", "-c", str(guessing), "--scan", "2", "--scan-file", str(file)])
    assert result.exit_code == 1 and "was made with other/base, not" in result.output
