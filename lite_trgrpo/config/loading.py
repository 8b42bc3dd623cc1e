"""From presets, files and flags to a run's options, and back to TOML.

Values come from, later winning: the defaults in `schema.py`, a preset, a TOML file, an objective recipe,
`--set section.key=value`, named flags. A key's value is replaced as a whole (a table such as `rewards.functions` is one
value, it is not merged); only a recipe's reward is added to the preset's.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from lite_trgrpo.config.schema import SECTIONS, Config, Guards, Rewards
from lite_trgrpo.errors import ConfigError, ModelError

Settings = dict[str, dict[str, Any]]  # section -> key -> value, not yet validated

# What a resumed run may change: how long, how often, how much at once. All else decides what its steps are.
MAY_CHANGE = {"train.steps", "train.checkpoint_every", "train.checkpoint_minutes", "train.keep_checkpoints"}
MAY_CHANGE |= {"train.micro_batch_tokens", "train.gradient_checkpointing", "rollout.max_rows", "eval.every"}
MAY_CHANGE |= {"train.track", "train.memory"}
MAY_CHANGE |= {f"guards.{name}" for name in Guards.model_fields}


# Options of older versions. Renamed ones are read under their new name; a removed one is ignored at its old default.
RENAMED = {f"objective.{key}": f"objective.weight.{key}" for key in ("alpha", "kappa", "low", "high")}
RENAMED |= {"objective.share": "objective.weight.a", "rewards.must_stop": "rewards.truncated_max_zero"}
REMOVED: dict[str, tuple[Any, str]] = {  # old default, what to do instead
    "model.lora_dropout": (0.0, "remove the line: LoRA trains without dropout"),
    "model.dora": (False, "remove the line, or set model.rslora = true"),
    "rollout.top_p": (1.0, "remove the line: answers come from the whole distribution"),
    "rollout.top_k": (0, "remove the line: answers come from the whole distribution"),
    "objective.normalise_weights": (False, "remove the line and scale objective.weight.alpha, low and high"),
    "train.prefer_half": (False, "use data.scan or rollout.top_up_rounds"),
    "eval.stop_loops": (False, "remove the line, or lower eval.max_new_tokens"),
    "guards.window": (5, "remove the line: the limit is fixed"),
    "guards.grad_norm": (10.0, "remove the line: the limit is fixed"),
    "guards.kl": (2.0, "remove the line: the limit is fixed"),
    "guards.truncated": (0.95, "remove the line: the limit is fixed"),
    "guards.length": (0.9, "remove the line: the limit is fixed"),
}
# What other trainers call our options.
SYNONYMS = {
    "lr": "train.learning_rate", "batch_size": "train.prompts_per_step", "max_steps": "train.steps",
    "epochs": "train.steps", "rank": "model.lora_rank", "r": "model.lora_rank", "max_tokens": "rollout.max_new_tokens",
    "max_completion_length": "rollout.max_new_tokens", "num_generations": "rollout.group_size",
    "load_in_4bit": "model.quantization",
}  # fmt: skip


HUB_ID = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}")


def presets_folder() -> Path:
    """`presets/`: inside the installed package, or of a checkout."""
    here = Path(__file__).parent.parent
    return here / "presets" if (here / "presets").is_dir() else here.parent / "presets"


def presets() -> dict[str, Path]:
    """Name -> file of every preset."""
    return {path.stem: path for path in sorted(presets_folder().glob("*.toml"))}


def objectives() -> dict[str, Path]:
    """Name -> file of every objective recipe: a few options that are laid over a preset."""
    return {path.stem: path for path in sorted((presets_folder() / "objectives").glob("*.toml"))}


def nearest(word: str, allowed: Sequence[str]) -> str:
    """` Did you mean 'x'?` or nothing."""
    close = difflib.get_close_matches(word, allowed, n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def preset_path(name: str) -> Path:
    """The file of a preset by name; an unknown one is an error that lists them."""
    return _named("preset", name, presets())


def objective_path(name: str) -> Path:
    """The file of an objective recipe by name; an unknown one is an error that lists them."""
    return _named("objective", name, objectives())


def _named(kind: str, name: str, known: dict[str, Path]) -> Path:
    if name not in known:
        raise ConfigError(f"no {kind} '{name}'.{nearest(name, list(known))} There are: {', '.join(known)}")
    return known[name]


def head_comment(path: Path) -> dict[str, str]:
    """The `# Key: value` lines at the top of a preset or recipe, keys in lower case."""
    found: dict[str, str] = {}
    key = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.lstrip("# ")
        word, colon, rest = text.partition(":")
        if colon and word.isalpha():
            key, text = word.lower(), rest.strip()
            found[key] = text
        elif key:
            found[key] += f" {text}"
    return found


def is_hub_id(name: str) -> bool:
    """Whether a name in the options is USER/REPO on the Hub, and nothing on this disk."""
    file = Path(name).suffix.lower() in (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz", ".gguf", ".toml")
    return HUB_ID.fullmatch(name) is not None and not file and not Path(name).exists()


def adapter_folder(name: str) -> Path | None:
    """The folder that `model.adapter` names; None: it is a Hub id. Raises ModelError where it is neither."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not is_hub_id(name) or name.startswith("runs/"):
        raise ModelError(f"no adapter folder {folder} (from {Path.cwd()}); type an existing folder, or a Hub id")
    return None


def read_toml(path: Path) -> Settings:
    """A preset or config file as raw settings."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read config {path}: {error.strerror}. Give an existing .toml file") from None
    except (ValueError, RecursionError) as error:  # tomllib's own, bytes that are no text, a number of 5,000 digits
        data = path.suffix in (".jsonl", ".csv", ".parquet")
        hint = f". For a config around this data type: lite-trgrpo init {path}" if data else ""
        raise ConfigError(f"{path} is not valid TOML: {error}{hint}") from None
    return raw


UNSET = object()


def parse_override(text: str) -> tuple[str, str, Any]:
    """`section.key=value` -> (section, key, value). The value is TOML; what is no TOML is a string; nothing
    unsets an option that may be unset. A key may name an entry of [objective.weight]: `objective.weight.kappa=5`.
    """
    name, equals, value = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        known = [f"{part}.{name}" for part, model in SECTIONS.items() for name in model.model_fields]
        meant = [full for full in known if full.rpartition(".")[2] == section] if equals else []
        example = f"{meant[0]}={value}" if meant else "train.learning_rate=2e-5"
        raise ConfigError(f"--set {text!r} is not section.key=value, e.g. --set {example}")
    field = SECTIONS[section].model_fields.get(key) if section in SECTIONS else None
    if not value.strip() and field is not None and field.default is None:
        return section, key, UNSET
    try:
        return section, key, tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        return section, key, value.strip()


def load(
    preset: str | None = None,
    file: Path | None = None,
    overrides: Sequence[str] = (),
    named: Mapping[str, Any] | None = None,
    objective: str | None = None,
) -> Config:
    """Resolve a run's options. `named` holds dotted names from command-line flags; None means not given."""
    merged: Settings = {}
    if preset is not None:
        lay_over(merged, preset_path(preset))
    if file is not None:
        lay_over(merged, file)
    if objective is not None:
        # a recipe adds its reward to those there are instead of replacing them
        given = merged.get("rewards", {}).get("functions", Rewards().functions)
        lay_over(merged, objective_path(objective))
        added = merged.get("rewards", {}).get("functions", {})
        merged.setdefault("rewards", {})["functions"] = given | added if isinstance(given, dict) else given
    for section, key, value in map(parse_override, overrides):
        _put(merged, section, key, value)
    for name, value in (named or {}).items():
        if value is not None:
            section, key = name.split(".")
            _put(merged, section, key, value)
    return validate(merged)


def _put(settings: Settings, section: str, key: str, value: Any) -> None:
    """Set one option under the name that it has today. UNSET takes it out, so that its default holds."""
    section, key = RENAMED.get(f"{section}.{key}", f"{section}.{key}").split(".", 1)
    table = settings.setdefault(section, {})
    outer, dot, inner = key.partition(".")
    if dot and f"{section}.{outer}" == "objective.weight":
        table, key = table.setdefault(outer, {}), inner
    if value is UNSET:
        table.pop(key, None)
    elif key == "weight" and isinstance(value, dict) and isinstance(table.get(key), dict):
        table[key] = table[key] | value
    else:
        table[key] = value


def lay_over(merged: Settings, path: Path) -> None:
    """Put the options of a file over those in `merged`, each under the name that it has today."""
    for section, values in read_toml(path).items():
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: '{section}' is outside a section; sections are {list(SECTIONS)}")
        for key, value in values.items():
            _put(merged, section, key, value)


def validate(settings: Settings) -> Config:
    """Raw settings -> Config, or one ConfigError with every problem in it, one a line."""
    problems = [
        f"{name} = {json.dumps(values[key], default=str)}: this option was removed; {instead}"
        for name, (default, instead) in REMOVED.items()
        for section, key in [name.split(".")]
        for values in [settings.get(section, {})]
        if key in values and values[key] != default
    ]
    settings = {
        section: {key: value for key, value in values.items() if f"{section}.{key}" not in REMOVED}
        for section, values in settings.items()
    }
    try:
        config = Config.model_validate(settings)
    except ValidationError as error:
        problems += [_problem(dict(item)) for item in error.errors()]
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def _problem(item: dict[str, Any]) -> str:
    place = [str(part) for part in item["loc"]]
    name = ".".join(place)
    if item["type"] == "extra_forbidden":
        allowed = list(SECTIONS) if len(place) == 1 else list(SECTIONS[place[0]].model_fields)
        kind = "section" if len(place) == 1 else "option"
        table, _, entry = place[-1].partition(".")
        field = SECTIONS[place[0]].model_fields.get(table) if kind == "option" else None
        if field is not None and isinstance(field.default, dict):
            whole = f"{place[0]}.{table}={{ {entry} = {json.dumps(item['input'], default=str)} }}"
            return f"'{name}': a table is set as a whole: --set '{whole}'"
        elsewhere = [f"{part}.{place[-1]}" for part, model in SECTIONS.items() if place[-1] in model.model_fields]
        meant = SYNONYMS.get(place[-1]) or next(iter(elsewhere), None)
        hint = f" Did you mean '{meant}'?" if meant else nearest(place[-1], allowed)
        return f"unknown {kind} '{name}'.{hint} Allowed: {', '.join(allowed)}"
    if item["type"] == "missing":
        if len(place) == 1:  # model and data are the two sections that a run cannot do without
            key = "name" if name == "model" else "source"
            return (
                f"{name}.{key} is not set. Type --preset NAME (`lite-trgrpo presets list`), or --config FILE "
                f"(`lite-trgrpo init my.jsonl` writes one), or --set {name}.{key}=..."
            )
        return f"{name} is not set. Type --set {name}=..."
    message = item["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if len(place) < 2:  # values of a section, or of several, that do not fit together
        return f"{name}: {message}".removeprefix(": ")
    if item["type"] == "string_type" and not isinstance(item["input"], list | dict):
        message += f"; quote it: --set '{name}=\"{item['input']}\"'"
    return f"{name} = {json.dumps(item['input'], default=str)}: {message}"


# -- writing ----------------------------------------------------------------------------------------------


def toml_line(key: str, value: Any) -> str:
    """`key = value`, with a table or list on the same line."""
    name = tomli_w.dumps({key: 0}).partition(" = ")[0]
    if isinstance(value, Mapping) and value:
        return f"{name} = {{ {', '.join(toml_line(inner, item) for inner, item in value.items())} }}"
    if isinstance(value, list):
        return f"{name} = [{', '.join(toml_line('x', item).removeprefix('x = ') for item in value)}]"
    return f"{name} = {{}}" if isinstance(value, Mapping) else tomli_w.dumps({key: value}).strip()


def to_toml(config: Config) -> str:
    """The resolved config as TOML. Options that are unset (None) have no line; TOML has no null."""
    return tomli_w.dumps(config.model_dump(exclude_none=True))
