"""The equations, on tensors. Imports torch and nothing else; takes numbers, never a config.

Symbols (docs/method.md explains each once): p = pi_theta(token) of the sampled token, r = pi_theta / pi_old,
A advantage, w token weight, x = pi_ref / pi_theta. All log-probabilities are those of softmax(logits / temperature).
Shapes: P prompts, G completions a group, B = P*G sequences, T completion tokens.

An objective is five choices, each its own function or argument: advantage, token weight, trust region, aggregation
(`denominators`), and filtering (which answers reach the loss at all; not in this file).

Source: Le et al., Token-Regulated Group Relative Policy Optimization, arXiv 2511.00066; GRPO: arXiv 2402.03300. The
others stand at their functions.
"""

import torch
from torch import Tensor

# -- advantages ---------------------------------------------------------------------------------------------


def group_advantages(rewards: Tensor, *, estimator: str = "grpo", eps: float = 1e-4) -> Tensor:
    """[P, G] rewards -> [P, G] advantages, each group judged against itself.

    grpo           A = (R - mean) / (std + eps), unbiased std
    dr-grpo        A = R - mean                                                 (arXiv 2503.20783)
    rloo           A = R - mean of the others = n / (n - 1) (R - mean)          (arXiv 2402.14740)
    reinforce-rej  A = R                                                        (arXiv 2504.11343)

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
    elif estimator == "reinforce-rej":
        advantages = values
    else:
        raise ValueError(f"estimator {estimator!r} is not one of grpo, dr-grpo, rloo, reinforce-rej")
    highest = torch.where(graded, rewards, -torch.inf).amax(1, keepdim=True)
    lowest = torch.where(graded, rewards, torch.inf).amin(1, keepdim=True)
    return torch.where(graded & (highest > lowest), advantages, 0.0)


# -- token weights ------------------------------------------------------------------------------------------


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


def linear_weights(logprobs: Tensor, *, share: float = 0.3) -> Tensor:
    """[B, T] log p -> w = a p + (1 - a), a = `share`, no gradient: advantage reweighting (arXiv 2505.12929)."""
    return share * logprobs.detach().exp() + (1 - share)


# -- trust regions: [B, T] gain of each token, to be maximised ----------------------------------------------


def clipped_gain(r: Tensor, advantages: Tensor, low: float, high: float, dual: float | None = None) -> Tensor:
    """min(r A, clip(r, 1 - low, 1 + high) A) (PPO); with `dual` = c never below c A where A < 0 (arXiv 1912.09729)."""
    gain = torch.min(r * advantages, r.clamp(1 - low, 1 + high) * advantages)
    return gain if dual is None else torch.where(advantages < 0, torch.max(gain, dual * advantages), gain)


def sequence_ratio(log_r: Tensor, mask: Tensor) -> Tensor:
    """s = exp(mean_t log r), one value for all tokens of a sequence (GSPO, arXiv 2507.18071).

    The value is the sequence's, the gradient of token t is s grad log pi_t, so token weights still act on their token.
    With weight 1 and the sequence mean this equals the gradient of s itself.
    """
    mean = (torch.where(mask, log_r, 0.0).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).detach()
    return torch.exp(mean + log_r - log_r.detach())


def cispo_gain(r: Tensor, logprobs: Tensor, advantages: Tensor, cap: float) -> Tensor:
    """sg[min(r, cap)] A log pi: every token keeps its gradient, however far it moved (arXiv 2506.13585)."""
    return r.detach().clamp(max=cap) * advantages * logprobs


def sapo_gain(r: Tensor, advantages: Tensor, tau: float = 1.0, tau_negative: float = 1.05) -> Tensor:
    """(4 / tau) sigmoid(tau (r - 1)) A: a soft gate in place of the clip (arXiv 2511.20347)."""
    t = torch.where(advantages > 0, r.new_tensor(tau), r.new_tensor(tau_negative))
    return 4 / t * torch.sigmoid(t * (r - 1)) * advantages


def dppo_gain(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, low: float, high: float, cap: float = 20.0
) -> Tensor:
    """sg[min(r, cap)] M A log pi; M = 0 once p has moved by more than `high` up (A > 0) or `low` down (A < 0).

    The binary total-variation form of arXiv 2602.04879: the bound is on the probability, not on the ratio.
    """
    p, old = logprobs.detach().exp(), old_logprobs.exp()
    near = torch.where(advantages > 0, p - old <= high, p - old >= -low)
    r = torch.exp(logprobs.detach() - old_logprobs)
    return torch.where(near, r.clamp(max=cap) * advantages * logprobs, 0.0)


def penalised_gain(r: Tensor, advantages: Tensor, penalty: float) -> Tensor:
    """r A - lambda (r - 1)^2: a soft penalty on the ratio's variance in place of the clip (R2VPO)."""
    return r * advantages - penalty * (r - 1).square()


def beyond_bounds(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, trust_region: str, low: float, high: float
) -> Tensor:
    """[B, T] True where a token has left the trust region on the side that its advantage pushes to; sapo and penalty
    have no such bound. For statistics; the losses above do not need it."""
    log_r = logprobs - old_logprobs
    if trust_region == "dppo":
        change = logprobs.exp() - old_logprobs.exp()
        up, down = change > high, change < -low
    elif trust_region in ("clip", "sequence", "cispo"):
        r = (sequence_ratio(log_r, mask) if trust_region == "sequence" else log_r.exp()).expand_as(log_r)
        up, down = r > 1 + high, r < 1 - low
    else:
        return torch.zeros_like(mask)
    if trust_region == "cispo":
        return up & (advantages != 0)  # a cap only, whatever the sign
    return (up & (advantages > 0)) | (down & (advantages < 0))


# -- KL estimates, from log x = log pi_ref - log pi_theta ---------------------------------------------------


def kl_estimate(log_x: Tensor, kind: str = "k3") -> Tensor:
    """Estimates of KL(pi_theta || pi_ref): k1 = -log x, k2 = (log x)^2 / 2, k3 = x - log x - 1 (never below 0)."""
    if kind == "k1":
        return -log_x
    if kind == "k2":
        return log_x.square() / 2
    if kind == "k3":
        return torch.expm1(log_x) - log_x
    raise ValueError(f"kl {kind!r} is not one of k1, k2, k3")


# -- the loss -----------------------------------------------------------------------------------------------


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
    dual_clip: float | None = None,
    penalty: float = 1.0,
    beta: float = 0.0,
    kl: str = "k3",
    placement: str = "surrogate",
    trust_region: str = "clip",
    denominator: float | Tensor,
) -> Tensor:
    """The loss of a micro-batch, to be minimised: a scalar.

    surrogate  J = w gain(r, A) - beta w kl(x)
    ratio      J = min(w r A, clip(w r) A) - beta (w x - log(w x) - 1)          (Eq. 9 as printed; trust region clip)

    logprobs      [B, T] with gradient
    old_logprobs  [B, T] under the policy before the first update of this batch, no gradient
    advantages    [B, 1], or [B, T]
    mask          [B, T] True where a token is in the loss
    weights       [B, T] or None for 1, no gradient
    ref_logprobs  [B, T] under the base model, needed when beta > 0
    trust_region  clip, sequence (GSPO), cispo, sapo, dppo, penalty (R2VPO): the functions above. The upper bound of
                  cispo's ratio is 1 + clip_high; clip_low and clip_high bound the change of probability in dppo
    denominator   a float, or [B, 1]: what the sum of token losses is divided by. It belongs to the optimizer step, not
                  to the micro-batch: B * own length for the sequence mean, all tokens of the step for the token mean.
    """
    # a padded position may hold anything: make it harmless before any function sees it
    logprobs, old_logprobs = torch.where(mask, logprobs, 0.0), torch.where(mask, old_logprobs, 0.0)
    w = torch.ones_like(logprobs) if weights is None else torch.where(mask, weights, 1.0)
    log_r = logprobs - old_logprobs
    if placement == "ratio":
        if trust_region != "clip":
            raise ValueError(f"placement 'ratio' is Eq. 9, whose trust region is clip, not {trust_region!r}")
        gain = clipped_gain(w * log_r.exp(), advantages, clip_low, clip_high, dual_clip)
    elif placement != "surrogate":
        raise ValueError(f"placement {placement!r} is not one of surrogate, ratio")
    elif trust_region == "clip":
        gain = w * clipped_gain(log_r.exp(), advantages, clip_low, clip_high, dual_clip)
    elif trust_region == "sequence":
        gain = w * clipped_gain(sequence_ratio(log_r, mask), advantages, clip_low, clip_high, dual_clip)
    elif trust_region == "cispo":
        gain = w * cispo_gain(log_r.exp(), logprobs, advantages, 1 + clip_high)
    elif trust_region == "sapo":
        gain = w * sapo_gain(log_r.exp(), advantages)
    elif trust_region == "dppo":
        gain = w * dppo_gain(logprobs, old_logprobs, advantages, clip_low, clip_high)
    elif trust_region == "penalty":
        gain = w * penalised_gain(log_r.exp(), advantages, penalty)
    else:
        raise ValueError(f"trust_region {trust_region!r} is not one of clip, sequence, cispo, sapo, dppo, penalty")
    if beta > 0:
        if ref_logprobs is None:
            raise ValueError("beta > 0 needs ref_logprobs")
        log_x = torch.where(mask, ref_logprobs, 0.0) - logprobs
        divergence = w * kl_estimate(log_x, kl) if placement == "surrogate" else kl_estimate(log_x + w.log(), kl)
        gain = gain - beta * divergence
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
