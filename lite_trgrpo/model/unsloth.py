"""The Policy on unsloth's kernels, on a card: its generate, a padded forward, its gradient checkpointing.

Our engine and packed update come into play only where their check passes on its patched models. With
`rollout.engine = "vllm"` its vLLM samples.
On a card it loaded, passed its self-check and took a step (docs/gpu.md); a test holds every call against its source.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lite_trgrpo.config.schema import Model
from lite_trgrpo.errors import ModelError, first_line
from lite_trgrpo.model import hf
from lite_trgrpo.model.loading import no_dropout, resolve_device, resolve_dtype
from lite_trgrpo.model.policy import Sequences, sample_all
from lite_trgrpo.records import Completion, Prompt, Sampling
from lite_trgrpo.rollout.engine import Answer
from lite_trgrpo.rollout.sampling import row_keys

SHORTEST = 2048  # unsloth cuts off what is longer than max_seq_length, so it is never set low
BOUND = 0.1  # nats; rounding in 16 bits stays below on average


def problem() -> str | None:
    """Imports unsloth, which has to come before transformers. -> why that does not work, or None."""
    try:
        import unsloth  # noqa: F401
    except Exception as error:  # without a usable card it raises one of several kinds
        return f"unsloth cannot be imported: {first_line(error)}"
    return None


def load(
    options: Model, *, seed: int, gradient_checkpointing: bool, longest: int, vllm: bool = False
) -> "UnslothPolicy":
    """longest: tokens of a prompt with its answer; vllm: load it too, to sample with.

    Raises ModelError where unsloth's model fails the check.
    """
    from unsloth import FastLanguageModel  # before anything that imports transformers

    if options.adapter is not None:
        raise ModelError("model.adapter is continued by the other backend; type --set model.backend=transformers")
    if options.quantization == "int8":
        raise ModelError("unsloth has no int8; type --set model.backend=transformers")
    located, template = hf.tokenizer_of(options)
    checkpointing = "unsloth" if gradient_checkpointing else False
    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(located.folder), max_seq_length=max(longest, SHORTEST),
        dtype=resolve_dtype(options.dtype, resolve_device(options.device)),
        load_in_4bit=options.quantization == "nf4", load_in_16bit=options.quantization == "none",
        trust_remote_code=options.trust_remote_code, use_gradient_checkpointing=checkpointing,
        use_exact_model_name=True, random_state=seed,
        fast_inference=vllm, max_lora_rank=options.lora_rank,
    )  # fmt: skip
    no_dropout(model.config)
    every_layer = options.lora_targets == ["all-linear"]
    model = FastLanguageModel.get_peft_model(
        model, r=options.lora_rank, lora_alpha=options.lora_alpha, lora_dropout=0.0, use_rslora=options.rslora,
        target_modules="all-linear" if every_layer else options.lora_targets,
        use_gradient_checkpointing=checkpointing, random_state=seed, max_seq_length=max(longest, SHORTEST),
    )  # fmt: skip
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # bf16 would lose updates of 1e-5
    adapter = model.peft_config["default"]
    adapter.base_model_name_or_path, adapter.revision = located.upstream, located.revision
    return UnslothPolicy(model, template, located, gradient_checkpointing, vllm)


class UnslothPolicy(hf.TransformersPolicy):
    """See `model.policy.Policy`. unsloth patches a model for sampling and for training; we switch between."""

    def __init__(self, model: Any, template: Any, located: Any, gradient_checkpointing: bool, vllm: bool) -> None:
        self.checkpointing = "unsloth" if gradient_checkpointing else False
        self.vllm, self.adapter_on = vllm, True
        self.backend = "unsloth and vLLM" if vllm else "unsloth"
        super().__init__(model, template, located, gradient_checkpointing=False)  # not that of transformers
        self.network.gradient_checkpointing = gradient_checkpointing  # it decides the mode of the update

    def sample(self, *arguments: Any) -> Iterator[tuple[int, int, Completion]]:
        from unsloth import FastLanguageModel

        FastLanguageModel.for_inference(self.model)
        return super().sample(*arguments)

    def logprobs(self, rows: Sequences, temperature: float) -> tuple[Tensor, Tensor]:
        from unsloth import FastLanguageModel

        FastLanguageModel.for_training(self.model, use_gradient_checkpointing=self.checkpointing)
        return super().logprobs(rows, temperature)

    @contextmanager
    def reference(self) -> Iterator[None]:
        with super().reference():
            self.adapter_on = False
            try:
                yield
            finally:
                self.adapter_on = True

    def _answers(self, *arguments: Any) -> Iterator[Answer]:
        return (
            self._by_vllm(*arguments[:3]) if self.vllm else super()._answers(*arguments)
        )  # it tells no token by itself

    def _by_vllm(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, wanted: Sequence[Sequence[int]]
    ) -> Iterator[Answer]:
        """One request an answer, with a seed of its own; vLLM reads a shared prompt once by itself."""
        from vllm import SamplingParams

        asked = [(p, member) for p, members in enumerate(wanted) for member in members]
        numbers = np.array(asked, dtype=np.uint64).reshape(-1, 2)
        seeds = row_keys(sampling.key, numbers[:, 0], numbers[:, 1]) >> np.uint64(33)  # 31 bits
        parameters = [
            SamplingParams(
                temperature=0.0 if sampling.greedy else sampling.temperature,
                max_tokens=sampling.max_new_tokens, stop_token_ids=sorted(self.end_ids),
                logprobs=0, seed=seed, detokenize=False,
            )
            for seed in seeds.tolist()
        ]  # fmt: skip
        with tempfile.TemporaryDirectory(prefix="lite-trgrpo-") as folder:
            adapter = self.model.load_lora(folder, load_tensors=True) if self.adapter_on else None
            outputs = self.model.fast_generate(
                [{"prompt_token_ids": list(prompts[p])} for p, _ in asked], sampling_params=parameters,
                lora_request=adapter, use_tqdm=False,
            )  # fmt: skip
        for (p, member), output in zip(asked, outputs, strict=True):
            [found] = output.outputs
            ids = list(found.token_ids)
            logprobs = [at[i].logprob for at, i in zip(found.logprobs, ids, strict=True)]
            yield Answer(p, member, ids, logprobs, stopped=ids[-1] in self.end_ids)

    def _check(self) -> None:
        """The head is a plain one; what samples and what is trained agree; a gradient arrives. Then: our engine too?"""
        self.network.attend_by_groups(False)
        self.network.by_groups = False
        if self.network.head_differs():
            raise ModelError("on unsloth this model changes its logits after the output head")
        prompt = Prompt(tuple(range(3, 12)), "")
        [answers] = sample_all(self, [prompt], Sampling(2, 8))
        logprobs, _ = self.logprobs([(prompt.ids, answer.ids) for answer in answers], 1.0)
        gaps = [
            abs(logprobs[i, t].item() - drawn)
            for i, answer in enumerate(answers)
            for t, drawn in enumerate(answer.logprobs)
        ]
        if not sum(gaps) / len(gaps) <= BOUND:  # NaN is no agreement
            raise ModelError(f"unsloth's sampling and its forward differ by {sum(gaps) / len(gaps):.2f} nats")
        logprobs.sum().backward()
        gradients = [parameter.grad for name, parameter in self.trainable().items() if "lora_B" in name]
        self.model.zero_grad()
        if not all(grad is not None and torch.isfinite(grad).all() and grad.any() for grad in gradients):
            raise ModelError("unsloth's backward leaves layers of the adapter without a gradient")
        try:
            self.network.attend_by_groups(True)
            self.network.by_groups = not self.network.groups_differ()
        except Exception:  # its patched layers may know nothing of groups, and say so in any way
            self.network.by_groups = False
        self.network.attend_by_groups(self.network.by_groups)
