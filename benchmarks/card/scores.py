"""A run in a few lines: scores before and after, where the time went, peak memory.

python benchmarks/card/scores.py RUN
"""

import sys
from pathlib import Path

import kit  # noqa: F401  (puts the checkout on the path)

from lite_trgrpo.store.run import Run


def main(folder: Path) -> None:
    run = Run.existing(folder)
    steps, scores = run.metrics(), run.evaluations()
    for score in scores:
        print(f"after step {score['step']}: pass@1 {score['pass@1']}, scored in {score['clock']['eval_s']:.1f} s")
    if scores and "gain" in scores[-1]:
        print(f"gain {scores[-1]['gain']}")
    spent = {key: sum(step["clock"][key] for step in steps) for key in ("rollout_s", "reward_s", "update_s")}
    print(f"{len(steps)} steps: " + ", ".join(f"{key} {value:.1f}" for key, value in spent.items()))
    if steps:
        speeds = [round(step["clock"]["tokens_per_s"]) for step in steps[::8]]
        gap = max(step.get("sampler_gap_mean", 0.0) for step in steps)
        peak = max(step["clock"].get("cuda_peak_mib", 0) for step in steps)
        print(f"tokens/s {speeds}, largest mean sampler gap {gap:.5f}, peak of the card {peak:,.0f} MiB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
