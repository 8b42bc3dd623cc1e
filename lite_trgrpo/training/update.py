"""From scored groups to an optimizer step: micro-batches, loss, backward, statistics."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from lite_trgrpo.config.schema import Objective
from lite_trgrpo.errors import OutOfMemoryError
from lite_trgrpo.model.oom import Limits, advice, free, ran_out
from lite_trgrpo.model.packing import Ids, batches
from lite_trgrpo.model.policy import Policy
from lite_trgrpo.objective import beyond_bounds, denominators, group_advantages, kl_estimate, policy_loss
from lite_trgrpo.records import Completion, Group
from lite_trgrpo.training.tokenstats import TokenStatistics, merged
from lite_trgrpo.training.weighting import step_mean, weight_range, weights_of

Result = TypeVar("Result")
CORRECTION_CAP = 2.0  # of pi_old / q
OVERFLOW_STEP = 4  # powers of two by which the loss scale comes down when a gradient is not finite


@dataclass(frozen=True, slots=True)
class Row:
    """One completion on its way into the loss."""

    prompt_ids: tuple[int, ...]
    completion: Completion
    advantage: float
    denominator: float
    """Divisor of its token losses; fixed by the whole step, see `objective.denominators`."""

    @property
    def sampled_logprobs(self) -> list[float]:
        """Log-probabilities, when sampled, of the tokens that are in the loss."""
        pairs = zip(self.completion.logprobs, self.completion.sampled, strict=True)
        return [logprob for logprob, sampled in pairs if sampled]


def prepare_rows(groups: Sequence[Group], objective: Objective, max_new_tokens: int) -> list[Row]:
    """Advantages and denominators of a whole step, then only the rows that teach something.

    Counted in the denominator: every graded completion (but truncated ones under `mask_truncated`). Dropped
    afterwards: rows whose advantage is 0, where nothing else in the loss acts on them (a KL term, R2VPO's penalty).
    """
    if not groups:
        return []
    rewards = torch.tensor([list(group.rewards) for group in groups], dtype=torch.float64)  # [P, G]
    advantages = group_advantages(rewards, estimator=objective.advantage).flatten().tolist()
    flat = [(group, completion) for group in groups for completion in group.completions]
    counted = [
        sum(completion.sampled)
        if not math.isnan(reward) and (completion.stopped or not objective.mask_truncated)
        else 0
        for (_, completion), reward in zip(flat, rewards.flatten().tolist(), strict=True)
    ]
    pulls_without_advantage = objective.beta > 0 or objective.trust_region == "penalty"
    divisors = denominators(torch.tensor(counted), objective.aggregation, max_new_tokens).flatten().tolist()
    return [
        Row(group.prompt.ids, completion, advantage, divisor)
        for (group, completion), advantage, count, divisor in zip(flat, advantages, counted, divisors, strict=True)
        if count > 0 and (advantage != 0 or pulls_without_advantage)
    ]


def micro_batches(rows: Sequence[Row], token_budget: int, packs: bool = True) -> Iterator[list[Row]]:
    """Batches of rows that fit `token_budget` tokens (at least one row), as the policy reads them."""
    return batches(rows, lambda row: (row.prompt_ids, row.completion.ids), token_budget, packs)


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[Row],
    objective: Objective,
    *,
    temperature: float,
    updates: int,
    limits: Limits,
    max_grad_norm: float,
    foreign: bool = False,
) -> dict[str, float | list[float]]:
    """`updates` optimizer steps on the rows of one batch. Returns this step's statistics (names: docs/metrics.md).

    foreign: another engine sampled, whose probabilities q are not quite the policy's. Then the advantage of each token
    is times min(pi_old / q, 2): truncated importance sampling.

    Where memory runs out, `limits.tokens` is halved and the optimizer step computed anew; where a scaled gradient
    overflows, the scale comes down (`loss_scale`). Raises OutOfMemoryError when a single row does not fit.
    """
    # One update: pi_old is the current policy. More: pi_old is what it was before the first of them.
    old = _frozen(policy, rows, temperature, limits) if updates > 1 else {}
    with policy.reference():
        reference = _frozen(policy, rows, temperature, limits) if objective.beta > 0 else {}
    parameters = list(policy.trainable().values())
    mean_weight = step_mean([row.sampled_logprobs for row in rows], objective)

    def learn(batch: Sequence[Row]) -> tuple[float, TokenStatistics]:
        loss, statistics = _batch_loss(policy, batch, objective, temperature, old, reference, mean_weight, foreign)
        (loss * scale).backward()
        return loss.item(), statistics

    losses: list[float] = []
    norms, skipped = [], 0
    statistics: list[TokenStatistics] = []
    while rows and len(losses) < updates:
        optimizer.zero_grad()
        scale = loss_scale(rows, limits)
        parts = in_pieces(rows, limits, policy.packs, learn, optimizer.zero_grad)
        loss = sum(part for part, _ in parts)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad /= scale
        norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
        if math.isfinite(loss) and not math.isfinite(norm) and scale > 1:
            limits.lowered += OVERFLOW_STEP  # the gradient is computed anew, so no answer of the step is lost
            continue
        statistics += [part for _, part in parts]
        if math.isfinite(loss) and math.isfinite(norm):
            _stepped(optimizer)
        else:
            skipped += 1  # one bad batch must not poison the adapter
        losses.append(loss)
        norms.append(norm)
    optimizer.zero_grad()
    return {
        "loss": _mean(losses),
        "grad_norm": _mean(norms),
        "updates_skipped": skipped,
        **merged(statistics).report(*weight_range(objective)),
    }


def loss_scale(rows: Sequence[Row], limits: Limits) -> float:
    """The power of two by which the loss is multiplied before the backward pass, and the gradient divided after it.

    A token's loss is divided by up to a million (the denominators). In float16 most of such a gradient is rounded to
    zero on its way through the layers; times the smallest denominator it is of the order of 1. In 32 bits and in
    bfloat16 nothing changes, because powers of two are exact there.
    """
    exponent = math.floor(math.log2(min(row.denominator for row in rows)))
    return 2.0 ** max(0, exponent - limits.lowered)


def _stepped(optimizer: torch.optim.Optimizer) -> None:
    """The first step makes the optimizer's state, before it changes a weight: that may not fit."""
    try:
        optimizer.step()
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        raise OutOfMemoryError(advice("the optimizer's state does", "model.lora_rank")) from None


def probe(policy: Policy, prompt_ids: Ids, answers: int, tokens: int, temperature: float, limits: Limits) -> None:
    """Forward and backward of the worst case, so that what does not fit shows now and `limits` come down before step 1.

    prompt_ids: the longest prompt; answers: of a step, `tokens` ids each. Nothing is learned.
    """
    longest = Completion(prompt_ids[:1] * tokens, (True,) * tokens, (0.0,) * tokens, "", False)
    parameters = policy.trainable().values()

    def forget() -> None:
        for parameter in parameters:
            parameter.grad = None

    def work(batch: Sequence[Row]) -> None:
        logprobs, _ = policy.logprobs([(row.prompt_ids, row.completion.ids) for row in batch], temperature)
        logprobs.sum().backward()

    in_pieces([Row(prompt_ids, longest, 1.0, 1.0)] * answers, limits, policy.packs, work, forget)
    forget()


def in_pieces(
    rows: Sequence[Row], limits: Limits, packs: bool, work: Callable[[Sequence[Row]], Result], undo: Callable[[], None]
) -> list[Result]:
    """`work` on every micro-batch. Where memory runs out: `undo`, and everything again in smaller ones."""
    while True:
        found = []
        try:
            for batch in micro_batches(rows, limits.tokens, packs):
                found.append(work(batch))
            return found
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            prompts = {row.prompt_ids for row in batch}
            tokens = sum(len(row.completion.ids) for row in batch) + sum(map(len, prompts))
            limits.fewer_tokens(tokens, len(batch))
        undo()
        del found  # the traceback is gone with the `except`; now nothing holds what had been computed
        free()


@torch.no_grad()
def _frozen(policy: Policy, rows: Sequence[Row], temperature: float, limits: Limits) -> dict[int, Tensor]:
    """log p of each row's completion [T], by the row's id."""

    def score(batch: Sequence[Row]) -> list[tuple[int, Tensor]]:
        logprobs, _ = policy.logprobs([(row.prompt_ids, row.completion.ids) for row in batch], temperature)
        return [(id(row), logprobs[i, : len(row.completion.ids)]) for i, row in enumerate(batch)]

    return dict(pair for part in in_pieces(rows, limits, policy.packs, score, lambda: None) for pair in part)


def _batch_loss(
    policy: Policy,
    batch: Sequence[Row],
    objective: Objective,
    temperature: float,
    old: Mapping[int, Tensor],
    reference: Mapping[int, Tensor],
    mean_weight: float,
    foreign: bool,
) -> tuple[Tensor, TokenStatistics]:
    logprobs, entropy = policy.logprobs([(row.prompt_ids, row.completion.ids) for row in batch], temperature)
    mask, sampled, advantages, denominator = batch_tensors(batch, logprobs)
    weights = weights_of(sampled if objective.weights_from == "sampling" else logprobs, objective, mean_weight)
    old_logprobs = _padded(batch, old) if old else logprobs.detach()
    ref_logprobs = _padded(batch, reference) if reference else None
    corrected = advantages
    if foreign:  # positive, so no trust region changes sides
        corrected = advantages * (old_logprobs - sampled).exp().clamp(max=CORRECTION_CAP)
    loss = policy_loss(
        logprobs, old_logprobs, corrected, mask,
        weights=weights, ref_logprobs=ref_logprobs,
        clip_low=objective.clip_low, clip_high=objective.clip_high, dual_clip=objective.dual_clip,
        penalty=objective.penalty, beta=objective.beta, kl=objective.kl,
        placement=objective.placement, trust_region=objective.trust_region, denominator=denominator,
    )  # fmt: skip
    statistics = TokenStatistics()
    with torch.no_grad():
        moved = logprobs if weights is None or objective.placement == "surrogate" else logprobs + weights.log()
        outside = beyond_bounds(
            moved, old_logprobs, advantages, mask, objective.trust_region, objective.clip_low, objective.clip_high
        )
        statistics.add(
            mask,
            prob=logprobs.exp(),
            entropy=entropy,
            weight=torch.ones_like(logprobs) if weights is None else weights,
            clipped=outside,
            gap=(logprobs - sampled).abs(),
            **({} if ref_logprobs is None else {"kl": kl_estimate(ref_logprobs - logprobs)}),
        )
    return loss, statistics


def _padded(batch: Sequence[Row], logprobs: Mapping[int, Tensor]) -> Tensor:
    """-> [B, T], as the policy gives them."""
    return nn.utils.rnn.pad_sequence([logprobs[id(row)] for row in batch], batch_first=True)


def batch_tensors(batch: Sequence[Row], like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> mask [B, T], log-probabilities when sampled [B, T], advantages [B, 1], denominators [B, 1]."""
    mask = torch.zeros(like.shape, dtype=torch.bool)
    sampled = torch.zeros(like.shape, dtype=like.dtype)
    for i, row in enumerate(batch):
        mask[i, : len(row.completion.ids)] = torch.tensor(row.completion.sampled)
        sampled[i, : len(row.completion.ids)] = torch.tensor(row.completion.logprobs, dtype=like.dtype)
    advantages = torch.tensor([[row.advantage] for row in batch], dtype=like.dtype)
    denominator = torch.tensor([[row.denominator] for row in batch], dtype=like.dtype)
    return mask.to(like.device), sampled.to(like.device), advantages.to(like.device), denominator.to(like.device)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
