"""Decoding groups: each prompt is read once, its cache copied to the members, finished rows leave the batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lite_trgrpo.records import Sampling
from lite_trgrpo.rollout.sampling import draw, row_keys, uniforms


@dataclass(slots=True)
class Answer:
    """A completion while it grows."""

    prompt: int
    member: int
    ids: list[int]
    logprobs: list[float]
    stopped: bool = False


@torch.no_grad()
def sample_groups(
    model: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, end_ids: frozenset[int], pad_id: int
) -> list[list[Answer]]:
    """Prompt ids -> for each prompt its answers, by member.

    `model` is a causal language model of transformers in eval mode. At most `sampling.max_rows` answers are decoded
    side by side; prompts of like length go together, since they are padded to the longest.
    """
    groups: list[list[Answer]] = [[Answer(p, m, [], []) for m in range(sampling.members)] for p in range(len(prompts))]
    for wave in _waves(groups, prompts, sampling.max_rows):
        _decode(model, prompts, wave, sampling, end_ids, pad_id)
    return groups


def _waves(groups: list[list[Answer]], prompts: Sequence[Sequence[int]], max_rows: int) -> Iterator[list[Answer]]:
    by_length = sorted(range(len(prompts)), key=lambda p: len(prompts[p]))
    answers = [answer for p in by_length for answer in groups[p]]
    for start in range(0, len(answers), max_rows):
        yield answers[start : start + max_rows]


def _decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    answers: list[Answer],
    sampling: Sampling,
    end_ids: frozenset[int],
    pad_id: int,
) -> None:
    """Grow the answers of one wave in place until each has stopped or reached the cap."""
    logits, cache, mask = _prefill(model, prompts, answers, pad_id)
    numbers = np.array([(a.prompt, a.member) for a in answers], dtype=np.uint64)
    keys = row_keys(sampling.key, numbers[:, 0], numbers[:, 1])
    for position in range(sampling.max_new_tokens):
        uniform = None if sampling.greedy else torch.from_numpy(uniforms(keys, position)).to(logits.device)
        ids, logprobs = draw(
            logits, uniform, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k
        )
        for answer, token, logprob in zip(answers, ids.tolist(), logprobs.tolist(), strict=True):
            answer.ids.append(token)
            answer.logprobs.append(logprob)
            answer.stopped = token in end_ids
        open_rows = [i for i, answer in enumerate(answers) if not answer.stopped]
        if not open_rows or position + 1 == sampling.max_new_tokens:
            return
        if len(open_rows) < len(answers):
            index = torch.tensor(open_rows, device=ids.device)
            answers, keys = [answers[i] for i in open_rows], keys[open_rows]
            ids, mask = ids[index], mask[index]
            cache.batch_select_indices(index)
        mask = torch.cat([mask, mask.new_ones(len(answers), 1)], dim=1)
        logits = model(
            input_ids=ids.unsqueeze(1),
            attention_mask=mask,
            position_ids=mask.sum(1, keepdim=True) - 1,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]


def _prefill(
    model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Answer], pad_id: int
) -> tuple[Tensor, Any, Tensor]:
    """Read each prompt of the wave once; -> first logits [B, V], cache of B rows, mask [B, L]."""
    unique = sorted({answer.prompt for answer in answers})
    longest = max(len(prompts[p]) for p in unique)
    ids = torch.full((len(unique), longest), pad_id)
    mask = torch.zeros((len(unique), longest), dtype=torch.long)
    for i, p in enumerate(unique):
        ids[i, longest - len(prompts[p]) :] = torch.tensor(prompts[p])
        mask[i, longest - len(prompts[p]) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),  # padding on the left must not shift positions
        use_cache=True,
        logits_to_keep=1,
    )
    row_of = {p: i for i, p in enumerate(unique)}
    index = torch.tensor([row_of[answer.prompt] for answer in answers], device=model.device)
    output.past_key_values.batch_select_indices(index)
    return output.logits[index, -1], output.past_key_values, mask[index]
