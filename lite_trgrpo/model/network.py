"""The model without its tokenizer: hidden states over groups, logits, log-probabilities of given answers."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lite_trgrpo.model import padded
from lite_trgrpo.model.hook import NAME, NO_MASK, has_states, register, states_as_cache, states_in
from lite_trgrpo.model.logprobs import Head, selected_logprobs
from lite_trgrpo.model.policy import Sequences
from lite_trgrpo.records import Sampling
from lite_trgrpo.rollout.attention import Attend, Packed
from lite_trgrpo.rollout.cache import GroupCache
from lite_trgrpo.rollout.engine import Answer, Engine

TRIAL = [tuple(range(3, 12)), tuple(range(5, 9))]  # prompts on which ways to compute the same are compared


class Network:
    """A causal language model of transformers with LoRA layers in it. Also a `rollout.engine.Decoder`."""

    def __init__(self, model: Any, pad_id: int, gradient_checkpointing: bool) -> None:
        self.model = model
        self.pad_id = pad_id
        self.gradient_checkpointing = gradient_checkpointing
        base = model.get_base_model()
        self.decoder, self.config = base.get_decoder(), base.config.get_text_config()
        self.device, self.dtype = base.device, base.dtype
        self.logits = Head(base.get_output_embeddings(), getattr(self.config, "final_logit_softcapping", None))
        self.by_groups = True
        """Whether our attention works for this model; else everything goes through `padded.py`."""
        self.pads = True
        """Whether `generate` may pad prompts on the left."""
        self.recurrent = has_states(self.config)
        """Whether some layers keep a state. Then rows of the update are padded: a state would run on along a row."""
        if gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        self._base, self._own_attention = base, base.config._attn_implementation
        self.attend_by_groups(True)

    @cached_property
    @torch.no_grad()
    def cache_bytes(self) -> tuple[int, int]:
        """-> bytes of one token's keys and values in all layers, and of one sequence's states. They are measured: every
        family names the sizes in its own way, and they may differ from layer to layer.
        """
        cache = GroupCache(1, 1, 1, 1)
        cache.read_into([(0, 1)])
        groups = Packed([(1, ())], self.device, keep=cache)
        self.hidden(torch.zeros_like(groups.positions), groups.positions, groups)
        kept = sum(store[:, :, :1].numel() * store.itemsize for pair in cache.rows.values() for store in pair)
        return kept, sum(state.nbytes for state in cache.row_states.values())

    @property
    def packs(self) -> bool:
        """Whether the update reads rows side by side, a shared prompt once; else padded, each with its own prompt."""
        return self.by_groups and not self.recurrent

    def path(self, why: str = "") -> str:
        """How it samples and is trained, in words; `why`: what keeps our attention from it."""
        if not self.by_groups:
            return f"transformers' generate, padded update{why and f' ({why})'}"
        return "own engine, packed update" if self.packs else "own engine, padded update (some layers keep a state)"

    def attend_by_groups(self, on: bool) -> None:
        """Ours, or the attention that the model was loaded with: some work with that alone."""
        if on:
            register()
        self._base.set_attn_implementation(NAME if on else self._own_attention)

    def hidden(self, ids: Tensor, positions: Tensor, groups: Attend) -> Tensor:
        """See `rollout.engine.Decoder`."""
        before, options = groups.states(), {}
        if self.recurrent:
            if self.model.training:  # after an update in between; there checkpointing would drop the states
                self.model.eval()
            options["past_key_values"] = states_as_cache(self.config, before)
        found: Tensor = self.decoder(
            input_ids=ids, position_ids=positions, attention_mask=NO_MASK, use_cache=False, groups=groups, **options
        ).last_hidden_state
        if self.recurrent and not before:
            groups.keep_states(states_in(options["past_key_values"]))
        return found

    def logprobs(self, rows: Sequences, temperature: float) -> tuple[Tensor, Tensor]:
        """See `lite_trgrpo.model.policy.Policy`."""
        # Gradient checkpointing only acts in training mode; all dropout is 0, so the mode changes nothing else.
        self.model.train(self.gradient_checkpointing and torch.is_grad_enabled())
        hidden = self.packed_hidden(rows) if self.packs else padded.hidden(self.decoder, rows, self.pad_id)
        targets = torch.tensor([i for _, completion in rows for i in completion], device=self.device)
        logprobs, entropy = selected_logprobs(hidden, targets, self.logits, temperature)
        lengths = [len(completion) for _, completion in rows]
        return _padded(logprobs, lengths), _padded(entropy, lengths)

    def packed_hidden(self, rows: Sequences) -> Tensor:
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

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def finite(self) -> bool:
        """Whether a few tokens get finite logits; float16 ends at 65,504, and some models compute beyond it."""
        ids = torch.arange(4, device=self.device).unsqueeze(0)
        return bool(self.model(input_ids=ids, use_cache=False).logits.isfinite().all())

    @torch.no_grad()
    def head_differs(self) -> bool:
        """Some architectures scale logits after the head; find out now, not from a run that learns nothing."""
        ids = torch.arange(4, device=self.device).unsqueeze(0)
        expected = self.model(input_ids=ids, use_cache=False).logits.float()[0]
        got = self.logits(self.decoder(input_ids=ids, use_cache=False).last_hidden_state[0]).float()
        return not torch.allclose(expected, got, rtol=2e-2, atol=2e-2)

    def groups_differ(self) -> str:
        """Two groups through decoding and the packed forward, and through padded rows. -> what differs by more than
        rounding; empty if nothing does. Raises what a model raises that knows nothing of `groups`.
        """
        return self._differ(Engine(self, TRIAL, Sampling(2, 5), frozenset(), slots=3).answers(), not self.recurrent)

    def padding_differs(self) -> str:
        """The same of transformers' `generate` with prompts padded on the left."""
        answers = padded.generate(self.model, TRIAL, Sampling(2, 5), [[0, 1], [0, 1]], frozenset(), self.pad_id)
        return self._differ(answers, packs=False)

    @torch.no_grad()
    def _differ(self, sampled: Iterator[Answer], packs: bool) -> str:
        answers = list(sampled)
        rows = [(TRIAL[answer.prompt], tuple(answer.ids)) for answer in answers]
        expected = self.logits(padded.hidden(self.decoder, rows, self.pad_id))
        packed = self.logits(self.packed_hidden(rows)) if packs else expected
        ids = torch.tensor([i for answer in answers for i in answer.ids], device=self.device)
        drawn = torch.tensor([logprob for answer in answers for logprob in answer.logprobs], device=self.device)
        scored = torch.log_softmax(expected, -1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        bound = 1e-3 if self.dtype.itemsize >= 4 else 0.1
        # medians: in 16 bits single positions of senseless text differ much, a wrong mask or position makes all differ
        # `not <=`: NaN is no agreement
        if not ((packed - expected).norm(dim=-1) / expected.norm(dim=-1)).median() <= bound:
            return "other logits"
        return "" if (drawn - scored).abs().median() <= 4 * bound else "other log-probabilities"


def _padded(flat: Tensor, lengths: list[int]) -> Tensor:
    """[sum of lengths] -> [B, T], zero beyond each row's length."""
    return nn.utils.rnn.pad_sequence(list(flat.split(lengths)), batch_first=True)
