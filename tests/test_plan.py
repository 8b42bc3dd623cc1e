"""The plan against what is measured: bytes alive in real runs of the same options."""

import json
import re

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from typer.testing import CliRunner

from lite_trgrpo.check import memory
from lite_trgrpo.check.plan import BYTES, _counted, _sampling, fitting, plan
from lite_trgrpo.cli import app
from lite_trgrpo.config import loading
from lite_trgrpo.errors import HubError
from lite_trgrpo.model import padded
from lite_trgrpo.model.loading import load_config
from lite_trgrpo.model.lora import add_lora, prepare
from lite_trgrpo.model.network import Network
from lite_trgrpo.model.packing import by_length, by_prompt
from lite_trgrpo.rollout.engine import Engine, slot_count
from lite_trgrpo.store.run import Run
from lite_trgrpo.terminal import screen
from tests.tiny import KINDS, MULTIMODAL, tiny_model, tiny_model_folder

PROMPT = 48
SETTINGS = {
    "as it is": {},
    "longer answers": {"rollout.max_new_tokens": 96},
    "larger groups": {"rollout.group_size": 16},
    "smaller micro-batches": {"train.micro_batch_tokens": 128},
    "checkpointing": {"train.gradient_checkpointing": True},
    "little cache": {"rollout.cache_mib": 1},
}


@pytest.fixture
def tiny(tiny_config):
    def load(**changes):
        base = {
            "rollout.max_new_tokens": 32,
            "rollout.group_size": 4,
            "train.prompts_per_step": 3,
            "model.lora_rank": 8,
        }
        given = base | {"train.micro_batch_tokens": 512} | changes
        return loading.load(file=tiny_config, overrides=[f"{key}={json.dumps(value)}" for key, value in given.items()])

    return load


def peak_of(work) -> int:
    """Peak of torch's CPU allocator above where it was, as its own profiler saw it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in seen.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    level = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        level += change
        peak = max(peak, level)
    return peak


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", (*KINDS, "lfm2"))
def test_the_planned_update_is_the_allocators_peak(tiny, kind, changes):
    """Within 10 %. Widths are larger than the other tests' so that activations outweigh the odd small buffer."""
    config = tiny(**changes)
    model = tiny_model(kind, hidden_size=128)
    found = plan(config, model.config, torch.float32, PROMPT)
    network = _real(model, config)
    rows = [
        ((p,) * PROMPT, (5,) * config.rollout.max_new_tokens)
        for p in range(config.train.prompts_per_step) for _ in range(config.rollout.group_size)
    ]  # fmt: skip
    batches = (by_prompt if kind in KINDS else by_length)(rows, lambda row: row, config.train.micro_batch_tokens)
    batch = max(batches, key=len)

    def teach() -> None:
        network.logprobs(batch, 1.0)[0].sum().backward()

    teach()  # gradients exist from here on: the plan counts them with the adapter
    assert found.update == pytest.approx(peak_of(teach), rel=0.10)


@pytest.mark.parametrize("changes", [SETTINGS["as it is"], SETTINGS["little cache"]], ids=["as it is", "little cache"])
@pytest.mark.parametrize("kind", (*KINDS, "lfm2", "qwen3_5_text"))
def test_the_planned_rollout_is_the_allocators_peak(tiny, kind, changes):
    config = tiny(**changes)
    model = tiny_model(kind, hidden_size=128)
    found = plan(config, model.config, torch.float32, PROMPT)
    network = _real(model, config)
    sampling = _sampling(config)
    prompts = [[7] * PROMPT] * config.train.prompts_per_step
    slots = slot_count(prompts, sampling, *network.cache_bytes)
    assert slots == found.slots

    def decode() -> None:
        list(Engine(network, prompts, sampling, frozenset(), slots).answers())

    decode()
    assert found.cache + found.rollout == pytest.approx(peak_of(decode), rel=0.15)


def test_the_planned_rollout_of_generate_is_the_allocators_peak(tiny):
    # answers so long that their own keys and values make the peak, not the prompts
    config = tiny(**{"rollout.engine": "generate", "rollout.max_rows": 8, "rollout.max_new_tokens": 256})
    model = tiny_model("llama", hidden_size=128)
    found = plan(config, model.config, torch.float32, PROMPT)
    assert found.slots == 8 and "rollout.engine" in found.path
    network, sampling, groups = _real(model, config), _sampling(config), config.train.prompts_per_step
    wanted = [range(sampling.members)] * groups

    def decode() -> None:
        list(padded.generate(network.model, [[7] * PROMPT] * groups, sampling, wanted, frozenset(), 0))

    network.model.eval()
    decode()
    assert found.cache + found.rollout == pytest.approx(peak_of(decode), rel=0.10)


def _real(model, config) -> Network:
    adapted = add_lora(model, config.model)
    prepare(adapted)
    return Network(adapted, 0, config.train.gradient_checkpointing)


def test_parts_are_what_the_options_say(tiny):
    model = tiny_model("llama")
    one = plan(tiny(), model.config, torch.float32, PROMPT)
    assert one.weights == sum(p.nbytes for p in model.parameters())
    trained = sum(p.numel() for p in _real(tiny_model("llama"), tiny()).trainable().values())
    assert one.adapter == trained * (4 + 4 + 8)
    small = plan(tiny(**{"train.optimizer": "adamw-8bit"}), model.config, torch.float32, PROMPT)
    assert small.adapter == trained * (4 + 4 + 2)
    linear = sum(p.numel() for name, p in model.named_parameters() if "proj" in name)
    rest = sum(p.numel() for name, p in model.named_parameters() if "proj" not in name)
    for name, size in BYTES.items():
        found = plan(tiny(**{"model.quantization": name}), model.config, torch.bfloat16, PROMPT)
        assert found.weights == int(linear * size + rest * 2)
    assert BYTES["nf4"] < 0.52


def test_any_number_of_layers_follows_from_two_and_four(tiny):
    """Six layers counted whole, and from two and four."""
    shape = tiny_model("llama").config
    shape.num_hidden_layers = 6
    assert plan(tiny(), shape, torch.float32, PROMPT) == _counted(tiny(), shape, torch.float32, PROMPT, 6)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "turn"), [("qwen3_5_text", 3), ("gemma3_text", 2)])
def test_any_number_of_layers_follows_from_two_turns_of_their_kinds(tiny, kind, turn):
    shape = tiny_model(kind).config
    shape.num_hidden_layers, shape.layer_types = 4 * turn, shape.layer_types[:turn] * 4
    found, whole = (f(tiny(), shape, torch.float32, PROMPT, *n) for f, n in ((plan, ()), (_counted, (4 * turn,))))
    assert found == whole


@pytest.mark.parametrize("kind", ["lfm2", "qwen2", "bloom", *MULTIMODAL])
def test_check_says_which_path_a_model_takes(tiny_config, tmp_path, kind):
    model = None
    if kind == "bloom":
        shape = CONFIG_MAPPING[kind](vocab_size=384, hidden_size=64, n_layer=2, n_head=4)
        model = AutoModelForCausalLM.from_config(shape)
    folder = tiny_model_folder(tmp_path / "base", kind, model=model)
    given = ["--config", str(tiny_config), "--set", f"model.name={json.dumps(str(folder))}", "--json"]
    done = CliRunner().invoke(app, ["check", "memory", *given])
    assert done.exit_code == 0, done.output
    path = json.loads(done.stdout)["memory"]["path"]
    assert ("generate" in path) == (kind == "bloom")
    assert ("packed" in path) == (kind not in ("bloom", "lfm2", "qwen3_5"))


def test_what_does_not_fit_is_made_to_with_the_least_harm(tiny):
    shape, config = tiny_model("llama").config, tiny(**{"train.micro_batch_tokens": 2048})
    whole = plan(config, shape, torch.float32, PROMPT)
    assert fitting(config, shape, torch.float32, PROMPT, whole.peak) == (config, [])
    smaller, changes = fitting(config, shape, torch.float32, PROMPT, whole.peak - 2**20)
    assert plan(smaller, shape, torch.float32, PROMPT).peak <= whole.peak - 2**20
    assert changes[0].startswith("train.micro_batch_tokens = ")
    assert smaller.model == config.model, "a smaller micro-batch changes no result, so it comes before 4 bits"
    assert fitting(config, shape, torch.float32, PROMPT, 1000) is None


def test_the_command_says_whether_it_fits(tiny_config, tmp_path):
    run = CliRunner()
    fits = run.invoke(app, ["check", "--config", str(tiny_config), "--vram", "8GB", "--json"])
    assert fits.exit_code == 0, fits.output
    result = json.loads(fits.stdout)["memory"]
    assert result["fits"] and result["changes"] == []
    assert result["peak"] == sum(result["parts"].values()) - min(
        result["parts"]["update"], result["parts"]["cache"] + result["parts"]["rollout"]
    )
    too_small = run.invoke(app, ["check", "--config", str(tiny_config), "--vram", "1.05GB"])
    assert too_small.exit_code == 1 and "does not fit" in too_small.output
    nonsense = run.invoke(app, ["check", "--config", str(tiny_config), "--vram", "lots"])
    assert nonsense.exit_code == 2


def test_options_that_fit_are_written_to_a_file(tiny_config, tmp_path):
    file = tmp_path / "fits.toml"
    done = CliRunner().invoke(app, ["check", "--config", str(tiny_config), "--vram", "8GB", "--fit", str(file)])
    assert done.exit_code == 0, done.output
    assert loading.load(file=file) == loading.load(file=tiny_config)
    nowhere = tmp_path / "missing" / "fits.toml"
    refused = CliRunner().invoke(app, ["check", "--config", str(tiny_config), "--vram", "8GB", "--fit", str(nowhere)])
    assert refused.exit_code == 2 and "--fit" in refused.output and "Traceback" not in refused.output


def test_a_cache_that_is_not_set_is_planned_as_a_run_on_a_card_would_take_it(tiny_config):
    """A third of what is free once the model is loaded, also when that is far more than 2 GiB."""
    many = [
        "rollout.group_size=64",
        "rollout.max_rows=4096",
        "train.prompts_per_step=64",
        "rollout.max_new_tokens=1024",
    ]
    config = loading.load(file=tiny_config, overrides=many)
    caches = [memory.check_memory(config, size * 10**9)[0]["parts"]["cache"] for size in (2, 3, 4)]
    assert caches[0] < caches[1] < caches[2]
    for cache, size in zip(caches, (2, 3, 4), strict=True):
        free = size * 10**9 - memory.DESKTOP - memory.CARD_OVERHEAD
        assert 0.25 * free < cache <= free / 3


def written(folder, config, steps, signal=0.5):
    run = Run(folder)
    run.create()
    run.describe(config, {})
    clock = {"rollout_s": 6.0, "reward_s": 0.5, "update_s": 3.5, "rss_mib": 700.0}
    for step in range(steps):
        line = {"step": step + 1, "tokens": 100, "length_mean": 5.0, "clock": clock, "groups_with_signal": signal}
        run.log_step(line, [], list)
    run.log_eval({"step": 0, "rows": [{}] * 2, "clock": {"eval_s": 30.0}})


def test_a_run_of_the_same_model_tells_how_long_the_next_one_takes(tiny_config, tmp_path):
    config = loading.load(file=tiny_config)  # 3 prompts, groups of 4, at most 6 tokens, 2 steps
    assert memory.past(config, tmp_path / "runs") is None
    other = config.model_copy(update={"model": config.model.model_copy(update={"name": "other/model"})})
    (tmp_path / "runs").mkdir()
    written(tmp_path / "runs" / "other", other, 3)
    written(tmp_path / "runs" / "without-updates", config, 3, signal=0.0)
    assert memory.past(config, tmp_path / "runs") is None
    written(tmp_path / "runs" / "same", config, 3)
    found = memory.past(config, tmp_path / "runs")
    # 10 s for 100 tokens; a step will have 3 * 4 answers of 5 tokens; scores before and after
    assert found["step_s"] == pytest.approx(6.0) and found["peak"] == 700 * 2**20
    # 15 s a row then, one answer each; twice 4 rows now
    assert found["hours"] == pytest.approx((2 * 6.0 + 2 * 4 * 15.0) / 3600)
    assert found["run"].endswith("same") and not found["least"]
    longer = config.changed("rollout", max_new_tokens=99).changed("eval", samples=3)
    found = memory.past(longer, tmp_path / "runs")
    assert found["least"] and found["hours"] == pytest.approx((2 * 6.0 + 2 * 4 * 4 * 15.0) / 3600)
    assert "at least" in screen.past_line(found)
    (tmp_path / "runs" / "same" / "config.toml").write_text("nonsense")
    assert memory.past(config, tmp_path / "runs") is None


# -- the presets' bases, without the Hub (the suite runs with HF_HUB_OFFLINE) ---------------------------------


@pytest.mark.parametrize("preset", [name for name in loading.presets() if name != "demo"])
def test_the_shipped_sizes_of_a_base_are_those_of_its_download(preset):
    """Two bytes a parameter are the gigabytes that the preset's head names."""
    [named] = re.findall(r"([\d.]+) GB", loading.head_comment(loading.preset_path(preset))["base"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(loading.load(preset).model))
    assert 2 * sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(float(named), rel=0.02)


def test_another_revision_of_a_shipped_base_is_asked_of_the_hub():
    with pytest.raises(HubError):
        load_config(loading.load("math-1.5b", overrides=["model.revision=other"]).model)


@pytest.mark.slow
def test_check_plans_a_preset_without_the_hub():
    done = CliRunner().invoke(app, ["check", "--preset", "math-1.5b", "--vram", "8GB", "--json"])
    assert done.exit_code == 0, done.output
    memory = json.loads(done.stdout)["memory"]
    assert memory["parts"]["weights"] == pytest.approx(1.066 * 2**30, rel=0.01)  # benchmarks/cards.txt: 1.07 GiB
