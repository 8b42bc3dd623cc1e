"""List presets and objectives, from the comments at the head of each file, and runs."""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from lite_trgrpo.config import loading
from lite_trgrpo.errors import ConfigError, RunError
from lite_trgrpo.store.run import Run, run_folders


def presets() -> Iterator[str]:
    """Lines: what each preset teaches, on which card, how long."""
    for name, path in loading.presets().items():
        head = loading.head_comment(path)
        model = loading.load(name).model
        yield f"{name:10} {model.upstream or model.name} ({head['licence']})"
        for key in ("teaches", "card", "time"):
            yield f"{'':10} {key}: {head[key]}"


def objectives() -> Iterator[str]:
    """Lines: what each recipe is, its formula, source and settings."""
    for name, path in loading.objectives().items():
        head = loading.head_comment(path)
        settings = loading.read_toml(path)["objective"]
        yield f"{name:16} {head['what']}"
        yield from (f"{'':16} {line}" for line in (head["formula"], head["source"]))
        yield f"{'':16} {', '.join(f'{key} = {value}' for key, value in settings.items())}"


def runs(folder: Path) -> Iterator[str]:
    """Lines: of each run below `folder`, oldest first, its name, steps, held-out pass@1 and when its last step was."""
    found = sorted((_logged(run), run) for run in run_folders(folder))
    names = {run: run.relative_to(folder).as_posix() for _, run in found}
    if not found:
        raise RunError(f"no run in {folder.absolute()}; start one with: lite-trgrpo train --preset demo")
    width = max(map(len, names.values()))
    yield f"{'run':{width}}  {'steps':>9}  pass@1 before -> after  last step"
    for when, run in found:
        yield f"{names[run]:{width}}  {_progress(run):>9}  {_scores(run):>22}  {when:%Y-%m-%d %H:%M}"


def _logged(run: Path) -> datetime:
    logs = [path for name in ("metrics.jsonl", "config.toml") if (path := run / name).exists()]
    return datetime.fromtimestamp(logs[0].stat().st_mtime)


def _progress(run: Path) -> str:
    try:
        planned = loading.read_toml(run / "config.toml").get("train", {}).get("steps", "?")
        return f"{len(Run(run).metrics())}/{planned}"
    except (ConfigError, RunError):
        return "damaged"


def _scores(run: Path) -> str:
    try:
        scores = [line["pass@1"]["value"] for line in Run(run).evaluations()]
    except RunError:
        return "damaged"
    return f"{scores[0]:.3f} -> {scores[-1]:.3f}" if len(scores) > 1 else f"{scores[0]:.3f} ->   -  " if scores else "-"
