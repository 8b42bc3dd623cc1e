"""Draw the README's picture from a finished run, with the panel and the tables that were on the screen.

python docs/picture.py runs/demo docs/demo.svg
"""

import io
import json
import sys
from pathlib import Path

import psutil
from rich.console import Console

from lite_trgrpo.config.loading import load
from lite_trgrpo.records import Completion, Example, Group, Prompt
from lite_trgrpo.store.run import Run
from lite_trgrpo.terminal import screen
from lite_trgrpo.terminal.panel import Panel

WIDTH, HEIGHT = 124, 24  # of the terminal that is shown


def main(folder: str, picture: str) -> None:
    run = Run.existing(Path(folder))
    options, evaluations, metrics = load(file=run.folder / "config.toml"), run.evaluations(), run.metrics()
    panel = Panel(
        "demo", options.train.steps, options.eval.every, options.rollout.max_new_tokens,
        psutil.virtual_memory().total, metrics, evaluations, last_groups(run, metrics[-1]["step"]),
    )  # fmt: skip
    panel.doing = f"scoring {len(evaluations[-1]['rows'])} rows"
    worked = [line["clock"][part] for line in metrics for part in ("rollout_s", "reward_s", "update_s")]
    panel.started -= sum(worked) + sum(line["clock"]["eval_s"] for line in evaluations)
    console = Console(record=True, width=WIDTH, highlight=False, file=io.StringIO())
    console.print("$ lite-trgrpo train --preset demo", style="bold")
    for line in evaluations:
        console.print(screen.eval_line(line), markup=False)
    for text in panel.lines(WIDTH, HEIGHT):
        console.print(text)
    for table in screen.comparison(evaluations[0], evaluations[-1], samples=5):
        console.print(table)
    console.save_svg(picture, title="lite-trgrpo")


def last_groups(run: Run, step: int) -> list[Group]:
    """The groups of a step as rollouts.jsonl holds them."""
    found = []
    for text in (run.folder / "rollouts.jsonl").read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if line["step"] == step:
            answers = [Completion(tuple(c["ids"]), (), (), c["text"], c["stopped"]) for c in line["completions"]]
            rewards = [float("nan") if c["reward"] is None else c["reward"] for c in line["completions"]]
            example = Example(line["prompt"], {"answer": line["answer"]}, line["origin"])
            found.append(Group(example, Prompt((), ""), answers, rewards))
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
