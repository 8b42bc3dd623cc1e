"""Held-out scores: pass@1 (greedy), pass@k (sampled), their 95 % intervals, and the paired gain over another one."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from lite_trgrpo.config.schema import Config
from lite_trgrpo.model.oom import Limits
from lite_trgrpo.model.packing import batches
from lite_trgrpo.model.policy import Policy, sample_all, sample_groups
from lite_trgrpo.records import Example, Group, Prompt, Sampling
from lite_trgrpo.rewards import Scorer

Estimate = dict[str, float]
"""A proportion or a difference, with its 95 % interval: value, low, high."""
Z = 1.959963984540054  # two-sided 95 %


def wilson(solved: Sequence[bool | None]) -> Estimate:
    """Share of solved prompts with Wilson's interval, which stays honest near 0 and 1. None: could not be graded, and
    is left out.
    """
    graded = [one for one in solved if one is not None]
    if not graded:
        return {"value": 0.0, "low": 0.0, "high": 1.0}
    n, p = len(graded), sum(graded) / len(graded)
    middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return {"value": p, "low": max(0.0, middle - half), "high": min(1.0, middle + half)}


def paired_gain(before: Sequence[bool | None], after: Sequence[bool | None]) -> Estimate:
    """Mean difference over the same prompts, without those that could not be graded both times.

    The interval is that of paired differences (normal) with half a pair more in each of the four cells, so that it
    stays honest for few rows and for equal ones (Agresti and Min, 2005).
    """
    pairs = [pair for pair in zip(before, after, strict=True) if None not in pair]
    won, lost = pairs.count((False, True)), pairs.count((True, False))
    n, more, less = len(pairs) + 2, won + 0.5, lost + 0.5
    middle = (more - less) / n
    half = Z * math.sqrt(more + less - (more - less) ** 2 / n) / n
    return {
        "value": (won - lost) / max(1, len(pairs)),
        "low": max(-1.0, middle - half),
        "high": min(1.0, middle + half),
    }


def evaluate(
    policy: Policy,
    heldout: Sequence[tuple[Example, Prompt]],
    scorer: Scorer,
    sampling: Sampling,
    *,
    samples: int,
    solved_at: float,
    progress: Callable[[str], None] = lambda how_far: None,
    limits: Limits | None = None,
) -> dict[str, Any]:
    """One greedy answer and `samples` sampled ones for each held-out row; `progress` is told how far it is.

    -> {"pass@1": estimate, "pass@k": estimate (k = samples), "pass@1_sampled": mean over samples, "truncated": share of
    greedy answers cut off, "length_mean": tokens, "ungradable": greedy answers left out of pass@1, "rows": per row
    prompt, answer, greedy text, solved (None: could not be graded), samples_solved}
    """
    prompts = [prompt for _, prompt in heldout]
    greedy = _answers(policy, heldout, prompts, scorer, replace(sampling, members=1, greedy=True), progress, limits)
    sampled = None
    if samples:
        sampled = _answers(policy, heldout, prompts, scorer, replace(sampling, members=samples), progress, limits)
    rows: list[dict[str, Any]] = []
    for i, (example, _) in enumerate(heldout):
        completion = greedy[i].completions[0]
        row: dict[str, Any] = {
            "prompt": example.text,
            "answer": example.columns.get("answer"),
            "greedy": completion.text,
            "ids": list(completion.ids),
            "stopped": completion.stopped,
            "tokens": len(completion.ids),
            "solved": greedy[i].solved(solved_at)[0] if greedy[i].graded() else None,
        }
        if sampled is not None:
            row["samples_solved"] = sum(sampled[i].solved(solved_at)) if sampled[i].graded() else None
        rows.append(row)
    result: dict[str, Any] = {"pass@1": wilson([row["solved"] for row in rows])}
    if sampled is not None:
        if samples > 1:  # with one sample it would take the greedy score's name
            result[f"pass@{samples}"] = wilson([any_solved(row) for row in rows])
        graded = sum(group.graded() for group in sampled)
        result["pass@1_sampled"] = sum(row["samples_solved"] or 0 for row in rows) / max(1, graded)
    result["ungradable"] = sum(row["solved"] is None for row in rows)
    result["truncated"] = sum(not row["stopped"] for row in rows) / len(rows)
    result["length_mean"] = sum(row["tokens"] for row in rows) / len(rows)
    result["rows"] = rows
    return result


def any_solved(row: Mapping[str, Any]) -> bool | None:
    """Whether a row's sampled answers hold a right one; None: none of them could be graded."""
    return None if row["samples_solved"] is None else row["samples_solved"] > 0


def _answers(
    policy: Policy,
    heldout: Sequence[tuple[Example, Prompt]],
    prompts: Sequence[Prompt],
    scorer: Scorer,
    sampling: Sampling,
    progress: Callable[[str], None],
    limits: Limits | None,
) -> list[Group]:
    found: dict[int, Group] = {}
    for p, completions in sample_groups(policy, prompts, sampling, limits):
        found[p] = Group(*heldout[p], completions)
        progress(f"{'greedy' if sampling.greedy else 'sampled'} {len(found)} of {len(prompts)}")
    return scorer.score([found[p] for p in range(len(prompts))])


@torch.no_grad()
def kl_to_base(policy: Policy, prompts: Sequence[Prompt], sampling: Sampling, token_budget: int) -> float:
    """KL(pi_theta || pi_base) per token (nats): mean log-ratio over one answer a prompt, sampled from pi_theta."""
    groups = sample_all(policy, prompts, replace(sampling, members=1, greedy=False))
    rows = [(prompt.ids, group[0]) for prompt, group in zip(prompts, groups, strict=True)]
    difference, tokens = 0.0, 0
    for batch in batches(rows, lambda row: (row[0], row[1].ids), token_budget, policy.packs):
        with policy.reference():
            base, _ = policy.logprobs([(ids, completion.ids) for ids, completion in batch], sampling.temperature)
        for i, (_, completion) in enumerate(batch):
            difference += sum(completion.logprobs) - base[i].sum().item()
            tokens += len(completion.ids)
    return difference / tokens


EVALUATION = 1  # another


def eval_sampling(config: Config) -> Sampling:
    """Held-out answers are drawn with the same numbers at every evaluation, so that differences are paired."""
    return Sampling(
        members=1,
        max_new_tokens=config.eval.max_new_tokens or config.rollout.max_new_tokens,
        temperature=config.rollout.temperature,
        key=(config.data.seed, EVALUATION),
        **config.rollout.decoding(),
    )
