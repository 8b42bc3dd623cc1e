"""From the names in a config to reward functions that are known to be callable."""

import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from lite_trgrpo.config.loading import nearest
from lite_trgrpo.errors import RewardError
from lite_trgrpo.rewards import gym, maths, puzzles, text

RewardFunction = Callable[..., Any]
BATCH = ("prompts", "completions", "completion_ids")  # what every function is offered besides the columns

BUILTINS: Mapping[str, RewardFunction] = {
    "math": maths.math_answer,
    "number": maths.number,
    "exact": text.exact,
    "format": text.tagged,
    "overlong": text.overlong,
    "knights-and-knaves": puzzles.knights_and_knaves,
    "reasoning-gym": gym.reasoning_gym_task,
}


@dataclass(frozen=True, slots=True)
class Reward:
    """A function, what its values count in the sum, and the options it is called with."""

    name: str
    """Name as in the config: a built-in, or path/file.py:function."""
    function: RewardFunction
    weight: float
    options: Mapping[str, Any]
    """Keyword arguments of every call; an option wins over a column of the same name."""
    truncated_max_zero: bool = False
    """An answer that the token cap cut off gets at most 0."""


def load(
    functions: Mapping[str, float], options: Mapping[str, Mapping[str, Any]], truncated_max_zero: bool = False
) -> list[Reward]:
    """Weights by name, options by name -> rewards in the same order, all with the same `truncated_max_zero`.

    A file named twice is run once. Raises RewardError for an unknown name, a file that cannot be imported, an
    option the function does not have or refuses, or a weight that is no finite number.
    """
    if functions and not any(functions.values()):
        raise RewardError(f"every reward has weight 0: {dict(functions)}. Give at least one another weight")
    modules: dict[Path, ModuleType] = {}
    rewards = []
    for name, weight in functions.items():
        if not math.isfinite(weight):
            raise RewardError(f"reward '{name}' has weight {weight}; it must be a finite number, e.g. 1.0")
        given = dict(options.get(name, {}))
        if name in BUILTINS:
            rewards.append(_builtin(name, weight, given))
        else:
            rewards.append(_from_file(name, weight, given, modules))
    return [replace(reward, truncated_max_zero=truncated_max_zero) for reward in rewards]


def _builtin(name: str, weight: float, given: dict[str, Any]) -> Reward:
    """A built-in with all of its options. They are its keyword-only parameters."""
    function = BUILTINS[name]
    known = {p.name: p.default for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
    _check_options(name, given, list(known))
    missing = [key for key, default in known.items() if default is inspect.Parameter.empty and key not in given]
    if missing:
        raise RewardError(
            f"reward '{name}' needs {' and '.join(missing)}. Type "
            f"[rewards.options.{name}] {missing[0]} = ... in the config"
        )
    # Defaults are bound here, so that a data column called `tags` is never taken for the option.
    options = known | given
    # Built-ins check their options, and import what they need, before they look at the rows: do so now.
    function([], [], [], answer=[], metadata=[], **options)
    return Reward(name, function, weight, options)


def _from_file(name: str, weight: float, given: dict[str, Any], modules: dict[Path, ModuleType]) -> Reward:
    """A person's own function: `path/file.py:function`."""
    file, colon, attribute = name.rpartition(":")
    if not colon and not name.endswith(".py"):
        raise RewardError(
            f"no reward '{name}'.{nearest(name, list(BUILTINS))} There are: {', '.join(BUILTINS)}; "
            "or type path/file.py:function"
        )
    # `own.py` and `C:\own.py` name a file and no function
    path = Path(name if name.endswith(".py") else file).expanduser()
    if path not in modules:
        modules[path] = _import(path)
    module = modules[path]
    mine = [
        key for key, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == module.__name__
    ]
    if name.endswith(".py"):
        raise RewardError(f"reward '{name}' names no function; type {name}:FUNCTION, one of {', '.join(mine)}")
    function = vars(module).get(attribute)
    if not callable(function):
        found = "is no function" if function is not None else "does not exist"
        raise RewardError(
            f"reward '{name}': '{attribute}' {found} in {path}.{nearest(attribute, mine)} "
            f"Its functions are: {', '.join(mine) or 'none'}"
        )
    _check_function(name, function, given)
    return Reward(name, function, weight, given)


def _import(path: Path) -> ModuleType:
    """Run a Python file as a module of its own."""
    if not path.is_file():
        near = nearest(path.name, sorted(other.name for other in path.parent.glob("*.py")))
        raise RewardError(
            f"reward file {path} does not exist.{near} Its path starts at the folder the command runs in: {Path.cwd()}"
        )
    name = _module_name(path.resolve())
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.append(folder)  # last, so that no file there hides a library; its neighbours can be imported
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RewardError(f"reward file {path} is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name while it runs
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise RewardError(
            f"reward file {path} cannot be imported: {type(error).__name__}: {_one_line(error)}. Try: python {path}"
        ) from error
    return module


def _module_name(path: Path) -> str:
    """The file's plain name, under which pickle and multiprocessing look for it, unless another module is called so."""
    if not path.stem.isidentifier() or path.stem in sys.modules:
        return str(path)
    found = importlib.util.find_spec(path.stem)
    return path.stem if found is None or found.origin == str(path) else str(path)


def _check_function(name: str, function: RewardFunction, given: dict[str, Any]) -> None:
    """It must be a function whose signature has the options it was given."""
    if inspect.isclass(function):
        raise RewardError(f"reward '{name}' is a class; name an instance of it: write `judge = Judge()` and name that")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):
        raise RewardError(f"reward '{name}' has no signature to read; wrap it in a plain `def`") from None
    # An option that only **columns would catch is more often a misspelling than meant, so it must be named.
    allowed = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    _check_options(name, given, [key for key in allowed if key not in BATCH])


def _check_options(name: str, given: Mapping[str, Any], allowed: list[str]) -> None:
    for key in given:
        if key not in allowed:
            raise RewardError(
                f"reward '{name}' has no option '{key}' (got {given[key]!r}).{nearest(key, allowed)} "
                f"Allowed: {', '.join(allowed) or 'none'}"
            )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
