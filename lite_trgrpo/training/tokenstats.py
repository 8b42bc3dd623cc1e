"""Statistics over the tokens of one update, independent of how they were cut into micro-batches."""

from collections.abc import Sequence

import torch
from torch import Tensor

BINS = 8  # of the weight histogram, between its lowest and highest possible value


class TokenStatistics:
    """Collects values of the tokens in the loss, [n] each, and reports means, a histogram and quartiles."""

    def __init__(self) -> None:
        self.values: dict[str, list[Tensor]] = {}

    def add(self, mask: Tensor, **values: Tensor) -> None:
        """`values` are [B, T]; only what `mask` [B, T] marks is kept."""
        for name, value in values.items():
            self.values.setdefault(name, []).append(value.detach()[mask].to("cpu", torch.float64))

    def report(self, low: float, high: float) -> dict[str, float | list[float]]:
        """Names as in metrics.jsonl (docs/metrics.md). Nothing where no token was in the loss."""
        tokens = {name: torch.cat(parts) for name, parts in self.values.items()}
        if not tokens or not len(tokens["prob"]):
            return {}
        means = {name: tokens[name].mean().item() for name in tokens}
        order = tokens["prob"].argsort()
        quartiles = torch.tensor_split(tokens["clipped"][order], 4)
        return {
            "entropy": means["entropy"],
            "prob_mean": means["prob"],
            "weight_mean": means["weight"],
            "weight_histogram": histogram(tokens["weight"], low, high),
            "clip_fraction": means["clipped"],
            "clip_by_quartile": [part.mean().item() if len(part) else 0.0 for part in quartiles],
            "sampler_gap_mean": means["gap"],
            "sampler_gap_max": tokens["gap"].max().item(),
            **({"kl": means["kl"]} if "kl" in means else {}),
        }


def merged(parts: Sequence[TokenStatistics]) -> TokenStatistics:
    """Statistics over all tokens of the parts."""
    whole = TokenStatistics()
    for part in parts:
        for name, values in part.values.items():
            whole.values.setdefault(name, []).extend(values)
    return whole


def histogram(values: Tensor, low: float, high: float) -> list[float]:
    """Share of the values in each of BINS equal bins of [low, high]; what lies outside counts at the edge."""
    counts = torch.histc(values.clamp(low, high), bins=BINS, min=low, max=high if high > low else low + 1)
    return (counts / len(values)).tolist()
