"""The notebooks in examples/: no outputs, commands that exist; at night a whole run of each with the demo's model."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

from tests.test_cli import COMMANDS

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "examples").glob("*.ipynb"))
SHORT = "--set train.steps=1 --set train.prompts_per_step=1 --set rollout.group_size=2"
SHORT += " --set eval.rows=2 --set eval.samples=0"


def code(path: Path) -> list[str]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_holds_no_outputs_and_reads_one_parameter(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        assert cell.get("outputs", []) == [] and cell.get("execution_count") is None
    assert sum(text.count("os.environ") for text in code(path)) == 1 and "NOTEBOOK_OPTIONS" in code(path)[0]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_python_and_calls_commands_that_exist(path):
    called = [command for text in code(path) for command in re.findall(r"(?m)^!lite-trgrpo (\w+)", text)]
    assert {"check", "train"} <= set(called) <= set(COMMANDS)
    for text in code(path):
        if not text.startswith("%%"):
            compile(re.sub(r"(?m)^( *)[!%].*", r"\1pass", text), path.name, "exec")


@pytest.mark.slow
@pytest.mark.night
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_first_to_last_cell_with_the_demos_model(path, tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    preset = "--preset demo " if path.stem == "colab" else ""  # without a card `init` chooses the demo's model
    monkeypatch.setenv("NOTEBOOK_OPTIONS", preset + SHORT)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(tmp_path)}}).execute()
    [scores] = tmp_path.glob("runs/*/eval.jsonl")
    assert [json.loads(line)["step"] for line in scores.read_text().splitlines()] == [0, 1]
