"""One decode step taken apart: kernels, launch time against time on the card, the adapter's share, generate beside it.

Random weights of Qwen2.5's shapes, groups of 8, prompts of 300 tokens. Times are taken without the profiler.
"""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from kit import CPU, engine_of, free, guarded, label_of, policy_of, sync
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from lite_trgrpo.model.hf import TransformersPolicy
from lite_trgrpo.rollout.engine import Engine

NF4 = {"quantization": "nf4"}
CASES: list[tuple[str, dict[str, Any]]] = [("1.5b", NF4), ("1.5b", {}), ("0.5b", NF4)]
ROWS = (8, 64)
STEPS = 4 if CPU else 24


def seconds_per_step(engine: Engine) -> float:
    for _ in range(3):
        engine._step()
    sync()
    started = time.perf_counter()
    for _ in range(STEPS):
        engine._step()
    sync()
    return (time.perf_counter() - started) / STEPS


def shares(engine: Engine) -> dict[str, float]:
    """Milliseconds of a step in the layers, the head, the draw and the rest, with a synchronisation after each."""
    spent: Counter[str] = Counter()

    def clocked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            sync()
            started = time.perf_counter()
            result = function(*args, **kwargs)
            sync()
            spent[name] += time.perf_counter() - started
            return result

        return timed

    network: Any = engine.decoder
    hidden, logits, extend = network.hidden, network.logits, engine._extend
    network.hidden, network.logits = clocked("layers", hidden), clocked("head", logits)
    engine._extend = clocked("draw", extend)  # type: ignore[method-assign]
    try:
        started = time.perf_counter()
        for _ in range(STEPS):
            engine._step()
        spent["rest"] = time.perf_counter() - started - sum(spent.values())
    finally:
        network.hidden, network.logits, engine._extend = hidden, logits, extend  # type: ignore[method-assign]
    return {name: 1000 * whole / STEPS for name, whole in spent.items()}


def print_profile(engine: Engine, steps: int = 2) -> None:
    """Counts of kernels and calls of a step, and the kernels that take longest."""
    activities = [ProfilerActivity.CPU] if CPU else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            engine._step()
        sync()
    events = profiler.key_averages()
    if CPU:
        operations = Counter({event.key: event.count // steps for event in events if event.key.startswith("aten::")})
        print(f"    aten operations a step: {sum(operations.values())}; most {operations.most_common(8)}")
        return
    kernels = sorted(
        (event for event in events if event.device_type == DeviceType.CUDA), key=lambda e: -e.self_device_time_total
    )
    busy = sum(event.self_device_time_total for event in kernels) / steps / 1000
    calls = Counter({
        event.key: event.count // steps
        for event in events
        if event.key.startswith("cu") and event.device_type == DeviceType.CPU
    })  # fmt: skip
    count = sum(event.count for event in kernels) / steps
    print(f"    {count:.0f} kernels and copies a step, busy on the card {busy:.2f} ms; {calls.most_common(8)}")
    for event in kernels[:8]:
        milliseconds = event.self_device_time_total / steps / 1000
        print(f"      {milliseconds:7.3f} ms {event.count / steps:6.0f} x {event.key[:110]}")


def seconds_of_generate(policy: TransformersPolicy, rows: int) -> float:
    """A token of all rows by transformers' generate, without the time that reading the prompt takes."""
    ids = torch.randint(5, policy.network.config.vocab_size - 1, (rows, 300), device=policy.device)
    spent = []
    policy.network.attend_by_groups(False)
    try:
        for new in (2, 2, STEPS):
            sync()
            started = time.perf_counter()
            with torch.no_grad():
                policy.model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), min_new_tokens=new, max_new_tokens=new,
                    do_sample=True, temperature=1.0, top_k=0, pad_token_id=policy.network.pad_id,
                )  # fmt: skip
            sync()
            spent.append(time.perf_counter() - started)
    finally:
        policy.network.attend_by_groups(True)
    return (spent[2] - spent[1]) / (STEPS - 2)


def measured(shape: str, options: dict[str, Any]) -> None:
    policy = policy_of(shape, dtype="bfloat16", **options)
    for rows in ROWS:
        engine = engine_of(policy, rows)
        ours = seconds_per_step(engine)
        print(f"{label_of(shape, options)}, {rows} rows: {1000 * ours:.2f} ms a step, {rows / ours:,.0f} tokens/s")
        print("    synchronised, ms: " + "  ".join(f"{name} {value:.2f}" for name, value in shares(engine).items()))
        print_profile(engine)
        with policy.reference():
            bare = seconds_per_step(engine_of(policy, rows))
        theirs = seconds_of_generate(policy, rows)
        print(
            f"    without the adapter {1000 * bare:.2f} ms; generate {1000 * theirs:.2f} ms a step, "
            f"{rows / theirs:,.0f} tokens/s",
            flush=True,
        )
    free()


if __name__ == "__main__":
    for shape, options in CASES:
        guarded(label_of(shape, options), lambda shape=shape, options=options: measured(shape, options))
