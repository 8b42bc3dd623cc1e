"""Show a run: a live panel on a terminal, a line per step, or JSON lines for a script."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, Literal

import torch

from lite_trgrpo.config.schema import Config
from lite_trgrpo.records import Group, Prompt
from lite_trgrpo.terminal import panel as panels
from lite_trgrpo.terminal import screen
from lite_trgrpo.terminal.screen import console, say
from lite_trgrpo.text import plain
from lite_trgrpo.training.state import Listener

Show = Literal["panel", "plain", "json"]
Line = Mapping[str, Any]


def introduce(config: Config, device: torch.device, weights: int, prompts: Line, first: Prompt, folder: str) -> None:
    """Print what is about to be trained on what, and one prompt as the model reads it."""
    say(
        f"{config.model.name} on {device}, {weights:,} trainable weights; {prompts['training']} prompts, "
        f"{prompts['heldout']} held out, {prompts['too_long']} too long and left out\nrun folder {folder}\n"
        "held-out rows are scored before the first step, which takes a while, and after the last\n"
        "the first prompt as the model reads it:"
    )
    console.print(plain(first.text), style="dim", markup=False)


@contextmanager
def watched(
    show: Show,
    panel: panels.Panel,
    log: Callable[[Line], None] = lambda line: None,
    saved: Callable[[], None] = lambda: None,
) -> Iterator[Listener]:
    """A listener for the trainer. Where there is no terminal to draw on, `panel` is `plain`.

    log: is given every step's metrics and every evaluation too; saved: called after each checkpoint
    """
    drawn = show == "panel" and panels.possible()

    def stepped(metrics: dict[str, Any], groups: Sequence[Group]) -> None:
        panel.stepped(metrics, groups)
        log(metrics)
        if show == "json":
            _out({"kind": "step", **metrics})
        elif not drawn:
            say(f"step {metrics['step']}/{panel.steps}  {screen.step_line(metrics)}")

    def doing(what: str) -> None:
        panel.doing = what

    def evaluated(line: dict[str, Any]) -> None:
        panel.evaluated(line)
        log(line)
        if show == "json":
            _out({"kind": "evaluation", **{key: value for key, value in line.items() if key != "rows"}})
        else:
            say(screen.eval_line(line))

    def warned(text: str) -> None:
        panel.warned(text)
        say(text)

    with panels.live(panel) if drawn else nullcontext():
        yield Listener(stepped, doing, evaluated, warned, saved)


def _out(line: Line) -> None:
    """On stdout at once. Whoever reads may have gone; the run goes on."""
    with suppress(OSError):
        print(json.dumps(line, default=str), flush=True)
