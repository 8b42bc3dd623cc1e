"""TRGRPOTrainer: two processes equal one, and both equal our own loop; the recipe for verl."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("trl", reason="trl, whose trainer this builds on, is not installed (extra: trl)")

from lite_trgrpo.build import scoring_of
from lite_trgrpo.config import loading
from lite_trgrpo.data.examples import load_examples
from lite_trgrpo.errors import ConfigError
from lite_trgrpo.model import hf
from lite_trgrpo.model.oom import Limits
from lite_trgrpo.records import Completion, Group
from lite_trgrpo.training.update import prepare_rows, update
from tests.tiny import tiny_model_folder
from tests.trl_worker import CASES, LONGEST, MEMBERS, answers

ROOT = Path(__file__).resolve().parents[1]
REWARD = """def odd(completion_ids, **_):
    return [None if sum(ids) % 5 == 0 else float(sum(ids) % 3) for ids in completion_ids]
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    """Three prompts of four answers: two processes of six rows each, so the second group is cut through.

    The adapter is one that has been trained, so that policy and base differ.
    """
    folder = tmp_path_factory.mktemp("scale-out")
    model = tiny_model_folder(folder / "model")
    (folder / "data.jsonl").write_text("".join(f'{{"prompt": "{i} + 1", "answer": "{i + 1}"}}\n' for i in range(3)))
    (folder / "reward.py").write_text(REWARD)
    file = folder / "run.toml"
    file.write_text(
        f'[model]\nname = "{model}"\nlora_rank = 4\ndevice = "cpu"\n[data]\nsource = "{folder / "data.jsonl"}"\n'
        f'max_prompt_tokens = 64\n[rewards]\nfunctions = {{ "{folder / "reward.py"}:odd" = 1.0 }}\n'
        f"[rollout]\ngroup_size = {MEMBERS}\nmax_new_tokens = {LONGEST}\n[eval]\nrows = 0\n"
        "[train]\nsteps = 1\nprompts_per_step = 3\nlearning_rate = 0.05\n"
    )
    hf.load(loading.load(file=file).model, seed=0).save_adapter(folder / "adapter")
    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    noise = torch.Generator().manual_seed(1)
    for name, weight in weights.items():
        weight += 0.05 * torch.randn(weight.shape, generator=noise) * ("lora_B" in name)
    save_file(weights, folder / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    file.write_text(file.read_text().replace("lora_rank = 4", f'adapter = "{folder / "adapter"}"'))
    return file


@pytest.fixture(scope="module")
def trained(config_file, tmp_path_factory):
    """Number of processes -> the folder that its workers wrote."""
    found = {}
    for processes in (1, 2):
        found[processes] = output = tmp_path_factory.mktemp(f"processes-{processes}")
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        done = subprocess.run(
            [sys.executable, *launch, "-m", "tests.trl_worker", str(config_file), str(output)], cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"},
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
    return found


def ours(file, settings):
    """Losses and gradients of each update in our own loop, on the same answers."""
    config = loading.load(file=file, overrides=settings)
    policy = hf.load(config.model, seed=config.train.seed)
    groups = []
    for example in load_examples(config.data, 0)[0]:
        prompt = policy.encode(example.prompt)
        rows = [(prompt.ids, tuple(ids)) for ids in answers(prompt.text)]
        with torch.no_grad():
            logprobs, _ = policy.logprobs(rows, config.rollout.temperature)
        made = [
            Completion(ids, (True,) * len(ids), tuple(logprobs[i, : len(ids)].tolist()), policy.decode(ids),
                       ids[-1] in policy.end_ids)
            for i, (_, ids) in enumerate(rows)
        ]  # fmt: skip
        groups.append(Group(example, prompt, made))
    with scoring_of(config) as scoring:
        groups = scoring.score(groups)
    gradients = {}
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=config.train.learning_rate)

    def record(*_):
        number = len(gradients) // len(policy.trainable())
        gradients.update({f"{number}/{name}": p.grad.clone() for name, p in policy.trainable().items()})

    optimizer.register_step_pre_hook(record)
    statistics = update(
        policy, optimizer, prepare_rows(groups, config.objective, LONGEST), config.objective,
        temperature=config.rollout.temperature, updates=config.train.updates_per_batch, limits=Limits(10**6, 64),
        max_grad_norm=float("inf"),
    )  # fmt: skip
    return statistics["loss"], gradients, groups


def distance(one, other):
    """Relative, all gradients of all updates in one vector."""
    assert one.keys() == other.keys()
    vectors = [torch.cat([gradients[name].flatten().double() for name in sorted(one)]) for gradients in (one, other)]
    assert vectors[1].norm() > 1e-3
    return ((vectors[0] - vectors[1]).norm() / vectors[1].norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one_and_our_own_loop(trained, config_file, case):
    loss, gradients, groups = ours(config_file, CASES[case])
    rewards = [reward for group in groups for reward in group.rewards]
    assert any(reward != reward for reward in rewards) and len(set(rewards)) > 2  # some cannot be graded
    for processes, folder in trained.items():
        for rank in range(processes):
            losses = json.loads((folder / f"losses-{rank}.json").read_text())[case]
            assert sum(losses) / len(losses) == pytest.approx(loss, rel=1e-4, abs=1e-6)
            assert distance(load_file(folder / f"{case}-{rank}.safetensors"), gradients) < 1e-4
    one, two = (load_file(trained[n] / f"{case}-0.safetensors") for n in (1, 2))
    assert distance(two, one) < 1e-4


@pytest.mark.slow
def test_it_samples_scores_logs_and_saves(trained, config_file):
    for folder in trained.values():
        [step] = [line for line in json.loads((folder / "sampled" / "log.json").read_text()) if "loss" in line]
        assert 1.0 <= step["weight_mean"] <= 1.4 and 0 < step["prob_mean"] < 1 and step["clip_fraction"] == 0
        assert 0 <= step["solved"] <= 1 and any(name.startswith("reward/") for name in step)
        before = load_file(config_file.parent / "adapter" / "adapter_model.safetensors")
        after = load_file(folder / "sampled" / "adapter" / "adapter_model.safetensors")
        assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)


def test_what_the_objective_decides_is_refused_in_trls_options(tmp_path):
    from trl import GRPOConfig

    from lite_trgrpo.integrations.trl import TRGRPOTrainer

    arguments = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", epsilon_high=0.28)
    with pytest.raises(ConfigError, match=r"epsilon_high.*objective"):
        TRGRPOTrainer("no/model", [len], args=arguments)


def test_answers_that_processes_cannot_share_are_refused(config_file, tmp_path, monkeypatch):
    from lite_trgrpo.integrations.trl import trl_arguments

    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(ConfigError, match=r"\b3\b.*rollout\.group_size.*\b4\b.*\b5\b"):
        trl_arguments(loading.load(file=config_file), tmp_path, torch.device("cpu"))


def test_a_preset_becomes_trls_options(tmp_path):
    """8 x 8 answers; 2048 tokens hold two rows of 300 + 512, and 32 micro-batches of two rows are a step."""
    from lite_trgrpo.integrations.trl import trl_arguments

    made = trl_arguments(loading.load("math-1.5b"), tmp_path, torch.device("cpu"))
    assert (made.per_device_train_batch_size, made.gradient_accumulation_steps) == (2, 32)
    assert made.generation_batch_size == 64 and made.num_generations == 8 and made.max_steps == 200
