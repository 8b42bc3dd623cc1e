"""Does anything work on this card: versions, the card itself, and tiny models sampled and trained in every type."""

import logging
import math
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from kit import CPU, DEVICE, guarded, half, sync

from lite_trgrpo.config.schema import Model, Objective
from lite_trgrpo.model.hf import load
from lite_trgrpo.model.oom import Limits
from lite_trgrpo.model.policy import sample_all
from lite_trgrpo.records import Example, Group, Sampling
from lite_trgrpo.training.update import prepare_rows, update
from tests.tiny import tiny_model_folder

PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "accelerate", "trl", "datasets", "pytest")


def versions() -> None:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "-"
    print(", ".join(f"{package} {number}" for package, number in found.items()))
    print(f"torch's CUDA {torch.version.cuda}, usable: {torch.cuda.is_available()}")


def card() -> None:
    """Name and memory; what a context and the first product take; bandwidth and launch time."""
    if CPU:
        return
    free_before, total = torch.cuda.mem_get_info()
    print(
        f"{torch.cuda.get_device_name()}: {total / 2**30:.1f} GiB, compute capability "
        f"{torch.cuda.get_device_capability()}, bf16 {torch.cuda.is_bf16_supported(including_emulation=False)}"
    )
    matrix = torch.randn(4096, 4096, device="cuda", dtype=half())
    (matrix @ matrix).sum().item()
    libraries = free_before - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved()
    print(f"context {(total - free_before) / 2**20:.0f} MiB, libraries of a first product {libraries / 2**20:.0f} MiB")
    size, times = 2**28, 20
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    sync()
    started = time.perf_counter()
    for _ in range(times):
        target.copy_(source)
    sync()
    bandwidth = times * 2 * size / (time.perf_counter() - started)
    number, launches = torch.zeros(1, device="cuda"), 2000
    sync()
    started = time.perf_counter()
    for _ in range(launches):
        number.add_(1)
    launch = (time.perf_counter() - started) / launches
    sync()
    print(f"copy {bandwidth / 1e12:.2f} TB/s, launch of a small kernel {launch * 1e6:.1f} us")


def half_product_in_fp32() -> None:
    """A 16-bit product with an fp32 result, as the head could use it. torch has it on CUDA alone."""
    if CPU:
        return
    left, right = (torch.randn(rows, 256, device=DEVICE, dtype=half()) for rows in (64, 512))
    difference = torch.mm(left, right.t(), out_dtype=torch.float32) - left.float() @ right.float().t()
    print(f"largest difference to the fp32 product: {difference.abs().max().item():.2e}")


def trained(kind: str, **options: Any) -> None:
    """Sample groups and update twice; the loss must be a number and the gradient must reach the adapter."""
    with tempfile.TemporaryDirectory() as folder:
        model = Model(name=str(tiny_model_folder(Path(folder), kind)), device=DEVICE, **options)
        policy = load(model, seed=0, gradient_checkpointing=model.quantization == "nf4")
        prompts = [policy.encode(text) for text in ("1 + 1", "What is two and two, and why?")]
        answers = sample_all(policy, prompts, Sampling(4, 16, key=(1,)))
        rewards = (1.0, 0.0, 0.5, 0.0)
        groups = [Group(Example("", {}, ""), p, a, rewards) for p, a in zip(prompts, answers, strict=True)]
        optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-3)
        rows = prepare_rows(groups, Objective(), 16)
        found = update(
            policy, optimizer, rows, Objective(), temperature=1.0, updates=2, limits=Limits(64, 8), max_grad_norm=1.0
        )
        print(
            f"    own engine {policy.network.by_groups}, {policy.dtype}, loss {found['loss']:.4f}, gradient "
            f"{found['grad_norm']:.4f}, sampler gap {found['sampler_gap_mean']:.5f}"
        )
        assert policy.network.by_groups and math.isfinite(found["loss"]) and found["grad_norm"] > 0


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    guarded("versions", versions)
    guarded("card", card)
    guarded("16-bit product with an fp32 result", half_product_in_fp32)
    for kind in ("qwen2", "llama", "gemma3_text"):
        guarded(f"{kind}, float32", lambda kind=kind: trained(kind, dtype="float32"))
    for dtype in ("bfloat16", "float16"):
        for quantization in ("none", "nf4", "int8"):
            guarded(
                f"qwen2, {dtype}, {quantization}",
                lambda dtype=dtype, quantization=quantization: trained("qwen2", dtype=dtype, quantization=quantization),
            )


if __name__ == "__main__":
    main()
