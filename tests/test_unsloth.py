"""The backend on unsloth, with a stand-in for the package, which needs a card: transformers and PEFT behind its names.

It shows that our side holds together; tests/test_drift.py compares the names with unsloth's own source, and
tests/test_gpu.py runs the package itself.
"""

import sys
from types import ModuleType

import pytest
import torch

from lite_trgrpo.backends import choice, transformers, unsloth
from lite_trgrpo.errors import ModelError
from lite_trgrpo.options import Model
from lite_trgrpo.policy import sample_all
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


def test_it_is_the_same_policy(folder, package):
    """Same base, same adapter seed: what it samples and says of it is what the other backend says."""
    options = Model(name=folder, device="cpu", lora_rank=4, lora_targets=["q_proj", "down_proj"])
    ours = unsloth.load(options, seed=3, gradient_checkpointing=True, longest=40)
    other = transformers.load(options, seed=3)
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
    with pytest.raises(ModelError, match=r"sampling and its forward differ by \d+\.\d+ nats"):
        unsloth.load(Model(name=folder, device="cpu"), seed=0, gradient_checkpointing=False, longest=40)


def test_a_gradient_that_does_not_arrive_is_refused(folder, package, monkeypatch):
    fast = sys.modules["unsloth"].FastLanguageModel

    def detached(model, **_):
        for name, parameter in model.named_parameters():
            if "layers.1.mlp.up_proj.lora_B" in name:
                parameter.register_hook(torch.zeros_like)
        return model.train()

    monkeypatch.setattr(fast, "for_training", staticmethod(detached))
    with pytest.raises(ModelError, match="leaves layers of the adapter without a gradient"):
        unsloth.load(Model(name=folder, device="cpu"), seed=0, gradient_checkpointing=False, longest=40)


def test_asked_for_by_name_its_absence_is_an_error(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "unsloth", None)  # import unsloth raises ImportError
    with pytest.raises(ModelError, match=r"unsloth cannot be imported: .* Type --set model.backend=transformers"):
        choice.load(Model(name=folder, device="cpu", backend="unsloth"), seed=0)


@pytest.mark.parametrize("broken", ["import", "load"])
def test_left_to_us_the_other_backend_takes_over(folder, package, monkeypatch, capsys, broken):
    """Where there is a card; without one the choice is made before."""
    monkeypatch.setattr(choice, "choose", lambda _: ("unsloth", "a card and the package are there"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(choice.torch.cuda, "is_available", lambda: True)
    if broken == "import":
        monkeypatch.setitem(sys.modules, "unsloth", None)
    else:
        fast = sys.modules["unsloth"].FastLanguageModel
        monkeypatch.setattr(fast, "from_pretrained", staticmethod(lambda **_: 1 / 0))
    monkeypatch.setattr(transformers, "load", lambda options, **_: "the other")
    monkeypatch.setattr(unsloth, "resolve_device", lambda _: torch.device("cpu"))
    assert choice.load(Model(name=folder), seed=0) == "the other"
    [line] = capsys.readouterr().err.splitlines()
    expected = {"import": "unsloth cannot be imported", "load": "unsloth failed here: division by zero"}
    assert line.startswith("backend: transformers (") and expected[broken] in line
