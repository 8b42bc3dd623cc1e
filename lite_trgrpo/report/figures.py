"""Figures of `diagnose`, `compare` and the model card, drawn by matplotlib: imported only when one is asked for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lite_trgrpo.errors import ConfigError

GOOD, GREY = "#2a6fbb", "#9aa3ad"


def check(path: Path) -> None:
    """Before hours of work: can a figure be drawn into this file?"""
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise ConfigError(f"a figure cannot be written as {path.name}: end its name in .svg, .png or .pdf")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "lite-trgrpo"  # the same numbers give the same file
    from matplotlib import pyplot

    return pyplot


def diagnosis(result: Mapping[str, Any], path: Path) -> None:
    """Left: gradient norm of single tokens against their probability. Right: share of each quartile by reading."""
    pyplot = _pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    left.scatter(*zip(*result["single_tokens"], strict=True), s=12, color=GOOD, alpha=0.7)
    left.set(xlabel="probability p of the sampled token", ylabel="norm of its LoRA gradient", title="single tokens")
    width = 0.8 / len(result["readings"])
    for k, (reading, quartiles) in enumerate(result["readings"].items()):
        places = [q + k * width for q in range(len(quartiles))]
        right.bar(places, [quartile["norm_share"] for quartile in quartiles], width, label=reading)
    labels = [f"{q['p_low']:.2f} - {q['p_high']:.2f}" for q in result["readings"]["none"]]
    right.set_xticks([q + 0.4 - width / 2 for q in range(len(labels))], labels)
    right.set(xlabel="quartile of p", ylabel="share of the gradient norm", title="quartiles of tokens")
    right.legend(title="weights")
    _save(figure, path)


def comparison(curves: Mapping[str, Sequence[Sequence[float]]], path: Path) -> None:
    """Training reward by step: the mean over seeds, with a band from the lowest to the highest seed.

    `curves` holds, for each objective, one list of rewards a seed.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for name, seeds in curves.items():
        smooth = [_running_mean(seed) for seed in seeds]
        columns = list(zip(*smooth, strict=False))
        steps = range(1, len(columns) + 1)
        [line] = axes.plot(steps, [sum(c) / len(c) for c in columns], label=name)
        axes.fill_between(
            steps, [min(c) for c in columns], [max(c) for c in columns], alpha=0.15, color=line.get_color()
        )
    axes.set(xlabel="step", ylabel="reward (running mean of 5 steps)", title="mean and range over seeds")
    axes.legend()
    _save(figure, path)


def training(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One run by step: mean reward and share of solved answers, with their running means."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 4))
    steps = [line["step"] for line in metrics]
    for name, label, colour in (("reward_mean", "reward", GOOD), ("solved", "solved", "#d98c2b")):
        values = [line[name] if line[name] is not None else float("nan") for line in metrics]
        axes.plot(steps, values, alpha=0.3, color=colour)
        # dashed where the two are one, as with a reward of 0 or 1
        axes.plot(steps, _running_mean(values), "--" if name == "solved" else "-", label=label, color=colour)
    axes.set(xlabel="step", title="training, with running means of 5 steps")
    axes.legend()
    _save(figure, path)


def _running_mean(values: Sequence[float], window: int = 5) -> list[float]:
    return [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i + 1 - window) : i + 1])]


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
