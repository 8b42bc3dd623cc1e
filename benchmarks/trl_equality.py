"""Is our update TRL's, where the two are meant to agree?

    python benchmarks/trl_equality.py          the demo model, a quarter of an hour on one core
    python benchmarks/trl_equality.py --tiny   a random model, half a minute

Both sides get the same base model, LoRA weights, prompts, completions and rewards, in fp32 on the CPU, with
token weights of 1. TRL's side is its own GRPOTrainer from the completions on: padding, advantages, old and
reference log-probabilities, loss. Ours is `prepare_rows` and `update` at several micro-batch sizes. Compared
are advantages, loss and all LoRA gradients: |ours - TRL's| / |TRL's|. A group's advantages sum to 0, so the loss is
a difference of nearly equal sums (exactly 0 for grpo at ratio 1): its error is taken relative to the size of its terms,
mean |A|. Ends with 1 if any exceeds 1e-4.

A case with two updates moves the weights between them, the same way on both sides: the second update's ratios
differ from 1 and some are clipped. Completions are ragged, some a single token, some cut off; one group's
rewards are equal, which our side leaves out when beta = 0.

Two things of TRL are changed: `use_bias_correction_kl` is off, since it multiplies the KL term by the ratio,
which GRPO and TR-GRPO do not; and its log-probability kernel, which needs Triton and a card, gives way to
log_softmax. With Triton installed, TRITON_INTERPRET=1 runs that kernel on the CPU, a little slower.
"""

import argparse
import datetime
import importlib.metadata
import itertools
import os
import platform
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import utils as trl_utils

from lite_trgrpo.config import loading
from lite_trgrpo.config.schema import Model, Objective
from lite_trgrpo.model.hf import TransformersPolicy, load
from lite_trgrpo.model.oom import Limits
from lite_trgrpo.model.policy import sample_all
from lite_trgrpo.objective import group_advantages
from lite_trgrpo.records import Completion, Example, Group, Sampling
from lite_trgrpo.training.update import prepare_rows, update

LIMIT = 1e-4
OWN_KERNEL = trl_utils._ChunkedLogProbFunction is not None and os.environ.get("TRITON_INTERPRET") == "1"
MAX_NEW_TOKENS = 16
LENGTHS = [(16, 1, 5, 11), (7, 16, 2, 1), (1, 9, 16, 3)]  # [P][G], where no end token comes before
REWARDS = [(1.0, 0.0, 0.0, 1.0), (1.0, 1.0, 1.0, 1.0), (0.25, 1.5, -0.5, 0.25)]
PROMPTS = ["What is 48 + 27?", "Name a colour.", "Is it true that every prime number above two is odd? Why?"]
# TRL's loss -> our aggregation, our advantage, TRL's scale_rewards
SAME = {"grpo": ("sequence", "grpo", "group"), "dapo": ("token", "grpo", "group")}
SAME["dr_grpo"] = ("constant", "dr-grpo", "none")
Weights = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Case:
    loss: str
    temperature: float
    beta: float
    updates: int

    def __str__(self) -> str:
        return f"{self.loss:8}{self.temperature:<6}{self.beta:<6}{self.updates}"


CASES = [Case(*values) for values in itertools.product(SAME, (1.0, 0.7), (0.0, 0.04), (1, 2))]


@dataclass(frozen=True, slots=True)
class Setting:
    """What both sides are given."""

    policy: TransformersPolicy
    options: Model
    groups: list[Group]
    weights: list[Weights]  # before the first update, and after it
    budgets: Sequence[int]  # padded tokens of our micro-batches; 1 means one row each


@dataclass(frozen=True, slots=True)
class Outcome:
    advantages: Tensor  # [B]
    loss: float  # mean over the updates
    gradients: list[Tensor]  # of every update, all LoRA gradients in one vector
    clipped: float = 0.0  # share of tokens, mean over the updates


def setting(options: Model, budgets: Sequence[int]) -> Setting:
    policy = load(options, seed=0)
    generator = torch.Generator().manual_seed(1)
    first, second = {}, {}
    for name, parameter in policy.trainable().items():
        noise = torch.randn(2, *parameter.shape, generator=generator)
        is_b = "lora_B" in name  # as made it is 0: A would get no gradient, and policy = reference
        first[name] = 0.02 * noise[0] if is_b else parameter.detach().clone()
        second[name] = first[name] + (0.01 if is_b else 0.001) * noise[1]
    put(policy.trainable(), first)
    return Setting(policy, options, make_groups(policy), [first, second], budgets)


def make_groups(policy: TransformersPolicy) -> list[Group]:
    """Sampled answers, cut to LENGTHS; every other one ends with the end token."""
    prompts = [policy.encode(text) for text in PROMPTS]
    groups = []
    sampled = sample_all(policy, prompts, Sampling(len(LENGTHS[0]), MAX_NEW_TOKENS))
    for prompt, answers, lengths, rewards in zip(prompts, sampled, LENGTHS, REWARDS, strict=True):
        cut = [answer.ids[:length] for answer, length in zip(answers, lengths, strict=True)]
        cut[1::2] = [(*ids[:-1], min(policy.end_ids)) for ids in cut[1::2]]
        # the sampler's log-probabilities are for statistics alone
        made = [Completion(c, (True,) * len(c), (0.0,) * len(c), "", c[-1] in policy.end_ids) for c in cut]
        groups.append(Group(Example(prompt.text, {}, "here"), prompt, made, rewards))
    return groups


@torch.no_grad()
def put(parameters: Weights, weights: Weights) -> None:
    assert parameters.keys() == weights.keys(), "the two sides name their LoRA weights differently"
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])


def gradient(parameters: Weights) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in parameters.values()]).double()


def our_side(given: Setting, case: Case, token_budget: int) -> Outcome:
    aggregation, estimator, _ = SAME[case.loss]
    objective = Objective(weights="none", aggregation=aggregation, advantage=estimator, beta=case.beta)
    parameters = given.policy.trainable()
    put(parameters, given.weights[0])
    gradients: list[Tensor] = []
    recorder = torch.optim.SGD(parameters.values(), lr=0.0)
    recorder.register_step_pre_hook(lambda *_: gradients.append(gradient(parameters)))
    recorder.register_step_post_hook(lambda *_: put(parameters, given.weights[1]))
    statistics = update(
        given.policy, recorder, prepare_rows(given.groups, objective, MAX_NEW_TOKENS), objective,
        temperature=case.temperature, updates=case.updates, limits=Limits(token_budget, 64),
        max_grad_norm=float("inf"),
    )  # fmt: skip
    advantages = group_advantages(torch.tensor(REWARDS, dtype=torch.float64), estimator=estimator).flatten()
    return Outcome(advantages, statistics["loss"], gradients, statistics["clip_fraction"])


def trl_side(given: Setting, case: Case) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(given, case, folder)
    parameters = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    put(parameters, given.weights[0])
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # its training loop would set it
    rows = [{"prompt": group.prompt.text} for group in given.groups for _ in group.completions]
    losses, gradients = [], []
    kernel = trl_utils._ChunkedLogProbFunction if OWN_KERNEL else SimpleNamespace(apply=plain_logprobs)
    with mock.patch.object(trl_utils, "_ChunkedLogProbFunction", kernel):
        inputs = trainer._generate_and_score_completions(rows)
        for _ in range(case.updates):
            trainer.model.zero_grad()
            loss = trainer.compute_loss(trainer.model, inputs)
            loss.backward()
            losses.append(loss.item())
            gradients.append(gradient(parameters))
            put(parameters, given.weights[1])
    return Outcome(inputs["advantages"], sum(losses) / len(losses), gradients)


def trl_trainer(given: Setting, case: Case, folder: str) -> Any:
    """A GRPOTrainer that is handed our completions and rewards; it computes the rest."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # it warns that rollout_func may change
    rows = [(group.prompt, completion) for group in given.groups for completion in group.completions]
    played_back = {
        "prompt_ids": [list(prompt.ids) for prompt, _ in rows],
        "completion_ids": [list(completion.ids) for _, completion in rows],
        "logprobs": [list(completion.logprobs) for _, completion in rows],  # asked for, not used
    }
    rank, alpha = given.options.lora_rank, given.options.lora_alpha
    arguments = GRPOConfig(
        folder, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", disable_tqdm=True,
        per_device_train_batch_size=len(rows), num_generations=len(LENGTHS[0]), num_iterations=case.updates,
        max_completion_length=MAX_NEW_TOKENS, temperature=case.temperature, beta=case.beta,
        loss_type=case.loss, scale_rewards=SAME[case.loss][2], use_bias_correction_kl=False,
    )  # fmt: skip
    return GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(given.policy.located.folder, dtype=torch.float32),
        reward_funcs=lambda **_: [reward for rewards in REWARDS for reward in rewards],
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=given.policy.template.tokenizer,
        peft_config=LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM"),
        rollout_func=lambda prompts, trainer: played_back,
    )


def plain_logprobs(hidden, weight, bias, targets, temperature, _chunk, softcap, scale, _outputs):
    """Stands in for TRL's Triton kernel, whose arguments and results it has."""
    logits = nn.functional.linear(hidden, weight, bias) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logprobs = torch.log_softmax(logits / temperature, -1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropy, None, None, None


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def compare(given: Setting, case: Case) -> tuple[Outcome, Outcome, list[float]]:
    """Ours, TRL's, and the largest errors over micro-batch sizes and updates: advantages, loss, gradient."""
    theirs = trl_side(given, case)
    sides = [our_side(given, case, budget) for budget in given.budgets]
    size = theirs.advantages.abs().mean().item()
    gradients = [pair for ours in sides for pair in zip(ours.gradients, theirs.gradients, strict=True)]
    return sides[-1], theirs, [
        relative(sides[0].advantages, theirs.advantages),
        worst(abs(ours.loss - theirs.loss) / size for ours in sides),
        worst(relative(*pair) for pair in gradients),
    ]  # fmt: skip


def worst(errors: Iterable[float]) -> float:
    return torch.tensor(list(errors)).max().item()  # NaN, if there is one; Python's max may drop it


def report(given: Setting) -> int:
    """Print the table; 1 if anything exceeds the limit, else 0."""
    names = ["trl", "torch", "transformers", "peft", *(["triton"] if OWN_KERNEL else [])]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    print(f"{datetime.date.today()}, Python {platform.python_version()}, {versions}")
    kernel = "its own kernel, interpreted" if OWN_KERNEL else "log_softmax"
    print(f"TRL's log-probabilities: {kernel}; fp32, CPU")
    print(f"{given.options.upstream or 'tiny random model'}; micro-batches of up to {given.budgets} tokens\n")
    print("loss    temp. beta  updates  ours      TRL         error of: ", end="")
    print("advantages  loss      gradient  clipped")
    failed = 0
    for case in CASES:
        ours, theirs, errors = compare(given, case)
        verdict = "" if worst(errors) <= LIMIT else "  FAILED"
        cells = f"{errors[0]:<12.1e}{errors[1]:<10.1e}{errors[2]:<10.1e}{ours.clipped:.1%}{verdict}"
        print(f"{case!s:29}{ours.loss:<+10.6f}{theirs.loss:<+22.6f}{cells}", flush=True)
        failed += bool(verdict)
    print(f"\n{failed} of {len(CASES)} cases exceed {LIMIT}")
    return min(failed, 1)


def tiny(folder: Path) -> Setting:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests.tiny import tiny_model_folder

    options = Model(name=str(tiny_model_folder(folder)), device="cpu", dtype="float32", lora_rank=4)
    return setting(options, (1, 200, 10**6))


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare loss and LoRA gradients with TRL's GRPOTrainer.")
    parser.add_argument("--tiny", action="store_true", help="a random model of two layers, not the demo's")
    if parser.parse_args().tiny:
        with tempfile.TemporaryDirectory() as folder:
            return report(tiny(Path(folder)))
    options = loading.load("demo").model.model_copy(update={"device": "cpu", "dtype": "float32"})
    return report(setting(options, (1, 10**6)))


if __name__ == "__main__":
    sys.exit(main())
