"""The user's own line against a small Hub on this machine, and what is said when the Hub refuses or is not there.

Every command is a process of its own: the Hub's address and cache are read when its client is imported.
"""

import io
import json
import os
import subprocess
import sys
import tomllib

import pyarrow
import pyarrow.parquet
import pytest

from tests.hub_server import HubServer
from tests.tiny import gsm8k_rows, tiny_model_folder

MODEL, ROWS = "Qwen/Qwen2.5-1.5B-Instruct", "openai/gsm8k"
CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train-*}
  - {split: test, path: main/test-*}
---
# GSM8K's shape: 50 rows to train on, 20 to test on
"""
# A run that ends while it loads: rows that need no Hub, so that the model is at fault; or the other way round.
BUILTIN = ("--set", "data.source=builtin:addition")
QUESTIONS = ("--set", "model.name=never/reached", "--set", "data.prompt=question")


def parquet(rows: list[dict[str, str]]) -> bytes:
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), content)
    return content.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """What the repositories hold, by their Hub ids."""
    folder = tiny_model_folder(tmp_path_factory.mktemp("model"))
    model = {path.name: path.read_bytes() for path in folder.iterdir()}
    rows = {
        "README.md": CARD.encode(),
        "main/test-00000-of-00001.parquet": parquet(gsm8k_rows(20, seed=2)),
        "main/train-00000-of-00001.parquet": parquet(gsm8k_rows(50, seed=1)),
    }
    return {MODEL: model | {"pytorch_model.bin": b"a pickle that nobody may ask for"}, ROWS: rows}


@pytest.fixture
def hub(files):
    with HubServer() as server:
        server.add(MODEL, files[MODEL])
        server.add(ROWS, files[ROWS], kind="datasets")
        yield server


@pytest.fixture
def train(tmp_path):
    """`lite-trgrpo train ...` with a cache of its own -> the finished process."""

    def run(url: str, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        env = kept | {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
        env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        env |= {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"} | extra
        command = [sys.executable, "-m", "lite_trgrpo", "train", *arguments]
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=500)

    return run


def refused(process: subprocess.CompletedProcess[str], *said: str) -> None:
    """Exit code 1 and nothing on stderr but one `error:` line that holds all of `said` (a plan may come before it)."""
    assert process.returncode == 1, process.stderr
    [line] = [line for line in process.stderr.strip().splitlines() if not line.startswith("memory: ")]
    assert line.startswith("error: ") and all(part in line for part in said), line


@pytest.mark.slow
def test_the_users_own_line_and_again_from_the_cache(files, train, tmp_path):
    # a random model solves nothing, which would end the run after its first step
    line = ("--preset", "math-1.5b", "--steps", "2", "--set", "train.preflight=false", "--output")
    with HubServer() as hub:
        sha = hub.add(MODEL, files[MODEL])
        hub.add(ROWS, files[ROWS], kind="datasets")
        first = train(hub.url, *line, "online")
    assert first.returncode == 0, first.stderr
    second = train(hub.url, *line, "offline", HF_HUB_OFFLINE="1")  # the server is gone
    assert second.returncode == 0, second.stderr

    fetched = [request for request in hub.requests if request.startswith("GET") and f"/{MODEL}/resolve/" in request]
    assert fetched and all(f"/resolve/{sha}/" in request for request in fetched)
    assert not any(".bin" in request for request in hub.requests)
    for name, process in (("online", first), ("offline", second)):
        assert "Traceback" not in process.stderr and "Warning" not in process.stderr
        run = tmp_path / name
        facts = json.loads((run / "run.json").read_text())
        assert (facts["base"], facts["revision"]) == (MODEL, sha)
        counted = {name: facts["prompts"][name] for name in ("training", "heldout", "too_long")}
        assert counted == {"training": 50, "heldout": 20, "too_long": 0}
        assert tomllib.loads((run / "config.toml").read_text())["model"]["quantization"] == "nf4"
        assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
        adapter = json.loads((run / "adapter" / "adapter_config.json").read_text())
        assert (adapter["base_model_name_or_path"], adapter["revision"]) == (MODEL, sha)
        assert (run / "adapter" / "adapter_model.safetensors").is_file()


def test_no_hub(train):
    """The library alone would retry for half a minute, a line each time."""
    with HubServer() as gone:
        pass
    refused(train(gone.url, "--preset", "math-1.5b"), ROWS, "Connection refused", "Check the connection")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "data"])
def test_not_in_the_cache_offline(train, kind):
    arguments = (*BUILTIN, "--set", f"model.name={MODEL}") if kind == "model" else ("--preset", "math-1.5b")
    process = train("http://127.0.0.1:1", *arguments, HF_HUB_OFFLINE="1")
    refused(process, MODEL if kind == "model" else ROWS, "HF_HUB_OFFLINE is set: unset it")


@pytest.mark.slow
def test_a_model_that_the_hub_refuses(hub, files, train):
    def base(name: str, *more: str) -> subprocess.CompletedProcess[str]:
        return train(hub.url, *BUILTIN, "--set", f"model.name={name}", *more)

    hub.add("gated/model", files[MODEL], gated=True)
    pickled = {path: content for path, content in files[MODEL].items() if not path.endswith(".safetensors")}
    hub.add("pickled/model", pickled)
    refused(base("gated/model"), "gated/model is gated", "accept its terms", "`hf auth login`")
    refused(base("no/model"), "no/model is not on the Hub", "check the id", "`hf auth login`")
    refused(base(MODEL, "--set", "model.revision=v9"), f"{MODEL} (revision v9)", "change model.revision")
    refused(base("not an/id"), "model.name 'not an/id'", "a Hub id such as")
    refused(base("pickled/model"), "pickled/model has no .safetensors file", "take another model.name")
    assert not any(".bin" in request for request in hub.requests)


def test_a_gated_data_set(hub, files, train):
    hub.add("gated/rows", files[ROWS], kind="datasets", gated=True)
    process = train(hub.url, *QUESTIONS, "--set", "data.source=gated/rows")
    refused(process, "data set gated/rows is gated", "accept its terms", "`hf auth login`")


@pytest.mark.slow
def test_a_data_set_that_the_hub_refuses(hub, files, train):
    def rows(name: str, *more: str) -> subprocess.CompletedProcess[str]:
        return train(hub.url, *QUESTIONS, "--set", f"data.source={name}", *more)

    hub.add("script/rows", {"README.md": CARD.encode(), "rows.py": b"raise SystemExit"}, kind="datasets")
    refused(rows("no/rows"), "data set no/rows is not on the Hub", "check the id", "`hf auth login`")
    refused(rows(ROWS, "--set", "data.revision=v9"), f"data set {ROWS} (revision v9)", "change data.revision")
    refused(rows(ROWS, "--set", "data.subset=socratic"), "'socratic' not found. Available: ['main']", "data.subset")
    refused(rows(ROWS, "--set", "data.split=valid"), "Should be one of ['train', 'test']", "data.split")
    refused(rows("script/rows"), "scripts are no longer supported", "Look at data.source")


@pytest.mark.slow
def test_a_connection_that_breaks(hub, train):
    """It once ended in a traceback: a dropped connection is neither an OSError nor an error of the Hub's."""
    hub.hangs_up = True
    process = train(hub.url, *BUILTIN, "--set", f"model.name={MODEL}")
    refused(process, f"{MODEL} could not be fetched", "Check the connection")
