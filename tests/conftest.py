"""Offline, and few threads: the suite must behave the same on every machine."""

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
    from tests.accidents import tiny_run

    return tiny_run(tmp_path)
