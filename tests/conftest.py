"""Offline, and few threads: the suite must behave the same on every machine."""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each worker; child processes inherit it
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _needs_card(request):
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA card, and torch sees none here")


@pytest.fixture
def tiny_config(tmp_path):
    """A config file for a whole run of a second: a random model, twelve prompts, a reward from a file."""
    from tests.tiny import tiny_model_folder

    folder = tiny_model_folder(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i} + 1", "answer": str(i + 1)}) + "\n" for i in range(12)))
    reward = tmp_path / "reward.py"
    reward.write_text("def length(completion_ids, **_):\n    return [sum(ids) % 3 for ids in completion_ids]\n")
    path = tmp_path / "tiny.toml"
    path.write_text(
        f'[model]\nname = "{folder}"\nlora_rank = 4\n[data]\nsource = "{data}"\n'
        f'[rewards]\nfunctions = {{ "{reward}:length" = 1.0 }}\n[rollout]\ngroup_size = 4\nmax_new_tokens = 6\n'
        "[train]\nsteps = 2\nprompts_per_step = 3\npreflight = false\n[eval]\nrows = 4\nsamples = 0\n"
    )
    return path
