"""The application, the options that commands share, how a command fails."""

import functools
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from lite_trgrpo import __version__
from lite_trgrpo.errors import LiteError
from lite_trgrpo.text import plain
from lite_trgrpo.training.stopping import Stopped

app = typer.Typer(
    name="lite-trgrpo",
    help="Teach a small language model to reason on one GPU: TR-GRPO with LoRA on a 4-bit base.",
    epilog="Start with: lite-trgrpo demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
presets_app = typer.Typer(help="List or print the presets that come with lite-trgrpo.", no_args_is_help=True)
app.add_typer(presets_app, name="presets")

PresetOption = Annotated[
    str | None, typer.Option("--preset", "-p", help="Preset to start from (`lite-trgrpo presets list`)")
]
ObjectiveOption = Annotated[
    str | None, typer.Option("--objective", help="Objective by name (`lite-trgrpo presets list --objectives`)")
]
ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="TOML file of options; overrides the preset")]
SetOption = Annotated[
    list[str], typer.Option("--set", "-s", metavar="SECTION.KEY=VALUE", help="Set one option; may be repeated")
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Set train.seed")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print everything as JSON")]
AdapterOption = Annotated[
    str | None, typer.Option("--adapter", "-a", help="LoRA adapter to load: a folder or a Hub id")
]


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Known failures end with their message and exit code 1, Ctrl-C with 130, a run that stops with its own."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        show_messages()
        try:
            function(*args, **kwargs)
        except LiteError as error:
            print(f"error: {plain(str(error))}", file=sys.stderr)
            raise typer.Exit(1) from None
        except (RuntimeError, MemoryError) as error:
            from lite_trgrpo.model import oom

            if not oom.ran_out(error):
                raise
            print(f"error: {oom.advice('this does', 'train.micro_batch_tokens')}", file=sys.stderr)
            raise typer.Exit(1) from None
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            raise typer.Exit(stopped.code) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from None

    return wrapper


def show_messages() -> None:
    """Let what the library logs appear on the terminal, once however many commands run in this process."""
    library = logging.getLogger("lite_trgrpo")
    warnings.filterwarnings("ignore", category=FutureWarning)  # what one library tells another helps nobody here
    if not library.handlers:
        from lite_trgrpo.terminal.screen import Messages

        library.addHandler(Messages())
        library.setLevel(logging.INFO)


def patience() -> None:
    """Before the libraries are imported, which takes seconds."""
    if sys.stderr.isatty():
        print("loading ...", file=sys.stderr)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit()


VramOption = Annotated[
    str | None, typer.Option("--vram", metavar="SIZE", help="Plan for a card with this much memory, e.g. 8GB")
]


def size_in_bytes(vram: str | None) -> int | None:
    from lite_trgrpo.config.schema import memory_bytes

    try:
        return None if vram is None else memory_bytes(vram)
    except ValueError as error:
        raise typer.BadParameter(f"--vram {vram!r} {error}") from None


def run_options(preset: str | None, adapter: str | None) -> Path | None:
    """The options of the run that an adapter lies in, where no others are given. An adapter that is nowhere is refused
    before anything is loaded.
    """
    from lite_trgrpo.config.loading import adapter_folder

    folder = adapter_folder(adapter) if adapter else None
    file = folder.parent / "config.toml" if folder is not None and preset is None else None
    return file if file is not None and file.is_file() else None
