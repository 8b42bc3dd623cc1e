"""Checkpoints: back bit for bit, whole or passed over, and never a reason for a traceback."""

import json
import shutil
import signal

import pytest
import torch
from torch import nn

from lite_trgrpo.errors import RunError
from lite_trgrpo.store import checkpoint

FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json")


def parameters(seed: int = 0, rows: int = 3) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "layer.lora_A": nn.Parameter(torch.randn(rows, 5, generator=generator)),
        "layer.lora_B": nn.Parameter(torch.randn(5, rows, generator=generator).T),  # not contiguous
        "untouched": nn.Parameter(torch.randn(2, generator=generator)),
    }


def adamw(trainable):
    return torch.optim.AdamW(trainable.values(), lr=0.01, weight_decay=0.1)


def descend(trainable, optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (trainable["layer.lora_A"].square().sum() + (trainable["layer.lora_B"] - 1).abs().sum()).backward()
        optimizer.step()


@pytest.fixture
def saved(tmp_path):
    """A folder with the checkpoints of steps 1 and 2, and what was saved last."""
    trainable = parameters()
    optimizer = adamw(trainable)
    for step in (1, 2):
        descend(trainable, optimizer, 1)
        checkpoint.save(tmp_path, step, trainable, optimizer, {"logs": {"metrics.jsonl": 70 * step}})
    return tmp_path, trainable, optimizer


# -- there and back -----------------------------------------------------------------------------------------


def test_parameters_optimizer_and_state_come_back_bit_for_bit(saved):
    folder, trainable, optimizer = saved
    fresh = parameters(seed=1)
    fresh_optimizer = adamw(fresh)
    state = checkpoint.load(checkpoint.newest(folder), fresh, fresh_optimizer)
    assert (state["step"], state["logs"]) == (2, {"metrics.jsonl": 140})
    for name, parameter in trainable.items():
        assert torch.equal(fresh[name], parameter)
        assert fresh[name].dtype == parameter.dtype
    was, now = optimizer.state_dict(), fresh_optimizer.state_dict()
    assert was["param_groups"] == now["param_groups"]
    assert was["state"].keys() == now["state"].keys() == {0, 1}  # the third parameter never had a gradient
    for index, values in was["state"].items():
        assert values.keys() == now["state"][index].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in values.items():
            assert torch.equal(value, now["state"][index][key]), (index, key)


def test_training_goes_on_bit_for_bit(saved):
    """With the moments lost Adam's next step would be as long as its first."""
    folder, trainable, optimizer = saved
    fresh = parameters(seed=1)
    fresh_optimizer = adamw(fresh)
    checkpoint.load(checkpoint.newest(folder), fresh, fresh_optimizer)
    descend(trainable, optimizer, 5)
    descend(fresh, fresh_optimizer, 5)
    assert all(torch.equal(fresh[name], parameter) for name, parameter in trainable.items())


def test_parameters_stay_the_objects_that_the_optimizer_holds(saved):
    folder, _, _ = saved
    fresh = parameters(seed=1)
    before = {name: id(parameter) for name, parameter in fresh.items()}
    checkpoint.load(checkpoint.newest(folder), fresh, adamw(fresh))
    assert {name: id(parameter) for name, parameter in fresh.items()} == before
    assert all(parameter.requires_grad for parameter in fresh.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_dtype_comes_back_as_it_was(tmp_path, dtype):
    trainable = {"a": nn.Parameter(torch.tensor([1 / 3, -0.0, 1e-30], dtype=dtype))}
    optimizer = adamw(trainable)
    trainable["a"].grad = torch.ones(3, dtype=dtype)
    optimizer.step()
    checkpoint.save(tmp_path, 1, trainable, optimizer, {})
    fresh = {"a": nn.Parameter(torch.zeros(3, dtype=dtype))}
    fresh_optimizer = adamw(fresh)
    checkpoint.load(checkpoint.newest(tmp_path), fresh, fresh_optimizer)
    assert torch.equal(fresh["a"], trainable["a"]) and fresh["a"].dtype == dtype
    moments = [o.state_dict()["state"][0]["exp_avg_sq"] for o in (optimizer, fresh_optimizer)]
    assert torch.equal(*moments) and moments[0].dtype == moments[1].dtype


def test_an_optimizer_that_has_not_stepped_yet_is_saved_too(tmp_path):
    trainable = parameters()
    checkpoint.save(tmp_path, 0, trainable, adamw(trainable), {})
    fresh = parameters(seed=1)
    assert checkpoint.load(checkpoint.newest(tmp_path), fresh, adamw(fresh))["step"] == 0
    assert torch.equal(fresh["untouched"], trainable["untouched"])


def test_a_step_that_is_there_already_is_written_anew(saved):
    folder, trainable, optimizer = saved
    descend(trainable, optimizer, 1)
    checkpoint.save(folder, 2, trainable, optimizer, {"logs": {}})
    fresh = parameters(seed=1)
    assert checkpoint.load(checkpoint.newest(folder), fresh, adamw(fresh))["logs"] == {}
    assert torch.equal(fresh["layer.lora_A"], trainable["layer.lora_A"])


def test_nothing_but_safetensors_and_json_is_written(saved):
    folder, _, _ = saved
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    steps = ["step-000001", "step-000002"]
    assert found == sorted(steps + [f"{step}/{name}" for step in steps for name in FILES])
    state = json.loads((folder / "step-000002" / "state.json").read_text(encoding="utf-8"))
    assert state["files"].keys() == set(FILES) - {"state.json"}


# -- torn ones ----------------------------------------------------------------------------------------------


def test_without_a_checkpoint_there_is_no_newest(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "missing") is None


def test_the_newest_is_that_of_the_highest_step(tmp_path):
    trainable = parameters()
    for step in (900, 1000, 99):
        checkpoint.save(tmp_path, step, trainable, adamw(trainable), {})
    assert checkpoint.newest(tmp_path).name == "step-001000"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0, 1, 0.5, -1])
def test_a_truncated_file_is_passed_over(saved, name, keep):
    folder, _, _ = saved
    path = folder / "step-000002" / name
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    assert checkpoint.newest(folder) == folder / "step-000001"


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_passed_over(saved, name):
    folder, _, _ = saved
    (folder / "step-000002" / name).unlink()
    assert checkpoint.newest(folder) == folder / "step-000001"


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_passed_over_wherever_it_is(saved, name):
    """In state.json as well: another `step`, or another length of a log, would be a run continued wrongly."""
    folder, _, _ = saved
    path = folder / "step-000002" / name
    content = path.read_bytes()
    places = range(len(content)) if name == "state.json" else range(0, len(content), 37)
    missed = []
    for place in places:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        if checkpoint.newest(folder) != folder / "step-000001":
            missed.append(content[max(0, place - 12) : place + 1].decode(errors="replace"))
    assert not missed
    path.write_bytes(content)
    assert checkpoint.newest(folder) == folder / "step-000002"


@pytest.mark.parametrize(
    "content", ["[]", "3", "null", '{"files": {}}', '{"files": []}', '{"files": {"adapter.safetensors": null}}', "{}"]
)
def test_json_that_is_no_state_is_passed_over(saved, content):
    folder, _, _ = saved
    (folder / "step-000002" / "state.json").write_text(content)
    assert checkpoint.newest(folder) == folder / "step-000001"


def test_files_of_another_step_are_passed_over(saved):
    folder, _, _ = saved
    shutil.copy(folder / "step-000001" / "adapter.safetensors", folder / "step-000002")
    assert checkpoint.newest(folder) == folder / "step-000001"


def test_when_all_are_torn_there_is_none(saved):
    folder, _, _ = saved
    for path in folder.rglob("state.json"):
        path.write_text("{")
    assert checkpoint.newest(folder) is None


@pytest.mark.parametrize("leftover", [".part-abc123", "step-000003.part", "other", "step-000009"])
def test_leftovers_of_a_killed_save_are_ignored(saved, leftover):
    folder, trainable, optimizer = saved
    (folder / leftover).mkdir()
    shutil.copy(folder / "step-000002" / "adapter.safetensors", folder / leftover)
    assert checkpoint.newest(folder) == folder / "step-000002"
    checkpoint.save(folder, 4, trainable, optimizer, {})
    assert checkpoint.newest(folder) == folder / "step-000004"


def test_an_interrupted_save_leaves_only_the_ones_before(saved, monkeypatch):
    folder, trainable, optimizer = saved

    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "sync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(folder, 3, trainable, optimizer, {})
    assert checkpoint.newest(folder) == folder / "step-000002"
    assert sorted(path.name for path in folder.iterdir()) == ["step-000001", "step-000002"]


# -- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        parameters(rows=4),
        {name: p for name, p in parameters().items() if name != "untouched"},
        parameters() | {"more": nn.Parameter(torch.zeros(1))},
        {f"other.{name}": p for name, p in parameters().items()},
    ],
    ids=["shape", "fewer", "more", "names"],
)
def test_another_adapter_is_refused_and_left_as_it_was(saved, other):
    folder, _, _ = saved
    before = {name: parameter.detach().clone() for name, parameter in other.items()}
    with pytest.raises(RunError, match=r"step-000002.*model\.lora_"):
        checkpoint.load(checkpoint.newest(folder), other, adamw(other))
    assert all(torch.equal(parameter, before[name]) for name, parameter in other.items())


def test_the_state_of_another_optimizer_is_refused(saved):
    """`auto` is an 8-bit AdamW on a card and AdamW on CPU: a run that moves between them must not end in a KeyError."""
    folder, trainable, _ = saved
    momentum = torch.optim.SGD(trainable.values(), lr=0.01, momentum=0.9)
    descend(trainable, momentum, 1)
    checkpoint.save(folder, 3, trainable, momentum, {})
    fresh = parameters(seed=1)
    with pytest.raises(RunError, match="optimizer"):
        checkpoint.load(checkpoint.newest(folder), fresh, adamw(fresh))


@pytest.mark.parametrize("folder", ["file", "file/checkpoints"])
def test_a_folder_that_cannot_be_made_is_a_run_error(tmp_path, folder):
    (tmp_path / "file").write_text("in the way")
    trainable = parameters()
    with pytest.raises(RunError, match=str(tmp_path / folder)):
        checkpoint.save(tmp_path / folder, 1, trainable, adamw(trainable), {})


def test_a_full_disk_is_a_run_error_and_leaves_the_ones_before(saved):
    """Tensors are written by safetensors, whose errors are its own. A limit on file sizes stands for the disk."""
    resource = pytest.importorskip("resource", reason="Windows has no such limits")
    folder, trainable, optimizer = saved
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(RunError, match=str(folder)):
            checkpoint.save(folder, 3, trainable, optimizer, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert checkpoint.newest(folder) == folder / "step-000002"
    assert sorted(path.name for path in folder.iterdir()) == ["step-000001", "step-000002"]
