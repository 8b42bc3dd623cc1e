"""The equations, on tensors. Imports torch and nothing else; takes numbers, never a config.

Symbols (docs/method.md explains each once): p = pi_theta(token) of the sampled token, r = pi_theta / pi_old,
A advantage, w token weight, x = pi_ref / pi_theta. All log-probabilities are those of softmax(logits / temperature).
Shapes: P prompts, G completions a group, B = P*G sequences, T completion tokens.

Source: Le et al., Token-Regulated Group Relative Policy Optimization, arXiv 2511.00066; GRPO: arXiv 2402.03300.
"""

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, *, estimator: str = "grpo", eps: float = 1e-4) -> Tensor:
    """[P, G] rewards -> [P, G] advantages, each group judged against itself.

    grpo     A = (R - mean) / (std + eps), unbiased std
    dr-grpo  A = R - mean
    rloo     A = (R - mean of the others) = n / (n - 1) (R - mean)

    NaN marks an answer that could not be graded: it is left out of mean, std and count and gets A = 0. A group with
    fewer than two graded answers, or whose rewards are all equal, gets exactly 0 (rounding must not become signal).
    """
    graded = ~torch.isnan(rewards)
    n = graded.sum(1, keepdim=True)  # [P, 1]
    values = torch.where(graded, rewards, 0.0)
    centred = torch.where(graded, rewards - values.sum(1, keepdim=True) / n.clamp(min=1), 0.0)  # [P, G]
    if estimator == "grpo":
        std = (centred.square().sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
        advantages = centred / (std + eps)
    elif estimator == "dr-grpo":
        advantages = centred
    elif estimator == "rloo":
        advantages = centred * n / (n - 1).clamp(min=1)
    else:
        raise ValueError(f"estimator {estimator!r} is not one of grpo, dr-grpo, rloo")
    highest = torch.where(graded, rewards, -torch.inf).amax(1, keepdim=True)
    lowest = torch.where(graded, rewards, torch.inf).amin(1, keepdim=True)
    return torch.where(graded & (highest > lowest), advantages, 0.0)


def token_weights(
    logprobs: Tensor,
    *,
    alpha: float = 2.0,
    kappa: float = 9.0,
    centre: float = 0.0,
    mu: float = 0.25,
    low: float = 1.0,
    high: float = 1.4,
) -> Tensor:
    """[B, T] log p -> [B, T] weights w = clip(alpha (sigmoid(kappa (p - centre)) - mu), low, high), no gradient.

    The paper's two readings: `offset` (centre 0, mu 0.25) and `centred` (centre 0.25, mu 0).
    """
    p = logprobs.detach().exp()
    return (alpha * (torch.sigmoid(kappa * (p - centre)) - mu)).clamp(low, high)


def k3(log_x: Tensor) -> Tensor:
    """Estimate of KL(pi_theta || pi_ref) from log x = log pi_ref - log pi_theta: x - log x - 1, never below 0."""
    return torch.expm1(log_x) - log_x


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    weights: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.0,
    placement: str = "surrogate",
    denominator: float | Tensor,
) -> Tensor:
    """The loss of a micro-batch, to be minimised: a scalar.

    surrogate  J = w min(r A, clip(r) A) - beta w (x - log x - 1)
    ratio      J = min(w r A, clip(w r) A) - beta (w x - log(w x) - 1)          (Eq. 9 as printed)

    logprobs      [B, T] with gradient
    old_logprobs  [B, T] under the policy before the first update of this batch, no gradient
    advantages    [B, 1], or [B, T]
    mask          [B, T] True where a token is in the loss
    weights       [B, T] or None for 1, no gradient
    ref_logprobs  [B, T] under the base model, needed when beta > 0
    denominator   a float, or [B, 1]: what the sum of token losses is divided by. It belongs to the optimizer step, not
                  to the micro-batch: B * own length for the sequence mean, all tokens of the step for the token mean.
    """
    w = torch.ones_like(logprobs) if weights is None else weights
    r = torch.exp(logprobs - old_logprobs)
    if placement == "surrogate":
        gain = w * torch.min(r * advantages, r.clamp(1 - clip_low, 1 + clip_high) * advantages)
    elif placement == "ratio":
        gain = torch.min(w * r * advantages, (w * r).clamp(1 - clip_low, 1 + clip_high) * advantages)
    else:
        raise ValueError(f"placement {placement!r} is not one of surrogate, ratio")
    if beta > 0:
        if ref_logprobs is None:
            raise ValueError("beta > 0 needs ref_logprobs")
        log_x = ref_logprobs - logprobs
        gain = gain - beta * (w * k3(log_x) if placement == "surrogate" else k3(log_x + w.log()))
    # where, not multiplication: a padded position may hold anything, infinities included
    return -(torch.where(mask, gain, 0.0) / denominator).sum()


def denominators(lengths: Tensor, aggregation: str, max_new_tokens: int) -> Tensor:
    """[B] counted tokens of each sequence of the whole optimizer step -> [B, 1] for `policy_loss`.

    sequence  mean over sequences of their token means (GRPO): B * length
    token     mean over all tokens of the step (DAPO)
    constant  sum over a constant, B * max_new_tokens (Dr. GRPO)

    Sequences without counted tokens (not graded, masked) are no part of B.
    """
    count = (lengths > 0).sum().clamp(min=1)
    if aggregation == "sequence":
        per_row = count * lengths.clamp(min=1)
    elif aggregation == "token":
        per_row = lengths.sum().clamp(min=1).expand_as(lengths)
    elif aggregation == "constant":
        per_row = (count * max_new_tokens).expand_as(lengths)
    else:
        raise ValueError(f"aggregation {aggregation!r} is not one of sequence, token, constant")
    return per_row.unsqueeze(1).to(torch.get_default_dtype())
