"""The loop: prompts -> completions -> rewards -> advantages -> update -> metrics -> checkpoint -> evaluation."""

import math
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from statistics import pvariance
from typing import Any

import torch

from lite_trgrpo.config.schema import Config
from lite_trgrpo.data.examples import batch
from lite_trgrpo.errors import RunError
from lite_trgrpo.evaluate import any_solved, eval_sampling, evaluate, paired_gain
from lite_trgrpo.model.oom import Limits
from lite_trgrpo.model.policy import Policy, sample_groups
from lite_trgrpo.records import Group, Sampling
from lite_trgrpo.rewards import Scorer, failure_counts
from lite_trgrpo.store import checkpoint
from lite_trgrpo.store.resuming import cut_back
from lite_trgrpo.store.run import Run
from lite_trgrpo.training import guards, recovery
from lite_trgrpo.training.guards import of_first_step
from lite_trgrpo.training.metrics import finite, has_signal, memory, of_rollout, timed
from lite_trgrpo.training.optimizer import learning_rate_at, make_optimizer
from lite_trgrpo.training.recovery import score_of
from lite_trgrpo.training.state import Encoded, Job, Listener, Metrics
from lite_trgrpo.training.stopping import Stop, Stopped
from lite_trgrpo.training.update import Row, in_pieces, prepare_rows, probe, update

TRAINING = 0  # a stream of random numbers
PROBED = 4  # answers on which an update's effect is measured
NORM_WINDOW = 20  # steps over which the running variance of the gradient norm is taken


def train(
    config: Config,
    policy: Policy,
    training: Encoded,
    heldout: Encoded,
    scorer: Scorer,
    run: Run,
    listener: Listener,
    stop: Stop,
    *,
    resume: Path | None = None,
) -> None:
    """Run to `config.train.steps`, from the start or from the checkpoint `resume`.

    Raises Stopped when `stop` or the guards end it before: with the state of the last finished step saved, its adapter
    in the run folder. Whatever else ends it, the state is saved if it is that of a finished step.
    """
    trainable = policy.trainable()
    optimizer = make_optimizer(list(trainable.values()), config.train)
    limits = Limits(config.train.micro_batch_tokens, config.rollout.max_rows, _memory_options(config))
    job = Job(config, policy, training, heldout, scorer, run, listener, stop, trainable, optimizer, limits)
    if resume is not None:
        state = checkpoint.load(resume, trainable, optimizer)
        job.step = job.saved = state["step"]
        limits.resume(state["limits"])
    cut_back(run, resume)
    job.history, job.evaluations = run.metrics(), run.evaluations()
    optimizer.register_step_pre_hook(lambda *_: setattr(job, "torn", True))
    try:
        _probe(job)
        _loop(job)
    except Stopped:
        recovery.finish(job, complete=False)
        raise
    except RunError:  # the disk refuses, perhaps in mid-line: what the last checkpoint counts on is there
        raise
    except Exception:  # out of memory, or a library at fault
        if not job.torn:
            with suppress(Exception):  # a card that is lost cannot be read; the first error is the one to show
                recovery.finish(job, complete=False)
        raise
    recovery.finish(job, complete=True)


def _memory_options(config: Config) -> list[Any]:
    """Options that bear on memory: limits that memory lowered hold as long as these stay."""
    train = config.train
    return [train.micro_batch_tokens, train.gradient_checkpointing, train.memory, config.rollout.max_rows]


def _probe(job: Job) -> None:
    """Trial step where memory is limited: find out now, not hours later, whether the largest micro-batch fits."""
    config, before = job.config, job.limits.tokens
    if not (torch.cuda.is_initialized() or config.train.memory):
        return
    longest = max((prompt.ids for _, prompt in job.training), key=len)
    answers = config.train.prompts_per_step * config.rollout.group_size
    with job.stop.interruptible():
        probe(job.policy, longest, answers, config.rollout.max_new_tokens, config.rollout.temperature, job.limits)
    if job.limits.tokens < before:
        job.listener.warned(
            f"micro-batches of {before} tokens do not fit in memory; from now on they have {job.limits.tokens} at most"
        )


def _loop(job: Job) -> None:
    """Each turn starts at a boundary: `job.step` steps are done, nothing of the next one is."""
    config = job.config
    while True:
        _evaluate_if_due(job)
        if job.step == config.train.steps:
            return
        recovery.save_if_due(job)
        clock = {"rollout_s": 0.0, "reward_s": 0.0, "update_s": 0.0}
        job.listener.doing("sampling")
        with job.stop.interruptible():
            groups, taught = rollout(config, job.policy, job.training, job.scorer, job.step, clock, job.limits)
        _learn(job, groups, taught, clock)


def _learn(job: Job, groups: list[Group], taught: list[Group], clock: dict[str, float]) -> None:
    """The update, what is logged of it, and what the guards make of it."""
    config = job.config
    job.listener.doing("updating")
    learning_rate = learning_rate_at(job.step, config.train) * 0.5 ** guards.rollbacks(job.history)
    for parameters in job.optimizer.param_groups:
        parameters["lr"] = learning_rate
    sound = all(math.isfinite(p) for group in taught for c in group.completions for p in c.logprobs)
    with timed(clock, "update_s"):
        statistics = update(
            job.policy,
            job.optimizer,
            prepare_rows(taught if sound else [], config.objective, config.rollout.max_new_tokens),
            config.objective,
            temperature=config.rollout.temperature,
            updates=config.train.updates_per_batch,
            limits=job.limits,
            max_grad_norm=config.train.max_grad_norm,
            foreign=config.rollout.engine == "vllm",
        )
    if not sound:  # as if the loss had come out so
        statistics["updates_skipped"] = config.train.updates_per_batch
    elif (drift := _drift(job, taught)) is not None:
        statistics["update_kl"] = drift
    tokens = sum(len(completion.ids) for group in groups for completion in group.completions)
    clock["tokens_per_s"] = tokens / clock["rollout_s"]
    metrics: Metrics = {
        "step": job.step + 1,
        **finite(of_rollout(groups, config.rewards.solved_at)),
        **failure_counts(groups),
        **finite(statistics),
        "learning_rate": learning_rate,
        "tokens": tokens,
        "clock": {**clock, **memory()},
    }
    job.history.append(metrics)
    norms = [line["grad_norm"] for line in job.history[-NORM_WINDOW:] if line["grad_norm"]]  # 0 or None: no update
    metrics["grad_norm_variance"] = pvariance(norms) if norms else None
    trouble = recovery.watch(job, metrics) or _hopeless(job, metrics)
    job.torn = True
    job.run.log_step(metrics, groups, job.policy.pieces)
    job.step += 1
    job.torn = False
    job.listener.step(metrics, groups)
    if trouble is not None:
        raise Stopped(trouble, 1)


def _hopeless(job: Job, metrics: Metrics) -> str | None:
    """After the first step: why nothing can be learned, as far as it and the score before training tell."""
    if job.step > 0 or not (job.config.train.preflight and job.evaluations):
        return None
    return of_first_step(job.evaluations[0], metrics, job.config)


@torch.no_grad()
def _drift(job: Job, taught: Sequence[Group]) -> float | None:
    """KL from the policy that sampled to the one after the update, on a few of its answers (nats a token); None
    without an answer that could have taught. NaN where the update has ruined the policy.

    A ruined policy may get no reward any more, hence no further update to see it by; here it shows at once.
    """
    answers = [(group.prompt.ids, c) for group in taught if has_signal(group) for c in group.completions][:PROBED]
    if not answers:
        return None

    def scored(batch: Sequence[Row]) -> float:
        rows = [(row.prompt_ids, row.completion.ids) for row in batch]
        return job.policy.logprobs(rows, job.config.rollout.temperature)[0].sum().item()

    rows = [Row(ids, completion, 0.0, 1.0) for ids, completion in answers]
    after = sum(in_pieces(rows, job.limits, job.policy.packs, scored, lambda: None))
    before = sum(sum(completion.logprobs) for _, completion in answers)
    return (before - after) / sum(len(completion.ids) for _, completion in answers)


def rollout(
    config: Config,
    policy: Policy,
    training: Encoded,
    scorer: Scorer,
    step: int,
    clock: dict[str, float],
    limits: Limits | None = None,
) -> tuple[list[Group], list[Group]]:
    """-> every group that was sampled and scored, and those that go into the update.

    A group is scored as soon as it is whole, while others are still decoded. With `top_up_rounds`, groups without
    signal are dropped and fresh prompts sampled in their place, for at most that many rounds; never until a clock says
    so, or a run could not be repeated.
    """
    wanted = config.train.prompts_per_step
    every: list[Group] = []
    taught: list[Group] = []
    used: set[int] = set()  # a refill brings no prompt that the step has already
    for refill in range(1 + config.rollout.top_up_rounds):
        missing = wanted - len(taught)
        order = batch(len(training), wanted, config.train.seed, step, refill)
        numbers = [i for i in order if refill == 0 or i not in used][:missing]
        used.update(numbers)
        chosen = [training[i] for i in numbers]
        tickets: dict[int, Future[Group]] = {}
        with timed(clock, "rollout_s"):
            prompts = [prompt for _, prompt in chosen]
            for p, completions in sample_groups(policy, prompts, _sampling(config, step, refill), limits):
                tickets[p] = scorer.start(Group(*chosen[p], completions))
        with timed(clock, "reward_s"):  # what was not done by the time that decoding was
            groups = [tickets[p].result() for p in range(len(chosen))]
        every += groups
        taught += [group for group in groups if has_signal(group)] if config.rollout.top_up_rounds else groups
        if len(taught) == wanted:
            break
    return every, taught


def _sampling(config: Config, step: int, refill: int) -> Sampling:
    return Sampling(
        members=config.rollout.group_size,
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=config.rollout.temperature,
        key=(config.train.seed, TRAINING, step, refill),
        **config.rollout.decoding(),
    )


def _evaluate_if_due(job: Job) -> None:
    """Before the first step, after the last one, every `eval.every`; not again where a resumed run has it already."""
    config, step = job.config, job.step
    due = step in (0, config.train.steps) or (config.eval.every and step % config.eval.every == 0)
    if not (due and job.heldout) or any(line["step"] == step for line in job.evaluations):
        return
    job.listener.doing(f"scoring {len(job.heldout)} rows")
    started = time.perf_counter()
    with job.stop.interruptible():
        result = evaluate(
            job.policy, job.heldout, job.scorer, eval_sampling(config),
            samples=config.eval.samples, solved_at=config.rewards.solved_at,
            progress=lambda how_far: job.listener.doing(f"scoring, {how_far}"),
            limits=job.limits,
        )  # fmt: skip
    line: Metrics = {"step": step, **result}
    if job.evaluations:
        rows = (job.evaluations[0]["rows"], result["rows"])
        line["gain"] = paired_gain(*([row["solved"] for row in found] for found in rows))
        if config.eval.samples > 1:
            line["gain_k"] = paired_gain(*([any_solved(row) for row in found] for found in rows))
    line["clock"] = {"eval_s": time.perf_counter() - started}
    if config.eval.every and step and all(score_of(line) > score_of(earlier) for earlier in job.evaluations):
        checkpoint.save_adapter(job.policy.save_adapter, job.run.best)
    job.run.log_eval(line)
    job.evaluations.append(line)
    job.listener.evaluated(line)
