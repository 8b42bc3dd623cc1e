"""What the benchmarks share: prompts, peak memory, TRL's trainer on the same model, the line that says where it ran."""

import contextlib
import ctypes
import gc
import platform
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import psutil
import torch

from lite_trgrpo.config import loading
from lite_trgrpo.config.schema import Model, Objective
from lite_trgrpo.model.hf import TransformersPolicy, load
from lite_trgrpo.model.oom import Limits
from lite_trgrpo.records import Completion, Example, Group
from lite_trgrpo.training.update import prepare_rows, update

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "trl")


def where() -> str:
    """Machine, versions, date."""
    cpu = Path("/proc/cpuinfo")
    names = [line for line in cpu.read_text().splitlines() if line.startswith("model name")] if cpu.exists() else []
    name = names[0].partition(": ")[2] if names else platform.processor()
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    card = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{date.today()}, {card}{torch.get_num_threads()} threads of {name}, {versions}"


@dataclass
class Spent:
    seconds: float = 0.0
    mib: float = 0.0
    """Peak of the process above what it held before (card: of the allocator)."""


@contextlib.contextmanager
def spent() -> Iterator[Spent]:
    """Time and peak memory of the block. On CPU the resident memory, looked at every 5 ms."""
    found, stop = Spent(), threading.Event()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        if sys.platform == "linux":
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # else memory that was freed hides what is taken again
        process = psutil.Process()
        before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.005):
            peak = max(peak, process.memory_info().rss)

    watcher = None if torch.cuda.is_available() else threading.Thread(target=watch, daemon=True)
    if watcher:
        watcher.start()
    started = time.perf_counter()
    yield found
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    found.seconds = time.perf_counter() - started
    stop.set()
    if watcher:
        watcher.join()
    found.mib = (peak - before) / 2**20


def middle(runs: list[Spent]) -> Spent:
    return Spent(median(run.seconds for run in runs), median(run.mib for run in runs))


def demo_model(**options: Any) -> Model:
    return loading.load("demo").model.model_copy(update=options)


def policy_for(gradient_checkpointing: bool = False, **options: Any) -> TransformersPolicy:
    """SmolLM2-135M-Instruct with LoRA on every linear layer; B is random, so that the adapter does something."""
    return with_random_b(load(demo_model(**options), seed=0, gradient_checkpointing=gradient_checkpointing))


def with_random_b(policy: TransformersPolicy) -> TransformersPolicy:
    """The policy with a small random LoRA B: a new adapter adds nothing, so nothing would be measured."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                parameter.copy_(0.005 * torch.randn(parameter.shape, generator=generator))
    return policy


def questions(count: int, long: bool) -> list[str]:
    """Word problems of about 60 tokens with the template, or of about 600 with solved examples before them."""
    draw = random.Random(0)

    def problem() -> tuple[str, int]:
        a, b, c = draw.randint(11, 99), draw.randint(2, 9), draw.randint(2, 9)
        return f"Ada has {a} coins and buys {b} bags with {c} coins in each. How many coins has she now?", a + b * c

    found = []
    for _ in range(count):
        solved = [problem() for _ in range(13 if long else 0)]
        examples = "".join(f"Question: {text}\nAnswer: She has {n} coins.\n\n" for text, n in solved)
        found.append(f"{examples}{problem()[0]}")
    return found


def groups_of(prompts: list[Any], answers: list[list[Completion]]) -> list[Group]:
    """Rewards with signal in every group."""
    rewards = tuple(float(i % 3) for i in range(len(answers[0])))
    return [Group(Example(p.text, {}, ""), p, a, rewards) for p, a in zip(prompts, answers, strict=True)]


def run_update(
    policy: TransformersPolicy, optimizer: torch.optim.Optimizer, groups: list[Group], tokens: int, budget: int
) -> None:
    """tokens: the cap on an answer; budget: tokens of a micro-batch."""
    update(
        policy, optimizer, prepare_rows(groups, Objective(), tokens), Objective(), temperature=1.0, updates=1,
        limits=Limits(budget, 64), max_grad_norm=1.0,
    )  # fmt: skip


def trl_trainer(policy: TransformersPolicy, model: Model, group: int, tokens: int, **settings: Any) -> Any:
    """TRL's GRPOTrainer with its own defaults, on the same weights and adapter as `policy`.

    Its log-probabilities come from a Triton kernel; where there is no Triton, log_softmax stands in for it.
    """
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer import utils
    from trl_equality import plain_logprobs

    if utils._ChunkedLogProbFunction is None:
        utils._ChunkedLogProbFunction = SimpleNamespace(apply=plain_logprobs)
    twin = load(model, seed=0)
    for name, parameter in twin.trainable().items():
        parameter.data.copy_(policy.trainable()[name].data)
    prompts = settings.pop("prompts")
    arguments = GRPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=not torch.cuda.is_available(), report_to=[], save_strategy="no",
        per_device_train_batch_size=group * len(prompts), num_generations=group, max_completion_length=tokens,
        learning_rate=1e-5, beta=0.0, logging_steps=1000, bf16=twin.dtype == torch.bfloat16, disable_tqdm=True,
        log_completions=False, temperature=1.0, seed=0, **settings,
    )  # fmt: skip
    rows = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in prompts]

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [float(i % 3) for i in range(len(completions))]

    trainer = GRPOTrainer(
        model=twin.model, args=arguments, processing_class=twin.template.tokenizer,
        train_dataset=Dataset.from_list(rows), reward_funcs=reward,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)  # it prints on stdout, between the lines of the tables
    return trainer
