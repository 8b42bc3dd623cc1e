"""The plain way, through transformers alone: `generate`, and a padded forward. Slow, and independent of ours.

It is the reference that ours is tested against, and what a model gets that ours does not fit.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lite_trgrpo.policy import Sequences
from lite_trgrpo.records import Sampling
from lite_trgrpo.rollout.engine import Answer


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    wanted: Sequence[Sequence[int]],
    end_ids: frozenset[int],
    pad_id: int,
) -> Iterator[Answer]:
    """transformers' `generate`, prompt after prompt; numbers come from torch's generator, seeded from the key."""
    from transformers import GenerationConfig

    filters = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, num_return_sequences=sampling.members, do_sample=not sampling.greedy,
        eos_token_id=sorted(end_ids), pad_token_id=pad_id, bos_token_id=None, output_logits=True,
        return_dict_in_generate=True, **({} if sampling.greedy else filters),
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(abs(hash(sampling.key)))  # hashes of tuples of integers are the same in every process
        for p, prompt in enumerate(prompts):
            if not wanted[p]:
                continue
            ids = torch.tensor([prompt], device=model.device)
            made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
            new = made.sequences[:, len(prompt) :].tolist()
            logprobs = torch.log_softmax(torch.stack(made.logits, 1).float() / sampling.temperature, -1)
            for member in wanted[p]:
                row = new[member]
                length = next((t + 1 for t, i in enumerate(row) if i in end_ids), len(row))
                picked = [logprobs[member, t, i].item() for t, i in enumerate(row[:length])]
                yield Answer(p, member, row[:length], picked, row[length - 1] in end_ids)


def hidden(decoder: Any, rows: Sequences, pad_id: int) -> Tensor:
    """Hidden states from which each completion id is predicted, row after row: [sum of T, width]."""
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids = torch.full((len(rows), width), pad_id)
    attention = torch.zeros((len(rows), width), dtype=torch.long)
    scored = torch.zeros((len(rows), width), dtype=torch.bool)  # where the next id is a completion id
    for i, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        ids[i, :end] = torch.tensor([*prompt, *completion])
        attention[i, :end] = 1
        scored[i, len(prompt) - 1 : end - 1] = True
    device = decoder.device
    found: Tensor = decoder(
        input_ids=ids.to(device), attention_mask=attention.to(device), use_cache=False,
        position_ids=torch.arange(width, device=device).expand(len(rows), -1),
    ).last_hidden_state  # fmt: skip
    return found[scored.to(device)]
