"""What the docs promise: links lead somewhere, tables say what the code says, the Python example runs."""

import json
import re
import runpy
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from lite_trgrpo import build
from lite_trgrpo.check import rewards as preflight
from lite_trgrpo.cli import app
from lite_trgrpo.config import loading
from lite_trgrpo.data.examples import load_examples
from lite_trgrpo.training.guards import NAMES

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md"), *ROOT.glob("benchmarks/*.md")]
)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def headings(page: Path) -> set[str]:
    """The anchors that a page's headings get."""
    titles = re.findall(r"(?m)^#+ (.+)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings_that_are_there(page):
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_relative_to(ROOT) and target.exists(), link
        assert not anchor or anchor in headings(target), link


def test_every_page_can_be_reached_from_the_readme():
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        links = [link.partition("#")[0] for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
        waiting += {(page.parent / name).resolve() for name in links if name.endswith(".md")} - reached
    assert set(ROOT.glob("docs/*.md")) <= reached


def explained() -> set[str]:
    """Every word that some page of the docs sets in `code`."""
    return {word for page in ROOT.glob("docs/*.md") for word in re.findall(r"`([\w/@]+)`", page.read_text("utf-8"))}


def test_every_guard_is_explained():
    assert set(NAMES) <= explained()


def test_every_metric_is_explained(tiny_config, tmp_path):
    arguments = ["train", "--config", str(tiny_config), "--output", str(tmp_path / "run")]
    overrides = ["train.steps=1", "objective.beta=0.1", "eval.rows=0"]
    result = CliRunner().invoke(app, [*arguments, *(word for pair in overrides for word in ("--set", pair))])
    assert result.exit_code == 0, result.stderr
    [line] = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    own = {f"reward/{name}" for name in loading.load(file=tiny_config).rewards.functions}
    assert line.keys() - own <= explained()


def test_the_right_answers_to_the_example_puzzles_get_full_marks():
    pytest.importorskip("reasoning_gym")
    config = loading.load("logic-4b", ROOT / "examples" / "knights.toml", ["data.options={ n_people = 2, size = 40 }"])
    training, _ = load_examples(config.data, eval_rows=8)
    with build.scoring_of(config) as scoring:
        found = preflight.of_rewards(training, scoring, config)
    assert (found.facts["accepted"], list(found.findings)) == (found.facts["rows"], [])


def test_the_python_example_trains_an_adapter(tiny_config, tmp_path, capsys):
    example = runpy.run_path(str(ROOT / "examples" / "python.py"))
    groups = example["train"](loading.load(file=tiny_config), steps=2, adapter=tmp_path / "adapter")
    assert [len(group.rewards) for group in groups] == [4, 4]
    assert any(len(set(group.rewards)) > 1 for group in groups), "no signal, so the update below would be none"
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(tensor.abs().sum() > 0 for name, tensor in weights.items() if "lora_B" in name)  # 0 before training
    assert len(capsys.readouterr().out.splitlines()) == 2
