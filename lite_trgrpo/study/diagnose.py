"""The paper's claim on one's own model: do unlikely tokens dominate the gradient, and what do the weights change?

Completion tokens are split into quartiles of probability. For every reading of the weight, the gradient of the loss is
taken over each quartile alone; the gradient of the whole is their sum.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lite_trgrpo.build import ready, scoring_of
from lite_trgrpo.config.schema import Config, Objective
from lite_trgrpo.data.examples import load_examples
from lite_trgrpo.errors import RunError
from lite_trgrpo.model.policy import Policy
from lite_trgrpo.objective import policy_loss
from lite_trgrpo.training import loop
from lite_trgrpo.training.update import Row, batch_tensors, micro_batches, prepare_rows
from lite_trgrpo.training.weighting import weights_of

SHOWN = ("none", "offset", "centred", "reverse")
QUARTILES = 4


def quartile_gradients(
    policy: Policy, rows: Sequence[Row], objective: Objective, temperature: float, token_budget: int
) -> dict[str, Any]:
    """-> for each reading a list of quartiles (unlikeliest first), each a dict:

    tokens (share of all), p_low, p_high, weight (mean), norm (of the quartile's LoRA gradient), norm_share (of the four
    norms' sum), cosine (with the gradient of all tokens). `tokens` on top is their number.
    """
    edges, count = _edges(rows)
    parameters = list(policy.trainable().values())
    size = sum(p.numel() for p in parameters)
    gradients = {reading: torch.zeros(QUARTILES, size) for reading in SHOWN}  # [4, weights] on the CPU
    sums = {reading: torch.zeros(QUARTILES, 2, dtype=torch.float64) for reading in SHOWN}  # weight, tokens
    for batch in micro_batches(rows, token_budget):
        logprobs, _ = policy.logprobs([(row.prompt_ids, row.completion.ids) for row in batch], temperature)
        mask, sampled, advantages, denominator = batch_tensors(batch, logprobs)
        quartile = torch.bucketize(sampled.exp(), edges.to(logprobs), right=True)  # [B, T] 0..3
        for reading in SHOWN:
            chosen = objective.model_copy(update={"weights": reading})
            weights = weights_of(logprobs, chosen, mean=1.0)
            for q in range(QUARTILES):
                part = mask & (quartile == q)
                if not part.any():
                    continue
                loss = policy_loss(
                    logprobs, logprobs.detach(), advantages, part,
                    weights=weights, placement=objective.placement, denominator=denominator,
                    clip_low=objective.clip_low, clip_high=objective.clip_high, dual_clip=objective.dual_clip,
                )  # fmt: skip
                found = torch.autograd.grad(loss, parameters, retain_graph=True)
                gradients[reading][q] += torch.cat([g.flatten().float().cpu() for g in found])
                weight = part.sum() if weights is None else weights[part].sum()
                sums[reading][q] += torch.tensor([float(weight), float(part.sum())], dtype=torch.float64)
    bounds = [0.0, *edges.tolist(), 1.0]
    table = {reading: _table(gradients[reading], sums[reading], bounds) for reading in SHOWN}
    return {"tokens": count, "readings": table}


def token_gradient_norms(
    policy: Policy, rows: Sequence[Row], temperature: float, tokens: int
) -> list[tuple[float, float]]:
    """(p, norm of the LoRA gradient of log p) of single tokens, spread evenly over the range of probability.

    Theorem 3.1 of the paper bounds this norm by a multiple of 1 - p.
    """
    places = sorted((lp, i, t) for i, row in enumerate(rows) for t, lp in enumerate(row.completion.logprobs))
    chosen = [places[k * (len(places) - 1) // max(1, tokens - 1)] for k in range(min(tokens, len(places)))]
    parameters = list(policy.trainable().values())
    found = []
    for _, i, t in chosen:
        row = rows[i]
        logprobs, _ = policy.logprobs([(row.prompt_ids, row.completion.ids[: t + 1])], temperature)
        gradient = torch.autograd.grad(logprobs[0, t], parameters)
        norm = torch.sqrt(sum((g.float().square().sum() for g in gradient), torch.zeros((), device=logprobs.device)))
        found.append((logprobs[0, t].exp().item(), norm.item()))
    return found


def _edges(rows: Sequence[Row]) -> tuple[Tensor, int]:
    """The three probabilities that cut the tokens of all rows into four equal parts, and the number of tokens."""
    p = torch.tensor([lp for row in rows for lp in row.completion.logprobs], dtype=torch.float64).exp()
    return torch.quantile(p, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)), len(p)


def _table(gradients: Tensor, sums: Tensor, bounds: list[float]) -> list[dict[str, float]]:
    total = gradients.sum(0)
    norms = gradients.norm(dim=1)
    counts = sums[:, 1].clamp(min=1)
    return [
        {
            "tokens": (sums[q, 1] / sums[:, 1].sum()).item(),
            "p_low": bounds[q],
            "p_high": bounds[q + 1],
            "weight": (sums[q, 0] / counts[q]).item(),
            "norm": norms[q].item(),
            "norm_share": (norms[q] / norms.sum()).item(),
            "cosine": torch.cosine_similarity(gradients[q], total, dim=0).item(),
        }
        for q in range(QUARTILES)
    ]


def measure_gradients(config: Config, prompts: int) -> dict[str, Any]:
    """Sample groups for `prompts` training prompts and measure whose gradient is how large."""
    config = config.changed("train", prompts_per_step=prompts)
    with scoring_of(config) as scoring:
        examples, _ = load_examples(config.data, config.eval.rows)
        config, policy, training = ready(config, examples)
        groups, _ = loop.rollout(config, policy, training, scoring, step=0, clock={"rollout_s": 0.0, "reward_s": 0.0})
    rows = prepare_rows(groups, config.objective, config.rollout.max_new_tokens)
    if not rows:
        raise RunError(
            "no group has answers of different reward, so there is no gradient to measure. Try more --prompts"
        )
    temperature, budget = config.rollout.temperature, config.train.micro_batch_tokens
    result = quartile_gradients(policy, rows, config.objective, temperature, budget)
    result["single_tokens"] = token_gradient_norms(policy, rows, temperature, tokens=96)
    return {"prompts": prompts, "rows": len(rows), **result}
