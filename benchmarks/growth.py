"""Growth of the update's memory and time, and the plan beside what was measured.

    python benchmarks/growth.py > benchmarks/growth.txt        (CPU; 15 minutes)

First a random Qwen2 of 4 layers: tokens an answer, then words in the vocabulary. `planned` comes from plan.py, which
has seen no data; `tensors` is the most bytes of tensors alive at once in a real update, weights not counted (MiB).
Then whole steps of SmolLM2-135M, each in a process of its own, beside what `lite-trgrpo check` says: the tensors alive
at once, and the peak of resident memory, in which the libraries are.
"""

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import psutil
import torch
from measure import groups_of, policy_for, questions, run_update, spent, where
from transformers import Qwen2Config, Qwen2ForCausalLM

from lite_trgrpo.check import memory as memory_check
from lite_trgrpo.check.plan import LiveBytes, plan
from lite_trgrpo.config import loading
from lite_trgrpo.model.hf import template_at_hand
from lite_trgrpo.model.lora import add_lora, prepare
from lite_trgrpo.model.network import Network
from lite_trgrpo.model.policy import sample_all
from lite_trgrpo.records import Sampling

MIB, PROMPT, ANSWERS = 2**20, 64, 2
SETTINGS: dict[str, dict[str, Any]] = {
    "fp32, G = 8, T = 64": {},
    "fp32, G = 16, T = 64": {"rollout.group_size": 16},
    "fp32, G = 8, T = 256": {"rollout.max_new_tokens": 256},
    "fp32, G = 8, T = 256, gradient checkpointing": {
        "rollout.max_new_tokens": 256, "train.gradient_checkpointing": True
    },
    "bf16, G = 8, T = 256": {"model.dtype": "bfloat16", "rollout.max_new_tokens": 256},
    "nf4, G = 8, T = 128": {"model.quantization": "nf4", "rollout.max_new_tokens": 128},
}  # fmt: skip


def grown(tokens: int, vocabulary: int) -> None:
    shape = Qwen2Config(
        hidden_size=256, num_hidden_layers=4, intermediate_size=1024, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=vocabulary, tie_word_embeddings=True, max_position_embeddings=8192,
    )  # fmt: skip
    changes = {
        "rollout.group_size": ANSWERS, "rollout.max_new_tokens": tokens, "train.prompts_per_step": 1,
        "train.micro_batch_tokens": PROMPT + ANSWERS * tokens, "model.dtype": "float32",
    }  # fmt: skip
    config = loading.load("demo", named=changes)
    planned = plan(config, shape, torch.float32, PROMPT).update
    model = add_lora(Qwen2ForCausalLM(shape), config.model)
    prepare(model)
    network = Network(model, 0, False)
    rows = [((5,) * PROMPT, tuple(range(7, 7 + tokens)))] * ANSWERS
    gradients = 4 * sum(p.numel() for p in network.trainable().values())

    def work() -> float:
        started = time.perf_counter()
        network.logprobs(rows, 1.0)[0].sum().backward()
        model.zero_grad()
        return time.perf_counter() - started

    work()
    found: dict[str, int] = {}
    with LiveBytes() as memory:
        for tensor in (*model.parameters(), *model.buffers()):
            memory.add(tensor)  # else a view of a weight counts as new
        with memory.above(found, "update"):
            work()
    seconds = sorted(work() for _ in range(3))[1]
    logits = 2 * 4 * vocabulary * min(256, ANSWERS * tokens)
    print(
        f"T = {tokens:5}  V = {vocabulary:7,}   planned {planned / MIB:7.1f}  tensors "
        f"{(found['update'] - gradients) / MIB:7.1f}  of that logits {logits / MIB:6.1f}   {seconds:6.2f} s  "
        f"{1e6 * seconds / (PROMPT + ANSWERS * tokens):5.0f} us a token",
        flush=True,
    )


def one(name: str) -> None:
    """A whole step: every answer of full length, as the plan assumes."""
    prompts = questions(2, False)
    template = template_at_hand(loading.load("demo").model)
    longest = max(len(template.encode(prompt).ids) for prompt in prompts)
    settings = {"train.prompts_per_step": 2, "data.max_prompt_tokens": longest, **SETTINGS[name]}
    config = loading.load("demo", named=settings)
    planned, _ = memory_check.check_memory(config, None)
    policy = policy_for(
        gradient_checkpointing=config.train.gradient_checkpointing,
        **{key: getattr(config.model, key) for key in ("dtype", "quantization")},
    )
    policy.end_ids = frozenset()
    encoded = [policy.encode(prompt) for prompt in prompts]
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-5)
    tokens, members = config.rollout.max_new_tokens, config.rollout.group_size
    held = psutil.Process().memory_info().rss

    def step(number: int) -> None:
        answers = sample_all(policy, encoded, Sampling(members, tokens, key=(number,)))
        run_update(policy, optimizer, groups_of(encoded, answers), tokens, config.train.micro_batch_tokens)

    with spent() as used:
        step(0)
        step(1)  # Adam's state is there from now on
    resident = held + used.mib * MIB
    with LiveBytes() as memory:
        for tensor in (*policy.model.parameters(), *policy.model.buffers(), *states(optimizer)):
            memory.add(tensor)
        step(2)
    tensors = planned["peak"] - planned["parts"]["overhead"]
    print(
        f"{name:46} tensors: plan {tensors / MIB:6.0f} MiB, measured {memory.peak / MIB:6.0f}, "
        f"{tensors / memory.peak - 1:+.0%}   resident: plan {planned['peak'] / MIB:6.0f} MiB, measured "
        f"{resident / MIB:6.0f}, {planned['peak'] / resident - 1:+.0%}"
    )


def states(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--one")
    if name := arguments.parse_args().one:
        one(json.loads(name))
        return
    print(f"{where()}\n", flush=True)
    for tokens in (128, 256, 512, 1024, 2048, 4096):
        grown(tokens, 32_000)
    for vocabulary in (32_000, 64_000, 128_000, 152_000):
        grown(512, vocabulary)
    print("\nwhole steps of SmolLM2-135M, 2 prompts, beside what `lite-trgrpo check` says", flush=True)
    for name in SETTINGS:
        subprocess.run([sys.executable, __file__, "--one", json.dumps(name)], check=True)


if __name__ == "__main__":
    main()
