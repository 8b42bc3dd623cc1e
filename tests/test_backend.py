"""The Policy on real libraries, with random two-layer models: what is sampled is what is trained."""

import json
import shutil

import pytest
import torch
from gguf import GGUFWriter
from peft import AutoPeftModelForCausalLM, PeftModel
from typer.testing import CliRunner

from lite_trgrpo.check import memory
from lite_trgrpo.cli import app
from lite_trgrpo.config.schema import Model
from lite_trgrpo.errors import ModelError
from lite_trgrpo.model import hf
from lite_trgrpo.model.policy import sample_all
from lite_trgrpo.model.template import Template
from lite_trgrpo.records import Sampling
from tests.tiny import END, KINDS, PAD, START, tiny_model, tiny_model_folder, tiny_tokenizer

PROMPTS = ["2 + 2", "Ada buys 5 apples and 2 bags with 3 apples in each bag. How many?", "coins"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {kind: tiny_model_folder(root / kind, kind) for kind in KINDS}


def policy_of(folder, *, random_adapter=True, gradient_checkpointing=False, **options):
    """A policy whose adapter already does something (LoRA's B starts at 0)."""
    policy = hf.load(
        Model(name=str(folder), lora_rank=4, **options), seed=1, gradient_checkpointing=gradient_checkpointing
    )
    if random_adapter:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in policy.trainable().items():
                if "lora_B" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


def sampled(policy, prompts=PROMPTS, **options):
    encoded = [policy.encode(prompt) for prompt in prompts]
    settings = {"members": 3, "max_new_tokens": 12, "key": (5,), **options}
    return encoded, sample_all(policy, encoded, Sampling(**settings))


def plain_logprobs(policy, prompt_ids, ids, temperature):
    """The reference: one row, no padding, the whole [1, L, V] of the model itself."""
    row = torch.tensor([prompt_ids + ids])
    logits = policy.model(input_ids=row, use_cache=False).logits[0].float() / temperature
    logprobs = torch.log_softmax(logits, -1)[len(prompt_ids) - 1 : -1]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, torch.tensor(ids).unsqueeze(-1)).squeeze(-1), entropy


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_sampler_and_scorer_agree_with_the_plain_model(folders, kind, quantization):
    policy = policy_of(folders[kind], quantization=quantization)
    policy.end_ids |= frozenset(range(3, 60))  # random models rarely end an answer
    prompts, groups = sampled(policy, temperature=0.7, members=6, max_new_tokens=40)
    rows = [(p.ids, c.ids) for p, group in zip(prompts, groups, strict=True) for c in group]
    logprobs, entropy = policy.logprobs(rows, 0.7)
    completions = [c for group in groups for c in group]
    assert len({len(c.ids) for c in completions}) > 1, "rows must be ragged for the test to mean something"
    for i, ((prompt_ids, ids), completion) in enumerate(zip(rows, completions, strict=True)):
        expected, expected_entropy = plain_logprobs(policy, prompt_ids, ids, 0.7)
        torch.testing.assert_close(logprobs[i, : len(ids)], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(entropy[i, : len(ids)], expected_entropy, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected.detach(), rtol=1e-4, atol=1e-4)
        assert (logprobs[i, len(ids) :] == 0).all()


def test_the_first_end_token_is_in_and_nothing_after_it(folders):
    policy = policy_of(folders["llama"])
    _, groups = sampled(policy, members=16, max_new_tokens=40)
    completions = [c for group in groups for c in group]
    assert any(c.stopped for c in completions) and not all(c.stopped for c in completions)
    for completion in completions:
        ends = [i for i, token in enumerate(completion.ids) if token in policy.end_ids]
        assert ends == ([len(completion.ids) - 1] if completion.stopped else [])
        assert completion.stopped or len(completion.ids) == 40


def lora_gradient(policy, rows):
    for parameter in policy.trainable().values():
        parameter.grad = None
    policy.logprobs(rows, 1.0)[0].sum().backward()
    return torch.cat([p.grad.flatten() for p in policy.trainable().values()])


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_int8_gradients_survive_sampling(folders):
    from bitsandbytes.functional import int8_vectorwise_dequant
    from bitsandbytes.nn import Linear8bitLt

    quantised, plain = policy_of(folders["qwen2"], quantization="int8"), policy_of(folders["qwen2"])
    modules, layers = dict(plain.model.named_modules()), 0
    for name, module in quantised.model.named_modules():
        if isinstance(module, Linear8bitLt):
            rounded = int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
            assert 0 < relative_error(rounded, modules[name].weight) < 0.02
            with torch.no_grad():
                modules[name].weight.copy_(rounded)
            layers += 1
    assert layers == 14
    prompts, groups = sampled(quantised)
    rows = [(p.ids, c.ids) for p, group in zip(prompts, groups, strict=True) for c in group]
    assert relative_error(lora_gradient(quantised, rows), lora_gradient(plain, rows)) < 1e-4


def test_nf4_gradients_survive_sampling(folders):
    """bitsandbytes 0.50 on CPUs with avx512_bf16: after one forward in eval mode the gradient through the base was
    lost without a word (relative error 0.997), which is exactly the order sample, then train."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    quantised = policy_of(folders["qwen2"], quantization="nf4")
    plain = policy_of(folders["qwen2"])
    modules = dict(plain.model.named_modules())
    layers = 0
    for name, module in quantised.model.named_modules():
        if isinstance(module, Linear4bit):
            with torch.no_grad():
                modules[name].weight.copy_(dequantize_4bit(module.weight, module.weight.quant_state))
            layers += 1
    assert layers == 14  # seven linear layers in each of two blocks
    prompts, groups = sampled(quantised)
    rows = [(p.ids, c.ids) for p, group in zip(prompts, groups, strict=True) for c in group]
    assert relative_error(lora_gradient(quantised, rows), lora_gradient(plain, rows)) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_nothing(folders, kind):
    gradients = []
    for checkpointing in (False, True):
        policy = policy_of(folders[kind], gradient_checkpointing=checkpointing)
        prompts, groups = sampled(policy)
        gradients.append(
            lora_gradient(policy, [(prompts[0].ids, groups[0][0].ids), (prompts[1].ids, groups[1][0].ids)])
        )
        assert sampled(policy)[1] == groups, "sampling after a backward is as before"
    assert relative_error(*gradients) < 1e-6


def test_reference_is_the_base(folders):
    policy = policy_of(folders["qwen2"])
    fresh = policy_of(folders["qwen2"], random_adapter=False)
    rows = [(policy.encode("2 + 2").ids, (30, 40, 50))]
    with torch.no_grad(), policy.reference():
        off = policy.logprobs(rows, 1.0)[0]
    on = policy.logprobs(rows, 1.0)[0]
    torch.testing.assert_close(off, fresh.logprobs(rows, 1.0)[0].detach(), rtol=0, atol=1e-6)
    assert (on - off).abs().max() > 1e-3


def test_adapter_is_fp32_whatever_the_base(folders):
    policy = policy_of(folders["qwen2"], dtype="bfloat16")
    assert {p.dtype for p in policy.trainable().values()} == {torch.float32}
    assert policy.dtype == torch.bfloat16
    prompts, groups = sampled(policy)
    assert torch.isfinite(lora_gradient(policy, [(prompts[0].ids, groups[0][0].ids)])).all()


def test_saved_adapter_is_plain_peft(folders, tmp_path):
    policy = policy_of(folders["qwen2"], upstream="Someone/Base-1B")
    policy.save_adapter(tmp_path / "adapter")
    described = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == "Someone/Base-1B"
    assert described["target_modules"] == sorted(described["target_modules"]), "a set's order differs between processes"
    other = PeftModel.from_pretrained(tiny_model("qwen2"), tmp_path / "adapter")
    ids = torch.tensor([policy.encode("2 + 2").ids])
    with torch.no_grad():
        ours, theirs = policy.model(input_ids=ids).logits, other(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    again = policy_of(folders["qwen2"], random_adapter=False, adapter=str(tmp_path / "adapter"))
    assert again.trainable().keys() == policy.trainable().keys()
    assert all(torch.equal(a, b) for a, b in zip(again.trainable().values(), policy.trainable().values(), strict=True))


def test_an_adapter_made_for_another_base_is_said(folders, tmp_path, caplog):
    policy_of(folders["qwen2"], upstream="Someone/Base-1B").save_adapter(tmp_path / "adapter")
    for base, warned in (("Someone/Base-1B", False), ("Someone/Other-1B", True)):
        policy_of(folders["qwen2"], random_adapter=False, upstream=base, adapter=str(tmp_path / "adapter"))
        said = caplog.text
        assert ("Someone/Base-1B" in said and base in said) == warned


def test_adapter_names_its_base_folder(folders, tmp_path):
    """Without an upstream id the adapter still finds its base: PEFT alone loads both."""
    policy = policy_of(folders["llama"])
    policy.save_adapter(tmp_path / "adapter")
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert model.get_base_model().config.model_type == "llama"


def test_an_adapters_own_dropout_is_put_to_rest(folders, tmp_path):
    """With it the scorer under gradient checkpointing (training mode) was up to 2.6 nats from the sampler."""
    policy_of(folders["qwen2"]).save_adapter(tmp_path / "adapter")
    described = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**described, "lora_dropout": 0.5}))
    policy = policy_of(
        folders["qwen2"], random_adapter=False, gradient_checkpointing=True, adapter=str(tmp_path / "adapter")
    )
    rows = [(policy.encode("2 + 2").ids, (30, 40, 50))]
    with torch.no_grad():
        calm = policy.logprobs(rows, 1.0)[0]
    torch.testing.assert_close(policy.logprobs(rows, 1.0)[0], calm, rtol=0, atol=1e-6)


def test_an_adapter_that_does_not_fit_is_one_clear_error(folders, tmp_path):
    adapter = tmp_path / "adapter"
    policy_of(folders["qwen2"]).save_adapter(adapter)
    narrow = tiny_model_folder(tmp_path / "narrow", "qwen2", hidden_size=128)
    with pytest.raises(ModelError, match=str(adapter)):
        hf.load(Model(name=str(narrow), adapter=str(adapter)), seed=0)
    whole = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=str(adapter)):
        hf.load(Model(name=str(folders["qwen2"]), adapter=str(adapter)), seed=0)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors"):
        hf.load(Model(name=str(folders["qwen2"]), adapter=str(adapter)), seed=0)
    with pytest.raises(ModelError, match="runs/nothing"):
        hf.load(Model(name=str(folders["qwen2"]), adapter="runs/nothing"), seed=0)


def test_a_gguf_of_a_fetched_package_is_found_and_its_hash_compared(tmp_path, monkeypatch):
    monkeypatch.setenv("LITE_TRGRPO_CACHE", str(tmp_path))
    (tmp_path / "packages" / "some_model").mkdir(parents=True)
    (tmp_path / "packages" / "some_model" / "tiny.gguf").write_bytes(b"weights")
    with pytest.raises(ModelError, match=r"other\.gguf"):
        hf.load(Model(name="package:some_model/other.gguf"), seed=0)
    with pytest.raises(ModelError, match=r"(?s)SHA-256|sha256"):
        hf.load(Model(name="package:some_model/tiny.gguf", sha256="0" * 64), seed=0)


# -- prompts and end tokens ---------------------------------------------------------------------------------


def test_prompt_is_tokenised_once_with_its_template(folders):
    policy = policy_of(folders["qwen2"], random_adapter=False)
    prompt = policy.encode([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2"}])
    assert prompt.text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 2<|im_end|>\n<|im_start|>assistant\n"
    )
    assert policy.template.tokenizer.decode(prompt.ids) == prompt.text
    assert prompt.prefix == ""


def with_bos(template="{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"):
    """A tokenizer that adds a BOS by itself, with a template that writes one too."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.chat_template = template
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.mark.parametrize("prompt_format", [None, "Question: {prompt}\nAnswer:"])
def test_one_bos(prompt_format):
    tokenizer = with_bos()
    prompt = Template(tokenizer, prompt_format, {}).encode("2 + 2")
    assert prompt.ids.count(tokenizer.bos_token_id) == 1
    assert prompt.ids[0] == tokenizer.bos_token_id


def with_tags(tokens=("<think>", "</think>", "<answer>", "</answer>"), template=None):
    """The tiny tokenizer with tags that were added as special tokens, as many fine-tunes do."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *tokens]})
    if template:
        tokenizer.chat_template += template
    return tokenizer


def test_tags_that_are_special_tokens_reach_the_rewards():
    """They once vanished: `<think>1 + 1</think><answer>2</answer>` was scored as `1 + 12`."""
    text = "<think>1 + 1</think><answer>2</answer>"
    opening = "{% if add_generation_prompt %}<think></think>{% endif %}"  # a template that writes tags is no reason
    for tokenizer in (with_tags(), with_tags(template=opening)):
        ids = tokenizer(text).input_ids
        assert tokenizer.convert_tokens_to_ids("<think>") in ids
        template = Template(tokenizer, None, {})
        assert template.decode([*ids, END, PAD], {END}) == text
        assert template.decode([START, *ids], ()) == text


def test_tags_reach_rewards_and_logs_of_a_run(tiny_config, tmp_path):
    """A part of the tiny vocabulary becomes special tokens, so that random answers hold some."""
    path = tmp_path / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    words = [token for token in content["model"]["vocab"] if token.isascii() and token.isalpha()]
    # none that the template writes: those mark turns
    by_id = {content["model"]["vocab"][word]: word for word in words if word not in "user q assistant"}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"] += [{"id": i, "content": by_id[i], **flags} for i in by_id]
    path.write_text(json.dumps(content))
    words = ["train", "--config", str(tiny_config), "--output", str(tmp_path / "run"), "--steps", "1"]
    assert CliRunner().invoke(app, words).exit_code == 0
    groups = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    answers = [answer for group in groups for answer in group["completions"]]
    special = [(by_id[i], answer["text"]) for answer in answers for i in answer["ids"] if i in by_id]
    assert len(special) > 5 and all(token in text for token, text in special)


def test_an_end_token_that_the_tokenizer_appends_is_not_in_the_prompt():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    ends = [("<|im_start|>", START), ("<|im_end|>", END)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|im_start|> $A <|im_end|>", special_tokens=ends)
    assert tokenizer("x").input_ids[-1] == END
    prompt = Template(tokenizer, "Question: {prompt}\nAnswer:", {}).encode("2 + 2")
    assert prompt.ids[0] == START and END not in prompt.ids
    assert prompt.text == "<|im_start|>Question: 2 + 2\nAnswer:" == tokenizer.decode(prompt.ids)


def test_the_shown_prompt_is_made_of_the_ids(tiny_config, tmp_path):
    """What the tokenizer adds shows only there."""
    path = tmp_path / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    piece = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing", "single": [piece, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [START], "tokens": ["<|im_start|>"]}},
    }  # fmt: skip
    path.write_text(json.dumps(content))
    tiny_config.write_text(tiny_config.read_text().replace("[data]", 'prompt_format = "Ask: {prompt}"\n[data]'))
    words = ["train", "--config", str(tiny_config), "--output", str(tmp_path / "run"), "--steps", "1"]
    said = CliRunner().invoke(app, words).stderr
    assert "<|im_start|>Ask: " in said


def test_a_system_message_without_a_place_in_the_format_is_an_error():
    with pytest.raises(ModelError, match=r"\{system\}"):
        template = Template(tiny_tokenizer(), "Q: {prompt}\nA:", {})
        template.encode([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2"}])


def test_data_system_without_a_place_is_refused_before_anything_is_loaded(tiny_config):
    words = ["--set", "model.prompt_format=Q: {prompt}", "--set", "data.system=Be brief."]
    refused = CliRunner().invoke(app, ["train", "--config", str(tiny_config), "--dry-run", *words])
    assert refused.exit_code == 1 and "data.system" in refused.stderr and "{system}" in refused.stderr
    words[1] = "model.prompt_format={system} Q: {prompt}"
    assert CliRunner().invoke(app, ["train", "--config", str(tiny_config), "--dry-run", *words]).exit_code == 0


@pytest.mark.parametrize("template", ["{{ 'a' * 100000000 }}", "a" * 10_000_000], ids=["rendered", "written"])
def test_a_chat_template_beyond_measure_is_refused(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ModelError, match="1,000,000 characters"):
        Template(tokenizer, None, {}).encode("2 + 2")


def test_declared_format_for_bases():
    template = Template(tiny_tokenizer(), "{system}\nQ: {prompt}\nA:", {})
    messages = [{"role": "system", "content": "Be {brief}."}, {"role": "user", "content": "{prompt}?"}]
    assert template.encode(messages).text == "Be {brief}.\nQ: {prompt}?\nA:"


def test_opened_think_is_the_rewards_business():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template += "{% if add_generation_prompt and thinking %}<think>\n{% endif %}"
    assert Template(tokenizer, None, {"thinking": True}).encode("2 + 2").prefix == "<think>\n"
    assert Template(tokenizer, None, {"thinking": False}).encode("2 + 2").prefix == ""


class Declared:
    """A generation config as far as it matters here."""

    def __init__(self, eos):
        self.eos_token_id = eos


@pytest.mark.parametrize(
    ("eos_token", "declared", "expected"),
    [
        ("<|im_end|>", END, {END}),
        ("<|endoftext|>", PAD, {PAD, END}),  # the template ends a turn with <|im_end|>, whatever the tokenizer says
        ("<|im_end|>", [PAD, 77], {END, PAD, 77}),
        ("<|endoftext|>", None, {PAD, END}),
    ],
)
def test_end_tokens_are_the_union(eos_token, declared, expected):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = eos_token
    assert Template(tokenizer, None, {}).end_ids(Declared(declared)) == expected


# -- refusals -----------------------------------------------------------------------------------------------


def test_what_cannot_work_is_refused_with_the_way_out(folders, tmp_path):
    qwen = folders["qwen2"]
    broken = shutil.copytree(qwen, tmp_path / "broken")
    (broken / "config.json").write_text('{"model_type": "no-such-model"}')
    pickled = shutil.copytree(qwen, tmp_path / "pickled")
    torch.save({}, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / "adapter_config.json").write_text("{}")
    cases = [
        ({"name": "no/such/folder"}, "no/such/folder"),
        ({"name": str(tmp_path)}, "config.json"),
        ({"name": "missing.gguf"}, "missing.gguf"),
        ({"name": "package:json/tokens.gguf"}, "tokens.gguf"),
        ({"name": str(broken)}, str(broken)),
        ({"name": str(pickled)}, str(pickled)),
        ({"name": str(qwen), "lora_targets": ["nothing"]}, "model.lora_targets"),
        ({"name": str(folders["llama"]), "lora_targets": ["q_proj", "lm_head"]}, "model.lora_targets"),
        ({"name": str(qwen), "prompt_format": "no place"}, "{prompt}"),
        ({"name": str(qwen), "adapter": str(tmp_path)}, "adapter_config.json"),
        ({"name": str(qwen), "adapter": str(run)}, str(run / "adapter")),
    ]
    if not torch.cuda.is_available():
        cases.append(({"name": str(qwen), "device": "cuda"}, "--set model.device=cpu"))
    for options, named in cases:
        with pytest.raises(ModelError) as caught:
            hf.load(Model(**options), seed=0)
        assert named in str(caught.value), options


def test_no_chat_template_asks_for_a_format():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match=r"model\.prompt_format"):
        Template(tokenizer, None, {})


@pytest.mark.parametrize("command", [["check", "memory"], ["train"]], ids=str)
def test_a_base_without_a_template_is_refused_before_its_plan(tmp_path, tiny_config, command, monkeypatch):
    base = tiny_model_folder(tmp_path / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    (base / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(base)
    monkeypatch.setattr(memory, "plan", None)  # never called
    given = ["--config", str(tiny_config), "--set", f"model.name={json.dumps(str(base))}"]
    done = CliRunner().invoke(app, [*command, *given])
    assert done.exit_code == 1 and "model.prompt_format" in done.output, done.output
    assert "Traceback" not in done.output


def test_a_gguf_without_a_template_is_refused_before_it_is_converted(tmp_path, tiny_config, monkeypatch):
    monkeypatch.setenv("LITE_TRGRPO_CACHE", str(tmp_path / "cache"))
    writer = GGUFWriter(tmp_path / "base.gguf", "llama")
    writer.add_context_length(64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    given = ["--config", str(tiny_config), "--set", f"model.name={json.dumps(str(tmp_path / 'base.gguf'))}"]
    done = CliRunner().invoke(app, ["check", "memory", *given])
    assert done.exit_code == 1 and "model.prompt_format" in done.output, done.output
    assert not (tmp_path / "cache").exists()


def test_a_template_that_refuses_a_role_says_so():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    )
    with pytest.raises(ModelError, match=r"System role not supported.*data\.system"):
        Template(tokenizer, None, {}).encode([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}])


def test_context_overflow_is_an_error_before_sampling(folders):
    with pytest.raises(ModelError, match=r"data\.max_prompt_tokens.*rollout\.max_new_tokens"):
        sampled(policy_of(folders["qwen2"]), max_new_tokens=2048)


def test_logits_scaled_after_the_head_are_noticed(tmp_path):
    from transformers import GraniteConfig, GraniteForCausalLM

    config = GraniteConfig(
        vocab_size=384, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, logits_scaling=8.0, initializer_range=0.2, bos_token_id=None, eos_token_id=END,
        pad_token_id=PAD,
    )  # fmt: skip
    GraniteForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="granite"):
        hf.load(Model(name=str(tmp_path)), seed=0)


def test_soft_capped_logits_are_followed(tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=384, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, final_logit_softcapping=3.0, initializer_range=0.3, bos_token_id=None,
        eos_token_id=END, pad_token_id=PAD, sliding_window=8,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    policy = hf.load(Model(name=str(tmp_path)), seed=0)
    prompt = policy.encode("2 + 2").ids
    expected, _ = plain_logprobs(policy, prompt, (30, 40, 50), 1.0)
    torch.testing.assert_close(policy.logprobs([(prompt, (30, 40, 50))], 1.0)[0][0], expected, rtol=1e-5, atol=1e-5)
