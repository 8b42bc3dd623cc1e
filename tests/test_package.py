"""What is shipped: wheel and source archive, built offline from a copy of the repository; files of a release."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from lite_trgrpo import __version__

pytest.importorskip("hatchling", reason="builds the packages (extra: dev)")

ROOT = Path(__file__).resolve().parent.parent
NAME = f"lite_trgrpo-{__version__}"
PRESETS = {
    path.relative_to(ROOT).as_posix(): path.read_bytes() for path in (ROOT / "presets").rglob("*") if path.is_file()
}
# What lies about in a checkout and must not travel: an ignored environment, one that is not, caches, runs
STRAY = [
    ".venv/lib/python3.11/site-packages/lite_trgrpo/stray.py",
    "env/lib/python3.11/site-packages/numpy/tests/stray.py",
    "env/lib/python3.11/site-packages/other/docs/stray.md",
    "lite_trgrpo/__pycache__/stray.cpython-311.pyc",
    "runs/demo/stray.safetensors",
]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the repository with strays in it, so that other work in the checkout cannot disturb."""
    copy = tmp_path_factory.mktemp("checkout") / "repository"
    ignored = shutil.ignore_patterns(".git", ".venv*", ".*_cache", "__pycache__", "runs", "dist")
    shutil.copytree(ROOT, copy, ignore=ignored)
    for name in STRAY:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("stray")
    return copy


def build(folder: Path, target: str, into: Path) -> Path:
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(into)],
        cwd=folder, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [built] = into.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    return build(checkout, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory):
    return build(checkout, "sdist", tmp_path_factory.mktemp("sdist"))


def contents(archive: Path) -> dict[str, bytes]:
    """Name -> bytes; of the source archive without its top folder."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as file:
            return {name: file.read(name) for name in file.namelist()}
    with tarfile.open(archive) as file:
        members = [member for member in file.getmembers() if member.isfile()]
        return {member.name.removeprefix(f"{NAME}/"): file.extractfile(member).read() for member in members}


def test_the_wheel_holds_the_presets_as_they_are(wheel):
    inside = {name: data for name, data in contents(wheel).items() if name.startswith("lite_trgrpo/presets/")}
    assert PRESETS
    assert inside == {f"lite_trgrpo/{name}": data for name, data in PRESETS.items()}


def test_the_wheel_holds_every_module_and_nothing_beside_the_package(wheel):
    names = set(contents(wheel))
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lite_trgrpo").rglob("*.py")}
    modules |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "lite_trgrpo").rglob("*.j2")}
    modules.add("lite_trgrpo/report/style.css")
    presets = {f"lite_trgrpo/{name}" for name in PRESETS}
    about = {name for name in names if name.startswith(f"{NAME}.dist-info/")}
    assert names - about == modules | presets


def test_the_wheel_says_what_it_is(wheel):
    inside = contents(wheel)
    about = inside[f"{NAME}.dist-info/METADATA"].decode().splitlines()
    for line in (
        "Name: lite-trgrpo",
        f"Version: {__version__}",
        "License-Expression: Apache-2.0",
        "Requires-Python: >=3.11",
    ):
        assert line in about
    script = inside[f"{NAME}.dist-info/entry_points.txt"].decode().split()
    assert script == ["[console_scripts]", "lite-trgrpo", "=", "lite_trgrpo.cli:main"]
    assert inside[f"{NAME}.dist-info/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()


def test_an_installed_wheel_finds_its_presets_inside_itself(wheel, tmp_path):
    """Away from any checkout: unpacked, first on the path, run from a folder without `presets/`."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    script = (
        "from lite_trgrpo.config.loading import objectives, presets\n"
        "print(*presets().values(), *objectives().values(), sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    folder = tmp_path / "site" / "lite_trgrpo"
    tables = sorted(str(folder / name) for name in PRESETS if name.endswith(".toml"))
    assert sorted(done.stdout.splitlines()) == tables, done.stderr


def test_the_source_archive_holds_what_a_checkout_does(sdist):
    names = set(contents(sdist))
    for folder, pattern in [("lite_trgrpo", "*.py"), ("presets", "*.toml"), ("tests", "*.py"), ("examples", "*.*")]:
        expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob(pattern)}
        expected = {name for name in expected if "__pycache__" not in name}
        assert expected and expected <= names, folder
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "start.py", "constraints.txt"} <= names
    assert "CITATION.cff" in names


@pytest.mark.parametrize("archive", ["wheel", "sdist"])
def test_nothing_that_lies_about_is_shipped(archive, request):
    """An environment in a folder that no ignore file names (`env/`) holds thousands of folders called tests or docs."""
    names = contents(request.getfixturevalue(archive))
    assert not [name for name in names if "stray" in name or "venv" in name or "site-packages" in name]


def test_a_wheel_built_from_the_source_archive_is_the_same(wheel, sdist, tmp_path):
    with tarfile.open(sdist) as file:
        file.extractall(tmp_path / "unpacked", filter="data")
    again = build(tmp_path / "unpacked" / NAME, "wheel", tmp_path / "again")
    assert contents(again) == contents(wheel)


# -- around a release ---------------------------------------------------------------------------------------


def github(name: str):
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((ROOT / ".github" / name).read_text(encoding="utf-8"))


def test_the_workflow_tests_every_python_and_system_with_commands_of_the_repository():
    jobs = github("workflows/tests.yml")["jobs"]
    start = runpy.run_path(str(ROOT / "start.py"))
    matrix = jobs["default-suite"]["strategy"]["matrix"]
    assert matrix["python"] == [f"3.{minor}" for minor in range(start["OLDEST"][1], start["NEWEST"][1] + 1)]
    assert {system.partition("-")[0] for system in matrix["os"]} == {"ubuntu", "macos", "windows"}
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert len(commands) == len(jobs), "one command a job, which also runs elsewhere"
    assert all((ROOT / command.split()[1]).is_file() for command in commands), commands


def test_a_release_needs_no_stored_token_and_the_tag_names_the_version():
    workflow = (ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8")
    jobs = github("workflows/release.yml")["jobs"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"} and "secrets." not in workflow
    assert f"dist/{NAME}-py3-none-any.whl".replace(__version__, "${GITHUB_REF_NAME#v}") in workflow


def test_templates_ask_for_the_machine():
    folder = ROOT / ".github"
    for path in [*folder.glob("ISSUE_TEMPLATE/*.yml"), folder / "PULL_REQUEST_TEMPLATE.md"]:
        assert "lite-trgrpo check --json" in path.read_text(encoding="utf-8"), path


def test_the_citation_is_the_paper_that_the_readme_names():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    [paper] = [one["value"] for one in citation["preferred-citation"]["identifiers"]]
    assert re.findall(r"arXiv \d+\.\d+", (ROOT / "README.md").read_text(encoding="utf-8"))[0] == paper.replace(":", " ")
