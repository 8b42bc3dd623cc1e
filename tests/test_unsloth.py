"""The backend on unsloth, with a stand-in for the package, which needs a card: transformers and PEFT behind its names.

It shows that our side holds together; tests/test_drift.py compares the names with unsloth's own source, and
tests/test_gpu.py runs the package itself.
"""

import sys
from contextlib import nullcontext
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch

from lite_trgrpo.config.schema import Model
from lite_trgrpo.errors import ModelError
from lite_trgrpo.model import hf, select, unsloth
from lite_trgrpo.model.policy import sample_all
from lite_trgrpo.records import Sampling
from tests.tiny import tiny_model_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_model_folder(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def package(monkeypatch):
    """-> the modes that the model was switched to, in order."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    modes = []

    class FastLanguageModel:
        @staticmethod
        def from_pretrained(model_name, max_seq_length, dtype, load_in_4bit, load_in_16bit, **_):
            assert max_seq_length >= 2048 and load_in_16bit != load_in_4bit
            return AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype), None

        @staticmethod
        def get_peft_model(model, r, lora_alpha, lora_dropout, use_rslora, target_modules, random_state, **_):
            torch.manual_seed(random_state)
            lora = LoraConfig(
                r=r, lora_alpha=lora_alpha, use_rslora=use_rslora, target_modules=target_modules, task_type="CAUSAL_LM"
            )
            return get_peft_model(model, lora)

        @staticmethod
        def for_inference(model):
            modes.append("inference")
            return model.eval()

        @staticmethod
        def for_training(model, use_gradient_checkpointing):
            modes.append(use_gradient_checkpointing)
            return model.train()

    module = ModuleType("unsloth")
    module.FastLanguageModel = FastLanguageModel
    monkeypatch.setitem(sys.modules, "unsloth", module)
    return modes


@dataclass
class SamplingParams:
    """vLLM's, as far as we use it."""

    temperature: float
    max_tokens: int
    stop_token_ids: list[int]
    logprobs: int
    seed: int
    detokenize: bool


@pytest.fixture
def vllm(package, monkeypatch):
    """-> the requests that it got: vLLM behind unsloth's names, one token after the other. Its log-probabilities are
    those of the distribution that was drawn from, as unsloth starts it for training.
    """
    asked = []
    fast = sys.modules["unsloth"].FastLanguageModel
    plain = fast.get_peft_model

    @torch.no_grad()
    def answer(model, ids, wanted, adapter):
        ids, found, logprobs = list(ids), [], []
        random = torch.Generator().manual_seed(wanted.seed)
        while len(found) < wanted.max_tokens and not (found and found[-1] in wanted.stop_token_ids):
            with nullcontext() if adapter else model.disable_adapter():
                logits = model(torch.tensor([ids + found])).logits[0, -1]
            q = torch.log_softmax(logits / (wanted.temperature or 1.0), -1)
            token = q.argmax() if wanted.temperature == 0 else torch.multinomial(q.exp(), 1, generator=random)
            found.append(int(token))
            logprobs.append({int(token): SimpleNamespace(logprob=q[int(token)].item())})
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(found), logprobs=logprobs)])

    def get_peft_model(model, **options):
        model = plain(model, **options)

        def fast_generate(prompts, sampling_params, lora_request, use_tqdm):
            asked.extend(sampling_params)
            pairs = zip(prompts, sampling_params, strict=True)
            return [answer(model, prompt["prompt_token_ids"], one, lora_request) for prompt, one in pairs]

        model.fast_generate = fast_generate
        model.load_lora = lambda folder, load_tensors: load_tensors
        return model

    monkeypatch.setattr(fast, "get_peft_model", staticmethod(get_peft_model))
    module = ModuleType("vllm")
    module.SamplingParams = SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    return asked


def test_vllm_samples_the_policy_and_without_its_adapter_the_base(folder, vllm):
    options = Model(name=folder, device="cpu", lora_rank=4)
    policy = unsloth.load(options, seed=3, gradient_checkpointing=False, longest=40, vllm=True)
    for name, parameter in policy.trainable().items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    prompts = [policy.encode(text) for text in ("2 + 2", "What is 17 + 25?")]
    vllm.clear()
    groups = sample_all(policy, prompts, Sampling(3, 6, 0.7, key=(1, 2)))
    assert len({answer.ids for answer in groups[0]}) > 1
    assert len({one.seed for one in vllm}) == 6 and {one.max_tokens for one in vllm} == {6}
    rows = [(prompt.ids, answer.ids) for prompt, group in zip(prompts, groups, strict=True) for answer in group]
    drawn = [answer.logprobs for group in groups for answer in group]
    scored = policy.logprobs(rows, 0.7)[0]
    for i, one in enumerate(drawn):
        torch.testing.assert_close(scored[i, : len(one)], torch.tensor(one), rtol=1e-4, atol=1e-4)
    [(_, _, alone)] = policy.sample(prompts, Sampling(3, 6, 0.7, key=(1, 2)), [[], [2]])
    assert alone == groups[1][2], "an answer does not depend on who else is asked for"
    greedy = Sampling(1, 6, greedy=True)
    on = sample_all(policy, prompts, greedy)
    with policy.reference():
        off = sample_all(policy, prompts, greedy)
    base = hf.load(options, seed=3)
    assert [group[0].ids for group in off] == [group[0].ids for group in sample_all(base, prompts, greedy)]
    assert [group[0].ids for group in on] != [group[0].ids for group in off]


def test_vllm_is_unsloths_alone(folder):
    with pytest.raises(ModelError, match=r"rollout\.engine = vllm.*--set rollout\.engine=groups"):
        select.load(Model(name=folder, device="cpu", backend="transformers"), seed=0, vllm=True)


def test_it_is_the_same_policy(folder, package):
    """Same base, same adapter seed: what it samples and says of it is what the other backend says."""
    options = Model(name=folder, device="cpu", lora_rank=4, lora_targets=["q_proj", "down_proj"])
    ours = unsloth.load(options, seed=3, gradient_checkpointing=True, longest=40)
    other = hf.load(options, seed=3)
    assert package[0] == "inference" and package[1] == "unsloth"  # the check samples, then takes a gradient
    assert ours.trainable().keys() == other.trainable().keys()
    prompt = ours.encode("2 + 2")
    package.clear()
    [answers] = sample_all(ours, [prompt], Sampling(3, 6))
    assert package == ["inference"]
    rows = [(prompt.ids, answer.ids) for answer in answers]
    found, expected = ours.logprobs(rows, 0.7)[0], other.logprobs(rows, 0.7)[0]
    assert package == ["inference", "unsloth"] and ours.model.training
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found.sum().backward()
    assert all(p.dtype == torch.float32 and p.grad is not None for p in ours.trainable().values())


def test_sampling_that_is_not_what_is_trained_is_refused(folder, package, monkeypatch):
    """As where an inference path forgets the positions, or the adapter."""
    fast = sys.modules["unsloth"].FastLanguageModel

    @torch.no_grad()
    def other_weights(model):
        model.get_output_embeddings().weight.mul_(-1.0)
        return model.eval()

    monkeypatch.setattr(fast, "for_inference", staticmethod(other_weights))
    monkeypatch.setattr(fast, "for_training", staticmethod(lambda model, **_: other_weights(model)))
    with pytest.raises(ModelError, match=r"\d+\.\d+ nats"):
        unsloth.load(Model(name=folder, device="cpu"), seed=0, gradient_checkpointing=False, longest=40)


def test_a_gradient_that_does_not_arrive_is_refused(folder, package, monkeypatch):
    fast = sys.modules["unsloth"].FastLanguageModel

    def detached(model, **_):
        for name, parameter in model.named_parameters():
            if "layers.1.mlp.up_proj.lora_B" in name:
                parameter.register_hook(torch.zeros_like)
        return model.train()

    monkeypatch.setattr(fast, "for_training", staticmethod(detached))
    with pytest.raises(ModelError, match="unsloth"):
        unsloth.load(Model(name=folder, device="cpu"), seed=0, gradient_checkpointing=False, longest=40)


def test_asked_for_by_name_its_absence_is_an_error(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "unsloth", None)  # import unsloth raises ImportError
    with pytest.raises(ModelError, match=r"unsloth.*--set model\.backend=transformers"):
        select.load(Model(name=folder, device="cpu", backend="unsloth"), seed=0)


@pytest.mark.parametrize("options", [{"vllm": True}, {}])
def test_a_load_that_fails_ends_with_the_line_to_type(folder, package, monkeypatch, options):
    """Never in transformers in the same process: unsloth has replaced parts of it by then."""
    fast = sys.modules["unsloth"].FastLanguageModel
    monkeypatch.setattr(fast, "from_pretrained", staticmethod(lambda **_: 1 / 0))
    monkeypatch.setattr(unsloth, "resolve_device", lambda _: torch.device("cpu"))
    monkeypatch.setattr(hf, "load", lambda options, **_: pytest.fail("fell back"))
    with pytest.raises(ModelError, match=r"division by zero.*--set model\.backend=transformers"):
        select.load(Model(name=folder, backend="auto" if options else "unsloth"), seed=0, **options)


def test_auto_is_transformers_whatever_is_installed_unless_vllm_is_to_sample(package):
    assert select.choose(Model(name="x"))[0] == "transformers"
    assert select.choose(Model(name="x"), vllm=True)[0] == "unsloth"
    assert select.choose(Model(name="x", backend="unsloth"))[0] == "unsloth"
