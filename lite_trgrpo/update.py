"""From scored groups to an optimizer step: micro-batches, loss, backward, statistics."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lite_trgrpo.config import Objective
from lite_trgrpo.objective import denominators, group_advantages, k3, policy_loss, token_weights
from lite_trgrpo.policy import Policy
from lite_trgrpo.records import Completion, Group

# The published readings of the paper's weight: (centre, mu). docs/method.md says what is certain about them.
READINGS = {"offset": (0.0, 0.25), "centred": (0.25, 0.0), "reverse": (0.0, 0.25)}


@dataclass(frozen=True, slots=True)
class Row:
    """One completion on its way into the loss."""

    prompt_ids: tuple[int, ...]
    completion: Completion
    advantage: float
    denominator: float
    """What its token losses are divided by; fixed by the whole step, see `objective.denominators`."""

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + len(self.completion.ids)


def prepare_rows(groups: Sequence[Group], objective: Objective, max_new_tokens: int) -> list[Row]:
    """Advantages and denominators of a whole step, then only the rows that teach something.

    Counted in the denominator: every graded completion (but truncated ones under `mask_truncated`). Dropped
    afterwards, when beta = 0: rows whose advantage is 0, since their loss and gradient are 0.
    """
    rewards = torch.tensor([list(group.rewards) for group in groups], dtype=torch.float64)  # [P, G]
    advantages = group_advantages(rewards, estimator=objective.advantage).flatten().tolist()
    flat = [(group, completion) for group in groups for completion in group.completions]
    counted = [
        sum(completion.sampled)
        if not math.isnan(reward) and (completion.stopped or not objective.mask_truncated)
        else 0
        for (_, completion), reward in zip(flat, rewards.flatten().tolist(), strict=True)
    ]
    divisors = denominators(torch.tensor(counted), objective.aggregation, max_new_tokens).flatten().tolist()
    return [
        Row(group.prompt.ids, completion, advantage, divisor)
        for (group, completion), advantage, count, divisor in zip(flat, advantages, counted, divisors, strict=True)
        if count > 0 and (advantage != 0 or objective.beta > 0)
    ]


def micro_batches(rows: Sequence[Row], token_budget: int) -> Iterator[list[Row]]:
    """Rows of like length together, as many as fit `token_budget` padded tokens (at least one)."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: -row.tokens):  # longest first: what does not fit shows at once
        if batch and (len(batch) + 1) * batch[0].tokens > token_budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def weights_of(logprobs: Tensor, objective: Objective) -> Tensor | None:
    """[B, T] token weights as configured, or None for 1."""
    if objective.weights == "none":
        return None
    centre, mu = READINGS[objective.weights]
    if objective.weights == "reverse":  # w(1 - p): the same values, mirrored
        logprobs = torch.log1p(-logprobs.detach().exp())
    return token_weights(
        logprobs, alpha=objective.alpha, kappa=objective.kappa, centre=centre, mu=mu,
        low=objective.low, high=objective.high,
    )  # fmt: skip


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[Row],
    objective: Objective,
    *,
    temperature: float,
    updates: int,
    token_budget: int,
    max_grad_norm: float,
) -> dict[str, float]:
    """`updates` optimizer steps on the rows of one batch. Returns this step's statistics (names: README)."""
    batches = list(micro_batches(rows, token_budget))
    # One update: pi_old is the current policy. More: pi_old is what it was before the first of them.
    old = [_frozen(policy, batch, temperature) for batch in batches] if updates > 1 else [None] * len(batches)
    with policy.reference():
        reference = [_frozen(policy, batch, temperature) if objective.beta > 0 else None for batch in batches]
    parameters = list(policy.trainable().values())
    sums = Sums()
    losses, norms, skipped = [], [], 0
    for _ in range(updates if rows else 0):
        optimizer.zero_grad()
        loss = 0.0
        for batch, old_logprobs, ref_logprobs in zip(batches, old, reference, strict=True):
            part = _batch_loss(policy, batch, objective, temperature, old_logprobs, ref_logprobs, sums)
            part.backward()
            loss += part.item()
        norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
        if math.isfinite(loss) and math.isfinite(norm):
            optimizer.step()
        else:
            skipped += 1  # one bad batch must not poison the adapter
        losses.append(loss)
        norms.append(norm)
    optimizer.zero_grad()
    return {
        "loss": _mean(losses),
        "grad_norm": _mean(norms),
        "updates_skipped": skipped,
        **sums.means(),
    }


@torch.no_grad()
def _frozen(policy: Policy, batch: Sequence[Row], temperature: float) -> Tensor:
    return policy.logprobs([(row.prompt_ids, row.completion.ids) for row in batch], temperature)[0]


def _batch_loss(
    policy: Policy,
    batch: Sequence[Row],
    objective: Objective,
    temperature: float,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    sums: "Sums",
) -> Tensor:
    logprobs, entropy = policy.logprobs([(row.prompt_ids, row.completion.ids) for row in batch], temperature)
    device, dtype = logprobs.device, logprobs.dtype
    mask = torch.zeros(logprobs.shape, dtype=torch.bool)
    sampled_at = torch.zeros(logprobs.shape, dtype=dtype)
    for i, row in enumerate(batch):
        mask[i, : len(row.completion.ids)] = torch.tensor(row.completion.sampled)
        sampled_at[i, : len(row.completion.ids)] = torch.tensor(row.completion.logprobs, dtype=dtype)
    mask, sampled_at = mask.to(device), sampled_at.to(device)
    advantages = torch.tensor([[row.advantage] for row in batch], dtype=dtype, device=device)
    weights = weights_of(logprobs, objective)
    old = logprobs.detach() if old_logprobs is None else old_logprobs
    loss = policy_loss(
        logprobs, old, advantages, mask,
        weights=weights, ref_logprobs=ref_logprobs,
        clip_low=objective.clip_low, clip_high=objective.clip_high,
        beta=objective.beta, placement=objective.placement,
        denominator=torch.tensor([[row.denominator] for row in batch], dtype=dtype, device=device),
    )  # fmt: skip
    with torch.no_grad():
        sums.add(mask, logprobs, entropy, weights, old, ref_logprobs, sampled_at, advantages, objective)
    return loss


class Sums:
    """Sums over the tokens of a step, for means that do not depend on the micro-batches."""

    def __init__(self) -> None:
        self.tokens = 0
        self.total: dict[str, float] = {}
        self.gap_max = 0.0

    def add(
        self,
        mask: Tensor,
        logprobs: Tensor,
        entropy: Tensor,
        weights: Tensor | None,
        old: Tensor,
        ref: Tensor | None,
        sampled_at: Tensor,
        advantages: Tensor,
        objective: Objective,
    ) -> None:
        ratio = torch.exp(logprobs - old)
        if weights is not None and objective.placement == "ratio":
            ratio = weights * ratio
        clipped = ((ratio > 1 + objective.clip_high) & (advantages > 0)) | (
            (ratio < 1 - objective.clip_low) & (advantages < 0)
        )
        gap = torch.where(mask, (logprobs - sampled_at).abs(), 0.0)
        values = {
            "entropy": entropy,
            "prob_mean": logprobs.exp(),
            "weight_mean": torch.ones_like(logprobs) if weights is None else weights,
            "clip_fraction": clipped.to(logprobs.dtype),
            "sampler_gap_mean": gap,
        }
        if ref is not None:
            values["kl"] = k3(ref - logprobs)
        self.tokens += int(mask.sum())
        for name, value in values.items():
            self.total[name] = self.total.get(name, 0.0) + torch.where(mask, value, 0.0).sum().item()
        self.gap_max = max(self.gap_max, gap.max().item())

    def means(self) -> dict[str, float]:
        if not self.tokens:
            return {}
        return {name: total / self.tokens for name, total in self.total.items()} | {"sampler_gap_max": self.gap_max}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
