"""The output head: logits in fp32 from weights in 16 bits, without a copy of them."""

import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lite_trgrpo.model.logprobs import Head, selected_logprobs

WIDTHS = [1, 384, 4096, 8193]  # of the vocabulary: less than a block, a block, blocks and a rest


def layer_of(vocabulary, dtype, bias=False, width=64):
    layer = nn.Linear(width, vocabulary, bias=bias, dtype=dtype).requires_grad_(False)
    layer.weight.normal_()
    if bias:
        layer.bias.normal_()
    return layer


def relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("soft_cap", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("vocabulary", WIDTHS)
def test_logits_and_gradient_are_those_of_the_exact_product(vocabulary, dtype, soft_cap, bias):
    layer = layer_of(vocabulary, dtype, bias)
    hidden = torch.randn(5, 64).to(dtype).requires_grad_()
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = exact_hidden @ layer.weight.double().t() + (layer.bias.double() if bias else 0.0)
    exact = exact if soft_cap is None else soft_cap * torch.tanh(exact / soft_cap)
    found = Head(layer, soft_cap)(hidden)
    assert found.dtype == torch.float32
    assert relative_error(found, exact.detach()) < 1e-6

    upstream = torch.randn(5, vocabulary)
    found.backward(upstream)
    exact.backward(upstream.double())
    rounding = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6}[dtype]  # of the hidden states' own type
    assert hidden.grad.dtype == dtype
    assert relative_error(hidden.grad, exact_hidden.grad) < rounding


def test_gradient_to_fp32_hidden_states_has_fp32_accuracy():
    layer = layer_of(4101, torch.bfloat16)
    hidden = torch.randn(7, 64, requires_grad=True)
    upstream = torch.randn(7, 4101)
    Head(layer, None)(hidden).backward(upstream)
    assert relative_error(hidden.grad, upstream.double() @ layer.weight.double()) < 1e-6


def test_a_double_model_has_double_logits():
    layer = layer_of(384, torch.float64)
    hidden = torch.randn(3, 64, dtype=torch.float64)
    torch.testing.assert_close(Head(layer, None)(hidden), hidden @ layer.weight.t(), rtol=1e-14, atol=1e-14)


def test_log_probabilities_of_a_bf16_head_are_exact_to_fp32():
    """Logits rounded to bf16 would be off by 0.02 nats and more."""
    layer = layer_of(5000, torch.bfloat16)
    layer.weight.mul_(0.25)  # logits of standard deviation 2
    hidden, ids = torch.randn(9, 64).bfloat16(), torch.arange(9) * 500
    found, entropy = selected_logprobs(hidden, ids, Head(layer, None), temperature=0.7, chunk=4)
    logprobs = torch.log_softmax(hidden.double() @ layer.weight.double().t() / 0.7, -1)
    torch.testing.assert_close(found.double(), logprobs[torch.arange(9), ids], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(logprobs.exp() * logprobs).sum(-1), rtol=1e-5, atol=1e-5)


class Born(TorchDispatchMode):
    """Every fp32 tensor as wide as the hidden states that comes into being."""

    def __init__(self, width):
        super().__init__()
        self.width, self.largest, self.seen = width, 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32 and self.width in tensor.shape[-2:]:
                self.largest = max(self.largest, tensor.numel())
                self.seen.append(weakref.ref(tensor))
        return out

    def alive(self):
        return sum(tensor.numel() for tensor in (ref() for ref in self.seen) if tensor is not None)


def test_no_fp32_copy_of_the_weight_is_made_or_kept():
    vocabulary, tokens = 32768, 4
    layer = layer_of(vocabulary, torch.bfloat16)
    hidden = torch.randn(tokens, 64, requires_grad=True)
    with Born(64) as born:
        logits = Head(layer, None)(hidden)
        assert 0 < born.largest <= vocabulary * 64 / 8
        assert born.alive() <= 2 * tokens * 64, "blocks are kept for backward"
        logits.sum().backward()
    assert born.largest <= vocabulary * 64 / 8
    assert hidden.grad.abs().sum() > 0
