"""Imports point downwards (the contract in pyproject.toml), and what is slow is imported only where it is used."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import lite_trgrpo
from tests.test_cli import COMMANDS

PACKAGE = Path(lite_trgrpo.__file__).parent
# Seconds to import, or not installed everywhere: only inside functions.
LAZY = {"transformers", "peft", "bitsandbytes", "datasets", "pyarrow", "reasoning_gym", "math_verify", "gguf"}
LAZY |= {"huggingface_hub", "matplotlib", "unsloth", "trackio", "jinja2"}
SUBCLASSES = {"integrations/trl.py"}  # only those who use that library import it
# libraries that pyproject.toml asks for by another name: that of their package, or of one that cannot do without them
COMES_WITH = {"pyarrow": "datasets", "vllm": "unsloth"}  # vllm: by hand


def imports(nodes) -> set[str]:
    """Top-level names of the libraries that the import statements among the nodes name."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name.split(".")[0] for name in names} - {"lite_trgrpo"} - sys.stdlib_module_names


def at_import(tree: ast.AST):
    """Every node that runs when the module is imported: all but the bodies of functions and `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if lazy or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            continue
        yield node
        yield from at_import(node)


def trees() -> dict[str, ast.AST]:
    return {
        path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in PACKAGE.rglob("*.py")
    }


def test_the_contract_of_imports_is_kept():
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(cache_dir=None))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_slow_and_optional_libraries_are_imported_where_they_are_used():
    found = {name: imports(at_import(tree)) & LAZY for name, tree in trees().items() if name not in SUBCLASSES}
    assert not {name: libraries for name, libraries in found.items() if libraries}


def test_every_library_is_asked_for_in_pyproject():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = project["dependencies"] + [line for lines in project["optional-dependencies"].values() for line in lines]
    declared = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in asked}
    used = set().union(*(imports(ast.walk(tree)) for tree in trees().values()))
    assert {COMES_WITH.get(library, library) for library in used} <= declared


def loaded_after(code: str) -> set[str]:
    """Top-level modules that a fresh Python has loaded after running the code."""
    script = f"{code}\nimport sys\nprint('\\n'.join({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_objective_loads_torch_alone():
    before = loaded_after("import torch")
    assert loaded_after("import lite_trgrpo.objective") <= before | {"lite_trgrpo"}


def test_the_loop_loads_no_model_library():
    loaded = loaded_after("import lite_trgrpo.training.loop, lite_trgrpo.rollout.engine")
    assert {"torch", "lite_trgrpo"} <= loaded
    assert not loaded & (LAZY | {"typer", "rich"})


def test_records_rewards_and_data_load_no_torch():
    loaded = loaded_after("from lite_trgrpo import records, rewards\nfrom lite_trgrpo.data import sources")
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
