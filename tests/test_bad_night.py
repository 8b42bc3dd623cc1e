"""Accidents of a night, one row each, against a small real run through the command line.

After each: the exit code, one clear line, a run folder that holds together, and the result. A new accident is one row.
"""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from lite_trgrpo.model.hf import TransformersPolicy
from lite_trgrpo.rollout import engine
from lite_trgrpo.store.run import Run
from lite_trgrpo.training import loop
from tests.accidents import ACCIDENTS, DAMAGES, differences, lite, logged, tensors, tiny_run, train


@pytest.fixture(scope="module")
def tiny_config(tmp_path_factory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("night"))


@pytest.fixture(scope="module")
def undisturbed(tiny_config) -> Path:
    folder = tiny_config.parent / "whole"
    done = train(tiny_config, folder)
    assert done.exit_code == 0, done.output
    return folder


# One of each kind in the default suite, the others of its kind beside the slow tests.
SLOW = {
    "SIGTERM in an evaluation", "SIGTERM in a checkpoint", "a full disk in the rollouts", "a full disk in the scores",
    "a library fails in the update", "a library fails in an evaluation", "the reward process is killed",
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in ACCIDENTS if ACCIDENTS[name].same],
)
def test_after_an_accident_the_run_ends_as_if_nothing_had_been(name, undisturbed, tiny_config, tmp_path):
    accident, run = ACCIDENTS[name], tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        accident.happens(patch, accident.n)
        done = train(tiny_config, run)
    assert done.exit_code == accident.code, done.output
    assert accident.word in done.stderr and "Traceback" not in done.output
    if accident.code:
        assert "train --resume" in done.stderr.splitlines()[-1]
        again = lite("train", "--resume", run)
        assert again.exit_code == 0, again.output
    assert differences(run, undisturbed) == []
    assert len(logged(run)) == 6 and not list((run / "checkpoints").glob(".part-*"))
    assert (run / "report.html").exists()


@pytest.mark.parametrize("name", DAMAGES)
def test_after_damage_the_run_goes_on_as_if_nothing_had_been(name, undisturbed, tiny_config, tmp_path):
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        ACCIDENTS["SIGTERM in an update"].happens(patch, 4)
        assert train(tiny_config, run).exit_code == 130
    DAMAGES[name](run)
    again = lite("train", "--resume", run)
    assert again.exit_code == 0, again.output
    assert differences(run, undisturbed) == []


@pytest.mark.parametrize(
    ("how", "log"),
    [("NULs", "metrics.jsonl"), ("another value", "rollouts.jsonl"),
     *(pytest.param(how, log, marks=pytest.mark.slow)
       for how, log in [("another value", "metrics.jsonl"), ("NULs", "eval.jsonl"), ("another value", "eval.jsonl")])],
)  # fmt: skip
def test_a_log_that_was_changed_before_its_checkpoint_is_refused_and_named(how, log, undisturbed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    content = (run / log).read_bytes()
    changed = b"\0" * len(content) if how == "NULs" else content.replace(b"1", b"2", 1)
    (run / log).write_bytes(changed)
    refused = lite("train", "--resume", run, "--steps", 7)
    assert refused.exit_code == 1 and log in refused.stderr and "--output" in refused.stderr
    assert (run / log).read_bytes() == changed


def test_a_lost_run_json_is_said_on_resume(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    resumed = lite("train", "--resume", tmp_path / "run", "--steps", 7)
    assert resumed.exit_code == 0 and "run.json" in resumed.stderr


@pytest.mark.parametrize("line", ["[1]", '{"step": "x"}', '"text"', "[" * 100_000, '{"step": 1, "clock": {}}'])
def test_json_of_another_shape_in_a_log_is_one_line(line, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text(line + "\n")
    refused = lite("report", tmp_path / "run")
    assert refused.exit_code == 1 and str(tmp_path / "run") in refused.stderr and "Traceback" not in refused.output


@pytest.mark.slow
@pytest.mark.night
def test_memory_and_open_files_stay_level_over_three_hundred_steps(tiny_config, tmp_path, monkeypatch):
    process, seen, real = psutil.Process(), [], loop.recovery.watch

    def watch(job, metrics):
        children = len(process.children(recursive=True))
        seen.append((process.memory_info().rss / 2**20, (process.num_fds(), process.num_threads(), children)))
        return real(job, metrics)

    monkeypatch.setattr(loop.recovery, "watch", watch)
    done = train(tiny_config, tmp_path / "run", "train.steps=300", "guards.rollbacks=0", "eval.every=50")
    assert done.exit_code == 0, done.output
    assert len({counts for _, counts in seen[50:]}) == 1
    assert seen[-1][0] - seen[150][0] < 8, "MiB in the second half; measured 1"


def test_what_a_refused_change_offers_after_a_kill_works(tiny_config, tmp_path):
    """A killed run has no adapter yet: each command that the message names is typed here."""
    run, change = tmp_path / "a run", ["--set", "train.learning_rate=1e-5"]
    with pytest.MonkeyPatch.context() as patch:
        ACCIDENTS["SIGTERM in an update"].happens(patch, 4)
        train(tiny_config, run)
    shutil.rmtree(run / "adapter")  # as SIGKILL leaves it
    refused = lite("train", "--resume", run, *change)
    [first] = [shlex.split(words) for words in re.findall(r"`lite-trgrpo (.*?)`", refused.stderr)]
    [second] = [shlex.split(words) for words in re.findall(r'--set ("model.*?")', refused.stderr)]
    assert lite(*first).exit_code == 0 and (run / "adapter").is_dir()
    new = train(tiny_config, tmp_path / "new", second[0], "train.learning_rate=1e-5", "train.steps=1")
    assert new.exit_code == 0, new.output


def test_ctrl_c_in_a_comparison_offers_the_comparison(tiny_config, tmp_path):
    arguments = ["compare", "-c", tiny_config, "--objectives", "grpo,tr-grpo", "--seeds", "0", "-o", tmp_path / "c"]
    with pytest.MonkeyPatch.context() as patch:
        ACCIDENTS["SIGTERM in an update"].happens(patch, 3)
        stopped = lite(*arguments)
    assert stopped.exit_code == 130 and "compare --objectives grpo,tr-grpo" in stopped.stderr.splitlines()[-1]
    assert str(tmp_path / "c") in stopped.stderr and "train --resume" not in stopped.stderr
    assert lite(*arguments).exit_code == 0


def once(condition: Callable[..., bool]):
    """A condition that holds the first time only."""
    fired = []

    def check(*given) -> bool:
        if fired or not condition(*given):
            return False
        fired.append(True)
        return True

    return check


# -- accidents: each patches the real machinery so that it happens in mid-run ---------------------------------


def nan_in_the_adapter(monkeypatch):
    real, strikes = loop._learn, once(lambda job: job.step == 2)

    def learn(job, *rest):
        real(job, *rest)
        if strikes(job):
            next(iter(job.trainable.values())).data[0] = float("nan")

    monkeypatch.setattr(loop, "_learn", learn)


def huge_learning_rate(monkeypatch):
    real, strikes = loop.learning_rate_at, once(lambda step, _: step == 2)
    monkeypatch.setattr(loop, "learning_rate_at", lambda *given: 1e30 if strikes(*given) else real(*given))


def infinite_logits(monkeypatch):
    """Of one row of one decoding step."""
    real, strikes = engine.draw, once(lambda logits, *_: len(logits) > 2)
    calls = []

    def draw(logits, *rest, **options):
        calls.append(1)
        if len(calls) > 40 and strikes(logits):
            logits = logits.clone()
            logits[1] = float("inf")
        return real(logits, *rest, **options)

    monkeypatch.setattr(engine, "draw", draw)


def no_memory(monkeypatch, where: str):
    """torch refuses memory once, in a phase of the run."""
    phases, real_logprobs = ["loading"], TransformersPolicy.logprobs
    strikes = once(lambda: True)
    real_train = loop.train

    def trained(*given, **options):
        phases[:] = [""]
        real_train(*given, **options)

    monkeypatch.setattr(loop, "train", trained)

    def refused():
        if strikes():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    if where in ("sampling", "evaluation"):
        real = engine.Engine._step
        evaluate = loop.evaluate

        def step(self):
            if phases[-1] == ("evaluation" if where == "evaluation" else "") and len(self._rows) > 2:
                refused()
            return real(self)

        def evaluated(*given, **options):
            phases.append("evaluation")
            try:
                return evaluate(*given, **options)
            finally:
                phases.pop()

        monkeypatch.setattr(engine.Engine, "_step", step)
        monkeypatch.setattr(loop, "evaluate", evaluated)
        return
    real_drift = loop._drift

    def drift(*given):
        phases.append("drift")
        try:
            return real_drift(*given)
        finally:
            phases.pop()

    def logprobs(self, rows, temperature):
        if phases[-1] == ("drift" if where == "drift" else "") and len(rows) > 1:
            refused()
        return real_logprobs(self, rows, temperature)

    monkeypatch.setattr(loop, "_drift", drift)
    monkeypatch.setattr(TransformersPolicy, "logprobs", logprobs)


ROLLED_BACK = {
    "NaN in an adapter tensor": (nan_in_the_adapter, "finite"),
    "a learning rate of 1e30": (huge_learning_rate, "update_kl"),
}


@pytest.mark.parametrize("accident", ROLLED_BACK)
def test_a_ruined_policy_is_rolled_back_and_the_run_ends_well(accident, tiny_config, tmp_path, monkeypatch):
    happens, guard = ROLLED_BACK[accident]
    happens(monkeypatch)
    done = train(tiny_config, tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert re.search(rf"guard '{guard}' critical at step \d", done.stderr) and "rolled back" in done.stderr
    lines = logged(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert sum("rolled_back_to" in line for line in lines) == 1
    assert all(tensor.isfinite().all() for tensor in tensors(tmp_path / "run").values())
    assert lines[-1]["guards"].keys().isdisjoint({"finite", "update_kl"}) and not lines[-1]["updates_skipped"]


def test_infinite_logits_cost_one_step_and_no_crash(tiny_config, tmp_path, monkeypatch):
    infinite_logits(monkeypatch)
    done = train(tiny_config, tmp_path / "run", "eval.rows=0")
    assert done.exit_code == 0, done.output
    lines = logged(tmp_path / "run")
    assert len(lines) == 6 and sum("finite" in line["guards"] for line in lines) == 1
    assert all(tensor.isfinite().all() for tensor in tensors(tmp_path / "run").values())


@pytest.mark.parametrize("engine_name", ["groups", "generate"])
def test_a_policy_that_is_ruined_from_the_start_ends_in_warnings(engine_name, tiny_config, tmp_path, monkeypatch):
    """Greedy and sampled, in our engine and in transformers' generate: answers end at once, nothing is learned."""
    from lite_trgrpo import build

    real = build.policy_of

    def ruined(config):
        policy = real(config)
        for parameter in policy.trainable().values():
            parameter.data.fill_(float("nan"))
        return policy

    monkeypatch.setattr("lite_trgrpo.session.policy_of", ruined)
    done = train(tiny_config, tmp_path / "run", f"rollout.engine={engine_name}", "guards.rollbacks=0")
    assert done.exit_code == 0, done.output
    assert "guard 'finite' critical at step 1" in done.stderr and "Traceback" not in done.output
    assert all(line["updates_skipped"] and line["length_mean"] <= 2 for line in logged(tmp_path / "run"))


@pytest.mark.parametrize("where", ["sampling", "evaluation", "update", "drift"])
def test_no_memory_once_changes_no_result(where, undisturbed, tiny_config, tmp_path, monkeypatch):
    no_memory(monkeypatch, where)
    done = train(tiny_config, tmp_path / "run")
    assert done.exit_code == 0, done.output
    expected, got = logged(undisturbed), logged(tmp_path / "run")
    # smaller batches round differently, and AdamW's first steps amplify that: later steps are alike, not equal
    for key in ("reward_mean", "length_mean", "solved", "groups_with_signal"):
        assert got[0][key] == pytest.approx(expected[0][key], abs=1e-6), key
    assert len(got) == 6 and not any({"finite", "update_kl"} & line["guards"].keys() for line in got)
    assert [line["rows"][0]["ids"] for line in Run(tmp_path / "run").evaluations()][:1] == [
        line["rows"][0]["ids"] for line in Run(undisturbed).evaluations()
    ][:1]


def test_no_memory_while_the_model_is_loaded_is_one_line(tiny_config, tmp_path, monkeypatch):
    def refused(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine.Engine, "_step", refused)
    done = train(tiny_config, tmp_path / "run")
    assert done.exit_code == 1 and "out of memory" in done.stderr and "Traceback" not in done.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["diagnose", "compare"])
def test_no_memory_in_a_study_is_one_line(command, tiny_config, tmp_path, monkeypatch):
    def refused(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    if command == "diagnose":
        monkeypatch.setattr(TransformersPolicy, "logprobs", refused)
        done = lite("diagnose", "--config", tiny_config, "--prompts", 4)
    else:
        monkeypatch.setattr("lite_trgrpo.evaluate.kl_to_base", refused)
        done = lite("compare", "-c", tiny_config, "--objectives", "grpo", "--seeds", "0", "-o", tmp_path / "c")
    assert done.exit_code == 1 and "Traceback" not in done.output
    assert "out of memory" in done.stderr.splitlines()[-1] and "micro_batch_tokens" in done.stderr


def test_no_memory_at_all_in_an_evaluation_is_one_line_and_resumes(undisturbed, tiny_config, tmp_path, monkeypatch):
    real = loop.evaluate

    def refused(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def evaluated(*given, **options):
        engine.Engine._step = refused
        return real(*given, **options)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "evaluate", evaluated)
        patched.setattr(engine.Engine, "_step", engine.Engine._step)
        done = train(tiny_config, tmp_path / "run")
    assert done.exit_code == 1 and "rollout.cache_mib" in done.stderr and "Traceback" not in done.output
    again = lite("train", "--resume", tmp_path / "run")
    assert again.exit_code == 0, again.output
    for name, tensor in tensors(undisturbed).items():
        assert torch.equal(tensors(tmp_path / "run")[name], tensor)


def test_a_model_that_our_engine_does_not_fit_is_planned_checked_and_trained(tmp_path):
    """Bloom has an attention of its own, which ours cannot replace: the plain path trains it, and the plan says so."""
    from transformers import BloomConfig, BloomForCausalLM, GenerationConfig

    from tests.tiny import END, PAD, VOCABULARY, tiny_tokenizer

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY}
    model = BloomForCausalLM(BloomConfig(**sizes, eos_token_id=END, pad_token_id=PAD, bos_token_id=None))
    model.generation_config = GenerationConfig(eos_token_id=[END], pad_token_id=PAD)
    model.save_pretrained(tmp_path / "bloom")
    tiny_tokenizer().save_pretrained(tmp_path / "bloom")
    (tmp_path / "data.jsonl").write_text("".join(f'{{"prompt": "{i} + 1", "answer": "{i + 1}"}}\n' for i in range(6)))
    options = [f"model.name={tmp_path / 'bloom'}", f"data.source={tmp_path / 'data.jsonl'}", "rollout.max_new_tokens=4"]
    options += ["train.steps=1", "train.preflight=false", "eval.rows=0", "rollout.group_size=2"]
    settings = [word for option in options for word in ("--set", option)]
    checked = lite("check", "memory", *settings)
    assert checked.exit_code == 0 and "generate" in checked.stdout, checked.output
    trained = lite("train", "--output", tmp_path / "run", "--plain", *settings)
    assert trained.exit_code == 0 and "bloom" in trained.stderr, trained.output
    assert len(logged(tmp_path / "run")) == 1


def test_limits_that_memory_lowered_fall_away_when_an_option_that_bears_on_memory_changes(tiny_config, tmp_path):
    from lite_trgrpo.model.oom import Limits

    train(tiny_config, tmp_path / "run", "train.micro_batch_tokens=64")
    state_file = max((tmp_path / "run" / "checkpoints").glob("step-*")) / "state.json"
    saved = json.loads(state_file.read_text())["limits"]
    lowered = {**saved, "tokens": 16, "rows": 2}
    same = Limits(64, 128, saved["options"])
    raised = Limits(4096, 128, [4096, *saved["options"][1:]])
    same.resume(lowered)
    raised.resume(lowered)
    assert (same.tokens, same.rows) == (16, 2)
    assert (raised.tokens, raised.rows) == (4096, 128)
    assert Run.existing(tmp_path / "run").metrics()
