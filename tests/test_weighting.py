"""Means of the token weights over a step, the policy they are read from, and the statistics over tokens."""

import math
import statistics
from dataclasses import replace

import pytest
import torch

from lite_trgrpo.config.schema import Objective
from lite_trgrpo.model.oom import Limits
from lite_trgrpo.model.policy import sample_all
from lite_trgrpo.records import Example, Group, Sampling
from lite_trgrpo.training import update as module
from lite_trgrpo.training.tokenstats import BINS, TokenStatistics, histogram
from lite_trgrpo.training.update import prepare_rows, update
from lite_trgrpo.training.weighting import step_mean, weights_of
from tests.toy import ToyPolicy

# log-probabilities of a step as they were sampled: ragged, with p from 1e-4 to 1
SAMPLED = [(-0.01, -2.0, -9.0), (-0.5,), (-1.2, -1.6, -0.05, -4.0, 0.0), ()]
FLAT = [logprob for row in SAMPLED for logprob in row]


def loop_weight(p, objective):
    """One weight in plain floats."""
    if objective.weights == "none":
        return 1.0
    if objective.weights == "linear":
        return objective.weight.a * p + (1 - objective.weight.a)
    centre, mu = (0.25, 0.0) if objective.weights == "centred" else (0.0, 0.25)
    p = 1 - p if objective.weights == "reverse" else p
    weight = objective.weight
    raw = weight.alpha * (1 / (1 + math.exp(-weight.kappa * (p - centre))) - mu)
    return min(weight.high, max(weight.low, raw))


# -- means over a step --------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["offset", "centred", "reverse", "linear", "none"])
@pytest.mark.parametrize("numbers", [{}, {"alpha": 3.0, "kappa": 4.0, "low": 0.5, "high": 2.0, "a": 0.8}])
def test_the_step_mean_is_the_plain_mean_over_tokens(weights, numbers):
    objective = Objective(weights=weights, weight=numbers)
    each = [loop_weight(math.exp(logprob), objective) for logprob in FLAT]
    assert step_mean(SAMPLED, objective) == pytest.approx(statistics.fmean(each), rel=1e-12)
    got = weights_of(torch.tensor(FLAT, dtype=torch.float64), objective, 123.0)  # the mean must not matter here
    assert got is None if weights == "none" else got.tolist() == pytest.approx(each, rel=1e-12)


def test_a_step_without_tokens_has_mean_one():
    assert step_mean([], Objective()) == step_mean([(), ()], Objective()) == 1.0


def test_the_constant_arm_is_the_mean_of_the_offset_weights_for_every_token():
    objective = Objective(weights="constant")
    mean = step_mean(SAMPLED, objective)
    assert mean == pytest.approx(step_mean(SAMPLED, Objective(weights="offset")), rel=1e-15)
    assert 1.0 < mean < 1.4
    got = weights_of(torch.randn(3, 4, dtype=torch.float64), objective, mean)
    assert got.eq(mean).all() and got.shape == (3, 4)


# -- in the update ------------------------------------------------------------------------------------------


def step_of(objective, *, updates=2, token_budget=7, learning_rate=2.0):
    """One step of the toy. -> every update's weights, log p as sampled, statistics."""
    policy = ToyPolicy()
    prompts = [policy.encode(text) for text in "013"]
    answers = sample_all(policy, prompts, Sampling(members=4, max_new_tokens=4))
    rewards = [(1.0, 0.0, -0.5, 0.25), (0.0, 1.0, 1.0, 0.0), (2.0, 0.0, 0.0, 0.0)]
    groups = [Group(Example(p.text, {}, "here"), p, a, r) for p, a, r in zip(prompts, answers, rewards, strict=True)]
    rows = prepare_rows(groups, objective, 4)
    seen, own = [], module.policy_loss

    def spy(logprobs, old, advantages, mask, **options):
        w = options["weights"]
        seen.append((torch.ones_like(logprobs) if w is None else w)[mask].detach().clone())
        return own(logprobs, old, advantages, mask, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "policy_loss", spy)
        report = update(
            policy, torch.optim.SGD([policy.adapter], lr=learning_rate), rows, objective,
            temperature=1.0, updates=updates, limits=Limits(token_budget, 1), max_grad_norm=math.inf,
        )  # fmt: skip
    sampled = [
        lp for batch in module.micro_batches(rows, token_budget) for row in batch for lp in row.completion.logprobs
    ]
    each = len(seen) // updates
    assert each > 1  # micro-batches
    weights = [torch.cat(seen[i * each : (i + 1) * each]) for i in range(updates)]
    return weights, torch.tensor(sampled, dtype=torch.float64), report


@pytest.mark.parametrize("weights", ["offset", "linear"])
def test_weights_from_sampling_stay_and_those_from_the_current_policy_move(weights):
    fixed = Objective(weights=weights, weights_from="sampling")
    moving = Objective(weights=weights, weights_from="current")
    (first, second), sampled, _ = step_of(fixed)
    expected = [loop_weight(math.exp(logprob), fixed) for logprob in sampled.tolist()]
    assert first.tolist() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(first, second)
    (before, after), _, _ = step_of(moving)
    torch.testing.assert_close(before, first, rtol=1e-12, atol=0)  # nothing has moved yet
    assert (after - before).abs().max() > 1e-3


def test_the_constant_arm_in_an_update_weighs_every_token_of_every_micro_batch_alike():
    (offset, _), _, _ = step_of(Objective(weights="offset"))
    for part in step_of(Objective(weights="constant"))[0]:
        torch.testing.assert_close(part, torch.full_like(part, offset.mean().item()), rtol=1e-12, atol=0)


def test_statistics_of_an_update_do_not_depend_on_micro_batches():
    reports = [step_of(Objective(beta=0.1), token_budget=budget)[2] for budget in (1, 7, 14)]
    for other in reports[1:]:
        assert other.keys() == reports[0].keys()
        for name, value in other.items():
            assert value == pytest.approx(reports[0][name], rel=1e-9, abs=1e-12), name


# -- statistics over tokens ---------------------------------------------------------------------------------


def test_the_histogram_by_hand():
    # bins of 0.05 from 1.0: 1.0 and 1.049 in the first, 1.05 in the second, 1.39 and 1.4 in the last,
    # and what lies outside counts at the edge
    values = torch.tensor([1.0, 1.049, 1.051, 1.39, 1.4, 0.2, 7.0], dtype=torch.float64)
    assert histogram(values, 1.0, 1.4) == pytest.approx([3 / 7, 1 / 7, 0, 0, 0, 0, 0, 3 / 7])
    assert histogram(torch.ones(5, dtype=torch.float64), 1.0, 1.0) == [1.0] + [0.0] * (BINS - 1)


def test_the_histogram_sums_to_one():
    values = torch.randn(10_007, dtype=torch.float64)
    shares = histogram(values, -0.5, 2.0)
    assert len(shares) == BINS and sum(shares) == pytest.approx(1.0, rel=1e-12)
    assert shares[0] > (values < -0.5).double().mean()


def tokens(count=23):
    """Values of `count` tokens, as one [1, T] row each."""
    generator = torch.Generator().manual_seed(5)
    prob = torch.rand(1, count, generator=generator, dtype=torch.float64)
    others = torch.rand(3, 1, count, generator=generator, dtype=torch.float64)
    return {"prob": prob, "entropy": others[0], "weight": 1 + 0.4 * prob, "clipped": others[1] < prob, "gap": others[2]}


def test_clip_by_quartile_by_hand():
    collected = TokenStatistics()
    # sorted by p: .1 .2 | .3 .4 | .5 .6 | .7 .8, clipped where marked
    prob = torch.tensor([[0.8, 0.1, 0.5, 0.3, 0.7, 0.2, 0.6, 0.4, 0.99]])
    clipped = torch.tensor([[True, False, False, True, True, True, False, True, True]])
    mask = torch.tensor([[True] * 8 + [False]])
    rest = dict.fromkeys(("entropy", "weight", "gap"), torch.ones(1, 9))
    collected.add(mask, prob=prob, clipped=clipped, **rest)
    report = collected.report(1.0, 1.4)
    assert report["clip_by_quartile"] == [0.5, 1.0, 0.0, 1.0]
    assert report["clip_fraction"] == 5 / 8
    assert report["prob_mean"] == pytest.approx(3.6 / 8)  # what the mask leaves out counts nowhere
    assert "kl" not in report


@pytest.mark.parametrize("cuts", [[23], [1] * 23, [5, 7, 11], [22, 1]])
def test_how_tokens_were_cut_never_matters(cuts):
    whole = TokenStatistics()
    values = tokens()
    whole.add(torch.ones(1, 23, dtype=torch.bool), **values)
    pieces = TokenStatistics()
    for start, size in zip([sum(cuts[:i]) for i in range(len(cuts))], cuts, strict=True):
        part = {name: torch.nn.functional.pad(value[:, start : start + size].double(), (0, 2), value=math.nan)
                for name, value in values.items()}  # fmt: skip
        pieces.add(torch.tensor([[True] * size + [False] * 2]), **part)
    assert pieces.report(1.0, 1.4) == whole.report(1.0, 1.4)


def test_few_tokens_and_none():
    assert TokenStatistics().report(1.0, 1.4) == {}
    nothing = TokenStatistics()
    nothing.add(torch.zeros(1, 23, dtype=torch.bool), **tokens())
    assert nothing.report(1.0, 1.4) == {}
    one = TokenStatistics()
    one.add(torch.arange(23)[None] == 4, **tokens())
    assert sum(one.report(1.0, 1.4)["weight_histogram"]) == 1.0
    assert len(one.report(1.0, 1.4)["clip_by_quartile"]) == 4


# -- another engine sampled ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("foreign", "updates"), [(False, 1), (True, 1), (True, 2)])
def test_what_another_engine_drew_counts_by_its_own_probability_up_to_the_cap(foreign, updates):
    """min(pi / q, 2) on each token, against autograd over the toy's table; q lies up to 2 nats off."""
    policy, objective = ToyPolicy(), Objective(weights="none", aggregation="token", advantage="dr-grpo", clip_low=0.99)
    prompt = policy.encode("0")
    [answers] = sample_all(policy, [prompt], Sampling(members=4, max_new_tokens=4))
    shift = torch.linspace(-2, 2, 16, dtype=torch.float64).reshape(4, 4)
    moved = [
        replace(a, logprobs=tuple(lp + s for lp, s in zip(a.logprobs, row.tolist(), strict=False)))
        for a, row in zip(answers, shift, strict=True)
    ]
    group = Group(Example("0", {}, "here"), prompt, moved, (1.0, 0.0, 0.0, 1.0))
    rate, tokens = 1e-3, sum(len(a.ids) for a in answers)
    optimizer = torch.optim.SGD([policy.adapter], lr=rate)
    update(
        policy, optimizer, prepare_rows([group], objective, 4), objective,
        temperature=1.0, updates=updates, limits=Limits(9, 1), max_grad_norm=math.inf, foreign=foreign,
    )  # fmt: skip
    table = ToyPolicy().adapter
    for _ in range(updates):
        logprobs = torch.log_softmax(policy.base + table, -1)
        loss = 0.0
        for answer, far, advantage in zip(answers, shift.tolist(), (0.5, -0.5, -0.5, 0.5), strict=True):
            at = [prompt.ids[-1], *answer.ids[:-1]]
            for t, (last, i) in enumerate(zip(at, answer.ids, strict=True)):
                correction = min(math.exp(-far[t]), 2.0) if foreign else 1.0
                ratio = (logprobs[last, i] - answer.logprobs[t]).exp()  # pi_old is what drew it, but for the shift
                loss = loss - correction * advantage * ratio / tokens
        [gradient] = torch.autograd.grad(loss, [table])
        table = (table - rate * gradient).detach().requires_grad_()
    torch.testing.assert_close(policy.adapter.detach(), table.detach(), rtol=1e-9, atol=1e-12)
