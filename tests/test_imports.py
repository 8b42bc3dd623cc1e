"""Who may import whom. Imports run one way, down this table; what is slow is imported only where it is used."""

import ast
import re
import subprocess
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lite_trgrpo
from tests.test_cli import COMMANDS

PACKAGE = Path(lite_trgrpo.__file__).parent

# module: (modules of this package, libraries) that it may import, inside functions too; a row uses only rows above it
ALLOWED: dict[str, tuple[str, str]] = {
    "__init__": ("", ""),
    "errors": ("", ""),
    "records": ("", ""),
    "store.disk": ("", ""),
    "store.lock": ("errors", ""),
    "training.stopping": ("errors", ""),
    "objective": ("", "torch"),
    "logprobs": ("", "torch"),
    "training.tokenstats": ("", "torch"),
    "training.packing": ("", ""),
    "options": ("", "pydantic"),
    "config": ("errors options", "pydantic tomli_w"),
    "hub": ("errors", "huggingface_hub"),
    "preflight": ("", ""),
    "preflight.scan": ("errors records", ""),
    "data": ("config errors hub options preflight.scan records", "datasets pyarrow reasoning_gym"),
    "rewards.text": ("errors", ""),
    "rewards.maths": ("rewards.text", "math_verify"),
    "rewards.puzzles": ("rewards.text", ""),
    "rewards.gym": ("errors rewards.text", "reasoning_gym"),
    "rewards.gold": ("rewards.gym", ""),
    "rewards.loading": ("config errors rewards.gym rewards.maths rewards.puzzles rewards.text", ""),
    "rewards.scoring": ("errors records rewards.loading", ""),
    "rewards.wire": ("", ""),
    "rewards.worker": ("errors records rewards.loading rewards.scoring rewards.wire", ""),
    "rewards.process": ("rewards.worker", ""),
    "rewards.cage": ("errors records rewards.process rewards.scoring rewards.wire rewards.worker", ""),
    "rewards": ("rewards.cage rewards.loading rewards.scoring", ""),
    "preflight.findings": ("options records rewards.gold", ""),
    "preflight.rewards": ("errors options preflight.findings records rewards rewards.gold", ""),
    "preflight.samples": ("options preflight.findings records rewards rewards.gold", ""),
    "preflight.told": ("preflight.findings", ""),
    "attention": ("", "torch"),
    "rollout": ("", ""),
    "rollout.sampling": ("", "numpy torch"),
    "rollout.cache": ("", "torch"),
    "rollout.engine": ("attention records rollout.cache rollout.sampling", "numpy torch"),
    "memory": ("errors", "psutil torch"),
    "policy": ("memory records", "torch"),
    "backends": ("", ""),
    "backends.template": ("errors records", ""),
    "backends.weights": ("errors hub", "torch transformers"),
    "backends.loading": ("backends.weights errors options", "bitsandbytes torch transformers"),
    "backends.lora": ("backends.weights config errors hub options", "peft torch"),
    "backends.groups": ("attention", "torch transformers"),
    "backends.reference": ("policy records rollout.engine", "torch transformers"),
    "backends.network": (
        "attention backends.groups backends.reference logprobs policy records rollout.engine",
        "torch",
    ),
    "backends.transformers": (
        "backends.loading backends.lora backends.network backends.reference backends.template backends.weights "
        "errors options policy records rollout.engine",
        "torch transformers",
    ),
    "backends.unsloth": (
        "backends.loading backends.transformers errors options policy records rollout.engine rollout.sampling",
        "numpy torch unsloth vllm",
    ),
    "backends.choice": ("backends.transformers backends.unsloth errors options", "torch"),
    "training": ("", ""),
    "training.weighting": ("objective options", "torch"),
    "training.update": (
        "errors memory objective options policy records training.packing training.tokenstats training.weighting",
        "torch",
    ),
    "training.optimizer": ("options", "bitsandbytes torch"),
    "store": ("", ""),
    "store.checkpoint": ("errors store.disk", "safetensors torch"),
    "store.run": ("config errors options records store.disk", ""),
    "listing": ("config errors store.run", ""),
    "evaluate": ("policy records rewards training.packing", "torch"),
    "training.metrics": ("records", "psutil torch"),
    "training.curriculum": ("", ""),
    "training.guards": ("options", ""),
    "training.job": ("memory options policy records rewards store.run training.curriculum training.stopping", "torch"),
    "training.recovery": ("store.checkpoint training.guards training.job", ""),
    "training.trainer": (
        "data errors evaluate memory options policy preflight.samples records rewards store.checkpoint store.run "
        "training.curriculum training.guards training.job training.metrics training.optimizer training.recovery "
        "training.stopping training.update",
        "torch",
    ),
    "diagnose": ("objective options policy training.update training.weighting", "torch"),
    "plan": (
        "attention backends.loading backends.lora backends.network options records rollout.cache rollout.engine "
        "rollout.sampling training.packing",
        "torch transformers",
    ),
    "check": ("backends.loading config errors options plan store.run", "psutil torch"),
    "machine": ("backends.choice backends.weights data errors options", "huggingface_hub packaging psutil torch"),
    "screen": ("", "rich"),
    "report.html": ("screen", ""),
    "report.charts": ("report.html", "matplotlib"),
    "report.reading": ("config options store.run training.guards training.weighting", "pydantic torch"),
    "report.account": ("__init__ report.html report.reading", ""),
    "report.answers": ("report.html report.reading", ""),
    "report.page": ("report.account report.answers report.charts report.html report.reading", ""),
    "report.several": ("report.account report.charts report.html report.page report.reading", ""),
    "report": ("errors report.page report.reading report.several store.disk store.run", ""),
    "figures": ("errors", "matplotlib"),
    "drawing": ("screen", "rich"),
    "panel": ("drawing records screen training.guards", "rich"),
    "display": ("options panel records screen training.job", "torch"),
    "trackers": ("errors screen", "torch trackio wandb"),
    "resuming": ("errors screen store.checkpoint store.run", ""),
    "session": (
        "__init__ backends.choice backends.loading backends.transformers check config data diagnose display errors "
        "evaluate memory options panel preflight.rewards records report resuming rewards screen store.lock "
        "store.run trackers training.job training.stopping training.trainer training.update",
        "",
    ),
    "integrations": ("", ""),
    "integrations.trl": (
        "backends.loading backends.template backends.transformers data errors objective options records rewards "
        "session training.weighting",
        "datasets torch trl",
    ),
    "preflight.proposal": (
        "backends.transformers check config data errors options preflight.findings records rewards rewards.gold",
        "torch",
    ),
    "preflight.survey": (
        "data errors options policy preflight.rewards preflight.samples preflight.scan records rewards session "
        "training.job",
        "",
    ),
    "sharing": ("", ""),
    "sharing.merge": ("errors", "safetensors torch"),
    "sharing.llamacpp": ("errors", "gguf llama_cpp transformers"),
    "backends.llamacpp": ("backends.template errors options policy records", "llama_cpp torch transformers"),
    "sharing.probe": (
        "backends.llamacpp backends.transformers config data errors evaluate options session sharing.llamacpp "
        "training.packing training.trainer",
        "torch",
    ),
    "sharing.export": (
        "backends.weights errors evaluate options sharing.llamacpp sharing.merge sharing.probe store.run",
        "",
    ),
    "sharing.card": ("config options store.run", "huggingface_hub"),
    "sharing.publish": ("errors figures options sharing.card sharing.export store.run", "huggingface_hub"),
    "compare": ("config errors evaluate options screen session store.checkpoint store.run training.stopping", ""),
    "cli.app": ("__init__ errors training.stopping", "typer"),
    "chat": ("backends.transformers errors options records rewards rollout.engine screen session", ""),
    "cli.work": ("chat cli.app config resuming screen session training.stopping", "typer"),
    "cli.look": (
        "check cli.app compare config figures machine options preflight.proposal preflight.survey preflight.told "
        "screen session",
        "typer",
    ),
    "cli.give": ("cli.app config listing report screen sharing.export sharing.publish store.run", "typer"),
    "cli": ("cli.app cli.give cli.look cli.work", ""),
    "__main__": ("cli", ""),
}  # fmt: skip
# Seconds to import, or not installed everywhere: only inside functions, but for the backend's own base library.
LAZY = {"transformers", "peft", "bitsandbytes", "datasets", "pyarrow", "reasoning_gym", "math_verify", "gguf"}
LAZY |= {"huggingface_hub", "matplotlib", "unsloth", "trackio", "llama_cpp"}
SUBCLASSES = {"integrations.trl"}  # is imported by those alone who use that library
# libraries that pyproject.toml asks for by another name: that of their package, or of one that cannot do without them
COMES_WITH = {"pyarrow": "datasets", "llama_cpp": "llama_cpp_python", "vllm": "unsloth"}  # the last asked for by hand


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1]) if parts[-1] == "__init__" and len(parts) > 1 else ".".join(parts)


MODULES = {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}


def imported(nodes) -> tuple[set[str], set[str]]:
    """-> (modules of this package, libraries) that the import statements among the nodes name."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    own = {_own_module(name) for name in names if name.split(".")[0] == "lite_trgrpo"}
    libraries = {name.split(".")[0] for name in names} - {"lite_trgrpo"} - sys.stdlib_module_names
    return own, libraries


def _own_module(name: str) -> str:
    """`lite_trgrpo.rewards.score` -> rewards, `lite_trgrpo.rewards.gym` -> rewards.gym, `__version__` -> __init__."""
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in MODULES:
        parts.pop()
    return ".".join(parts) or "__init__"


def at_import(tree: ast.AST):
    """Every node that runs when the module is imported: all but the bodies of functions and `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        lazy = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if lazy or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            continue
        yield node
        yield from at_import(node)


# -- the table ----------------------------------------------------------------------------------------------


def test_every_module_has_its_row():
    assert set(MODULES) == set(ALLOWED)


@pytest.mark.parametrize("module", ALLOWED)
def test_a_module_imports_only_what_its_row_allows(module):
    own, libraries = imported(ast.walk(MODULES[module]))
    assert own <= set(ALLOWED[module][0].split())
    assert libraries <= set(ALLOWED[module][1].split())


def test_each_row_names_only_rows_above_it():
    rows = list(ALLOWED)
    assert not [(row, name) for i, row in enumerate(rows) for name in ALLOWED[row][0].split() if name not in rows[:i]]


def test_there_is_no_circle_among_the_imports_as_they_are():
    graph = {name: imported(ast.walk(tree))[0] - {name} for name, tree in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("module", [name for name in ALLOWED if name not in SUBCLASSES])
def test_slow_and_optional_libraries_are_imported_where_they_are_used(module):
    assert not imported(at_import(MODULES[module]))[1] & LAZY


@pytest.mark.parametrize(
    ("library", "modules"),
    [
        ("typer", {"cli.app", "cli.give", "cli.look", "cli.work"}),
        ("rich", {"drawing", "panel", "screen"}),
        ("click", set()),
        ("safetensors", {"store.checkpoint", "sharing.merge"}),
        ("pydantic", {"config", "options", "report.reading"}),
        ("peft", {"backends.lora"}),
        ("trl", {"integrations.trl"}),
        ("unsloth", {"backends.unsloth"}),
        (
            "transformers",
            {f"backends.{name}" for name in ("transformers", "loading", "groups", "reference", "weights", "llamacpp")}
            | {"plan", "sharing.llamacpp"},
        ),
        ("bitsandbytes", {"backends.loading", "training.optimizer"}),
    ],
)
def test_a_library_has_its_place(library, modules):
    assert {name for name, tree in MODULES.items() if library in imported(ast.walk(tree))[1]} == modules


def test_every_library_is_asked_for_in_pyproject():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = project["dependencies"] + [line for lines in project["optional-dependencies"].values() for line in lines]
    declared = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in asked}
    used = set().union(*(imported(ast.walk(tree))[1] for tree in MODULES.values()))
    assert {COMES_WITH.get(library, library) for library in used} <= declared


# -- what an import drags in --------------------------------------------------------------------------------


def loaded_after(code: str) -> set[str]:
    """Top-level modules that a fresh Python has loaded after running the code."""
    script = f"{code}\nimport sys\nprint('\\n'.join({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_loop_and_the_mathematics_load_no_model_library():
    """Not through others either: all that the trainer imports, `data` and `rewards` among it."""
    loaded = loaded_after("import lite_trgrpo.training.trainer, lite_trgrpo.objective, lite_trgrpo.rollout.engine")
    assert {"torch", "lite_trgrpo"} <= loaded
    assert not loaded & (LAZY | {"typer", "rich"})


def test_records_rewards_and_data_load_no_torch():
    loaded = loaded_after("import lite_trgrpo.records, lite_trgrpo.rewards, lite_trgrpo.data, lite_trgrpo.store.run")
    assert not loaded & (LAZY | {"torch", "numpy"})


def test_help_dry_run_and_presets_are_instant():
    """Nothing slow behind them: no torch (2 s), no model library, no numpy."""
    lines = [[*command.split(), "--help"] for command in ["", *COMMANDS]]
    lines += [
        ["--version"],
        ["presets", "list"],
        ["presets", "list", "--objectives"],
        ["train", "--preset", "demo", "--dry-run"],
        ["train", "--bogus"],
    ]
    loaded = loaded_after(
        "from typer.testing import CliRunner\nfrom lite_trgrpo.cli import app\n"
        f"codes = [CliRunner().invoke(app, line).exit_code for line in {lines}]\n"
        f"assert codes == [0] * {len(lines) - 1} + [2], codes"
    )
    assert not loaded & (LAZY | {"torch", "numpy"})
