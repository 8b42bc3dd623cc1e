"""Which weight each token gets: the readings of the paper, their controls, and the means of a whole step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lite_trgrpo.config.schema import Objective
from lite_trgrpo.objective import linear_weights, token_weights

# (centre, mu) of the two readings of the paper. docs/method.md says what is certain about them.
READINGS = {"offset": (0.0, 0.25), "centred": (0.25, 0.0)}


def reading(logprobs: Tensor, objective: Objective) -> Tensor:
    """[B, T] log p -> [B, T] weights as `objective.weights` reads them, before any mean over the step is applied."""
    if objective.weights == "none":
        return torch.ones_like(logprobs)
    if objective.weights == "linear":
        return linear_weights(logprobs, share=objective.weight.a)
    if objective.weights == "reverse":  # w(1 - p): the same values, mirrored
        logprobs = torch.log1p(-logprobs.detach().exp().clamp(max=1.0))
    weight = objective.weight
    centre, mu = READINGS.get(objective.weights, READINGS["offset"])
    return token_weights(
        logprobs, alpha=weight.alpha, kappa=weight.kappa, centre=centre, mu=mu, low=weight.low, high=weight.high
    )


def step_mean(sampled: Sequence[Sequence[float]], objective: Objective) -> float:
    """Mean of the weights over all tokens of a step, from the log-probabilities they were sampled with.

    From the sampler, since `constant` needs it before the first micro-batch.
    """
    flat = torch.tensor([logprob for row in sampled for logprob in row], dtype=torch.float64)
    return reading(flat, objective).mean().item() if len(flat) else 1.0


def weights_of(logprobs: Tensor, objective: Objective, mean: float) -> Tensor | None:
    """[B, T] weights as they enter the loss, or None for 1. `mean` is `step_mean` of this step."""
    if objective.weights == "none":
        return None
    if objective.weights == "constant":  # the fair control: as much weight, the same for every token
        return torch.full_like(logprobs, mean)
    return reading(logprobs, objective)


def weight_range(objective: Objective) -> tuple[float, float]:
    """Lowest and highest weight that can occur: the ends of the histogram."""
    weight = objective.weight
    return (1 - weight.a, 1.0) if objective.weights == "linear" else (weight.low, weight.high)
