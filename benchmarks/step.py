"""A whole GRPO step beside TRL's GRPOTrainer, and what each part of the update brings.

    python benchmarks/step.py > benchmarks/step.txt        (--quick: fp32, short prompts, one repetition)

SmolLM2-135M-Instruct, LoRA r = 16 on every linear layer, 2 prompts x 8 answers of exactly 64 tokens, rewards with
signal in every group, one update a step, AdamW. TRL runs with its own defaults (gradient checkpointing on); on CPU
log_softmax stands in for its Triton kernel. Sides take
turns; medians over steps after the first. Memory is the peak above the loaded model.
"""

import argparse
import functools
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from measure import Spent, demo_model, groups_of, middle, policy_for, questions, run_update, spent, trl_trainer, where

from lite_trgrpo.model.hf import TransformersPolicy
from lite_trgrpo.model.policy import sample_all
from lite_trgrpo.records import Prompt, Sampling
from lite_trgrpo.rollout.attention import Packed

PROMPTS, GROUP, TOKENS = 2, 8, 64
KINDS = {"fp32": {"dtype": "float32"}, "bf16": {"dtype": "bfloat16"}}


def our_step(policy: TransformersPolicy, prompts: list[str]) -> Callable[[], tuple[Spent, Spent]]:
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-5)
    encoded = [policy.encode(prompt) for prompt in prompts]
    budget = micro_batch(encoded)

    def step() -> tuple[Spent, Spent]:
        with spent() as rollout:
            answers = sample_all(policy, encoded, Sampling(GROUP, TOKENS, key=(int(time.time()),)))
        with spent() as updating:
            run_update(policy, optimizer, groups_of(encoded, answers), TOKENS, budget)
        return rollout, updating

    return step


def micro_batch(prompts: list[Prompt]) -> int:
    """Tokens of a group: the smallest micro-batch that reads no prompt twice."""
    return max(len(prompt.ids) for prompt in prompts) + GROUP * TOKENS


class TrlSteps:
    """TRL's trainer, one step at a time: the rollout is its generation, the update all the rest."""

    def __init__(self, policy: TransformersPolicy, kind: dict[str, Any], prompts: list[str], steps: int) -> None:
        self.trainer = trl_trainer(
            policy, demo_model(**kind), GROUP, TOKENS, prompts=prompts, max_steps=steps,
            generation_kwargs={"min_new_tokens": TOKENS},
        )  # fmt: skip
        self.generation, self.steps = 0.0, []
        single_turn, training_step = self.trainer._generate_single_turn, self.trainer.training_step
        self.trainer._generate_single_turn = self._timed_generation(single_turn)
        self.trainer.training_step = self._timed_step(training_step)

    def _timed_generation(self, function: Callable) -> Callable:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            self.generation += time.perf_counter() - started
            return result

        return timed

    def _timed_step(self, function: Callable) -> Callable:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.generation = 0.0
            with spent() as whole:
                result = function(*args, **kwargs)
            self.steps.append((Spent(self.generation, whole.mib), Spent(whole.seconds - self.generation, whole.mib)))
            return result

        return timed

    def run(self) -> list[tuple[Spent, Spent]]:
        self.trainer.train()
        return self.steps


def compare(name: str, kind: dict[str, Any], long: bool, repetitions: int) -> None:
    prompts = questions(PROMPTS, long)
    policy = policy_for(**kind)
    policy.end_ids = frozenset()  # every answer has TOKENS tokens, on both sides
    step = our_step(policy, prompts)
    step()  # warm up
    ours, theirs = [], []
    for _ in range(repetitions):
        ours.append(step())
        theirs += TrlSteps(policy, kind, prompts, 1 if long else 2).run()[-1:]
        ours.append(step())
    rows = []
    for side, found in (("ours", ours), ("TRL", theirs)):
        rollout, updating = middle([r for r, _ in found]), middle([u for _, u in found])
        peak = max(rollout.mib, updating.mib)
        rows.append((rollout.seconds, updating.seconds, rollout.seconds + updating.seconds, peak))
        print(
            f"{name}  prompts of {len(policy.encode(prompts[0]).ids):3}  {side:5} rollout {rollout.seconds:6.1f} s  "
            f"update {updating.seconds:6.1f} s  step {rows[-1][2]:6.1f} s  peak {peak:6.0f} MiB",
            flush=True,
        )
    rollout, updating, whole, peak = (theirs_ / ours_ for ours_, theirs_ in zip(*rows, strict=True))
    print(
        f"{'':26} TRL / ours: rollout x{rollout:.1f}, update x{updating:.1f}, step x{whole:.1f}, peak x{peak:.1f}\n",
        flush=True,
    )


def ablation(long: bool, kind: dict[str, Any], repetitions: int) -> None:
    """The update alone, one part after the other; the last line is the product."""
    prompts = questions(PROMPTS, long)
    policy = policy_for(**kind)
    policy.end_ids = frozenset()
    encoded = [policy.encode(prompt) for prompt in prompts]
    budget = micro_batch(encoded)
    groups = groups_of(encoded, sample_all(policy, encoded, Sampling(GROUP, TOKENS)))
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-5)
    network = policy.network
    merged, head = network.packed_hidden, network.selected_logprobs

    def alone(rows: Any) -> Any:
        """Packed, but every answer with its own copy of the prompt."""
        groups = Packed([(len(p), [max(0, len(c) - 1)]) for p, c in rows], policy.device)
        ids = torch.tensor([[i for p, c in rows for i in (*p, *c[:-1])]], device=policy.device)
        hidden = network.hidden(ids, groups.positions, groups)[0]
        return torch.cat([hidden[span.start + span.prompt - 1 : span.stop] for span in groups.spans])

    def whole(hidden: Any, ids: Any, head: Any, temperature: float) -> Any:
        """[N, V] kept for backward."""
        logprobs = torch.log_softmax(head(hidden) / temperature, -1)
        entropy = -(logprobs.detach().exp() * logprobs.detach()).sum(-1)
        return logprobs.gather(-1, ids.unsqueeze(-1)).squeeze(-1), entropy

    lean = {layer: vars(layer)["forward"] for layer in policy.model.modules() if "forward" in vars(layer)}
    parts = {
        "padded, all logits kept": (False, merged, whole),
        "+ logits in chunks, once": (False, merged, head),
        "+ packed without padding": (True, alone, head),
        "+ prompt shared": (True, merged, head),
        "+ our LoRA product": (True, merged, head),
        "+ gradient checkpointing": (True, merged, head),
    }
    found: dict[str, list[Spent]] = {name: [] for name in parts}
    network._base.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    for _ in range(repetitions):
        for name, (network.by_groups, network.packed_hidden, network.selected_logprobs) in parts.items():
            for layer, forward in lean.items():
                layer.forward = forward if list(parts).index(name) >= 4 else forward.args[1]
            network.gradient_checkpointing = name == "+ gradient checkpointing"
            with spent() as used:
                run_update(policy, optimizer, groups, TOKENS, budget)
            found[name].append(used)
    print(f"update alone, micro-batches of {budget} tokens, prompts of {len(encoded[0].ids)}")
    for name, runs in found.items():
        print(
            f"  {name:28} {median(run.seconds for run in runs):6.1f} s  {median(run.mib for run in runs):6.0f} MiB",
            flush=True,
        )
    print()


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--quick", action="store_true")
    quick = arguments.parse_args().quick
    print(f"{where()}\n")
    for long in (False,) if quick else (False, True):
        for name, kind in list(KINDS.items())[: 1 if quick else 2]:
            compare(name, kind, long, 1)
        ablation(long, KINDS["fp32"], 1)


if __name__ == "__main__":
    main()
