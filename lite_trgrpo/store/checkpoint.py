"""Checkpoints: written whole or not at all, found by themselves, safetensors and JSON only.

A checkpoint is a folder `step-000050` with `adapter.safetensors`, `optimizer.safetensors` and `state.json`; the last
is written last and holds the size and SHA-256 of the others and a SHA-256 of itself, so a torn or damaged folder is
recognised.
Sampling, data order and schedule are functions of (seed, step): there is no random state to keep.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from lite_trgrpo.errors import RunError
from lite_trgrpo.store.disk import AFTERWARDS, sync
from lite_trgrpo.text import sha256

STATE = "state.json"


def save(
    folder: Path,
    step: int,
    trainable: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
) -> Path:
    """Write `folder/step-NNNNNN`. `step` counts the steps that are done; `state` is anything JSON can hold."""
    tensors, scalars = _flatten(optimizer.state_dict()["state"])
    part: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=folder, prefix=".part-"))
        save_file({name: p.detach().contiguous().cpu() for name, p in trainable.items()}, part / "adapter.safetensors")
        save_file(tensors, part / "optimizer.safetensors")
        files = {path.name: _fingerprint(path) for path in sorted(part.iterdir())}
        kind = type(optimizer).__name__
        content = {**state, "step": step, "optimizer": {"kind": kind, "state": scalars}, "files": files}
        content["sha256"] = _digest(content)
        (part / STATE).write_text(json.dumps(content, indent=1), encoding="utf-8")
        for path in (*part.iterdir(), part):
            sync(path)
        final = at_step(folder, step)
        old = part.with_name(f"{part.name}-old")
        if final.exists():  # left by a run that was set back behind it
            final.replace(old)
        part.replace(final)
        sync(folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot write a checkpoint into {folder}: {error}; {AFTERWARDS}") from None
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)
    return final


def at_step(folder: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` steps, whether or not it exists."""
    return folder / f"step-{step:06d}"


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None. Torn ones are passed over: see `torn`."""
    return next((path for path in _newest_first(folder) if is_whole(path)), None)


def torn(folder: Path) -> list[Path]:
    """The damaged ones that `newest` passes over."""
    return list(takewhile(lambda path: not is_whole(path), _newest_first(folder)))


def prune(folder: Path, step: int, keep: int, also: Collection[int]) -> None:
    """Leave the newest `keep` up to `step`, and those of the steps `also`; what a killed save left behind goes too."""
    past = [path for path in _newest_first(folder) if _number(path) <= step]
    kept = {*past[:keep], *(at_step(folder, other) for other in also)}
    for path in (*_newest_first(folder), *folder.glob(".part-*")):
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def save_adapter(write: Callable[[Path], None], folder: Path) -> dict[str, str]:
    """A policy's `save_adapter` made durable; its failures become RunErrors. -> SHA-256 of the files that decide what
    the adapter does, by name, for the checkpoint.
    """
    try:
        write(folder)
        for path in (*folder.iterdir(), folder, folder.parent):
            sync(path)
        return {
            path.name: sha256(path) for path in sorted(folder.iterdir()) if path.suffix in (".json", ".safetensors")
        }
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot write the adapter into {folder}: {error}; {AFTERWARDS}") from None


def state_of(path: Path) -> dict[str, Any]:
    """What a whole checkpoint keeps besides tensors: step, logs, limits; at the end of a run the adapter's SHA-256."""
    found: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
    return found


def steps_done(path: Path) -> int:
    """Steps done at a whole checkpoint."""
    return state_of(path)["step"]


def is_complete(path: Path) -> bool:
    """Whether a whole checkpoint says that its run had come to its end, adapter and scores included."""
    return state_of(path).get("complete", False)


def load(path: Path, trainable: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put adapter and optimizer back as they were; -> the state that was saved, `step` in it."""
    state = state_of(path)
    adapter = load_file(path / "adapter.safetensors")
    if adapter.keys() != trainable.keys() or any(adapter[n].shape != p.shape for n, p in trainable.items()):
        raise RunError(
            f"{path} belongs to another adapter: names or shapes differ. Use the model.lora_* settings of the run's "
            "config.toml"
        )
    kind = type(optimizer).__name__
    if state["optimizer"]["kind"] != kind:
        raise RunError(
            f"{path} holds the state of the optimizer {state['optimizer']['kind']}, this run uses {kind}. Set "
            "train.optimizer as it was"
        )
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(adapter[name])
    restored = optimizer.state_dict()
    restored["state"] = _unflatten(load_file(path / "optimizer.safetensors"), state["optimizer"]["state"])
    optimizer.load_state_dict(restored)
    return state


def _flatten(state: Mapping[Any, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Optimizer state -> tensors and plain values, keyed `PARAMETER/NAME` (8-bit optimizers nest one level deeper)."""
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Mapping):
            below, plain = _flatten(value)
            tensors |= {f"{key}/{name}": tensor for name, tensor in below.items()}
            scalars |= {f"{key}/{name}": item for name, item in plain.items()}
        elif torch.is_tensor(value):
            tensors[str(key)] = value.detach().contiguous().cpu().clone()  # safetensors refuses shared memory
        else:
            scalars[str(key)] = value
    return tensors, scalars


def _unflatten(tensors: Mapping[str, torch.Tensor], scalars: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *scalars.items()]:
        index, *path, name = key.split("/")
        place = state.setdefault(int(index), {})
        for step in path:
            place = place.setdefault(step, {})
        place[name] = value
    return state


def _newest_first(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("step-*") if p.name[5:].isdecimal()), key=_number, reverse=True)


def _number(path: Path) -> int:
    return int(path.name[5:])


def is_whole(path: Path) -> bool:
    """Whether every file is the one that was written."""
    try:
        content = state_of(path)
        if not isinstance(content, dict) or content.pop("sha256", None) != _digest(content):
            return False
        return all(_fingerprint(path / name) == mark for name, mark in content["files"].items())
    except (OSError, ValueError):
        return False


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _fingerprint(path: Path) -> list[Any]:
    return [path.stat().st_size, sha256(path)]
