"""The loop: prompts -> completions -> rewards -> advantages -> update -> metrics -> checkpoint -> evaluation."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev, pvariance
from typing import Any

import psutil
import torch
from torch import nn

from lite_trgrpo import checkpoint
from lite_trgrpo.data import batch
from lite_trgrpo.errors import DataError
from lite_trgrpo.evaluate import evaluate, paired_gain
from lite_trgrpo.options import Config, Train
from lite_trgrpo.policy import Policy
from lite_trgrpo.records import Example, Group, Prompt, Sampling
from lite_trgrpo.rewards import Scorer, failure_counts
from lite_trgrpo.run import Run
from lite_trgrpo.update import prepare_rows, update

TRAINING, EVALUATION = 0, 1  # streams of random numbers
NORM_WINDOW = 20  # steps over which the running variance of the gradient norm is taken

Encoded = list[tuple[Example, Prompt]]
Metrics = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Listener:
    """What the person sees; the trainer itself prints nothing."""

    step: Callable[[Metrics], None]
    evaluated: Callable[[Metrics], None]


def encode(policy: Policy, examples: Sequence[Example], max_prompt_tokens: int) -> tuple[Encoded, int]:
    """-> examples with their prompts, and how many were left out because their prompt is too long."""
    encoded = [(example, policy.encode(example.prompt)) for example in examples]
    kept = [pair for pair in encoded if len(pair[1].ids) <= max_prompt_tokens]
    if examples and not kept:
        shortest = min(len(prompt.ids) for _, prompt in encoded)
        raise DataError(
            f"every prompt is longer than data.max_prompt_tokens = {max_prompt_tokens}; the shortest has {shortest}"
        )
    return kept, len(encoded) - len(kept)


def train(
    config: Config,
    policy: Policy,
    training: Encoded,
    heldout: Encoded,
    scorer: Scorer,
    run: Run,
    listener: Listener,
    *,
    resume: Path | None = None,
) -> None:
    """Run to `config.train.steps`, from the start or from the checkpoint `resume`."""
    options = config.train
    trainable = policy.trainable()
    optimizer = make_optimizer(list(trainable.values()), options)
    start = 0
    if resume is not None:
        state = checkpoint.load(resume, trainable, optimizer)
        start = state["step"]
        run.cut_back(state["logs"])
    else:
        _evaluate(config, policy, heldout, scorer, run, listener, step=0)
    norms = [line["grad_norm"] for line in run.metrics()]
    for step in range(start, options.steps):
        metrics, groups = _step(config, policy, optimizer, training, scorer, step)
        norms.append(metrics["grad_norm"])
        metrics["grad_norm_variance"] = pvariance(norms[-NORM_WINDOW:])
        run.log_step(metrics, groups)
        listener.step(metrics)
        done = step + 1
        last = done == options.steps
        if last or (config.eval.every and done % config.eval.every == 0):
            _evaluate(config, policy, heldout, scorer, run, listener, step=done)
        if last or (options.checkpoint_every and done % options.checkpoint_every == 0):
            checkpoint.save(run.checkpoints, done, trainable, optimizer, {"logs": run.offsets()})
    policy.save_adapter(run.adapter)


def _step(
    config: Config,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    training: Encoded,
    scorer: Scorer,
    step: int,
) -> tuple[Metrics, list[Group]]:
    """One batch: sample, score, update."""
    clock = {"rollout_s": 0.0, "reward_s": 0.0, "update_s": 0.0}
    learning_rate = learning_rate_at(step, config.train)
    for parameters in optimizer.param_groups:
        parameters["lr"] = learning_rate
    groups, taught = rollout(config, policy, training, scorer, step, clock)
    with _timed(clock, "update_s"):
        statistics = update(
            policy,
            optimizer,
            prepare_rows(taught, config.objective, config.rollout.max_new_tokens),
            config.objective,
            temperature=config.rollout.temperature,
            updates=config.train.updates_per_batch,
            token_budget=config.train.micro_batch_tokens,
            max_grad_norm=config.train.max_grad_norm,
        )
    tokens = sum(len(completion.ids) for group in groups for completion in group.completions)
    clock["tokens_per_s"] = tokens / clock["rollout_s"]
    metrics = {
        "step": step + 1,
        **_rollout_metrics(groups, config.rewards.solved_at),
        **statistics,
        "learning_rate": learning_rate,
        "tokens": tokens,
        "clock": {**clock, **_memory()},
    }
    return metrics, groups


def rollout(
    config: Config,
    policy: Policy,
    training: Encoded,
    scorer: Scorer,
    step: int,
    clock: dict[str, float],
) -> tuple[list[Group], list[Group]]:
    """-> every group that was sampled and scored, and those that go into the update.

    With `top_up_rounds`, groups without signal are dropped and fresh prompts sampled in their place, for at most that
    many rounds; never until a clock says so, or a run could not be repeated.
    """
    wanted = config.train.prompts_per_step
    every: list[Group] = []
    taught: list[Group] = []
    for refill in range(1 + config.rollout.top_up_rounds):
        indices = batch(len(training), wanted, config.train.seed, step, refill)[: wanted - len(taught)]
        chosen = [training[i] for i in indices]
        with _timed(clock, "rollout_s"):
            completions = policy.sample([prompt for _, prompt in chosen], _sampling(config, step, refill))
            groups = [Group(e, p, c) for (e, p), c in zip(chosen, completions, strict=True)]
        with _timed(clock, "reward_s"):
            groups = scorer.score(groups)
        every += groups
        taught += [group for group in groups if has_signal(group)] if config.rollout.top_up_rounds else groups
        if len(taught) == wanted:
            break
    return every, taught


def has_signal(group: Group) -> bool:
    """Whether its graded answers differ in reward: else every advantage is 0."""
    return len({reward for reward in group.rewards if not math.isnan(reward)}) > 1


def _sampling(config: Config, step: int, refill: int) -> Sampling:
    return Sampling(
        members=config.rollout.group_size,
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        top_k=config.rollout.top_k,
        max_rows=config.rollout.max_rows,
        key=(config.train.seed, TRAINING, step, refill),
    )


def eval_sampling(config: Config) -> Sampling:
    """Held-out answers are drawn with the same numbers at every evaluation, so that differences are paired."""
    return Sampling(
        members=1,
        max_new_tokens=config.eval.max_new_tokens or config.rollout.max_new_tokens,
        temperature=config.rollout.temperature,
        max_rows=config.rollout.max_rows,
        key=(config.data.seed, EVALUATION),
    )


def _evaluate(
    config: Config,
    policy: Policy,
    heldout: Encoded,
    scorer: Scorer,
    run: Run,
    listener: Listener,
    *,
    step: int,
) -> None:
    if not heldout:
        return
    started = time.perf_counter()
    result = evaluate(
        policy, heldout, scorer, eval_sampling(config),
        samples=config.eval.samples, solved_at=config.rewards.solved_at,
    )  # fmt: skip
    line: Metrics = {"step": step, **result}
    if earlier := run.evaluations():
        rows = (earlier[0]["rows"], result["rows"])
        line["gain"] = paired_gain(*([row["solved"] for row in found] for found in rows))
        if config.eval.samples > 1:
            line["gain_k"] = paired_gain(*([row["samples_solved"] > 0 for row in found] for found in rows))
    line["clock"] = {"eval_s": time.perf_counter() - started}
    run.log_eval(line)
    listener.evaluated(line)


def _rollout_metrics(groups: Sequence[Group], solved_at: float) -> Metrics:
    """Means over this step's completions; ungradable ones are counted apart."""
    completions = [completion for group in groups for completion in group.completions]
    rewards = [reward for group in groups for reward in group.rewards if not math.isnan(reward)]
    first = next(iter(groups[0].parts))
    parts = {
        f"reward/{name}": fmean(values)
        for name in groups[0].parts
        if (values := [v for group in groups for v in group.parts[name] if not math.isnan(v)])
    }
    return {
        "reward_mean": fmean(rewards) if rewards else None,
        "reward_std": pstdev(rewards) if rewards else None,
        **parts,
        "solved": fmean(v >= solved_at for group in groups for v in group.parts[first]),
        "groups_with_signal": fmean(has_signal(group) for group in groups),
        "truncated": fmean(not completion.stopped for completion in completions),
        "ungradable": len(completions) - len(rewards),
        **failure_counts(groups),
        "length_mean": fmean(len(completion.ids) for completion in completions),
        "length_max": max(len(completion.ids) for completion in completions),
    }


def learning_rate_at(step: int, options: Train) -> float:
    """Linear warm-up over `warmup_steps`, then constant, or linear or cosine decay to 0 after the last step."""
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    progress = (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[options.schedule]
    return options.learning_rate * factor


def make_optimizer(parameters: list[nn.Parameter], options: Train) -> torch.optim.Optimizer:
    """AdamW over the adapter. LoRA's Adam state is small, so fp32 is the default; 8 bits are an option."""
    settings: dict[str, Any] = {"lr": options.learning_rate, "weight_decay": options.weight_decay}
    if options.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **settings)
    import bitsandbytes.optim as bnb

    kind = {"adamw-8bit": bnb.AdamW8bit, "paged-adamw-8bit": bnb.PagedAdamW8bit}[options.optimizer]
    return kind(parameters, **settings)


@contextmanager
def _timed(clock: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    clock[name] += time.perf_counter() - started


def _memory() -> dict[str, float]:
    """MiB: resident memory of the process now, and the card's peak so far."""
    memory = {"rss_mib": psutil.Process().memory_info().rss / 2**20}
    if torch.cuda.is_initialized():
        memory["cuda_peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return memory
