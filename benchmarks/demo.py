"""The demo over several seeds, as a page of Markdown: scores, curve, a cap four times longer, samples.

    lite-trgrpo train --preset demo --seed 0 --output runs/demo-0      (and so on for other seeds)
    python benchmarks/demo.py runs/demo-0 runs/demo-1 runs/demo-2 > benchmarks/demo.md

The longer cap tells arithmetic from brevity: with the run's own cap a base model also fails by talking too long.
Those scores are computed once and kept in each run folder as long-cap.json.
"""

import json
import platform
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

from lite_trgrpo import session
from lite_trgrpo.config import loading
from lite_trgrpo.store.run import Run

FACTOR = 4


def long_cap(run: Run, adapter: bool) -> dict:
    """Greedy score with a cap `FACTOR` times the run's, of its adapter or of the base."""
    path = run.folder / ("long-cap.json" if adapter else "long-cap-base.json")
    if not path.exists():
        changes = [
            f"eval.max_new_tokens={FACTOR * loading.load(file=run.folder / 'config.toml').rollout.max_new_tokens}"
        ]
        named = {"model.adapter": str(run.adapter) if adapter else None}
        options = loading.load(None, run.folder / "config.toml", [*changes, "eval.samples=0"], named)
        path.write_text(json.dumps(session.evaluate(options)), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def estimate(value: dict) -> str:
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def main(folders: list[str]) -> None:
    runs = [Run.existing(Path(folder)) for folder in folders]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    print(
        f"# The demo, {len(runs)} seeds\n\n{date.today()}, {platform.processor() or platform.machine()}, {versions}.\n"
    )
    print(
        "Greedy pass@1 on 200 held-out rows with 95 % intervals; the gain is paired. Minutes are those of all steps.\n"
    )
    print(
        f"| seed | before | after | gain | cap x{FACTOR}: before | cap x{FACTOR}: after | truncated after | minutes |"
    )
    print("|---|---|---|---|---|---|---|---|")
    base = long_cap(runs[0], adapter=False)
    for run in runs:
        before, after = run.evaluations()[0], run.evaluations()[-1]
        minutes = sum(line["clock"][k] for line in run.metrics() for k in ("rollout_s", "reward_s", "update_s")) / 60
        print(
            f"| {loading.load(file=run.folder / 'config.toml').train.seed} | {estimate(before['pass@1'])} | "
            f"{estimate(after['pass@1'])} | {estimate(after['gain'])} | {estimate(base['pass@1'])} | "
            f"{estimate(long_cap(run, adapter=True)['pass@1'])} | {after['truncated']:.1%} | {minutes:.1f} |"
        )
    print("\nShare of sampled answers solved, mean of five steps:\n")
    for run in runs:
        solved = [line["solved"] for line in run.metrics()]
        print("   ", "  ".join(f"{fmean(solved[i : i + 5]):.2f}" for i in range(0, len(solved), 5)))
    print("\nTen greedy answers of the first run, before and after:\n")
    print("| prompt | gold | before | after |\n|---|---|---|---|")
    for old, new in list(zip(*(runs[0].evaluations()[i]["rows"] for i in (0, -1)), strict=True))[:10]:
        print(f"| {new['prompt']} | {new['answer']} | `{old['greedy']!r}` | `{new['greedy']!r}` |")


if __name__ == "__main__":
    main(sys.argv[1:])
