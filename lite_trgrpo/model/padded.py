"""The plain way, through transformers alone: `generate`, and a padded forward. Slow, and independent of ours.

It is the reference that ours is tested against, and what a model gets that ours does not fit.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lite_trgrpo.model.policy import Sequences
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

    drawn = {"temperature": sampling.temperature, "top_p": 1.0, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, num_return_sequences=1 if sampling.greedy else sampling.members,
        do_sample=not sampling.greedy, eos_token_id=sorted(end_ids), pad_token_id=pad_id, bos_token_id=None,
        output_scores=True, return_dict_in_generate=True, **({} if sampling.greedy else drawn),
    )  # fmt: skip
    for p, prompt in enumerate(prompts):
        if not wanted[p]:
            continue
        new, logprobs = _generated(model, prompt, sampling, config, p)
        for member in wanted[p]:
            row = new[0 if sampling.greedy else member]
            length = next((t for t in range(1, len(row) + 1) if row[t - 1] in end_ids), len(row))
            picked = [logprobs[0 if sampling.greedy else member, t, i].item() for t, i in enumerate(row[:length])]
            yield Answer(p, member, row[:length], picked, row[length - 1] in end_ids)


def _generated(
    model: Any, prompt: Sequence[int], sampling: Sampling, config: Any, number: int
) -> tuple[list[list[int]], Tensor]:
    """New ids of every member, and the log-probabilities that they were drawn from: [members, T, V]."""
    from transformers import GenerationConfig

    ruined_at: list[Tensor] = []  # by position: rows whose logits are NaN or +inf

    def end_where_ruined(ids: Tensor, logits: Tensor) -> Tensor:
        """torch.multinomial raises on such rows: let them end instead."""
        ruined = logits.isnan().any(-1) | (logits == math.inf).any(-1)
        ruined_at.append(ruined)
        ending = torch.full_like(logits, -math.inf)
        ending[:, config.eos_token_id[0] if config.eos_token_id else 0] = 0.0
        return torch.where(ruined.unsqueeze(-1), ending, logits)

    base = model.get_base_model()
    own, base.generation_config = base.generation_config, GenerationConfig()  # what it sets would fill our gaps
    try:
        with torch.random.fork_rng():  # seeded for each prompt: what a caller draws between two does not matter
            torch.manual_seed(abs(hash((*sampling.key, number))))  # such hashes are the same in every process
            ids = torch.tensor([prompt], device=model.device)
            made = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                logits_processor=[end_where_ruined],
            )
    finally:
        base.generation_config = own
    scores = torch.stack(made.scores, 1).float()  # of a sampler, temperature included
    logprobs = torch.log_softmax(scores / sampling.temperature if sampling.greedy else scores, -1)
    for t, ruined in enumerate(ruined_at):
        logprobs[ruined, t] = math.nan
    return made.sequences[:, len(prompt) :].tolist(), logprobs


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
