"""Group rollouts: ours, transformers' `generate`, and TRL's rollout, side by side.

    python benchmarks/rollouts.py > benchmarks/rollouts.txt        (--quick: fp32, 1 and 4 short prompts)
    python benchmarks/rollouts.py --hybrid                         (LFM2 at half of its smallest size, random weights)

SmolLM2-135M-Instruct with an unmerged LoRA adapter, groups of 8, natural stopping, at most 64 tokens, temperature 1.
Engines take turns (A B C A B C), twice where it is quick. Memory is the peak above the loaded model. TRL's rollout is
measured for one prompt: with more it does what `generate` does.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import Spent, demo_model, middle, policy_for, questions, spent, trl_trainer, where, with_random_b
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Lfm2Config

from lite_trgrpo.config.schema import Model
from lite_trgrpo.model import weights
from lite_trgrpo.model.hf import TransformersPolicy, load
from lite_trgrpo.model.policy import sample_all
from lite_trgrpo.records import Sampling
from lite_trgrpo.rollout.engine import Engine

GROUP, TOKENS = 8, 64
KINDS = {"fp32": {"dtype": "float32"}, "bf16": {"dtype": "bfloat16"}, "nf4": {"quantization": "nf4"}}
Run = Callable[[], tuple[int, Spent]]


def ours(policy: TransformersPolicy, prompts: list[str]) -> Run:
    def run() -> tuple[int, Spent]:
        with spent() as used:
            groups = sample_all(
                policy, [policy.encode(prompt) for prompt in prompts], Sampling(GROUP, TOKENS, key=(1,))
            )
        return sum(len(answer.ids) for group in groups for answer in group), used

    return run


def generate(policy: TransformersPolicy, prompts: list[str]) -> Run:
    """One call, as a person would write it: left-padded prompts, `num_return_sequences`."""
    tokenizer = policy.template.tokenizer
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def run() -> tuple[int, Spent]:
        texts = [policy.encode(prompt).text for prompt in prompts]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        batch = batch.to(policy.device)
        with spent() as used, torch.no_grad():
            made = policy.model.generate(
                **batch, max_new_tokens=TOKENS, num_return_sequences=GROUP, do_sample=True, temperature=1.0, top_k=0,
                eos_token_id=sorted(policy.end_ids), pad_token_id=policy.network.pad_id,
            )[:, batch.input_ids.shape[1] :].tolist()  # fmt: skip
        return sum(kept(row, policy.end_ids) for row in made), used

    return run


def kept(ids: list[int], end_ids: frozenset[int]) -> int:
    """Tokens up to and with the first end token."""
    return next((t + 1 for t, i in enumerate(ids) if i in end_ids), len(ids))


def trl(policy: TransformersPolicy, kind: dict[str, str], prompts: list[str]) -> Run:
    trainer = trl_trainer(policy, demo_model(**kind), GROUP, TOKENS, prompts=prompts)
    ids = [list(policy.encode(prompt).ids) for prompt in prompts for _ in range(GROUP)]

    def run() -> tuple[int, Spent]:
        with spent() as used:
            completions = trainer._generate_single_turn(ids, None, {}, GROUP)[0]
        return sum(kept(list(row), policy.end_ids) for row in completions), used

    return run


def table(name: str, policy: TransformersPolicy, kind: dict[str, str], cells: list[tuple[int, bool]]) -> None:
    for count, long in cells:
        prompts = questions(count, long)
        runs = {"ours": ours(policy, prompts), "generate": generate(policy, prompts)}
        if count == 1:
            runs["TRL"] = trl(policy, kind, prompts)
        found: dict[str, list[tuple[int, Spent]]] = {engine: [] for engine in runs}
        for _ in range(2 if count == 1 or (count == 4 and not long) else 1):
            for engine, run in runs.items():
                found[engine].append(run())
        speed = {
            engine: sum(tokens for tokens, _ in all_) / sum(used.seconds for _, used in all_)
            for engine, all_ in found.items()
        }
        length = len(policy.encode(prompts[0]).ids)
        memory = {engine: middle([used for _, used in all_]).mib for engine, all_ in found.items()}
        shown = "  ".join(f"{engine} {speed[engine]:6.0f} /s {memory[engine]:6.0f} MiB" for engine in runs)
        print(
            f"{name:5}{count:3} x 8, prompts of {length:4}   {shown}   x{speed['ours'] / speed['generate']:.2f}",
            flush=True,
        )


def near_the_limit(name: str, policy: TransformersPolicy) -> None:
    """Share of a decode step that the model's own matrix products would take as plain F.linear, adapter on."""
    for rows in (8, 32, 128):
        prompts = [policy.encode(question).ids for question in questions(rows // 8, False)]
        sampling = Sampling(8, 24, key=(2,))
        engine = Engine(policy.network, prompts, sampling, frozenset(), rows)
        engine._admit()  # reads the prompts; the steps alone are timed
        started = time.perf_counter()
        for _ in range(20):
            engine._step()
        step = (time.perf_counter() - started) / 20
        products = sorted(plain_products(policy, rows) for _ in range(5))[2]
        print(
            f"{name:5}{rows:4} rows: step {1000 * step:6.1f} ms, "
            f"products {1000 * products:6.1f} ms, {products / step:.0%}"
        )


def rest(name: str, policy: TransformersPolicy) -> None:
    """Where the time of a decoding step goes at 32 rows, by operation."""
    prompts = [policy.encode(question).ids for question in questions(4, False)]
    engine = Engine(policy.network, prompts, Sampling(8, 24, key=(2,)), frozenset(), 32)
    engine._admit()
    engine._step()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(10):
            engine._step()
    events = sorted(found.key_averages(), key=lambda event: event.self_cpu_time_total, reverse=True)
    whole = sum(event.self_cpu_time_total for event in events)
    print(f"{name:5} 32 rows, by operation: ", end="")
    print(
        ", ".join(
            f"{event.key.removeprefix('aten::')} {event.self_cpu_time_total / whole:.0%}" for event in events[:12]
        )
    )


@torch.no_grad()
def plain_products(policy: TransformersPolicy, rows: int) -> float:
    """Seconds for every linear layer, its LoRA pair and the head, as plain products."""
    work = []
    for name, module in policy.model.named_modules():
        if name.endswith("base_layer"):
            parent = policy.model.get_submodule(name.removesuffix(".base_layer"))
            work.append((module.weight, parent.lora_A["default"].weight, parent.lora_B["default"].weight))
    inputs = {w.shape[1]: torch.randn(rows, w.shape[1], dtype=w.dtype, device=w.device) for w, _, _ in work}
    head = policy.network.logits.layer.weight
    hidden = torch.randn(rows, head.shape[1], dtype=head.dtype, device=head.device)
    started = time.perf_counter()
    for weight, a, b in work:
        x = inputs[weight.shape[1]]
        F.linear(x, weight)
        F.linear(F.linear(x.to(a.dtype), a), b)
    F.linear(hidden, head)
    return time.perf_counter() - started


def hybrid_policy(folder: Path) -> TransformersPolicy:
    """Sixteen layers as in LFM2-350M at half of its width: ten short convolutions, six that attend. Weights are random,
    and an answer ends with each fortieth token of the vocabulary, so that lengths differ as they do in a run.
    """
    attending = (2, 5, 8, 10, 12, 14)
    config = Lfm2Config(
        vocab_size=49152, hidden_size=512, intermediate_size=3328, num_hidden_layers=16, num_attention_heads=8,
        num_key_value_heads=4, bos_token_id=None, eos_token_id=2, pad_token_id=0, initializer_range=0.05,
        layer_types=["full_attention" if i in attending else "conv" for i in range(16)],
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    for path in locate(demo_model()).glob("*token*"):
        shutil.copyfile(path, folder / path.name)
    shutil.copyfile(locate(demo_model()) / "chat_template.jinja", folder / "chat_template.jinja")
    policy = with_random_b(load(demo_model(name=str(folder), sha256=None), seed=0))
    policy.end_ids = frozenset(range(0, 49152, 40))
    return policy


def locate(model: Model) -> Path:
    return weights.locate(model).folder


def hybrid(cells: list[tuple[int, bool]]) -> None:
    """Beside `generate` in one batch, and one prompt after the other, as hybrids were sampled before."""
    with tempfile.TemporaryDirectory() as folder:
        policy = hybrid_policy(Path(folder))
        assert policy.network.by_groups and policy.network.recurrent
        for count, long in cells:
            prompts = questions(count, long)
            runs = {"ours": [ours(policy, prompts)], "generate": [generate(policy, prompts)]}
            runs["prompt by prompt"] = [generate(policy, [prompt]) for prompt in prompts]
            speed = {}
            for engine, parts in runs.items():
                found = [part() for part in parts]
                speed[engine] = sum(tokens for tokens, _ in found) / sum(used.seconds for _, used in found)
            shown = "  ".join(f"{engine} {found:6.0f} /s" for engine, found in speed.items())
            ratios = " and ".join(f"x{speed['ours'] / speed[engine]:.2f}" for engine in list(speed)[1:])
            print(f"{count:3} x 8, prompts of {len(policy.encode(prompts[0]).ids):4}   {shown}   {ratios}", flush=True)


def growth(policy: TransformersPolicy) -> None:
    def line(what: str, sampling: Sampling, prompts: int) -> None:
        encoded = [policy.encode(question).ids for question in questions(prompts, False)]
        engine = Engine(policy.network, encoded, sampling, frozenset(), min(128, prompts * sampling.members))
        with spent() as used:
            tokens = sum(len(answer.ids) for answer in engine.answers())
        print(f"{what:28} {tokens / used.seconds:6.0f} tokens/s  {used.mib:6.0f} MiB", flush=True)

    for group in (1, 2, 4, 8, 16, 32, 64):
        line(f"G = {group}, 48 tokens", Sampling(group, 48, key=(3,)), 1)
    for tokens in (64, 128, 256, 512, 1024):
        line(f"length {tokens}, G = 8", Sampling(8, tokens, key=(3,)), 1)


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--quick", action="store_true")
    arguments.add_argument("--hybrid", action="store_true")
    given = arguments.parse_args()
    if given.hybrid:
        print(f"{where()}\n\nLFM2 at half width, fp32; tokens/s; last columns ours over the others\n")
        return hybrid([(1, False), (4, False), (16, False), (1, True), (4, True)])
    quick = given.quick
    print(f"{where()}\n\ntokens/s, peak MiB above the loaded model; last column ours over generate\n")
    for name, kind in list(KINDS.items())[: 1 if quick else 3]:
        policy = policy_for(**kind)
        sample_all(policy, [policy.encode("Hello")], Sampling(8, 8))  # warm up
        cells = (
            [(1, False), (4, False)]
            if quick
            else [(1, False), (4, False), (16, False), (1, True), (4, True), (16, True)]
        )
        table(
            name,
            policy,
            kind,
            cells if name != "nf4" else [(c, long) for c, long in cells if c == 1 or (c == 4 and not long)],
        )
        if not quick and name != "nf4":
            print()
            near_the_limit(name, policy)
            rest(name, policy)
            print()
    if not quick:
        growth(policy_for())


if __name__ == "__main__":
    sys.exit(main())
