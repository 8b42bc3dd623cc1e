"""The Policy on transformers, PEFT and bitsandbytes: Linux, macOS and Windows, with or without a card."""

import logging
import shutil
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lite_trgrpo.backends.template import Template
from lite_trgrpo.backends.weights import Located, locate
from lite_trgrpo.errors import ModelError, first_line
from lite_trgrpo.hub import fetch
from lite_trgrpo.logprobs import selected_logprobs
from lite_trgrpo.options import Model
from lite_trgrpo.policy import Sequences
from lite_trgrpo.records import Completion, Message, Prompt, Sampling
from lite_trgrpo.rollout.engine import sample_groups


def load(options: Model, *, seed: int, gradient_checkpointing: bool = False) -> "TransformersPolicy":
    """Load the base (quantised where asked), put a LoRA adapter on it, and check that its head can be chunked."""
    from transformers import AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # bitsandbytes warns of an optional CPU kernel that it did not find
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    located = locate(
        options.name, options.revision,
        sha256=options.sha256, upstream=options.upstream, remote_code=options.trust_remote_code,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(
        located.folder,
        trust_remote_code=options.trust_remote_code,
        clean_up_tokenization_spaces=False,  # rewards must see the text as it was written
    )
    template = Template(tokenizer, options.prompt_format, options.template_options)
    base = _load_base(located, options, device, dtype)
    torch.manual_seed(seed)
    model = _with_lora(base, options, located)
    model.eval()
    if gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    return TransformersPolicy(model, template, located, gradient_checkpointing)


def resolve_device(wanted: str) -> torch.device:
    """`auto` takes the card if torch can use one. A card asked for and not usable is an error."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            f"model.device = cuda, but torch {torch.__version__} sees no usable card. Install a CUDA build of torch "
            "(pytorch.org/get-started), or type --set model.device=cpu"
        )
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def resolve_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 where the card has it, else float16 (Turing); float32 on CPU."""
    if wanted != "auto":
        return getattr(torch, wanted)
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _load_base(located: Located, options: Model, device: torch.device, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    try:
        config = AutoConfig.from_pretrained(located.folder, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"{located.folder} is no model that transformers knows: {error}") from None
    for name in vars(config):  # any dropout would make the ratio differ from 1 before the first update
        if name.endswith(("dropout", "_pdrop")) and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)
    quantization = None
    if options.quantization == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )  # fmt: skip
    try:
        model = AutoModelForCausalLM.from_pretrained(
            located.folder, config=config, dtype=dtype, device_map={"": device},
            quantization_config=quantization, use_safetensors=True,
            trust_remote_code=options.trust_remote_code,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise ModelError(f"{options.name} could not be loaded: {str(error).splitlines()[0]}") from None
    if quantization is not None:
        keep_gradients_on_cpu(model)
    return model


def keep_gradients_on_cpu(model: nn.Module) -> None:
    """Clear the flag under which bitsandbytes loses gradients on CPU.

    On processors with avx512_bf16, bitsandbytes 0.50 repacks every 4-bit layer at its first forward in eval mode;
    from then on no gradient passes through the base weights, silently: sample, then train, is exactly that order.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _with_lora(base: Any, options: Model, located: Located) -> Any:
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors import SafetensorError

    if options.adapter is not None:
        folder = Path(options.adapter).expanduser()
        if not folder.is_dir():
            if options.adapter.count("/") != 1 or options.adapter.startswith((".", "runs/")):
                raise ModelError(f"no adapter folder {folder} (from {Path.cwd()}); give one that exists, or a Hub id")
            folder = fetch(options.adapter, None, ["*.json", "*.safetensors"], "model.adapter")
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            if not (folder / file).is_file():
                raise ModelError(f"{folder} is no LoRA adapter: it has no {file}")
        try:
            model = PeftModel.from_pretrained(base, str(folder), is_trainable=True)
        except (RuntimeError, ValueError, OSError, TypeError, SafetensorError) as error:
            raise ModelError(
                f"the adapter {folder} does not fit {located.upstream}: {first_line(error)}. Its adapter_config.json "
                "names the base it was made for"
            ) from None
    else:
        every_layer = options.lora_targets == ["all-linear"]
        lora = LoraConfig(
            r=options.lora_rank, lora_alpha=options.lora_alpha, lora_dropout=0.0, use_rslora=options.rslora,
            target_modules="all-linear" if every_layer else options.lora_targets, task_type="CAUSAL_LM",
        )  # fmt: skip
        try:
            model = get_peft_model(base, lora)
        except ValueError as error:
            raise ModelError(f"model.lora_targets = {options.lora_targets!r}: {error}") from None
    adapter = model.peft_config["default"]
    adapter.base_model_name_or_path, adapter.revision = located.upstream, located.revision
    head = model.get_base_model().get_output_embeddings()
    if any(parameter.requires_grad for parameter in head.parameters()):
        raise ModelError("model.lora_targets names the output head, which must stay frozen; take it out of the list")
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # an adapter brings its own, a base may hide one in a nested config
            module.p = 0.0
    for parameter in model.parameters():
        if parameter.requires_grad:  # bf16 master weights would lose updates of 1e-5
            parameter.data = parameter.data.float()
    return model


class TransformersPolicy:
    """A causal language model with a LoRA adapter; see `lite_trgrpo.policy.Policy` for the methods."""

    def __init__(self, model: Any, template: Template, located: Located, gradient_checkpointing: bool) -> None:
        self.model = model
        self.template = template
        self.located = located
        self.gradient_checkpointing = gradient_checkpointing
        base = model.get_base_model()
        self.decoder, self.config = base.get_decoder(), base.config.get_text_config()
        self.device, self.dtype = base.device, base.dtype
        self.end_ids = template.end_ids(base.generation_config)
        pad = template.tokenizer.pad_token_id
        self.pad_id = min(self.end_ids) if pad is None else pad
        self._output = base.get_output_embeddings()
        self._soft_cap = getattr(self.config, "final_logit_softcapping", None)
        self._check_head()

    def encode(self, prompt: str | list[Message]) -> Prompt:
        return self.template.encode(prompt)

    def decode(self, ids: Sequence[int]) -> str:
        return self.template.tokenizer.decode(ids, skip_special_tokens=True)

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        self._check_length(prompts, sampling)
        self.model.eval()
        groups = sample_groups(self.model, [prompt.ids for prompt in prompts], sampling, self.end_ids, self.pad_id)
        return [
            [
                Completion(
                    tuple(answer.ids), (True,) * len(answer.ids), tuple(answer.logprobs), self.decode(answer.ids),
                    answer.stopped,
                )
                for answer in group
            ]
            for group in groups
        ]  # fmt: skip

    def logprobs(self, rows: Sequences, temperature: float) -> tuple[Tensor, Tensor]:
        # Gradient checkpointing only acts in training mode; all dropout is 0, so the mode changes nothing else.
        self.model.train(self.gradient_checkpointing and torch.is_grad_enabled())
        width = max(len(prompt) + len(completion) for prompt, completion in rows)
        ids = torch.full((len(rows), width), self.pad_id)
        attention = torch.zeros((len(rows), width), dtype=torch.long)
        scored = torch.zeros((len(rows), width), dtype=torch.bool)  # where the next id is a completion id
        for i, (prompt, completion) in enumerate(rows):
            end = len(prompt) + len(completion)
            ids[i, :end] = torch.tensor(prompt + completion)
            attention[i, :end] = 1
            scored[i, len(prompt) - 1 : end - 1] = True
        ids, scored = ids.to(self.device), scored.to(self.device)
        hidden = self.decoder(
            input_ids=ids, attention_mask=attention.to(self.device), use_cache=False,
            position_ids=torch.arange(width, device=self.device).expand(len(rows), -1),
        ).last_hidden_state  # fmt: skip
        targets = ids.roll(-1, dims=1)[scored]
        logprobs, entropy = selected_logprobs(hidden[scored], targets, self._head, temperature)
        lengths = [len(completion) for _, completion in rows]
        return _padded(logprobs, lengths), _padded(entropy, lengths)

    def reference(self) -> AbstractContextManager[object]:
        return self.model.disable_adapter()

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def save_adapter(self, folder: Path) -> None:
        part = folder.with_name(f".{folder.name}-part")  # the name `adapter` never stands for half of one
        shutil.rmtree(part, ignore_errors=True)
        # save_embedding_layers=False: otherwise PEFT asks the Hub whether the vocabulary was resized
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model.save_pretrained(part, save_embedding_layers=False)
        shutil.rmtree(folder, ignore_errors=True)
        part.replace(folder)

    def _head(self, hidden: Tensor) -> Tensor:
        logits = self._output(hidden)
        return logits if self._soft_cap is None else self._soft_cap * torch.tanh(logits / self._soft_cap)

    @torch.no_grad()
    def _check_head(self) -> None:
        """Some architectures scale logits after the head; find out now, not from a run that learns nothing."""
        ids = torch.arange(4, device=self.device).unsqueeze(0)
        expected = self.model(input_ids=ids, use_cache=False).logits.float()
        got = self._head(self.decoder(input_ids=ids, use_cache=False).last_hidden_state).float()
        if not torch.allclose(expected, got, rtol=1e-2, atol=1e-2):
            raise ModelError(
                f"the model type {self.config.model_type!r} changes its logits after the output head, which is not "
                "supported yet; take a Qwen, Llama, SmolLM, Mistral or Gemma model"
            )

    def _check_length(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        limit = getattr(self.config, "max_position_embeddings", None)
        longest = max((len(prompt.ids) for prompt in prompts), default=0)
        if any(not prompt.ids for prompt in prompts):
            raise ModelError("a prompt has no tokens; a language model needs at least one to answer to")
        if limit is not None and longest + sampling.max_new_tokens > limit:
            raise ModelError(
                f"a prompt of {longest} tokens and {sampling.max_new_tokens} new ones exceed the model's {limit}; "
                "lower data.max_prompt_tokens or rollout.max_new_tokens"
            )


def _padded(flat: Tensor, lengths: Sequence[int]) -> Tensor:
    """[sum of lengths] -> [B, T], zero beyond each row's length."""
    return nn.utils.rnn.pad_sequence(list(flat.split(list(lengths))), batch_first=True)
