"""The Policy on transformers, PEFT and bitsandbytes: Linux, macOS and Windows, with or without a card."""

import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lite_trgrpo.config.schema import Model
from lite_trgrpo.errors import FOREIGN, ModelError, first_line
from lite_trgrpo.model import padded
from lite_trgrpo.model.loading import load_base, resolve_device, resolve_dtype
from lite_trgrpo.model.lora import with_lora
from lite_trgrpo.model.network import Network
from lite_trgrpo.model.oom import ran_out
from lite_trgrpo.model.policy import Sequences
from lite_trgrpo.model.template import Template
from lite_trgrpo.model.weights import Located, at_hand, locate
from lite_trgrpo.records import Completion, Message, Prompt, Sampling
from lite_trgrpo.rollout.engine import Answer, Engine, slot_count

logger = logging.getLogger(__name__)


def load(options: Model, *, seed: int, gradient_checkpointing: bool = False) -> "TransformersPolicy":
    """Load the base (quantised where asked), put a LoRA adapter on it, and check what we assume about the model."""
    model, template, located = parts(options, resolve_device(options.device), seed)
    return TransformersPolicy(model, template, located, gradient_checkpointing)


def parts(options: Model, device: torch.device, seed: int) -> tuple[Any, Template, Located]:
    """-> the base with its adapter, in eval mode; its tokenizer; where the base was found."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    dtype = resolve_dtype(options.dtype, device)
    located, template = tokenizer_of(options)
    base = load_base(located, options, device, dtype)
    torch.manual_seed(seed)
    model = with_lora(base, options, located)
    model.eval()
    return model, template, located


def tokenizer_of(options: Model) -> tuple[Located, Template]:
    """Find the base, and load the tokenizer beside it."""
    located = locate(options)
    return located, _template(located.folder, options)


def template_at_hand(options: Model) -> Template | None:
    """The base's tokenizer and template, if nothing has to be fetched or converted for them."""
    folder = at_hand(options.name, options.revision)
    return None if folder is None or not (folder / "tokenizer.json").is_file() else _template(folder, options)


def _template(folder: Path, options: Model) -> Template:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder,
            trust_remote_code=options.trust_remote_code,
            clean_up_tokenization_spaces=False,  # rewards must see the text as it was written
        )
    except Exception as error:  # files of others: the library raises whatever it stumbles over
        raise ModelError(f"the tokenizer of {options.name} cannot be read: {first_line(error)}") from None
    if not tokenizer("1 + 1").input_ids:  # without its files transformers makes an empty one
        raise ModelError(f"{options.name} has no tokenizer: its folder has no tokenizer.json")
    return Template(tokenizer, options.prompt_format, options.template_options)


class TransformersPolicy:
    """A causal language model with a LoRA adapter; see `lite_trgrpo.model.policy.Policy` for the methods."""

    backend = "transformers"

    def __init__(self, model: Any, template: Template, located: Located, gradient_checkpointing: bool) -> None:
        self.model = model
        self.template = template
        self.located = located
        self.end_ids = template.end_ids(model.get_base_model().generation_config)
        pad = template.tokenizer.pad_token_id
        self.network = Network(model, min(self.end_ids) if pad is None else pad, gradient_checkpointing)
        self.device, self.dtype = self.network.device, self.network.dtype
        self.rows = model.get_input_embeddings().weight.shape[0]
        if (last := max(template.tokenizer.vocab_size - 1, *self.end_ids)) >= self.rows:
            raise ModelError(
                f"the tokenizer beside {located.upstream} has tokens up to id {last}, the model's embedding has "
                f"{self.rows} rows: it is another model's. Put the model's own tokenizer files back"
            )
        self._check()

    def encode(self, prompt: str | list[Message]) -> Prompt:
        found = self.template.encode(prompt)
        if (last := max(found.ids, default=0)) >= self.rows:  # some tokenizers have more tokens, for images
            raise ModelError(
                f"a prompt holds the token {self.pieces([last])[0]!r} with id {last}, but the model's embedding has "
                f"{self.rows} rows: the token was added to the tokenizer and not to the model"
            )
        return found

    def decode(self, ids: Sequence[int]) -> str:
        return self.template.decode(ids, self.end_ids)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return self.template.tokenizer.batch_decode([[i] for i in ids])

    def context(self) -> int | None:
        """Longest sequence that the model takes (tokens); None: it names no limit."""
        return getattr(self.network.config, "max_position_embeddings", None)

    def cache_mib(self) -> int:
        """Memory for keys and values that suits this machine (MiB)."""
        if self.device.type != "cuda":
            return 2048
        return max(1, torch.cuda.mem_get_info(self.device)[0] // 3 // 2**20)

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        wanted: Sequence[Sequence[int]],
        grown: Callable[[Answer], None] = lambda answer: None,
    ) -> Iterator[tuple[int, int, Completion]]:
        """`grown` is called with each token of an answer."""
        self._check_length(prompts, sampling)
        self.model.eval()
        for answer in self._answers([prompt.ids for prompt in prompts], sampling, wanted, grown):
            completion = Completion(
                tuple(answer.ids), (True,) * len(answer.ids), tuple(answer.logprobs), self.decode(answer.ids),
                answer.stopped,
            )  # fmt: skip
            yield answer.prompt, answer.member, completion

    def _answers(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        wanted: Sequence[Sequence[int]],
        grown: Callable[[Answer], None],
    ) -> Iterator[Answer]:
        if sampling.engine == "generate" or not self.network.by_groups:
            pad_id, like_lengths = self.network.pad_id, not self.network.pads
            return padded.generate(self.model, prompts, sampling, wanted, self.end_ids, pad_id, grown, like_lengths)
        slots = slot_count(prompts, sampling, *self.network.cache_bytes)
        return Engine(self.network, prompts, sampling, self.end_ids, slots, wanted, grown).answers()

    @property
    def packs(self) -> bool:
        return self.network.packs

    def logprobs(self, rows: Sequences, temperature: float) -> tuple[Tensor, Tensor]:
        return self.network.logprobs(rows, temperature)

    def reference(self) -> AbstractContextManager[object]:
        return self.model.disable_adapter()

    def trainable(self) -> dict[str, nn.Parameter]:
        return self.network.trainable()

    def save_adapter(self, folder: Path) -> None:
        part = folder.with_name(f".{folder.name}-part")  # the name `adapter` never stands for half of one
        shutil.rmtree(part, ignore_errors=True)
        # save_embedding_layers=False: otherwise PEFT asks the Hub whether the vocabulary was resized
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model.save_pretrained(part, save_embedding_layers=False)
        old = folder.with_name(f".{folder.name}-old")  # until the new one is in place
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.replace(old)
        part.replace(folder)
        shutil.rmtree(old, ignore_errors=True)

    def _check(self) -> None:
        """Check on a few tokens what we assume about a model: a plain head, and attention that ours can replace."""
        kind = self.network.config.model_type
        self.network.attend_by_groups(False)
        if not self.network.finite():
            if self.dtype == torch.float16:
                raise ModelError(
                    f"the activations of this {kind!r} model are beyond float16's largest number (65,504). Type --set "
                    "model.dtype=float32, or bfloat16 on a card that has it"
                )
            raise ModelError(f"{self.located.folder} gives logits that are not finite: its weights are damaged")
        if self.network.head_differs():
            raise ModelError(
                f"the model type {kind!r} changes its logits after the output head, which is not supported yet; take a "
                "Qwen, Llama, SmolLM, Mistral or Gemma model"
            )
        self.network.attend_by_groups(True)
        try:
            wrong = self.network.groups_differ()
        except FOREIGN as error:
            if ran_out(error):  # says nothing about the model; the slow path would need more memory
                raise
            wrong = first_line(error)
        self.network.by_groups = not wrong
        if wrong:
            self.network.attend_by_groups(False)
            self.network.pads = not self.network.padding_differs()
            logger.warning(
                f"our attention over groups does not fit the model type {kind!r} ({wrong}): answers come from "
                "transformers' generate and the update is padded, slower and with more memory"
            )

    def _check_length(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        limit = self.context()
        longest = max((len(prompt.ids) for prompt in prompts), default=0)
        if any(not prompt.ids for prompt in prompts):
            raise ModelError("a prompt has no tokens; a language model needs at least one to answer to")
        if limit is not None and longest + sampling.max_new_tokens > limit:
            raise ModelError(
                f"a prompt of {longest} tokens and {sampling.max_new_tokens} new ones exceed the model's {limit}; "
                "lower data.max_prompt_tokens or rollout.max_new_tokens"
            )
