"""Against an independent implementation: the loss and gradients of TRL's GRPOTrainer."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="trl, the implementation compared with, is not installed (dev extra)")

_spec = importlib.util.spec_from_file_location(
    "trl_equality", Path(__file__).parents[1] / "benchmarks" / "trl_equality.py"
)
trl_equality = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(trl_equality)

QUICK = [trl_equality.Case("grpo", 0.7, 0.04, 2), trl_equality.Case("dapo", 0.7, 0.04, 2)]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return trl_equality.tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=() if c in QUICK else pytest.mark.slow) for c in trl_equality.CASES],
    ids=lambda case: "-".join(str(case).split()),
)
def test_loss_and_gradients_equal_trl(given, case):
    ours, theirs, (advantages, loss, gradient) = trl_equality.compare(given, case)
    assert advantages < 1e-6
    assert loss < 1e-4  # the sum cancels, to a hundredth of its terms
    assert gradient < 1e-5
    assert len(theirs.gradients) == case.updates and all(g.norm() > 0 for g in theirs.gradients)
    assert (ours.clipped > 0) == (case.updates > 1)
