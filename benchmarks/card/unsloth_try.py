"""The unsloth backend on random weights of Qwen2.5-0.5B's shape: import, load with its self-check, two steps."""

import importlib
import time
from typing import Any

from kit import DEVICE, folder_of, free, guarded, sync


def one_step(policy: Any) -> None:
    """Sample two groups and update once; the second call shows the speed without what is compiled once."""
    import torch

    from lite_trgrpo.config.schema import Objective
    from lite_trgrpo.model.oom import Limits
    from lite_trgrpo.model.policy import sample_all
    from lite_trgrpo.records import Example, Group, Sampling
    from lite_trgrpo.training.update import prepare_rows, update

    prompts = [policy.encode(text) for text in ("What is 2 + 2?", "Name the sum of 17 and 4.")]
    started = time.perf_counter()
    answers = sample_all(policy, prompts, Sampling(8, 64, key=(1,)))
    sync()
    sampled = time.perf_counter()
    rewards = tuple(float(i % 3) for i in range(8))
    groups = [Group(Example("", {}, ""), p, a, rewards) for p, a in zip(prompts, answers, strict=True)]
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-5)
    rows = prepare_rows(groups, Objective(), 64)
    found = update(
        policy, optimizer, rows, Objective(), temperature=1.0, updates=1, limits=Limits(2048, 64), max_grad_norm=1.0
    )
    sync()
    tokens = sum(len(answer.ids) for group in answers for answer in group)
    print(
        f"    {tokens / (sampled - started):,.0f} tokens/s, update {time.perf_counter() - sampled:.2f} s, loss "
        f"{found['loss']:.4f}, gradient {found['grad_norm']:.4f}, sampler gap {found['sampler_gap_mean']:.4f}"
    )


def whole(quantization: str, checkpointing: bool) -> None:
    from lite_trgrpo.config.schema import Model
    from lite_trgrpo.model import unsloth

    model = Model(name=str(folder_of("0.5b")), device=DEVICE, backend="unsloth", quantization=quantization)
    policy = guarded(
        f"load and self-check, {quantization}",
        lambda: unsloth.load(model, seed=0, gradient_checkpointing=checkpointing, longest=600),
    )
    if policy is not None:
        print(f"    own engine on its layers {policy.network.by_groups}, {type(policy.model).__name__}, {policy.dtype}")
        guarded("first step", lambda: one_step(policy))
        guarded("second step", lambda: one_step(policy))
    free()


if __name__ == "__main__":
    if guarded("import unsloth", lambda: importlib.import_module("unsloth")) is None:  # before transformers
        raise SystemExit(1)
    whole("nf4", True)
    whole("none", False)
