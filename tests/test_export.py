"""Export: merged weights against PEFT's, what is written, and that a broken export is caught."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lite_trgrpo.cli import app
from lite_trgrpo.config.schema import Model
from lite_trgrpo.errors import ExportError, MissingPackageError
from lite_trgrpo.export import export, gguf, merge
from lite_trgrpo.export.verify import Answers, ask, of_rows
from lite_trgrpo.model.weights import locate
from lite_trgrpo.store import checkpoint
from lite_trgrpo.store.run import Run
from tests.runs import BASE, finished_run
from tests.tiny import tiny_model_folder

WEIGHTS = export.WEIGHTS
WANTED = export.Wanted()


def located(config):
    return locate(config.model)


def silent(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """-> the run and its config; not to be changed."""
    return finished_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def written(original, tmp_path):
    """-> run, config, and a folder that holds its exported adapter."""
    run, config = original
    export.write_adapter(run, located(config), tmp_path)
    return run, config, tmp_path


# -- merging ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), [("qwen2", {}), ("llama", {"rslora": True})])  # tied and untied head
def test_merged_weights_are_those_of_peft(tmp_path, kind, options):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run, config = finished_run(tmp_path, kind, rows=2, **options)
    base = AutoModelForCausalLM.from_pretrained(config.model.name)
    expected = PeftModel.from_pretrained(base, str(run.adapter)).merge_and_unload().state_dict()
    merge.merge(Path(config.model.name), merge.read_adapter(run.adapter), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
    assert merged.config.tie_word_embeddings == (kind == "qwen2")
    for name, tensor in merged.state_dict().items():
        # one rounding to bfloat16 (8 significant bits, so at most 2^-8 of the value); the sums differ by float32's
        torch.testing.assert_close(tensor.float(), expected[name], rtol=2**-8 + 1e-6, atol=1e-6)


def test_a_base_in_16_bits_keeps_its_type_and_tensors_without_lora_their_bits(tmp_path):
    run, config = finished_run(tmp_path, rows=2)
    base = Path(config.model.name)
    half = {name: tensor.half() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(half, base / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"dtype": "float16"}))
    merge.merge(base, merge.read_adapter(run.adapter), tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.float16}
    changed = {name for name in half if not torch.equal(half[name], merged[name])}
    assert changed == {f"{module}.weight" for module in merge.read_adapter(run.adapter).pairs()}


def test_a_model_in_many_shards_is_the_same_model(original, tmp_path, monkeypatch):
    run, config = original
    adapter = merge.read_adapter(run.adapter)
    merge.merge(Path(config.model.name), adapter, tmp_path / "one")
    monkeypatch.setattr(merge, "SHARD", 50_000)
    merge.merge(Path(config.model.name), adapter, tmp_path / "many")
    places = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(places.values())) > 2
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert places.keys() == whole.keys()
    for name, file in places.items():
        assert torch.equal(load_file(tmp_path / "many" / file)[name], whole[name])
    sizes = [path.stat().st_size for path in (tmp_path / "many").glob("*.safetensors")]
    assert max(sizes) < 60_000 + 384 * 64 * 2  # a tensor that is larger than a shard stands alone


def test_the_tokenizer_travels_and_pickles_do_not(original, tmp_path):
    run, config = original
    base = shutil.copytree(config.model.name, tmp_path / "base")
    (base / "pytorch_model.bin").write_bytes(b"a pickle")
    merge.merge(base, merge.read_adapter(run.adapter), tmp_path / "merged")
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"} <= names
    assert "pytorch_model.bin" not in names


@pytest.mark.parametrize(("setting", "value"), [("modules_to_save", ["lm_head"]), ("alpha_pattern", {"q_proj": 8})])
def test_what_is_more_than_plain_lora_is_not_merged_as_if_it_were(original, setting, value):
    run, _ = original
    adapter = merge.read_adapter(run.adapter)
    with pytest.raises(ExportError, match=f"only plain LoRA .* {setting} = "):
        merge.Adapter(adapter.settings | {setting: value}, adapter.tensors).pairs()


def test_dora_without_its_lengths_is_not_merged(original):
    run, _ = original
    adapter = merge.read_adapter(run.adapter)
    with pytest.raises(ExportError, match=r"has .*lora_magnitude_vector"):
        merge.Adapter(adapter.settings | {"use_dora": True}, adapter.tensors).pairs()


def test_an_adapter_of_another_base_is_not_merged(original, tmp_path):
    run, _ = original
    other = tiny_model_folder(tmp_path / "other", "llama", hidden_size=128)
    with pytest.raises(ExportError, match=r"of shape \[64, 128\], but .* has one of shape \[128, 128\]"):
        merge.merge(other, merge.read_adapter(run.adapter), tmp_path / "merged")


# -- what is written, and what is caught before anything is loaded -------------------------------------------


def test_the_exported_adapter_names_the_upstream_base_and_nothing_of_this_machine(written):
    run, _, folder = written
    text = (folder / "adapter_config.json").read_text()
    assert json.loads(text)["base_model_name_or_path"] == BASE
    assert str(run.folder.parent) not in text
    assert (folder / WEIGHTS).read_bytes() == (run.adapter / WEIGHTS).read_bytes()


def rewrite(folder: Path, **settings) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def rename(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({name.replace("q_proj", "query"): tensor for name, tensor in tensors.items()}, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda folder: rewrite(folder, base_model_name_or_path="a/b"), "_or_path = 'a/b', the run 'tiny"),
        (lambda folder: rewrite(folder, revision="v2"), "revision = 'v2', the run None"),
        (lambda folder: rewrite(folder, lora_alpha=1.0), "lora_alpha = 1.0, the run 32.0"),
        (lambda folder: rewrite(folder, target_modules=["query"]), r"target_modules = \['query'\]"),
        (rename, WEIGHTS),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"half"), "holds no whole LoRA adapter"),
    ],
    ids=["base", "revision", "alpha", "targets", "tensors", "damaged"],
)
def test_names_and_base_must_be_the_runs(written, broken, message):
    run, config, folder = written
    broken(folder)
    with pytest.raises(ExportError, match=message):
        export.check(run, config, export.of_the_end(run), located(config), folder, WANTED, silent)


def test_a_run_without_an_adapter_says_how_to_finish_it(original, tmp_path):
    _, config = original
    run = Run.vacant(tmp_path / "new")
    run.create()
    with pytest.raises(ExportError, match="has no adapter yet; finish it with: lite-trgrpo train --resume"):
        export.export(run, config, WANTED, silent)


def scored(before: float, after: float) -> dict:
    """A report of 100 rows whose trained gain is after - before."""
    solved = [[i < 100 * share for i in range(100)] for share in (before, after)]
    return {"trained": {"gain": export.paired_gain(*solved)}, "forms": {}}


@pytest.mark.parametrize(
    ("trained", "kept", "lost"),
    [(0.4, 0.35, False), (0.4, 0.19, True), (0.4, -0.1, True), (0.01, -0.05, False)],
    ids=["kept", "less than half", "worse than the base", "none to lose"],
)
def test_a_gain_is_lost_when_less_than_half_is_left_of_one_that_is_certain(trained, kept, lost):
    report = scored(0.2, 0.2 + trained)
    report["forms"]["merged"] = {"gain": {"value": kept}}
    if lost:
        with pytest.raises(ExportError, match="the gain is lost"):
            export._keeps_the_gain("the merged model", report, "merged")
    else:
        export._keeps_the_gain("the merged model", report, "merged")


# -- GGUF ---------------------------------------------------------------------------------------------------


def test_without_the_converter_it_says_what_to_type(monkeypatch, tmp_path):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingPackageError, match=r"needs llama\.cpp's converter\. Type: git clone"):
        gguf.check("q8_0")
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    with pytest.raises(MissingPackageError, match=r"has no convert_hf_to_gguf\.py"):
        gguf.check("q8_0")
    (tmp_path / "convert_hf_to_gguf.py").touch()
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"needs sentencepiece\. Type: pip install sentencepiece"):
        gguf.check("q8_0")
    with pytest.raises(ExportError, match="no GGUF type 'q9' here; there are q8_0, f16, q4_k_m"):
        gguf.check("q9")


def test_a_converter_that_fails_is_quoted(monkeypatch, tmp_path):
    (tmp_path / "convert_hf_to_gguf.py").write_text("raise NotImplementedError('Model X is not supported')")
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    with pytest.raises(ExportError, match=r"convert_hf_to_gguf\.py ended with exit code 1 .*Model X is not supported"):
        gguf.write(tmp_path, tmp_path / "x.gguf", "f16")


def small_gguf(path: Path, tokens: list[str], seed: int) -> Path:
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    writer = GGUFWriter(path, "llama")
    writer.add_block_count(seed)
    writer.add_tokenizer_model("gpt2" if seed else "llama")
    writer.add_token_list(tokens)
    draw = np.random.default_rng(seed)
    packed = quants.quantize(draw.normal(size=(4, 64)).astype(np.float32), GGMLQuantizationType.Q8_0)
    writer.add_tensor("token_embd.weight", packed, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.add_tensor("output_norm.weight", draw.normal(size=64).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_base_out_of_a_gguf_gives_its_tokenizer_back(tmp_path):
    """The demo's export once held a tokenizer of another kind, on which llama.cpp aborted."""
    from gguf import GGUFReader

    mine, donor = small_gguf(tmp_path / "mine", ["<s>"], 0), small_gguf(tmp_path / "donor", ["a", "b", "</s>"], 1)
    before = GGUFReader(mine)
    tensors = [(t.name, t.tensor_type, t.shape.tolist(), t.data.tobytes()) for t in before.tensors]
    gguf.take_tokenizer(donor, mine)
    after = GGUFReader(mine)
    assert [(t.name, t.tensor_type, t.shape.tolist(), t.data.tobytes()) for t in after.tensors] == tensors
    assert after.fields["tokenizer.ggml.tokens"].contents() == ["a", "b", "</s>"]
    assert after.fields["tokenizer.ggml.model"].contents() == "gpt2"
    assert after.fields["llama.block_count"].contents() == 0  # its own


def test_a_modelfile_has_the_models_template_stops_and_system_message(original):
    _, config = original
    text = gguf.modelfile("run-Q8_0.gguf", Path(config.model.name), [1, 2], config.model, "Be brief.")
    assert text.startswith("FROM ./run-Q8_0.gguf\n")
    assert 'PARAMETER stop "<|im_end|>"' in text and 'SYSTEM """Be brief."""' in text
    assert "<|im_start|>user\n{{ .Prompt }}<|im_end|>" in text


def test_a_modelfile_holds_no_stop_that_is_no_token_and_no_text_that_ends_itself(original):
    _, config = original
    name = Path(config.model.name)
    assert "None" not in gguf.modelfile("x.gguf", name, [1, 10**6], config.model, None)
    with pytest.raises(ExportError, match=r"data\.system"):
        gguf.modelfile("x.gguf", name, [1], config.model, 'Say """ no.')


def test_a_system_message_that_the_template_adds_itself_is_in_the_modelfile(original, tmp_path):
    """SmolLM2 and Qwen2.5 do; Ollama's own ChatML does not, so the model would see another prompt than in training."""
    folder = shutil.copytree(original[1].model.name, tmp_path / "base")
    template = folder / "chat_template.jinja"
    added = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou add.<|im_end|>\n{% endif %}"
    template.write_text(added + template.read_text())
    text = gguf.modelfile("x.gguf", folder, [2], Model(name="x"), None)
    assert 'SYSTEM """You add."""' in text


# -- against what the run recorded -------------------------------------------------------------------------


def worsened(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({n: -40 * t if "lora_B" in n else t for n, t in tensors.items()}, folder / WEIGHTS)


@pytest.fixture
def copied(original, tmp_path):
    """-> a copy of the run that a test may damage, and its config."""
    run, config = original
    return Run.existing(Path(shutil.copytree(run.folder, tmp_path / "run"))), config


@pytest.mark.parametrize(
    ("damage", "file"),
    [
        (worsened, WEIGHTS),
        (lambda folder: rewrite(folder, lora_alpha=-1000.0), "adapter_config.json"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json"),
    ],
    ids=["weights", "scale", "gone"],
)
def test_a_damaged_adapter_is_refused_by_its_digest(copied, damage, file):
    """An adapter whose B was multiplied by -40 once exported as verified: it was compared with itself."""
    run, _ = copied
    damage(run.adapter)
    refused = CliRunner().invoke(app, ["export", str(run.folder)])
    assert refused.exit_code == 1
    assert file in refused.stderr and "SHA-256" in refused.stderr and "--resume" in refused.stderr
    assert not export.folder_of(run).exists()


def test_an_earlier_export_does_not_hide_a_damaged_adapter(copied):
    run, _ = copied
    folder = export.folder_of(run)
    folder.mkdir()
    worsened(run.adapter)
    shutil.copytree(run.adapter, folder, dirs_exist_ok=True)
    files = {path.name: export.sha256(path) for path in folder.iterdir()}
    (folder / "check.json").write_text(json.dumps({"forms": {}, "files": files}))
    refused = CliRunner().invoke(app, ["export", str(run.folder), "--dry-run"])
    assert refused.exit_code == 1 and WEIGHTS in refused.stderr


def test_a_run_that_was_cut_off_later_than_its_adapter_is_not_exported(copied):
    run, _ = copied
    newest = checkpoint.newest(run.checkpoints)
    state = checkpoint.state_of(newest) | {"complete": False, "step": 1}
    del state["adapter"], state["sha256"]
    state["sha256"] = checkpoint._digest(state)
    (newest / "state.json").write_text(json.dumps(state))
    refused = CliRunner().invoke(app, ["export", str(run.folder)])
    assert refused.exit_code == 1 and f"train --resume {run.folder}" in refused.stderr


def answers_of(run, **facts) -> Answers:
    found = of_rows(run.evaluations()[-1]["rows"], [])
    return replace(found, facts=run.facts() | facts)


def another(answers: Answers, rows: int, solved: bool) -> Answers:
    """The same but for the first `rows` answers."""
    n = len(answers.ids)
    return replace(
        answers, ids=[[7] for _ in range(rows)] + answers.ids[rows:], solved=[solved] * rows + [True] * (n - rows)
    )


def test_recorded_answers_that_differ_on_this_machine_are_a_failure(copied):
    run, _ = copied
    state = export.of_the_end(run)
    assert export._as_recorded(run, state, answers_of(run), silent) == ([], 8)
    with pytest.raises(ExportError, match=r"\b1 of 8 .*otherwise than"):
        export._as_recorded(run, state, another(answers_of(run), 1, True), silent)


def test_on_another_processor_answers_may_differ_but_not_the_score(copied):
    run, _ = copied
    state, said = export.of_the_end(run), []
    evaluation = run.evaluations()[-1]
    evaluation["rows"] = [row | {"solved": True} for row in evaluation["rows"]]
    (run.folder / "eval.jsonl").write_text(json.dumps(evaluation) + "\n")
    there = answers_of(run, processor="another")
    other, equal = export._as_recorded(run, state, another(there, 6, True), said.append)
    assert equal == 2 and "processor" in other[0] and "processor" in said[0]
    with pytest.raises(ExportError, match=r"6 of 8 .*-0\.750 .*processor"):
        export._as_recorded(run, state, another(there, 6, False), silent)


@pytest.mark.parametrize("lost", ["checkpoints", "eval.jsonl"])
def test_without_a_digest_the_recorded_answers_decide_and_one_must_be_there(copied, lost):
    run, _ = copied
    shutil.rmtree(run.checkpoints)
    if lost == "eval.jsonl":
        (run.folder / lost).unlink()
        with pytest.raises(ExportError, match="checkpoints"):
            export._as_recorded(run, export.of_the_end(run), answers_of_nothing(run), silent)
    else:
        assert export._as_recorded(run, export.of_the_end(run), answers_of(run), silent) == ([], 8)


def answers_of_nothing(run) -> Answers:
    return replace(of_rows([], []), facts=run.facts())


def test_a_base_that_was_replaced_since_the_training_is_named_at_export(copied):
    run, _ = copied
    files = {**run.facts()["files"], "base": {"model.safetensors": "0" * 64}}
    with pytest.raises(ExportError, match=r"model\.safetensors"):
        export._as_recorded(run, export.of_the_end(run), answers_of(run, files=files), silent)


# -- in fresh processes -------------------------------------------------------------------------------------


def zeroed(folder: Path) -> None:
    save_file(
        {name: torch.zeros_like(tensor) for name, tensor in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS
    )


@pytest.mark.slow
def test_an_export_of_every_form_passes_and_is_not_made_twice(tmp_path):
    run, config = finished_run(tmp_path)
    wanted = export.Wanted(merged=True)
    report = export.export(run, config, wanted, silent)
    folder = export.folder_of(run)
    assert report["rows"] == 8 and report["forms"]["merged"]["logprob_difference"] < 0.1
    assert json.loads((folder / "check.json").read_text()) == report
    assert not (run.folder / ".export-part").exists()
    assert export.existing(run, wanted) == report
    assert export.existing(run, WANTED) is None  # it holds more than is wanted
    (folder / "merged" / "config.json").write_text("{}")
    assert export.existing(run, wanted) is None


@pytest.mark.slow
def test_an_adapter_that_was_zeroed_on_the_way_is_caught(written):
    run, config, folder = written
    zeroed(folder)
    changed = config.changed("model", adapter=str(folder))
    with pytest.raises(ExportError, match=r"answers \d of 8 held-out prompts otherwise than the run"):
        export._as_recorded(run, export.of_the_end(run), ask(changed, "it"), silent)


@pytest.mark.slow
def test_a_damaged_adapter_of_a_run_without_digests_is_caught_by_its_answers(copied):
    run, config = copied
    shutil.rmtree(run.checkpoints)
    worsened(run.adapter)
    with pytest.raises(ExportError, match=r"of 8 held-out prompts otherwise than"):
        export.export(run, config, WANTED, silent)
    assert not export.folder_of(run).exists()


@pytest.mark.slow
def test_a_run_whose_own_adapter_has_no_effect_is_no_export(tmp_path):
    run, config = finished_run(tmp_path, noise=0)
    with pytest.raises(
        ExportError, match=r"all 8 held-out answers equal those of the base: it has no effect\. Nothing"
    ):
        export.export(run, config, WANTED, silent)
    assert not export.folder_of(run).exists()


@pytest.mark.slow
def test_a_merge_on_another_base_loses_the_gain(written, tmp_path_factory):
    """Same names and shapes, other weights: no name tells, the answers do."""
    run, config, folder = written
    other = tiny_model_folder(tmp_path_factory.mktemp("other"), "llama", seed=9)
    merge.merge(other, merge.read_adapter(folder), folder / "merged")
    solved = {False: [False] * 8, True: [True] * 8}
    trained = [row["ids"] for row in run.evaluations()[-1]["rows"]]
    merged = ask(config.changed("model", name=str(folder / "merged"), adapter=None), "the merged model", tokens=trained)
    assert sum(a == b for a, b in zip(merged.ids, trained, strict=True)) < 4
    report = {"trained": {"gain": export.paired_gain(solved[False], solved[True])}, "forms": {}}
    report["forms"]["merged"] = {"gain": export.paired_gain(solved[False], merged.solved)}
    with pytest.raises(ExportError, match="the gain is lost"):
        export._keeps_the_gain("the merged model", report, "merged")


@pytest.mark.slow
@pytest.mark.night
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_command_exports_what_the_demo_trained(tmp_path, quantization):
    """SmolLM2-135M after a few steps: the adapter, merged, and where llama.cpp's converter is at hand a GGUF."""
    here = os.pathsep.join([str(Path(export.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": here, "HF_HUB_OFFLINE": "1"}

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "lite_trgrpo", *words]
        done = subprocess.run(line, capture_output=True, text=True, env=env, timeout=900)
        assert done.returncode == 0, done.stderr
        return done

    run = tmp_path / "run"
    small = ["eval.rows=12", "eval.samples=0", "train.learning_rate=1e-3", f"model.quantization={quantization}"]
    call("train", "--preset", "demo", "--steps", "10", "--output", str(run), *(f"--set={one}" for one in small))
    call("export", str(run), "--merge", *(["--gguf"] if converter_at_hand() else []))
    report = json.loads((run / "export" / "check.json").read_text())
    forms = {"merged"} | ({"unquantised"} if quantization == "nf4" else set())
    assert set(report["forms"]) == forms | ({"gguf"} if converter_at_hand() else set())
    assert report["base"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    # bfloat16 against float32 moves log-probabilities by 0.04 at most, nf4 by 0.4 (measured on this model)
    limit = 0.1 if quantization == "none" else 1.0
    assert all(scores["logprob_difference"] < limit for scores in report["forms"].values())


def converter_at_hand() -> bool:
    try:
        gguf.check("q8_0")
    except MissingPackageError:
        return False
    return True
