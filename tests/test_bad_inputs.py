"""Bad inputs through the command line: each ends with a message that names the thing, without a traceback, and leaves
nothing that would block the next start."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lite_trgrpo.cli import app
from tests.tiny import tiny_model_folder

ROW = '{"prompt": "1 + 1?", "answer": "2"}\n'
GOOD = ROW + ROW.replace("1 + 1", "1 + 2").replace('"2"', '"3"') + ROW.replace("1 + 1", "2 + 2").replace('"2"', '"4"')
REWARD = "def reward(completions, **_):\n    return [float(len(c)) for c in completions]\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    """A good run, for its adapter and its folder."""
    folder = tmp_path_factory.mktemp("runs") / "good"
    data = folder.parent / "data.jsonl"
    data.write_text(GOOD)
    arguments = ["train", "-o", folder, "--steps", 1, *settings(model, data)]
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return folder


def settings(model, data, *more: str) -> list:
    chosen = [f"model.name={model}", f"data.source={data}", "rollout.max_new_tokens=2", "rollout.group_size=2"]
    chosen += ["train.prompts_per_step=1", "eval.rows=0", *more]
    return [word for setting in chosen for word in ("--set", setting)]


def refused(arguments, names: str, run: Path | None = None) -> str:
    """Run the line; -> what it said, once it has been looked at."""
    result = CliRunner(env={"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, [str(a) for a in arguments])
    assert result.exit_code in (1, 2), (result.exit_code, result.output, result.exception)
    assert isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    said = result.stderr
    if result.exit_code == 1:
        last = said[said.index("error: ") :].rstrip("\n")
        assert "\n" not in last or all(len(line) > 20 for line in last.splitlines()), last  # one line a problem
        assert len(last) < 1500, last
        said = last
    assert names.lower() in said.lower(), said
    assert run is None or not (run / "config.toml").exists()
    return said


# -- options: what is set, what the message must name -------------------------------------------------------

OPTIONS = [
    ("train.steps=-1", "train.steps"),
    ("train.steps=many", "train.steps"),
    ("train.steps=1.5", "train.steps"),
    ("train.steps=[1]", "train.steps"),
    ("train.steps=", "train.steps"),
    ("train.learning_rate=0", "train.learning_rate"),
    ("train.learning_rate=-1e-5", "train.learning_rate"),
    ("train.learning_rate=nan", "train.learning_rate"),
    ("train.learning_rate=inf", "train.learning_rate"),
    ("train.learnin_rate=1", "learning_rate"),
    ("train.prompts_per_step=0", "train.prompts_per_step"),
    ("train.updates_per_batch=0", "train.updates_per_batch"),
    ("train.warmup_steps=-1", "train.warmup_steps"),
    ("train.schedule=step", "train.schedule"),
    ("train.optimizer=sgd", "train.optimizer"),
    ("train.weight_decay=-1", "train.weight_decay"),
    ("train.max_grad_norm=0", "train.max_grad_norm"),
    ("train.micro_batch_tokens=0", "train.micro_batch_tokens"),
    ("train.gradient_checkpointing=maybe", "train.gradient_checkpointing"),
    ("train.checkpoint_every=-1", "train.checkpoint_every"),
    ("train.checkpoint_minutes=-0.5", "train.checkpoint_minutes"),
    ("train.keep_checkpoints=0", "train.keep_checkpoints"),
    ("train.seed=-1", "train.seed"),
    ("train.seed=99999999999999999999", "train.seed"),
    ("rollout.group_size=1", "rollout.group_size"),
    ("rollout.group_size=0", "rollout.group_size"),
    ("rollout.max_new_tokens=0", "rollout.max_new_tokens"),
    ("rollout.temperature=0", "rollout.temperature"),
    ("rollout.temperature=-1", "rollout.temperature"),
    ("rollout.top_p=0.5", "rollout.top_p"),
    ("rollout.top_k=5", "rollout.top_k"),
    ("rollout.max_rows=0", "rollout.max_rows"),
    ("rollout.top_up_rounds=-1", "rollout.top_up_rounds"),
    ("objective.weights=ofset", "objective.weights"),
    ("objective.clip_low=1", "objective.clip_low"),
    ("objective.clip_high=-0.1", "objective.clip_high"),
    ("objective.dual_clip=1", "objective.dual_clip"),
    ("objective.beta=-1", "objective.beta"),
    ("objective.weight.low=3", "low"),
    ("objective.trust_region=none", "objective.trust_region"),
    ("objective.kl=k4", "objective.kl"),
    ("model.lora_rank=0", "model.lora_rank"),
    ("model.lora_rank=100000", "model.lora_rank"),
    ("model.lora_alpha=0", "model.lora_alpha"),
    ("model.lora_dropout=0.1", "model.lora_dropout"),
    ("model.lora_targets=[]", "model.lora_targets"),
    ("model.quantization=int7", "model.quantization"),
    ("model.dtype=fp8", "model.dtype"),
    ("model.device=tpu", "model.device"),
    ("model.trust_remote_code=perhaps", "model.trust_remote_code"),
    ("data.max_prompt_tokens=0", "data.max_prompt_tokens"),
    ("data.options=7", "data.options"),
    ("data.answer=gold", "gold"),
    ("data.prompt=question", "question"),
    ("data.seed=-1", "data.seed"),
    ("data.eval_split=test", "data.eval_split"),
    ("data.eval_source=no.jsonl", "no.jsonl"),
    ("eval.rows=-1", "eval.rows"),
    ("eval.samples=-1", "eval.samples"),
    ("eval.max_new_tokens=0", "eval.max_new_tokens"),
    ("guards.rollbacks=-1", "guards.rollbacks"),
    ("guards.window=1", "guards.window"),
    ("guards.kl=0", "guards.kl"),
    ("guards.truncated=1.5", "guards.truncated"),
    ("guards.entrop=1", "entropy"),
    ("rewards.functions={}", "rewards.functions"),
    ("rewards.functions={ exact = nan }", "exact"),
    ("rewards.functions={ exact = 0 }", "exact"),
    ("rewards.functions={ exat = 1 }", "exact"),
    ("rewards.functions={ 'no.py:reward' = 1 }", "no.py"),
    ("rewards.functions=exact", "rewards.functions"),
    ("rewards.options={ math = {} }", "math"),
    ("rewards.options={ exact = { strict = true } }", "strict"),
    ("rewards.solved_at=full", "rewards.solved_at"),
    ("nonsense", "--set 'nonsense'"),
    ("=3", "--set '=3'"),
    ("train=3", "--set 'train=3'"),
    ("train.=3", "--set 'train.=3'"),
    ("trian.steps=3", "train"),
]


@pytest.mark.parametrize(("setting", "names"), OPTIONS, ids=[setting for setting, _ in OPTIONS])
def test_an_option(setting, names, tmp_path, monkeypatch):
    from lite_trgrpo import session

    monkeypatch.setattr(session, "policy_of", lambda config: pytest.fail("the model was loaded first"))
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text(GOOD)
    refused(["train", "-o", "run", *settings("x/y", "data.jsonl", setting)], names, Path("run"))


# -- data ---------------------------------------------------------------------------------------------------

DATA = {
    "missing": (None, "data.jsonl"),
    "empty": ("", "data.jsonl"),
    "blank lines": ("\n\n", "data.jsonl"),
    "no JSON": ("hello\n", "data.jsonl:1"),
    "half a line": (ROW + ROW[:20], "data.jsonl:2"),
    "a list": ("[1, 2]\n", "data.jsonl:1"),
    "a whole JSON array": ("[\n" + ROW.strip() + "\n]\n", "data.jsonl:1"),
    "an empty prompt": ('{"prompt": "", "answer": "1"}\n', "data.jsonl:1"),
    "a prompt of spaces": ('{"prompt": "  ", "answer": "1"}\n', "data.jsonl:1"),
    "a number as prompt": ('{"prompt": 7, "answer": "1"}\n', "data.jsonl:1"),
    "no prompt": ('{"question": "?", "answer": "1"}\n', "data.prompt"),
    "no answer": ('{"prompt": "?"}\n', "data.answer"),
    "no role": ('{"prompt": [{"content": "?"}], "answer": "1"}\n', "role"),
    "no messages": ('{"prompt": [], "answer": "1"}\n', "data.jsonl:1"),
    "not UTF-8": (b'{"prompt": "\xff\xfe", "answer": "1"}\n', "data.jsonl"),
    "UTF-16": (ROW.encode("utf-16"), "data.jsonl"),
    "binary": (bytes(range(256)) * 4, "data.jsonl"),
    "deep nesting": ('{"prompt": ' + "[" * 100_000 + "\n", "data.jsonl"),
    "a lone surrogate": ('{"prompt": "\\ud800", "answer": "1"}\n', "data.jsonl:1"),
    "NUL": ('{"prompt": "a", "answer": "1"}\x00\n', "data.jsonl:1"),
    "a huge number": ('{"prompt": "a", "answer": ' + "9" * 5000 + "}\n", "data.jsonl:1"),
}


@pytest.mark.parametrize("what", DATA)
def test_data(what, tmp_path, monkeypatch):
    from lite_trgrpo import session

    monkeypatch.setattr(session, "policy_of", lambda config: pytest.fail("the model was loaded first"))
    monkeypatch.chdir(tmp_path)
    content, names = DATA[what]
    if content is not None:
        Path("data.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(["train", "-o", "run", *settings("x/y", "data.jsonl")], names, Path("run"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", b"prompt,answer\n"),
        ("t.csv", b"prompt,answer\n?,1,2\n"),
        ("t.csv", b'prompt,answer\n?,"1\n'),
        ("t.csv", b"\x00\x01\x02"),
        ("t.parquet", b"PAR1 but no more"),
        ("t.parquet", b""),
        ("t.txt", b"1 + 1"),
    ],
)
def test_other_files_of_data(name, content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    refused(["train", "-o", "run", *settings("x/y", name)], name, Path("run"))


@pytest.mark.parametrize("source", [".", "reasoning-gym:no_such_task", "builtin:multiplication", "gsm8k", "a/b/c", "~"])
def test_sources(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(["train", "-o", "run", *settings("x/y", source)], source.rpartition(":")[2], Path("run"))


# -- config files and presets -------------------------------------------------------------------------------

CONFIGS = {
    "no TOML": (b"steps: 3\n", "own.toml"),
    "half a table": (b"[train\n", "own.toml"),
    "twice the same": (b"[train]\nsteps = 1\nsteps = 2\n", "own.toml"),
    "outside of a section": (b"steps = 3\n", "steps"),
    "an unknown section": (b"[trainer]\nsteps = 3\n", "train"),
    "not UTF-8": (b"[data]\nsystem = '\xff'\n", "own.toml"),
    "a section that is a list": (b"[[train]]\nsteps = 3\n", "train"),
    "JSON": (b'{"train": {"steps": 3}}', "own.toml"),
    "binary": (bytes(range(256)), "own.toml"),
    "empty": (b"", "model.name"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_config_files(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, names = CONFIGS[what]
    Path("own.toml").write_bytes(content)
    refused(["train", "-c", "own.toml", "-o", "run"], names, Path("run"))


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["train", "--preset", "dmo"], "demo"),
        (["train", "--preset", ""], "demo"),
        (["train", "--preset", "../demo"], "demo"),
        (["train", "--preset", "demo", "--objective", "gpro"], "grpo"),
        (["train", "--config", "none.toml"], "none.toml"),
        (["train", "--config", str(Path(__file__).parent)], str(Path(__file__).parent)),
        (["train", "demo"], "--preset demo"),
        (["train", "--resume", "none"], "none"),
        (["train", "--resume"], "runs"),
        (["train", "--preset", "demo", "--max-hours", "-1"], "--max-hours"),
        (["train", "--preset", "demo", "--max-hours", "nan"], "--max-hours"),
        (["train", "--preset", "demo", "--stop-at", "7pm"], "--stop-at"),
        (["train", "--preset", "demo", "--stop-at", ""], "--stop-at"),
        (["train", "--preset", "demo", "--steps", "x"], "--steps"),
        (["train", "--preset", "demo", "--seed", "1.5"], "--seed"),
        (["train", "--preset", "demo", "--bogus"], "--bogus"),
        (["compare", "--preset", "demo", "--objectives", "grpo,grop"], "grpo"),
        (["compare", "--preset", "demo", "--objectives", "grpo", "--seeds", "0,x"], "0,x"),
        (["compare", "--preset", "demo", "--objectives", ""], "objective"),
        (["diagnose", "--preset", "demo", "--prompts", "0"], "--prompts"),
        (["diagnose", "--preset", "demo", "--figure", "x.gif"], "x.gif"),
        (["presets", "show", "dmo"], "demo"),
        (["eval"], "model.name"),
        (["trian"], "trian"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_command_lines(arguments, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(arguments, names)
    assert list(tmp_path.rglob("config.toml")) == []


# -- reward functions ---------------------------------------------------------------------------------------

REWARDS = {
    "a syntax error": "def reward(:\n",
    "an import that fails": "import no_such_module\n",
    "an error while importing": "raise ValueError('broken')\n",
    "another name": REWARD.replace("reward", "rewrad"),
    "no function": "reward = 3\n",
    "binary": "\x00",
    "exit while importing": "raise SystemExit(3)\n",
}


@pytest.mark.parametrize("what", REWARDS)
def test_reward_files(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text(GOOD)
    Path("own.py").write_text(REWARDS[what])
    setting = "rewards.functions={ 'own.py:reward' = 1 }"
    refused(["train", "-o", "run", *settings("x/y", "data.jsonl", setting)], "own.py", Path("run"))


@pytest.mark.parametrize(
    "body",
    # an exception is no mistake of this kind: rewards.on_failure says what becomes of it
    ["[1.0]", "['1'] * len(completions)", "[float('nan')] * len(completions)", "7", "None", "'text'", "{}"],
)
def test_what_a_reward_function_does_wrong(body, tmp_path, monkeypatch):
    """The preflight finds it before the model is loaded."""
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text(GOOD)
    Path("own.py").write_text(f"def reward(completions, **_):\n    return {body}\n")
    setting = "rewards.functions={ 'own.py:reward' = 1 }"
    refused(["train", "-o", "run", *settings("x/y", "data.jsonl", setting)], "own.py:reward", Path("run"))


def test_a_wrong_reward_can_be_fixed_and_the_run_resumed(model, tmp_path, monkeypatch):
    """Without the preflight the function is called only when there are answers, and by then the run folder is there."""
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text(GOOD)
    Path("own.py").write_text("def reward(completions, **_):\n    return [1.0]\n")
    setting = "rewards.functions={ 'own.py:reward' = 1 }"
    later = settings(model, "data.jsonl", setting, "train.preflight=false")
    refused(["train", "-o", "run", "--steps", 1, *later], "own.py:reward")
    Path("own.py").write_text(REWARD)
    result = CliRunner().invoke(app, ["train", "--resume", "run"])
    assert result.exit_code == 0, result.output


# -- model folders and adapters -----------------------------------------------------------------------------


def without(name):
    return lambda folder: (folder / name).unlink()


def overwritten(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def other_shapes(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 128}))


MODELS = {
    "no config": without("config.json"),
    "no weights": without("model.safetensors"),
    "only pickled weights": pickled,
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "config is no JSON": overwritten("config.json", b"{"),
    "config is a list": overwritten("config.json", b"[]"),
    "config of no known type": overwritten("config.json", b'{"model_type": "nonsense"}'),
    "tokenizer is no JSON": overwritten("tokenizer.json", b"{"),
    "weights are empty": overwritten("model.safetensors", b""),
    "weights are a Git LFS pointer": overwritten("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
    "weights are cut": lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:9000]),
    "weights of other shapes": other_shapes,
}


@pytest.mark.parametrize("what", MODELS)
def test_model_folders(what, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text(GOOD)
    shutil.copytree(model, "broken")
    MODELS[what](Path("broken"))
    refused(["train", "-o", "run", *settings("./broken", "data.jsonl")], "broken", Path("run"))


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("nowhere", "nowhere"),
        ("./nowhere", "nowhere"),
        ("nowhere.gguf", "nowhere.gguf"),
        ("package:no_such_package/x.gguf", "no_such_package"),
        ("package:json/x.gguf", "x.gguf"),
        ("package:", "package"),
        ("data.jsonl", "data.jsonl"),
        ("some one/some model", "some one/some model"),
        ("no-such-user/no-such-model", "no-such-user/no-such-model"),
        ("empty.gguf", "empty.gguf"),
        ("x.whl/y.gguf", "y.gguf"),
    ],
)
def test_model_names(name, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LITE_TRGRPO_CACHE", str(tmp_path / "cache"))
    Path("data.jsonl").write_text(GOOD)
    Path("empty.gguf").write_bytes(b"")
    refused(["train", "-o", "run", *settings(name, "data.jsonl")], names, Path("run"))


ADAPTERS = {
    "no config": without("adapter_config.json"),
    "no weights": without("adapter_model.safetensors"),
    "config is no JSON": overwritten("adapter_config.json", b"{"),
    "config is empty": overwritten("adapter_config.json", b"{}"),
    "weights are nonsense": overwritten("adapter_model.safetensors", b"nonsense" * 9),
    "weights are empty": overwritten("adapter_model.safetensors", b""),
}


@pytest.mark.parametrize(("what", "command"), [*((what, "eval") for what in ADAPTERS), ("no weights", "train")])
def test_adapters(what, command, model, adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text(GOOD)
    shutil.copytree(adapter / "adapter", "broken")
    ADAPTERS[what](Path("broken"))
    arguments = [*settings(model, "data.jsonl", "model.adapter=./broken"), "--set", "eval.rows=1"]
    refused([command, *arguments, *(["-o", "run"] if command == "train" else [])], "broken", Path("run"))


# -- the environment, and runs that are there ---------------------------------------------------------------


def test_an_output_that_is_a_file(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text(GOOD)
    refused(["train", "-o", "data.jsonl", *settings(model, "data.jsonl")], "data.jsonl")
    refused(["train", "-o", "data.jsonl/run", *settings(model, "data.jsonl")], "data.jsonl/run")


@pytest.mark.parametrize("file", ["config.toml", "run.json", "metrics.jsonl"])
def test_a_run_whose_files_are_broken(file, adapter, tmp_path):
    """run.json only tells of the past; without the others a run does not go on."""
    run = tmp_path / "run"
    shutil.copytree(adapter, run)
    content = (run / file).read_bytes()
    (run / file).write_bytes(b"\xff{" + content[2:])
    arguments = ["train", "--resume", run, "--steps", 2]
    if file == "run.json":
        assert CliRunner().invoke(app, [str(a) for a in arguments]).exit_code == 0
    else:
        refused(arguments, file)


def test_data_that_has_changed_since_the_run_began(adapter, tmp_path):
    run, data = tmp_path / "run", adapter.parent / "data.jsonl"
    shutil.copytree(adapter, run)
    try:
        data.write_text(GOOD.replace('"3"', '"5"'))
        refused(["train", "--resume", run, "--steps", 2], str(run))
    finally:
        data.write_text(GOOD)
    assert CliRunner().invoke(app, ["train", "--resume", str(run), "--steps", "2"]).exit_code == 0


def test_a_missing_package(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    refused(["train", "-o", "run", *settings(model, "reasoning-gym:gcd")], "pip install", Path("run"))
