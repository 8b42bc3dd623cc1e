"""A fair comparison of objectives: identical prompts, initial weights and sampling numbers; one arm after another."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, pvariance
from typing import Any

from lite_trgrpo import evaluate as evaluation
from lite_trgrpo import session
from lite_trgrpo.build import heldout_of, ready
from lite_trgrpo.config.loading import load
from lite_trgrpo.config.schema import Config
from lite_trgrpo.errors import RunError
from lite_trgrpo.evaluate import eval_sampling, paired_gain
from lite_trgrpo.store.checkpoint import is_complete, newest
from lite_trgrpo.store.run import Run
from lite_trgrpo.terminal.screen import console
from lite_trgrpo.training.stopping import Stop

LAST = 10  # steps over which a final entropy is averaged
Arms = Mapping[tuple[str, int], Config]


def run_arms(arms: Arms, folder: Path) -> dict[str, Any]:
    """Train every (objective, seed) into `folder/OBJECTIVE-sSEED`; what is finished is kept, what is not goes on.

    -> {"objectives": one summary each, in order, "curves": rewards by step for each objective and seed}
    """
    _check(arms, folder)
    for (name, seed), config in arms.items():
        run = Run(folder / f"{name}-s{seed}")
        console.print(f"== {name}, seed {seed}")
        if (run.folder / "kl.json").exists():
            continue
        found = newest(run.checkpoints)
        if found is None or not is_complete(found):
            if found is None:  # nothing worth keeping yet
                shutil.rmtree(run.folder, ignore_errors=True)
            session.train(config, run.folder, run.folder if found else None, Stop())
        kl = kl_to_base(config.changed("model", adapter=str(run.adapter)))
        (run.folder / "kl.json").write_text(json.dumps({"kl_to_base": kl}), encoding="utf-8")
    names = list(dict.fromkeys(name for name, _ in arms))
    runs = {name: [Run(folder / f"{n}-s{seed}") for n, seed in arms if n == name] for name in names}
    return {
        "objectives": [_summary(name, runs[name], runs[names[0]]) for name in names],
        "curves": {
            name: [[step["reward_mean"] or 0.0 for step in run.metrics()] for run in runs[name]] for name in names
        },
    }


def _check(arms: Arms, folder: Path) -> None:
    """Refuse arms that are the same run, and a folder that holds arms of another one."""
    for seed in {seed for _, seed in arms}:
        names = [name for name, s in arms if s == seed]
        for i, name in enumerate(names):
            same = [other for other in names[:i] if arms[other, seed] == arms[name, seed]]
            if same:
                raise RunError(
                    f"{same[0]} and {name} have the same options, because --set or the file overrides what differs"
                )
    for (name, seed), config in arms.items():
        path = folder / f"{name}-s{seed}" / "config.toml"
        if path.exists() and _unpinned(load(file=path)) != _unpinned(config):
            raise RunError(f"{path.parent} was trained with other options. Type --output with another folder")


def _unpinned(config: Config) -> Config:
    """Options without those that a run resolves at its start: the model's commit, the memory of the cache."""
    return config.changed("model", revision=None).changed("rollout", cache_mib=None)


def _summary(name: str, runs: Sequence[Run], baseline: Sequence[Run]) -> dict[str, Any]:
    """One objective over its seeds. The gain is paired over (seed, held-out prompt) with the first objective's."""
    evaluations = [run.evaluations() for run in runs]
    metrics = [run.metrics() for run in runs]
    solved = [row["solved"] for found in evaluations for row in found[-1]["rows"]]
    others = [row["solved"] for run in baseline for row in run.evaluations()[-1]["rows"]]
    norms = [[step["grad_norm"] for step in steps if (step["grad_norm"] or 0) > 0] for steps in metrics]
    entropies = [step["entropy"] for steps in metrics for step in steps[-LAST:] if "entropy" in step]
    weights = [step["weight_mean"] for steps in metrics for step in steps if "weight_mean" in step]
    return {
        "objective": name,
        "before": fmean(found[0]["pass@1"]["value"] for found in evaluations),
        "after": [found[-1]["pass@1"]["value"] for found in evaluations],
        "over_first": paired_gain(others, solved),
        "grad_norm_mean": _mean([_mean(seed) for seed in norms]),
        "grad_norm_variance": _mean([pvariance(seed) for seed in norms if seed]),
        "entropy": _mean(entropies),
        "weight_mean": _mean(weights),
        "kl_to_base": fmean(json.loads((run.folder / "kl.json").read_text())["kl_to_base"] for run in runs),
        "minutes": fmean(_minutes(steps) for steps in metrics),
    }


def _mean(values: Sequence[float]) -> float:
    """0 where no step had an update to take a mean of."""
    return fmean(values) if values else 0.0


def _minutes(steps: Sequence[Mapping[str, Any]]) -> float:
    return sum(step["clock"][key] for step in steps for key in ("rollout_s", "reward_s", "update_s")) / 60


def kl_to_base(config: Config, prompts: int = 64) -> float:
    """KL of the configured adapter to its base, per token (nats), on answers to held-out prompts."""
    config, policy, encoded = ready(config, heldout_of(config)[:prompts])
    return evaluation.kl_to_base(
        policy, [prompt for _, prompt in encoded], eval_sampling(config), config.train.micro_batch_tokens
    )
