"""The command line. Commands are short; what is heavy is imported inside them, so that --help is instant."""

import functools
import json
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from lite_trgrpo import __version__
from lite_trgrpo.errors import LiteError
from lite_trgrpo.stopping import Stop, Stopped, next_time

app = typer.Typer(
    name="lite-trgrpo",
    help="Teach a small language model to reason on one GPU: TR-GRPO with LoRA on a 4-bit base.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
presets_app = typer.Typer(help="The presets that come with lite-trgrpo.", no_args_is_help=True)
app.add_typer(presets_app, name="presets")

PresetOption = Annotated[
    str | None, typer.Option("--preset", "-p", help="A preset by name: see `lite-trgrpo presets list`")
]
ObjectiveOption = Annotated[
    str | None, typer.Option("--objective", help="An objective recipe: see `lite-trgrpo presets list --objectives`")
]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="A TOML file of options, laid over the preset")
]
SetOption = Annotated[
    list[str], typer.Option("--set", "-s", metavar="SECTION.KEY=VALUE", help="One option; may be repeated")
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="train.seed")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print everything as JSON")]
AdapterOption = Annotated[str | None, typer.Option("--adapter", "-a", help="LoRA adapter: a folder or a Hub id")]


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Known failures end with their message and exit code 1, Ctrl-C with 130, a run that stops with its own."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except LiteError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(1) from None
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            raise typer.Exit(stopped.code) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from None

    return wrapper


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit()


@app.command()
@command
def train(
    preset: PresetOption = None,
    config: ConfigOption = None,
    set_: SetOption = [],  # noqa: B006 (typer copies it)
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The run folder; default runs/PRESET-TIME")
    ] = None,
    objective: ObjectiveOption = None,
    steps: Annotated[int | None, typer.Option("--steps", help="train.steps")] = None,
    seed: SeedOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved options and stop")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with RUN, or with the newest unfinished one")] = False,
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="With --resume: the run's folder")] = None,
    max_hours: Annotated[float | None, typer.Option("--max-hours", help="Stop after so many hours, resumably")] = None,
    stop_at: Annotated[
        str | None, typer.Option("--stop-at", metavar="HH:MM", help="Stop at this time of day, resumably")
    ] = None,
) -> None:
    """Train a LoRA adapter.

    Example: lite-trgrpo train --preset demo
    """
    from lite_trgrpo import config as options

    if max_hours is not None and not max_hours > 0:
        raise typer.BadParameter(f"--max-hours {max_hours:g} must be above 0")
    stop = Stop(max_hours, next_time(stop_at, datetime.now()) if stop_at is not None else None)
    named = {"train.steps": steps, "train.seed": seed}
    if resume:
        if preset or config or output or objective:
            raise typer.BadParameter("--resume takes its options from the run; change one with --set SECTION.KEY=VALUE")
        from lite_trgrpo import session

        run = session.to_resume(run)
        resolved, changed = options.resumed(run, set_, named)
        for line in changed:
            print(f"changed: {line}", file=sys.stderr)
    elif run:
        raise typer.BadParameter(f"'{run}' stands alone: type --preset {run}, or --resume {run} to go on with a run")
    else:
        resolved = options.load(preset, config, set_, named, objective)
    if dry_run:
        print(options.to_toml(resolved), end="")
        return
    from lite_trgrpo import screen, session

    name = preset or (config.stem if config else "run")
    output = output or Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    if len(evaluations := session.train(resolved, output, run, stop).evaluations()) > 1:
        screen.show(screen.comparison(evaluations[0], evaluations[-1]))


@app.command(name="eval")
@command
def evaluate(
    preset: PresetOption = None,
    config: ConfigOption = None,
    adapter: AdapterOption = None,
    set_: SetOption = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, each row with its answer")] = False,
) -> None:
    """Score an adapter, or the base without one, on held-out rows of any source.

    Example: lite-trgrpo eval --preset demo --adapter runs/demo/adapter
    """
    from lite_trgrpo import config as options

    resolved = options.load(preset, config, set_, {"model.adapter": adapter})
    from lite_trgrpo import session

    result = session.evaluate(resolved)
    if as_json:
        print(json.dumps(result, default=str))
        return
    from lite_trgrpo.screen import score_table, show

    show([score_table(result)])


@app.command()
@command
def chat(
    preset: PresetOption = None,
    config: ConfigOption = None,
    adapter: AdapterOption = None,
    set_: SetOption = [],  # noqa: B006
) -> None:
    """Talk to the model, with or without an adapter. An empty line ends it.

    Example: lite-trgrpo chat --preset demo --adapter runs/demo/adapter
    """
    from lite_trgrpo import config as options

    resolved = options.load(preset, config, set_, {"model.adapter": adapter})
    from lite_trgrpo import session

    session.chat(resolved)


@app.command()
@command
def diagnose(
    preset: PresetOption = None,
    config: ConfigOption = None,
    adapter: AdapterOption = None,
    set_: SetOption = [],  # noqa: B006
    prompts: Annotated[int, typer.Option("--prompts", min=1, help="Training prompts to sample groups for")] = 8,
    figure: Annotated[Path | None, typer.Option("--figure", help="Draw it into this .svg or .png file")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure on your model whether unlikely tokens dominate the gradient, and what the weights change.

    Example: lite-trgrpo diagnose --preset demo --figure diagnosis.svg
    """
    from lite_trgrpo import config as options

    resolved = options.load(preset, config, set_, {"model.adapter": adapter})
    from lite_trgrpo import figures, screen, session

    if figure is not None:
        figures.check(figure)
    result = session.diagnose(resolved, prompts)
    if figure is not None:
        figures.diagnosis(result, figure)
    if as_json:
        print(json.dumps(result))
    else:
        screen.show(screen.diagnosis_table(result))


@app.command()
@command
def check(
    preset: PresetOption = None,
    config: ConfigOption = None,
    set_: SetOption = [],  # noqa: B006
    vram: Annotated[
        str | None, typer.Option("--vram", metavar="SIZE", help="Plan for a card of this size, e.g. 8GB")
    ] = None,
    fit: Annotated[Path | None, typer.Option("--fit", metavar="FILE", help="Write options that fit to a file")] = None,
    as_json: JsonOption = False,
) -> None:
    """Will it fit? Memory by part, before any weight is loaded; what to change if it does not. Exit code 1 if so.

    Example: lite-trgrpo check --preset math-1.5b --vram 8GB
    """
    from lite_trgrpo import config as options
    from lite_trgrpo.options import memory_bytes

    try:
        size = None if vram is None else memory_bytes(vram)
    except ValueError as error:
        raise typer.BadParameter(f"--vram {vram!r} {error}") from None
    loaded = options.load(preset, config, set_)
    from lite_trgrpo import check as checks
    from lite_trgrpo import screen

    result, fitting = checks.memory(loaded, size)
    if as_json:
        print(json.dumps(result))
    else:
        screen.show(screen.memory_tables(result))
        print(screen.memory_line(result))
    if fit is not None and fitting is not None:
        fit.write_text(options.to_toml(fitting), encoding="utf-8")
        print(f"options that fit: {fit}; train with: lite-trgrpo train --config {fit}", file=sys.stderr)
    elif not result["fits"]:
        raise typer.Exit(1)


@app.command()
@command
def compare(
    objectives: Annotated[str, typer.Option("--objectives", help="Objective recipes, separated by commas")],
    preset: PresetOption = None,
    config: ConfigOption = None,
    set_: SetOption = [],  # noqa: B006
    seeds: Annotated[str, typer.Option("--seeds", help="Values of train.seed, separated by commas")] = "0,1,2",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the arms, table and figure")] = Path(
        "runs/compare"
    ),
) -> None:
    """Train the same run under several objectives: same prompts, same initial weights, same seeds.

    Stopped and called again it goes on where it was.
    Example: lite-trgrpo compare --preset demo --objectives grpo,constant,tr-grpo,reverse
    """
    from lite_trgrpo import config as options

    if not all(seed.strip().isdigit() for seed in seeds.split(",")):
        raise typer.BadParameter(f"--seeds {seeds!r} is not a list of numbers such as 0,1,2")
    # arms that replace or choose prompts would not see the same ones; one at half the learning rate would be another
    same = {"rollout.top_up_rounds": 0, "train.prefer_half": False, "guards.rollbacks": 0}
    arms = {
        (name, int(seed)): options.load(preset, config, set_, {**same, "train.seed": int(seed)}, name)
        for seed in seeds.split(",")
        for name in (objective.strip() for objective in objectives.split(","))
    }
    from lite_trgrpo import compare as comparing
    from lite_trgrpo import figures, screen

    picture = output / "compare.svg"
    figures.check(picture)
    result = comparing.run_arms(arms, output)
    (output / "compare.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    screen.show([screen.comparison_table(result["objectives"])])
    figures.comparison(result["curves"], picture)


@app.command()
@command
def export(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run", metavar="RUN")],
    merge: Annotated[bool, typer.Option("--merge", help="Merged 16-bit safetensors too")] = False,
    gguf: Annotated[bool, typer.Option("--gguf", help="A GGUF and an Ollama Modelfile too (needs llama.cpp)")] = False,
    gguf_type: Annotated[str, typer.Option("--gguf-type", help="q8_0, f16 or q4_k_m")] = "q8_0",
    push: Annotated[
        str | None, typer.Option("--push", metavar="USER/REPO", help="Put it on the Hugging Face Hub")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Of the repository on the Hub")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the files and the card, and stop")] = False,
) -> None:
    """Write RUN/export: the adapter as others load it, loaded again in a fresh process and compared.

    Example: lite-trgrpo export runs/demo --merge --push USER/REPO
    """
    from lite_trgrpo import config as options
    from lite_trgrpo.run import Run

    found = Run.existing(run)
    resolved = options.load(file=found.folder / "config.toml")
    from lite_trgrpo import publish, screen
    from lite_trgrpo.export import Wanted

    wanted = Wanted(merge, gguf_type if gguf else None)
    if dry_run:
        files, text = publish.preview(found, resolved, wanted, push)
        print("\n".join([*files, "", text]), end="")
        return
    report = publish.deliver(found, resolved, wanted, push, private, screen.say)
    screen.show([screen.export_table(report)])


@presets_app.command(name="list")
@command
def presets_list(
    objectives: Annotated[bool, typer.Option("--objectives", help="List the objective recipes instead")] = False,
) -> None:
    """What each preset teaches, on which card, how long; or each objective's formula and source.

    Example: lite-trgrpo presets list
    """
    from lite_trgrpo import listing

    for line in listing.objectives() if objectives else listing.presets():
        print(line)


@presets_app.command(name="show")
@command
def presets_show(name: Annotated[str, typer.Argument(help="A preset's or objective's name")]) -> None:
    """Print a preset's file: a start for your own (--config).

    Example: lite-trgrpo presets show demo
    """
    from lite_trgrpo import config as options

    known = options.objective_path(name) if name in options.objectives() else options.preset_path(name)
    print(known.read_text(encoding="utf-8"), end="")


def main() -> None:
    app()
