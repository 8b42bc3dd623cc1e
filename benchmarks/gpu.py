"""What a card must show of memory and speed: the plan against measured peaks, sampling and update beside TRL.

    benchmarks/gpu.sh               the tests on the card, then this, in one go, under 9 minutes, nothing to download
    python benchmarks/gpu.py        this alone; --tiny: two-layer models, a minute, also on a CPU to see that it works

Models have random weights and the shapes of Qwen2.5; prompts are as long as the preset allows, and answers of 256
tokens hardly ever end before, so every row is at its longest: the worst case, which the plan is for. Ends with 1 where
a peak is above its plan.
"""

import argparse
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from measure import PACKAGES, Spent, demo_model, spent

from lite_trgrpo.check.plan import Plan, plan
from lite_trgrpo.config import loading
from lite_trgrpo.config.schema import Config
from lite_trgrpo.model.hf import TransformersPolicy, load, tokenizer_of
from lite_trgrpo.model.loading import load_config
from lite_trgrpo.model.oom import Limits, free
from lite_trgrpo.model.policy import sample_all
from lite_trgrpo.records import Example, Group, Prompt, Sampling
from lite_trgrpo.training.optimizer import make_optimizer
from lite_trgrpo.training.update import prepare_rows, update

# preset -> hidden, intermediate, layers, heads, key-value heads: Qwen2.5's
SHAPES = {"math-0.5b": (896, 4864, 24, 14, 2), "math-1.5b": (1536, 8960, 28, 12, 2)}
CASES = [("math-0.5b", "nf4"), ("math-1.5b", "nf4"), ("math-1.5b", "none")]
CACHE_MIB = 1024
SLACK = 1.05  # buffers inside kernels and the allocator's rounding, which no plan sees


def random_model(folder: Path, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Path:
    """A Qwen2.5 of random weights with the demo's tokenizer, as an ordinary folder."""
    from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config

    _, template = tokenizer_of(demo_model())
    hidden, inner, layers, heads, shared = shape
    shape_config = Qwen2Config(
        vocab_size=151936, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=shared, max_position_embeddings=32768, rope_theta=1e6,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=template.tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape_config, dtype=dtype)
    model.generation_config = GenerationConfig(eos_token_id=template.tokenizer.eos_token_id)
    model.save_pretrained(folder)
    template.tokenizer.save_pretrained(folder)
    return folder


def settings(preset: str, quantization: str, folder: Path, tiny: bool) -> Config:
    size = ["rollout.max_new_tokens=256"]  # half of the preset's, for the time it takes
    if tiny:
        size = ["rollout.max_new_tokens=24", "data.max_prompt_tokens=32", "train.prompts_per_step=2"]
    given = [f"model.name={folder}", f"model.quantization={quantization}", f"rollout.cache_mib={CACHE_MIB}", *size]
    return loading.load(preset, overrides=given)


def worst_prompts(config: Config, policy: TransformersPolicy) -> list[Prompt]:
    draw = torch.Generator().manual_seed(1)
    shape = (config.train.prompts_per_step, config.data.max_prompt_tokens)
    ids = torch.randint(100, 40000, shape, generator=draw)
    return [Prompt(tuple(row), "") for row in ids.tolist()]


def run(config: Config, policy: TransformersPolicy) -> dict[str, Any]:
    """One whole step of the preset: sampling, then the update, each with its peak."""
    prompts, cap = worst_prompts(config, policy), config.rollout.max_new_tokens
    optimizer = make_optimizer(list(policy.trainable().values()), config.train)
    sampling = Sampling(config.rollout.group_size, cap, **config.rollout.decoding())
    with spent() as rollout:
        answers = sample_all(policy, prompts, sampling)
    rewards = tuple(float(i % 3) for i in range(config.rollout.group_size))
    groups = [Group(Example("", {}, ""), p, a, rewards) for p, a in zip(prompts, answers, strict=True)]
    limits = Limits(config.train.micro_batch_tokens, sampling.max_rows)
    with spent() as updating:
        found = update(
            policy, optimizer, prepare_rows(groups, config.objective, cap), config.objective, temperature=1.0,
            updates=1, limits=limits, max_grad_norm=1.0,
        )  # fmt: skip
    tokens = sum(len(answer.ids) for group in answers for answer in group)
    return {"tokens": tokens, "rollout": rollout, "update": updating, "gap": found["sampler_gap_mean"],
            "whole": limits.tokens == config.train.micro_batch_tokens}  # fmt: skip


def line(name: str, planned: Plan, base: float, found: dict[str, Any]) -> tuple[str, bool]:
    """base: MiB that the loaded model holds. -> a row of the table, and whether every peak is below its plan."""
    rollout: Spent = found["rollout"]
    updating: Spent = found["update"]
    weights = planned.weights / 2**20
    pairs = [
        (weights + planned.adapter / 2**20, base),
        ((planned.weights + planned.adapter + planned.cache + planned.rollout) / 2**20, base + rollout.mib),
        ((planned.weights + planned.adapter + planned.update) / 2**20, base + updating.mib),
    ]
    cells = [f"{plan_mib:,.0f} / {measured:,.0f}" for plan_mib, measured in pairs]
    fits = all(measured <= SLACK * plan_mib for plan_mib, measured in pairs) and found["whole"]
    speed = f"{found['tokens'] / rollout.seconds:,.0f} | {updating.seconds:.1f} | {found['gap']:.4f}"
    verdict = "yes" if fits else "NO" if torch.cuda.is_available() else "-"  # a process on the CPU holds libraries too
    return f"| {name} | {' | '.join(cells)} | {speed} | {verdict} |", fits


def card() -> str:
    """The card, its driver's CUDA, and versions."""
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    if not torch.cuda.is_available():
        return f"CPU (this shows only that the script works), {versions}"
    total = torch.cuda.mem_get_info()[1] / 2**30
    return f"{torch.cuda.get_device_name()}, {total:.0f} GB, CUDA {torch.version.cuda}, {versions}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="two small layers")
    tiny = parser.parse_args().tiny
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cpu" or torch.cuda.is_bf16_supported(False) else torch.float16
    if device == "cpu" and not tiny:
        print("no card that torch can use; see what would run with --tiny", file=sys.stderr)
        return 2
    print(f"{card()}\n\nMiB, planned / measured\n")
    print("| preset | model | sampling | update | tokens/s | update (s) | sampler gap | within the plan |")
    print("|---|---|---|---|---|---|---|---|")
    good = True
    for preset, quantization in CASES:
        with tempfile.TemporaryDirectory() as folder:
            shape = (128, 256, 2, 2, 2) if tiny else SHAPES[preset]
            config = settings(preset, quantization, random_model(Path(folder), shape, dtype, device), tiny)
            with spent() as loading:
                policy = load(config.model, seed=0, gradient_checkpointing=config.train.gradient_checkpointing)
            base = loading.mib if device == "cpu" else torch.cuda.memory_allocated() / 2**20
            planned = plan(config, load_config(config.model), policy.dtype, config.data.max_prompt_tokens)
            row, fits = line(f"{preset}, {quantization}", planned, base, run(config, policy))
            print(row, flush=True)
            good &= fits
            del policy
            free()
    if device == "cuda":
        print(json.dumps({"reserved_mib": torch.cuda.max_memory_reserved() / 2**20}), file=sys.stderr)
    return 0 if good or device == "cpu" else 1


if __name__ == "__main__":
    sys.exit(main())
