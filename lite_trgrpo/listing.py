"""What `presets list` says: from the comments at the head of each file, and what it sets."""

from collections.abc import Iterator

from lite_trgrpo import config


def presets() -> Iterator[str]:
    """Lines: what each preset teaches, on which card, how long."""
    for name, path in config.presets().items():
        head = config.head_comment(path)
        model = config.load(name).model
        yield f"{name:10} {model.upstream or model.name} ({head['licence']})"
        for key in ("teaches", "card", "time"):
            yield f"{'':10} {key}: {head[key]}"


def objectives() -> Iterator[str]:
    """Lines: what each recipe is, its formula, source and settings."""
    for name, path in config.objectives().items():
        head = config.head_comment(path)
        settings = config.read_toml(path)["objective"]
        yield f"{name:16} {head['what']}"
        yield from (f"{'':16} {line}" for line in (head["formula"], head["source"]))
        yield f"{'':16} {', '.join(f'{key} = {value}' for key, value in settings.items())}"
