"""Before a run: what cannot work is found and named, with the setting to change; what can work passes."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lite_trgrpo import build
from lite_trgrpo.check import rewards, samples
from lite_trgrpo.cli import app
from lite_trgrpo.config import loading
from lite_trgrpo.data.examples import load_examples
from lite_trgrpo.errors import RunError
from lite_trgrpo.records import Completion, Group, Prompt
from lite_trgrpo.rewards import gold
from lite_trgrpo.training import guards
from tests.tiny import gsm8k_rows
from tests.toy import InProcess

ROOT = Path(__file__).resolve().parent.parent
SUMS = [
    {"prompt": f"What is {a} + {b}?", "answer": str(a + b), "right": str(a + b), "id": i, "page": str(i + 200),
     "words": "a sum", "topic": "sums" if i % 2 else "adding"}
    for i, (a, b) in enumerate((a, b) for a in range(11, 18) for b in range(21, 29))
]  # fmt: skip
OWN = """
def ones(completions, **_): return [1.0] * len(completions)
def raising(completions, **_): return [c["x"] for c in completions]
def numbers(completions, answer, **_): return [float(int(c) == int(a)) for c, a in zip(completions, answer)]
def zeros(completions, **_): return [0.0] * len(completions)
def half(completions, **_): return [0.5] * len(completions)
def longer(completions, **_): return [len(c) / 20 for c in completions]
def holds(completions, answer, **_): return [float(a in c) for c, a in zip(completions, answer)]
def echo(completions, prompts, answer, **_):
    return [float(a == c or p in c) for c, p, a in zip(completions, prompts, answer)]
def boxed(completions, answer, **_): return [float(c == "<<" + a + ">>") for c, a in zip(completions, answer)]
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return str(tmp_path / "own.py")


def sums(tmp_path, functions, rows=SUMS, **settings):
    """A config for these rows, whose reward has been loaded: (config, examples, scorer)."""
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = loading.validate({
        "model": {"name": "none"}, "data": {"source": str(tmp_path / "sums.jsonl"), **settings.pop("data", {})},
        "rewards": {"functions": functions, **settings.pop("rewards", {})}, "rollout": settings,
    })  # fmt: skip
    examples, _ = load_examples(config.data, 0)
    return config, examples, InProcess(config.rewards.functions, config.rewards.options)


def both(config, examples, scorer):
    """Data and rewards, without a model; as many rows held out as were asked for."""
    return rewards.of_data(examples, config.eval.rows, config), rewards.of_rewards(examples, scorer, config)


def found(*reports):
    """(problem, whether it stops) of each finding."""
    return [(finding.problem, finding.stops) for report in reports for finding in report.findings]


# -- planted mistakes: what no model is needed for ----------------------------------------------------------

BOXED = {"data": {"system": "Put your final answer within \\boxed{}."}}
TAGS = {"data": {"system": "Think inside <think> </think>, answer inside <answer> </answer>."}}


@pytest.mark.parametrize(
    ("function", "settings", "problem", "words"),
    [
        ("number", {"data": {"answer": "words"}}, "wrong answer column", "data.answer = 'right'"),
        ("number", {"words": True}, "gold answers cannot be read", "'number' cannot compare anything with the gold"),
        ("own.py:ones", {}, "constant reward", "gives 1 to everything"),
        ("own.py:half", {}, "constant reward", "gives 0.5 to everything"),
        ("own.py:longer", {}, "length is rewarded", "rewards.truncated_max_zero = true"),
        ("own.py:holds", {}, "junk is rewarded", "many answers at once gets 1.00"),
        ("own.py:echo", {}, "junk is rewarded", "the prompt itself gets 1.00"),
        ("exact", BOXED, "prompt and reward disagree on the form", "asks for \\boxed{ANSWER}, but 'exact' gives"),
        ("number", {"rewards": {"solved_at": 2.0}}, "gold answers not accepted", "rewards.solved_at = 2: set it to 1"),
        ("overlong", {"rewards": {"options": {"overlong": {"max_tokens": 9, "buffer": 2}}}},
         "gold answers not accepted", "name the function that reads the answer first"),
        ("number", {"data": {"prompt": "topic"}}, "one prompt, several answers", "data.prompt = 'topic'"),
    ],
)  # fmt: skip
def test_a_planted_mistake_is_named_with_its_setting(tmp_path, own, function, settings, problem, words):
    settings = dict(settings)
    written = [{**row, "answer": f"{row['answer']} or so, maybe 7", "right": "?", "page": "?"} for row in SUMS]
    rows = written if settings.pop("words", False) else SUMS
    config, examples, scorer = sums(tmp_path, {function.replace("own.py", own): 1.0}, rows, **settings)
    reports = both(config, examples, scorer)
    broken = [finding for report in reports for finding in report.broken]
    assert [finding.problem for finding in broken][:1] == [problem]
    assert words in broken[0].text
    with pytest.raises(RunError, match=r"--set train\.preflight=false"):
        rewards.before_training(examples, (examples * 10)[: config.eval.rows], scorer, config)


def test_a_reward_that_raises_is_called_that_and_nothing_is_said_of_the_gold_answers(tmp_path, own):
    config, examples, _ = sums(tmp_path, {own.replace("own.py", "own.py:raising"): 1.0})
    with build.scoring_of(config) as scorer:
        report = rewards.of_rewards(examples, scorer, config)
    [finding] = report.broken
    assert finding.problem == "the reward fails"
    assert "own.py:raising' raises an error on 6 of 6 gold answers" in finding.text


def test_a_reward_that_raises_on_what_is_wrong_is_no_constant_one(tmp_path, own):
    """On gold answers it gives 1, on junk it raises: what is left is 1 everywhere."""
    config, examples, _ = sums(tmp_path, {own.replace("own.py", "own.py:numbers"): 1.0})
    with build.scoring_of(config) as scorer:
        [finding] = rewards.of_rewards(examples, scorer, config).findings
    assert (finding.problem, finding.stops) == ("the reward fails", False)
    assert "raises an error on 15 of 15 answers that are junk" in finding.text


def test_half_of_a_small_file_is_held_out_and_that_is_said(tmp_path):
    config, examples, _ = sums(tmp_path, {"number": 1.0}, SUMS[:40])
    [finding] = rewards.of_data(examples[:20], 20, config).findings
    assert (finding.problem, finding.stops) == ("few rows", False)
    assert "eval.rows = 200, but there are only 40 prompts" in finding.text


@pytest.mark.parametrize(
    ("function", "settings"),
    [
        ("number", {}), ("exact", {}), ("math", BOXED), ("number", BOXED), ("reasoning-gym", TAGS), ("math", TAGS),
        ("exact", {"data": {"answer": "page"}}),  # wrong, but only the base's answers can tell: below
        ("own.py:zeros", {"data": {"answer": ""}}),  # no gold answer to compare with
    ],
)  # fmt: skip
def test_what_can_work_passes(tmp_path, own, function, settings):
    rows = [{**row, "metadata": {"source_dataset": "chain_sum"}} for row in SUMS]
    config, examples, scorer = sums(tmp_path, {function.replace("own.py", own): 1.0}, rows, **settings)
    assert found(*both(config, examples, scorer)) == []
    rewards.before_training(examples, (examples * 10)[: config.eval.rows], scorer, config)


def test_an_own_reward_may_want_a_form_that_is_not_guessed(tmp_path, own):
    """Its author knows; so this is said, not held against it."""
    config, examples, scorer = sums(tmp_path, {f"{own}:boxed": 1.0})
    assert found(rewards.of_rewards(examples, scorer, config)) == [("gold answers not accepted", False)]
    [line] = rewards.before_training(examples, (examples * 10)[: config.eval.rows], scorer, config)
    assert line.startswith("warning: gold answers not accepted") and "own.py:boxed" in line


def test_a_few_bad_rows_are_named(tmp_path):
    rows = [{**row, "answer": row["answer"] if i % 5 else "no idea"} for i, row in enumerate(SUMS)]
    config, examples, scorer = sums(tmp_path, {"number": 1.0}, rows)
    [finding] = rewards.of_rewards(examples, scorer, config).findings
    assert not finding.stops and "'no idea' (" in finding.text and "sums.jsonl:" in finding.text


@pytest.mark.parametrize("reward", ["number", "math", "exact"])
def test_gold_answers_that_cannot_be_graded_are_named_with_file_line_and_value(tmp_path, own, reward):
    """Four in three hundred rows: too few for the sample on which the reward is tried. Held-out rows count too."""
    bad = {7: None, 20: float("nan"), 90: "", 250: ["4"]}
    rows = [{"prompt": f"What is {i} + 1?", "answer": bad.get(i, str(i + 1))} for i in range(300)]
    config, examples, scorer = sums(tmp_path, {reward: 1.0, f"{own}:half": 1.0}, rows)
    report = rewards.of_golds(examples, scorer, config)
    assert report.facts["golds"] == 300 and len(report.broken) == 1
    assert f"'{reward}' cannot grade 4 of 300" in report.broken[0].text
    assert all(f"sums.jsonl:{i + 1}" in report.broken[0].text for i in bad)
    with pytest.raises(RunError, match="of 300"):
        rewards.before_training(examples[:200], examples[200:], scorer, config)


def test_repeated_prompts_are_counted(tmp_path):
    config, examples, _ = sums(tmp_path, {"number": 1.0}, SUMS * 3)
    [finding] = rewards.of_data(examples, config.eval.rows, config).findings
    assert not finding.stops and "168 rows hold only 56 different prompts" in finding.text


def test_the_same_answer_everywhere_is_said(tmp_path):
    config, examples, _ = sums(tmp_path, {"number": 1.0}, [{**row, "answer": "4"} for row in SUMS])
    assert found(rewards.of_data(examples, config.eval.rows, config)) == [("one answer for all", False)]


# -- planted mistakes: what the base's answers show -----------------------------------------------------------


def answered(examples, texts, stopped=True, ids=(5, 6)):
    """Groups of four answers as a model might have given them: `texts` makes one from an example and its number."""
    return [
        Group(example, Prompt((1,), ""), [
            Completion(ids, (True,) * len(ids), (-1.0,) * len(ids), texts(example, i), stopped) for i in range(4)
        ])
        for example in examples[:8]
    ]  # fmt: skip


def right(example, i):
    return example.columns["right"]


def wrong(example, i):
    return "1 and not 2"


@pytest.mark.parametrize(
    ("texts", "settings", "answers", "problem", "words"),
    [
        (wrong, {}, {}, "nothing is solved", "easier prompts or a larger base"),
        (right, {}, {}, "already solved", "take harder prompts in data.source"),
        (wrong, {}, {"stopped": False}, "answers are truncated", "rollout.max_new_tokens = 256: raise it"),
        (wrong, {}, {"stopped": False, "ids": (5, 9, 5, 5)}, "no token ends an answer", "run on past <|im_end|> until"),
        (right, {"data": {"answer": "page"}}, {}, "wrong answer column", "set data.answer = 'right'"),
        (wrong, BOXED, {}, "the base does not keep to the form", "answers are not in the form \\boxed{ANSWER}"),
        (lambda example, i: right(example, i) if int(right(example, i)) % 2 else "1", {}, {}, "no group with signal",
         "raise rollout.group_size"),
    ],
)  # fmt: skip
def test_answers_that_teach_nothing_are_explained(tmp_path, texts, settings, answers, problem, words):
    config, examples, scorer = sums(tmp_path, {"number": 1.0}, **settings)
    groups = scorer.score(answered(examples, texts, **answers))
    [finding] = samples.of_samples(groups, scorer, config, {9: "<|im_end|>"}).findings
    assert (finding.problem, finding.stops) == (problem, True)
    assert words in finding.text


def test_a_column_that_stands_in_the_question_is_no_sign_of_the_wrong_column(tmp_path):
    """A base that repeats a number of the question is right by that number's column."""
    rows = [{**row, "first": row["prompt"].split()[2], "right": "?"} for row in SUMS]
    config, examples, scorer = sums(tmp_path, {"number": 1.0}, rows)
    groups = scorer.score(answered(examples, lambda example, i: example.columns["first"]))
    assert found(samples.of_samples(groups, scorer, config, {})) == [("nothing is solved", True)]


def test_answers_of_an_own_reward_that_gives_nothing_show_it(tmp_path, own):
    config, examples, scorer = sums(tmp_path, {f"{own}:zeros": 1.0})
    assert not rewards.of_rewards(examples, scorer, config).broken  # it might want another form
    groups = scorer.score(answered(examples, right))
    assert found(samples.of_samples(groups, scorer, config, {})) == [("nothing is solved", True)]


def test_answers_that_differ_are_enough(tmp_path):
    config, examples, scorer = sums(tmp_path, {"number": 1.0})
    groups = scorer.score(answered(examples, lambda example, i: right(example, i) if i == 1 else "0"))
    report = samples.of_samples(groups, scorer, config, {})
    assert not report.findings
    assert (report.facts["solved"], report.facts["groups_with_signal"]) == (0.25, 1.0)


# -- after the first step -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "solved", "truncated", "signal", "said"),
    [
        (20, 0, 0.0, 0.0, "no right answer among 100"),
        (20, 0, 1.0, 0.0, "100% were truncated: raise rollout.max_new_tokens"),
        (20, 5, 0.0, 0.0, "100 of 100 held-out answers right before training"),
        (20, 0, 0.0, 0.1, None),  # something to learn from
        (20, 1, 0.0, 0.0, None),  # not hopeless
        (19, 0, 0.0, 0.0, None),  # 95 answers prove nothing
    ],
)
def test_a_run_ends_after_its_first_step_only_where_hundred_answers_say_the_same(rows, solved, truncated, signal, said):
    """Each row has one greedy and four sampled answers."""
    config = loading.load("demo")
    row = {"solved": solved > 0, "samples_solved": max(0, solved - 1)}
    text = guards.of_first_step({"rows": [row] * rows, "truncated": truncated}, {"groups_with_signal": signal}, config)
    assert text is None if said is None else said in text


# -- the form of an answer ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "form"),
    [
        ("What is 2 + 2?", None),
        ("Put your final answer within \\boxed{}.", "\\boxed{ANSWER}"),
        ("End with a line `#### number`.", "#### ANSWER"),
        ("Reason in <think> </think>, answer in <answer></answer>", "<think>...</think>\n<answer>ANSWER</answer>"),
        ("<think>your thoughts</think> and then the answer in \\boxed{}", "<think>...</think>\n\\boxed{ANSWER}"),
        ("<reasoning>\n...\n</reasoning>", None),  # a document rather than an instruction: spans lines
        ("Is <b>this</b> so?", "<b>...</b>\nANSWER"),
    ],
)
def test_the_form_that_a_prompt_asks_for(prompt, form):
    assert gold.asked(prompt) == form


@pytest.mark.parametrize(
    ("answer", "final"),
    [("5", "5"), (7, "7"), ("So 2.\n#### 42", "42"), ("it is \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"), ("$x$", "x")],
)
def test_the_final_answer_of_a_gold_one(answer, final):
    assert gold.final(answer) == final


def test_an_answer_follows_its_form():
    assert gold.follows("so \\boxed{4}", "\\boxed{ANSWER}") and not gold.follows("so \\boxed{}", "\\boxed{ANSWER}")
    assert gold.follows("<think>a</think>\n\n<answer>b</answer>", gold.FORMS[-1])
    assert not gold.follows("<answer>b</answer>", gold.FORMS[-1])


# -- what is shipped ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", loading.presets())
def test_the_presets_pass(tmp_path, name):
    config = loading.load(name)
    if config.data.source == "openai/gsm8k":
        rows = tmp_path / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in gsm8k_rows(200)))
        config = replace_data(config, source=str(rows), eval_split=None)
    elif config.data.source.startswith("reasoning-gym"):
        config = replace_data(config, options={**config.data.options, "size": 60})
    examples, _ = load_examples(config.data, 20)
    scorer = InProcess(config.rewards.functions, config.rewards.options)
    assert found(*both(config, examples, scorer)) == []


def replace_data(config, **values):
    return config.model_copy(update={"data": config.data.model_copy(update=values)})


def test_the_example_passes(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = loading.load("demo", ROOT / "examples" / "own.toml")
    examples, _ = load_examples(config.data, config.eval.rows)
    scorer = InProcess(config.rewards.functions, config.rewards.options)
    assert found(*both(config, examples, scorer)) == []


# -- whole commands -------------------------------------------------------------------------------------------


def call(*arguments):
    return CliRunner(env={"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, [str(a) for a in arguments])


def test_a_broken_reward_stops_a_run_before_the_model_is_loaded(tmp_path, own):
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SUMS))
    settings = ["model.name=x/y", f"data.source={tmp_path / 'sums.jsonl'}", f"rewards.functions={{ '{own}:ones' = 1 }}"]
    arguments = ["train", "-o", tmp_path / "run", *(word for line in settings for word in ("-s", line))]
    result = call(*arguments)
    assert result.exit_code == 1 and result.stderr.startswith("error: constant reward: "), result.output
    assert not (tmp_path / "run").exists()
    assert "x/y" in call(*arguments, "-s", "train.preflight=false").stderr  # now it is the model that is not there


def test_check_looks_at_what_it_is_asked_for(tiny_config):
    """A random model and a reward of nonsense: the gold answers get none of its marks, so the reward is at fault."""
    result = call("check", "rewards", "--config", tiny_config, "--json")
    found = json.loads(result.stdout)
    assert list(found) == ["rewards"] and found["rewards"]["data"]["rows"] == 8
    assert found["rewards"]["samples"]["answers"] == 8 * 4
    assert call("check", "reward", "--config", tiny_config).exit_code == 2
    assert "memory" in call("check", "memory", "-c", tiny_config).stdout


def test_what_is_quoted_is_printed_harmless(tiny_config):
    """Terminal escapes can stand in prompts as in answers."""
    result = call("check", "rewards", "-c", tiny_config, "-s", 'data.system="\\u001b]0;x\\u0007"')
    assert "]0;x" in result.stdout and "\x1b" not in result.stdout


def test_a_run_that_cannot_learn_ends_after_its_first_step(tiny_config, tmp_path):
    """A random model never says the sum and nothing else: 4 held-out rows, one greedy and 40 sampled answers each."""
    settings = ["rewards.functions={ exact = 1 }", "train.preflight=true", "eval.samples=40", "train.steps=3"]
    arguments = ["-c", tiny_config, *(word for line in settings for word in ("-s", line))]
    result = call("train", *arguments, "-o", tmp_path / "r")
    assert result.exit_code == 1, result.output
    assert "stopped by no right answer among 164 held-out ones and no signal in the first step" in result.stderr
    assert len((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()) == 1
    resumed = call("train", "--resume", tmp_path / "r")  # whoever knows better goes on
    assert resumed.exit_code == 0, resumed.output


BIG_SUMS = "data.options={ first = [700000, 700030], second = [800000, 800030] }"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ([], None),
        (["rollout.max_new_tokens=2"], "answers are truncated"),
        ([BIG_SUMS, "rollout.max_new_tokens=40", "rollout.group_size=4"], "nothing is solved"),
        (["data.system=Use \\boxed{}.", "rewards.functions={ exact = 1 }"], "prompt and reward disagree on the form"),
        (["data.answer=prompt"], "gold answers cannot be read"),
    ],
)
def test_the_demo_passes_and_mistakes_in_it_do_not(settings, problem):
    result = call("check", "rewards", "--preset", "demo", "--json", *(w for line in settings for w in ("-s", line)))
    found = json.loads(result.stdout)["rewards"]
    stops = [f["problem"] for part in ("data", "rewards", "samples") for f in found.get(part, {}).get("findings", [])
             if f["stops"]]  # fmt: skip
    assert stops == ([problem] if problem else []), found
    assert (result.exit_code == 0) is found["works"] is (problem is None)
    assert found["seconds"] < 120
