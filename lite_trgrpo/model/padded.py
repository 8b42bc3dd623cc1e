"""The plain way, through transformers alone: `generate`, and a padded forward. Slow, and independent of ours.

It is the reference that ours is tested against, and what a model gets that ours does not fit.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lite_trgrpo.model.policy import Sequences
from lite_trgrpo.records import Sampling
from lite_trgrpo.rollout.engine import Answer, extend, set_keys


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    wanted: Sequence[Sequence[int]],
    end_ids: frozenset[int],
    pad_id: int,
    grown: Callable[[Answer], None] = lambda answer: None,
    like_lengths: bool = False,
) -> Iterator[Answer]:
    """transformers' `generate`, up to `sampling.max_rows` answers at a time; tokens are drawn as in our engine.

    Shorter prompts are padded on the left; with `like_lengths` only prompts of one length share a batch, for models
    whose states padding would reach.
    """
    by_length = sorted(range(len(prompts)), key=lambda p: len(prompts[p]))
    answers = [Answer(p, member) for p in by_length for member in wanted[p]]
    set_keys(answers, sampling.key)
    for _, part in groupby(answers, lambda answer: len(prompts[answer.prompt]) if like_lengths else 0):
        alike = list(part)
        for i in range(0, len(alike), sampling.max_rows):
            batch = alike[i : i + sampling.max_rows]
            _generate(model, [prompts[answer.prompt] for answer in batch], batch, sampling, end_ids, pad_id, grown)
            yield from batch


def _generate(
    model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Answer], sampling: Sampling,
    end_ids: frozenset[int], pad_id: int, grown: Callable[[Answer], None],
) -> None:  # fmt: skip
    """Let each answer grow to its end beside the others."""
    from transformers import GenerationConfig

    growing = list(range(len(answers)))

    def choose(_: Tensor, logits: Tensor) -> Tensor:
        """The token is drawn here, where its log-probability is known, so that no scores are kept; transformers then
        takes the only one that is left. A row that has ended gets padding from it, whatever it is given.
        """
        if growing:
            ended = {
                id(answer)
                for answer in extend([answers[i] for i in growing], logits[growing], sampling, end_ids, grown)
            }
            growing[:] = [i for i in growing if id(answers[i]) not in ended]
        only = torch.full_like(logits, -torch.inf)
        only[range(len(answers)), [answer.ids[-1] for answer in answers]] = 0.0
        return only

    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    real = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, do_sample=False, eos_token_id=sorted(end_ids) or None,
        pad_token_id=pad_id, bos_token_id=None,
    )  # fmt: skip
    base = model.get_base_model()
    own, base.generation_config = base.generation_config, GenerationConfig()  # what it sets would fill our gaps
    try:
        model.generate(input_ids=ids, attention_mask=real, generation_config=config, logits_processor=[choose])
    finally:
        base.generation_config = own


def hidden(decoder: Any, rows: Sequences, pad_id: int) -> Tensor:
    """Hidden states from which each completion id is predicted, row after row: [sum of T, width]."""
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids = torch.full((len(rows), width), pad_id)
    attention = torch.zeros((len(rows), width), dtype=torch.long)
    scored: list[tuple[int, int]] = []  # row and place where the next id is a completion id
    for i, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        ids[i, :end] = torch.tensor([*prompt, *completion])
        attention[i, :end] = 1
        scored += [(i, place) for place in range(len(prompt) - 1, end - 1)]
    device = decoder.device
    found: Tensor = decoder(
        input_ids=ids.to(device), attention_mask=attention.to(device), use_cache=False,
        position_ids=torch.arange(width, device=device).expand(len(rows), -1),
    ).last_hidden_state  # fmt: skip
    row, place = torch.tensor(scored, dtype=torch.long, device=device).reshape(-1, 2).unbind(1)
    return found[row, place]
