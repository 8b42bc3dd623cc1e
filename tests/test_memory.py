"""Running out of memory: met anywhere in sampling or in the update, the step comes out as if nothing had happened."""

import random
import re
import subprocess
import sys

import psutil
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from lite_trgrpo import session
from lite_trgrpo.config import loading
from lite_trgrpo.config.schema import Model, Objective
from lite_trgrpo.errors import OutOfMemoryError
from lite_trgrpo.model import hf, oom
from lite_trgrpo.model.network import Network
from lite_trgrpo.model.oom import Limits, ran_out
from lite_trgrpo.model.policy import sample_all
from lite_trgrpo.records import Example, Group, Sampling
from lite_trgrpo.store import checkpoint
from lite_trgrpo.terminal import screen
from lite_trgrpo.training.stopping import Stop
from lite_trgrpo.training.update import micro_batches, prepare_rows, update
from tests.tiny import KINDS, tiny_model_folder
from tests.toy import ToyPolicy

NO_MEMORY = "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate"
PROMPTS = ["2 + 2", "Ada buys 5 apples and 2 bags with 3 apples in each bag. How many?", "coins"]
SAMPLING = Sampling(members=4, max_new_tokens=10, key=(7,))


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tiny_model_folder(tmp_path_factory.mktemp("model"))
    loaded = hf.load(Model(name=str(folder), lora_rank=4), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in loaded.trainable().items():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return loaded


class Fails:
    """A function of the product that runs out of memory at its n-th calls."""

    def __init__(self, function, at):
        self.function, self.at, self.calls = function, set(at), 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls in self.at:
            raise RuntimeError(NO_MEMORY)
        return self.function(*args, **kwargs)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError(NO_MEMORY), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("could not create a memory object"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_only_a_lack_of_memory_is_met(error, expected):
    assert ran_out(error) is expected


def test_a_real_refusal_of_the_allocator_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert ran_out(caught.value)


@pytest.mark.parametrize("seed", range(8))
def test_sampling_keeps_what_is_finished_and_draws_the_rest_again(policy, monkeypatch, seed):
    encoded = [policy.encode(prompt) for prompt in PROMPTS]
    undisturbed = sample_all(policy, encoded, SAMPLING)
    hidden = Fails(policy.network.hidden, random.Random(seed).sample(range(1, 12), 1 + seed % 2))
    monkeypatch.setattr(policy.network, "hidden", hidden)
    limits = Limits(tokens=999, rows=64)
    found = sample_all(policy, encoded, SAMPLING, limits)
    assert limits.rows in (6, 3, 2, 1), "12 answers, halved once or twice"
    assert [[c.ids for c in group] for group in found] == [[c.ids for c in group] for group in undisturbed]
    for mine, other in zip(found, undisturbed, strict=True):
        for a, b in zip(mine, other, strict=True):
            torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=1e-5, atol=1e-5)


def test_finished_answers_are_not_drawn_again(policy, monkeypatch):
    """Two at a time: when the last pair runs out of memory, only that pair is decoded once more."""
    encoded = [policy.encode(prompt) for prompt in PROMPTS]
    pairs = Sampling(members=4, max_new_tokens=10, key=(7,), max_rows=2)
    counted = Fails(policy.network.hidden, [])
    monkeypatch.setattr(policy.network, "hidden", counted)
    sample_all(policy, encoded, pairs)
    whole = counted.calls
    again = Fails(counted.function, [whole])
    monkeypatch.setattr(policy.network, "hidden", again)
    sample_all(policy, encoded, pairs, Limits(999, 2))
    assert again.calls <= whole + 2 * SAMPLING.max_new_tokens + 2


def rows_of(policy):
    encoded = [policy.encode(prompt) for prompt in PROMPTS]
    groups = [
        Group(Example(p.text, {}, "here"), p, answers, (0.0, 1.0, 0.5, 1.0))
        for p, answers in zip(encoded, sample_all(policy, encoded, SAMPLING), strict=True)
    ]
    return prepare_rows(groups, Objective(), SAMPLING.max_new_tokens)


class Recording(torch.optim.SGD):
    """Keeps the gradients it is given. Its steps are small: rounding must not grow from one update to the next."""

    def step(self):
        self.seen = torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]])
        super().step()


def gradients_of(policy, rows, limits, objective=Objective(), updates=1):
    """-> the gradient of the last update, and what `update` reports; the weights stay as they were."""
    parameters = list(policy.trainable().values())
    before = [p.detach().clone() for p in parameters]
    optimizer = Recording(parameters, lr=1e-3)
    statistics = update(
        policy, optimizer, rows, objective, temperature=1.0, updates=updates, limits=limits, max_grad_norm=1e9
    )
    with torch.no_grad():
        for b, p in zip(before, parameters, strict=True):
            p.copy_(b)
    return optimizer.seen, statistics


@pytest.mark.parametrize("objective", [Objective(), Objective(beta=0.1)], ids=["plain", "with a reference"])
@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_an_update_that_runs_out_in_a_forward_is_computed_anew(policy, monkeypatch, objective, updates, seed):
    rows = rows_of(policy)
    expected, statistics = gradients_of(policy, rows, Limits(60, 64), objective, updates)
    calls = Fails(policy.network.hidden, [])
    monkeypatch.setattr(policy.network, "hidden", calls)
    gradients_of(policy, rows, Limits(60, 64), objective, updates)
    fails = Fails(calls.function, [random.Random(seed).randint(1, calls.calls)])
    monkeypatch.setattr(policy.network, "hidden", fails)
    limits = Limits(60, 64)
    found, disturbed = gradients_of(policy, rows, limits, objective, updates)
    assert limits.tokens < 60
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    for name in ("loss", "grad_norm", "entropy", "weight_mean"):
        assert disturbed[name] == pytest.approx(statistics[name], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_an_update_that_runs_out_in_backward_is_computed_anew(policy, monkeypatch, seed):
    """Half of the gradients of a micro-batch are there already when it fails; none may be counted twice."""
    rows = rows_of(policy)
    expected, _ = gradients_of(policy, rows, Limits(60, 64))
    places = len(policy.trainable()) * len(list(micro_batches(rows, 60)))
    fails = Fails(lambda gradient: gradient, [random.Random(seed).randint(1, places)])
    hooks = [parameter.register_hook(fails) for parameter in policy.trainable().values()]
    limits = Limits(60, 64)
    found, _ = gradients_of(policy, rows, limits)
    for hook in hooks:
        hook.remove()
    assert limits.tokens < 60
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_when_one_row_does_not_fit_the_message_says_what_to_change(policy, monkeypatch):
    rows = rows_of(policy)
    monkeypatch.setattr(policy.network, "hidden", Fails(policy.network.hidden, range(1, 999)))
    with pytest.raises(OutOfMemoryError, match=r"rollout\.max_new_tokens.*lite-trgrpo check"):
        gradients_of(policy, rows, Limits(60, 64))
    with pytest.raises(OutOfMemoryError, match=r"rollout\.cache_mib.*lite-trgrpo check"):
        sample_all(policy, [policy.encode("coins")], SAMPLING, Limits(60, 64))


def test_another_error_is_not_taken_for_it(policy, monkeypatch):
    def broken(*args):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(policy.network, "hidden", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        sample_all(policy, [policy.encode("coins")], SAMPLING, Limits(60, 64))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process")
def test_the_limit_on_cpu_makes_torch_refuse():
    """In a process of its own: of 200 MiB that are left 50 are given and 300 refused, and that is recognised."""
    script = (
        "import torch; from lite_trgrpo.model import oom\n"
        "taken = int(open('/proc/self/status').read().split('VmData:')[1].split()[0]) * 1024\n"
        "assert oom.cap(taken + 200 * 2**20, torch.device('cpu'))\n"
        "small = torch.zeros(50 * 2**20, dtype=torch.uint8)\n"
        "try:\n    torch.zeros(300 * 2**20, dtype=torch.uint8)\n"
        "except (RuntimeError, MemoryError) as error:\n    print('refused', oom.ran_out(error))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "refused True"


@pytest.mark.slow
@pytest.mark.parametrize("kind", [KINDS[0], *(pytest.param(kind, marks=pytest.mark.night) for kind in KINDS[1:])])
def test_memory_at_step_200_is_that_at_step_20(tmp_path, kind):
    """Resident memory of this process over 200 steps of sampling and updating a tiny model: within 8 MiB."""
    loaded = hf.load(Model(name=str(tiny_model_folder(tmp_path, kind)), lora_rank=4), seed=1)
    optimizer = torch.optim.AdamW(loaded.trainable().values(), lr=1e-5)
    taken = []
    for _ in range(200):
        update(
            loaded, optimizer, rows_of(loaded), Objective(), temperature=1.0, updates=1, limits=Limits(60, 64),
            max_grad_norm=1.0,
        )  # fmt: skip
        oom.free()
        taken.append(psutil.Process().memory_info().rss)
    assert max(taken[-10:]) - max(taken[19:29]) < 8 * 2**20


def test_the_toy_learns_alike_with_any_limit():
    policy = ToyPolicy()
    assert sample_all(policy, [policy.encode("1")], Sampling(4, 6), Limits(1, 1)) == sample_all(
        policy, [policy.encode("1")], Sampling(4, 6)
    )


def test_a_run_with_little_memory_comes_down_before_step_1_and_ends_alike(tiny_config, tmp_path, monkeypatch):
    """The probe meets a lack of memory for more than 30 tokens at a time; the run is that of smaller micro-batches."""
    loaded = loading.load(file=tiny_config, overrides=["train.memory=64GB"])
    monkeypatch.setattr(oom, "cap", lambda limit, device: True)  # of this process, which has other tests to run
    hidden, said = Network.hidden, []

    def narrow(self, ids, positions, groups):
        if torch.is_grad_enabled() and ids.shape[1] > 30 and not isinstance(ids, FakeTensor):  # the plan sees no limit
            raise RuntimeError(NO_MEMORY)
        return hidden(self, ids, positions, groups)

    monkeypatch.setattr(Network, "hidden", narrow)
    monkeypatch.setattr(screen.console, "print", lambda text="", **_: said.append(str(text)))
    run = session.train(loaded, tmp_path / "run", None, Stop())
    numbers = [[int(n) for n in re.findall(r"\b\d+\b", line)] for line in said]
    before = loaded.train.micro_batch_tokens
    assert any(found[:1] == [before] and found[-1] <= 30 for found in numbers), said
    assert [line["step"] for line in run.metrics()] == [1, 2]
    assert all(line["updates_skipped"] == 0 for line in run.metrics())


def test_a_run_that_never_fits_ends_with_a_checkpoint_and_a_message(tiny_config, tmp_path, monkeypatch):
    hidden = Network.hidden

    def nothing_fits(self, ids, positions, groups):
        if torch.is_grad_enabled() and not isinstance(ids, FakeTensor):
            raise RuntimeError(NO_MEMORY)
        return hidden(self, ids, positions, groups)

    monkeypatch.setattr(Network, "hidden", nothing_fits)
    with pytest.raises(OutOfMemoryError, match="lite-trgrpo check"):
        session.train(loading.load(file=tiny_config), tmp_path / "run", None, Stop())
    assert checkpoint.newest(tmp_path / "run" / "checkpoints") is not None


def test_a_limit_on_a_card_reaches_torch_with_the_cards_number(monkeypatch):
    """torch refuses to limit a device without one, so every run with train.memory on a card died."""
    from lite_trgrpo.model.loading import resolve_device

    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 * 2**30, 8 * 2**30))
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: asked.append((share, device))
    )
    assert oom.cap(4 * 2**30, resolve_device("auto"))
    assert asked == [(0.5, torch.device("cuda", 1))]
