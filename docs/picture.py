"""Draw the README's picture from a finished run, with the same lines that were on the screen.

python docs/picture.py runs/demo docs/demo.svg
"""

import io
import sys
from pathlib import Path

from rich.console import Console

from lite_trgrpo import screen
from lite_trgrpo.store.run import Run


def main(folder: str, picture: str) -> None:
    run = Run.existing(Path(folder))
    evaluations, metrics = run.evaluations(), run.metrics()
    console = Console(record=True, width=118, highlight=False, file=io.StringIO())
    console.print("$ lite-trgrpo train --preset demo", style="bold")
    console.print(screen.eval_line(evaluations[0]))
    shown = [0, 1, *range(4, len(metrics), 5)]
    for i in shown:
        console.print(f"step {metrics[i]['step']:>2}/{len(metrics)}  {screen.step_line(metrics[i])}")
    console.print(screen.eval_line(evaluations[-1]))
    for table in screen.comparison(evaluations[0], evaluations[-1], samples=5):
        console.print(table)
    console.save_svg(picture, title="lite-trgrpo")


if __name__ == "__main__":
    main(*sys.argv[1:])
