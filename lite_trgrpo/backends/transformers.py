"""The Policy on transformers, PEFT and bitsandbytes: Linux, macOS and Windows, with or without a card."""

import logging
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lite_trgrpo.attention import Attend, Packed
from lite_trgrpo.backends import reference
from lite_trgrpo.backends.groups import NO_MASK, attend_by_groups
from lite_trgrpo.backends.loading import load_base, resolve_device, resolve_dtype, with_lora
from lite_trgrpo.backends.template import Template
from lite_trgrpo.backends.weights import Located, locate
from lite_trgrpo.errors import ModelError, first_line
from lite_trgrpo.logprobs import Head, selected_logprobs
from lite_trgrpo.options import Model
from lite_trgrpo.policy import Sequences
from lite_trgrpo.records import Completion, Message, Prompt, Sampling
from lite_trgrpo.rollout.engine import Answer, Engine, slot_count


def load(options: Model, *, seed: int, gradient_checkpointing: bool = False) -> "TransformersPolicy":
    """Load the base (quantised where asked), put a LoRA adapter on it, and check what we assume about the model."""
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
    base = load_base(located, options, device, dtype)
    torch.manual_seed(seed)
    model = with_lora(base, options, located)
    model.eval()
    if gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    return TransformersPolicy(model, template, located, gradient_checkpointing)


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
        self.logits = Head(base.get_output_embeddings(), getattr(self.config, "final_logit_softcapping", None))
        self._check_head()
        attend_by_groups(base)
        self.by_groups = self._groups_agree()
        """Whether our attention works for this model; else everything goes through `reference.py`, padded and slow."""

    def encode(self, prompt: str | list[Message]) -> Prompt:
        return self.template.encode(prompt)

    def decode(self, ids: Sequence[int]) -> str:
        return self.template.tokenizer.decode(ids, skip_special_tokens=True)

    def hidden(self, ids: Tensor, positions: Tensor, groups: Attend) -> Tensor:
        """See `rollout.engine.Decoder`."""
        found: Tensor = self.decoder(
            input_ids=ids, position_ids=positions, attention_mask=NO_MASK, use_cache=False, groups=groups
        ).last_hidden_state
        return found

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in all layers."""
        config = self.config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 2 * config.num_hidden_layers * config.num_key_value_heads * width * self.dtype.itemsize

    def cache_mib(self) -> int:
        """Memory for keys and values that suits this machine (MiB)."""
        if self.device.type != "cuda":
            return 2048
        return max(1, torch.cuda.mem_get_info(self.device)[0] // 3 // 2**20)

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[tuple[int, list[Completion]]]:
        self._check_length(prompts, sampling)
        self.model.eval()
        groups: list[dict[int, Completion]] = [{} for _ in prompts]
        for answer in self._answers([prompt.ids for prompt in prompts], sampling):
            group = groups[answer.prompt]
            group[answer.member] = Completion(
                tuple(answer.ids), (True,) * len(answer.ids), tuple(answer.logprobs), self.decode(answer.ids),
                answer.stopped,
            )  # fmt: skip
            if len(group) == sampling.members:
                yield answer.prompt, [group[m] for m in range(sampling.members)]

    def _answers(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[Answer]:
        if sampling.engine == "generate" or not self.by_groups:
            return reference.generate(self.model, prompts, sampling, self.end_ids, self.pad_id)
        slots = slot_count(prompts, sampling, self.token_bytes)
        return Engine(self, prompts, sampling, self.end_ids, slots).answers()

    def logprobs(self, rows: Sequences, temperature: float) -> tuple[Tensor, Tensor]:
        # Gradient checkpointing only acts in training mode; all dropout is 0, so the mode changes nothing else.
        self.model.train(self.gradient_checkpointing and torch.is_grad_enabled())
        hidden = self._packed_hidden(rows) if self.by_groups else reference.hidden(self.decoder, rows, self.pad_id)
        targets = torch.tensor([i for _, completion in rows for i in completion], device=self.device)
        logprobs, entropy = selected_logprobs(hidden, targets, self.logits, temperature)
        lengths = [len(completion) for _, completion in rows]
        return _padded(logprobs, lengths), _padded(entropy, lengths)

    def _packed_hidden(self, rows: Sequences) -> Tensor:
        """Hidden states from which each completion id is predicted, row after row: [sum of T, width].

        Rows with the same prompt share its tokens; an answer's last token predicts nothing and is not read at all.
        """
        members: dict[tuple[int, ...], list[int]] = {}
        for i, (prompt, _) in enumerate(rows):
            members.setdefault(tuple(prompt), []).append(i)
        read = [(prompt, [rows[i][1][:-1] for i in group]) for prompt, group in members.items()]
        groups = Packed([(len(prompt), [len(a) for a in answers]) for prompt, answers in read], self.device)
        ids = [i for prompt, answers in read for part in (prompt, *answers) for i in part]
        hidden = self.hidden(torch.tensor([ids], device=self.device), groups.positions, groups)[0]
        places: list[list[int]] = [[] for _ in rows]
        start = 0
        for prompt, group in members.items():
            last, start = start + len(prompt) - 1, start + len(prompt)
            for i in group:
                tokens = max(0, len(rows[i][1]) - 1)
                places[i] = [last, *range(start, start + tokens)] if rows[i][1] else []
                start += tokens
        return hidden[torch.tensor([place for row in places for place in row], device=self.device, dtype=torch.long)]

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

    @torch.no_grad()
    def _check_head(self) -> None:
        """Some architectures scale logits after the head; find out now, not from a run that learns nothing."""
        ids = torch.arange(4, device=self.device).unsqueeze(0)
        expected = self.model(input_ids=ids, use_cache=False).logits.float()[0]
        got = self.logits(self.decoder(input_ids=ids, use_cache=False).last_hidden_state[0]).float()
        if not torch.allclose(expected, got, rtol=2e-2, atol=2e-2):
            raise ModelError(
                f"the model type {self.config.model_type!r} changes its logits after the output head, which is not "
                "supported yet; take a Qwen, Llama, SmolLM, Mistral or Gemma model"
            )

    def _groups_agree(self) -> bool:
        """Whether two groups come out of decoding and the packed forward as out of padded rows; if not, says so."""
        try:
            wrong = self._distance_by_groups()
        except (TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
            wrong = first_line(error)
        if wrong:
            print(
                f"warning: our attention over groups does not fit the model type {self.config.model_type!r} ({wrong}): "
                "answers come from transformers' generate and the update is padded, slower and with more memory",
                file=sys.stderr,
            )
        return not wrong

    @torch.no_grad()
    def _distance_by_groups(self) -> str:
        """-> what differs by more than rounding; empty if nothing does."""
        prompts = [tuple(range(3, 12)), tuple(range(5, 9))]
        answers = list(Engine(self, prompts, Sampling(2, 5), frozenset(), slots=3).answers())
        rows = [(prompts[answer.prompt], tuple(answer.ids)) for answer in answers]
        packed, padded = (
            self.logits(self._packed_hidden(rows)),
            self.logits(reference.hidden(self.decoder, rows, self.pad_id)),
        )
        ids = torch.tensor([i for answer in answers for i in answer.ids], device=self.device)
        drawn = torch.tensor([logprob for answer in answers for logprob in answer.logprobs], device=self.device)
        scored = torch.log_softmax(padded, -1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        bound = 1e-3 if self.dtype.itemsize >= 4 else 0.1
        # medians: in 16 bits single positions of senseless text differ much, a wrong mask or position makes all differ
        if ((packed - padded).norm(dim=-1) / padded.norm(dim=-1)).median() > bound:
            return "other logits"
        return "other log-probabilities" if (drawn - scored).abs().median() > 4 * bound else ""

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
