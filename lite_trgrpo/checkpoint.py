"""Checkpoints: written whole or not at all, found by themselves, safetensors and JSON only.

A checkpoint is a folder `step-000050` with `adapter.safetensors`, `optimizer.safetensors` and `state.json`; the last
is written last and holds the size and SHA-256 of the others and a SHA-256 of itself, so a torn or damaged folder is
recognised.
Sampling, data order and schedule are functions of (seed, step): there is no random state to keep.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from lite_trgrpo.errors import RunError

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
        for path in part.iterdir():
            _sync(path)
        final = folder / f"step-{step:06d}"
        if final.exists():  # left by a run that was set back behind it
            shutil.rmtree(final)
        part.replace(final)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot write a checkpoint into {folder}: {error}; the ones before are intact") from None
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)
    return final


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None. Torn ones are passed over."""
    found = sorted(folder.glob("step-*"), key=lambda path: (len(path.name), path.name), reverse=True)
    return next((path for path in found if _is_whole(path)), None)


def steps_done(path: Path) -> int:
    """Of a whole checkpoint."""
    return json.loads((path / STATE).read_text(encoding="utf-8"))["step"]


def load(path: Path, trainable: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put adapter and optimizer back as they were; -> the state that was saved, `step` in it."""
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
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


def _is_whole(path: Path) -> bool:
    try:
        content = json.loads((path / STATE).read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.pop("sha256", None) != _digest(content):
            return False
        return all(_fingerprint(path / name) == mark for name, mark in content["files"].items())
    except (OSError, ValueError):
        return False


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _fingerprint(path: Path) -> list[Any]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _sync(path: Path) -> None:
    """Make sure it is on the disk. Windows cannot open a folder, and does not need to."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
