"""The equations against an independent double loop in plain Python floats, and what the method page states."""

import itertools
import math

import pytest
import torch

from lite_trgrpo.config.schema import Objective
from lite_trgrpo.objective import denominators, group_advantages, kl_estimate, policy_loss, token_weights
from lite_trgrpo.training.weighting import step_mean, weights_of

CLIP_LOW, CLIP_HIGH = 0.2, 0.28


def batch(seed=0, rows=5, width=6):
    """Ragged rows, both signs of A, ratios inside and outside the clip range, likely and unlikely tokens."""
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(rows, width, generator=generator, dtype=torch.float64) ** 2
    new = (old + 0.6 * torch.randn(rows, width, generator=generator, dtype=torch.float64)).clamp(max=-1e-3)
    ref = (old + 0.5 * torch.randn(rows, width, generator=generator, dtype=torch.float64)).clamp(max=-1e-3)
    advantages = torch.randn(rows, 1, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([width, 1, 3, width - 1, 2][:rows])
    mask = torch.arange(width) < lengths[:, None]
    return new.requires_grad_(), old, ref, advantages, mask, lengths


def loop_weight(p, reading):
    if reading == "none":
        return 1.0
    kappa, centre, mu = 9.0, *{"offset": (0.0, 0.25), "centred": (0.25, 0.0), "reverse": (0.0, 0.25)}[reading]
    p = 1 - p if reading == "reverse" else p
    return min(1.4, max(1.0, 2.0 * (1 / (1 + math.exp(-kappa * (p - centre))) - mu)))


def loop_weights(values, mask, reading):
    """Of every token; for `constant` their mean over the step stands for all."""
    one = "offset" if reading == "constant" else reading
    weights = [[loop_weight(math.exp(lp), one) for lp in row] for row in values]
    counted = [w for row, seen in zip(weights, mask.tolist(), strict=True) for w, m in zip(row, seen, strict=True) if m]
    mean = sum(counted) / len(counted)
    return [[mean for _ in row] for row in weights] if reading == "constant" else weights


def loop_loss(new, old, ref, advantages, mask, weights, placement, beta, aggregation, max_new_tokens):
    """The same objective, one token at a time; `new` is a list of floats."""
    lengths = [int(row.sum()) for row in mask]
    total = 0.0
    for i, j in itertools.product(range(len(lengths)), range(mask.shape[1])):
        if not mask[i, j]:
            continue
        lp, a, w = new[i][j], float(advantages[i, 0]), weights[i][j]
        r = math.exp(lp - float(old[i, j]))
        s = w * r if placement == "ratio" else r
        clipped = min(max(s, 1 - CLIP_LOW), 1 + CLIP_HIGH)
        gain = min(s * a, clipped * a) * (w if placement == "surrogate" else 1.0)
        x = math.exp(float(ref[i, j]) - lp)
        if placement == "surrogate":
            gain -= beta * w * (x - math.log(x) - 1)
        else:
            gain -= beta * (w * x - math.log(w * x) - 1)
        divisor = {
            "sequence": len(lengths) * lengths[i],
            "token": sum(lengths),
            "constant": len(lengths) * max_new_tokens,
        }[aggregation]
        total -= gain / divisor
    return total


def loop_gradient(new, old, ref, advantages, mask, weights, placement, beta, aggregation, max_new_tokens):
    """d loss / d log p of each token, derived by hand: d r = r, d x = -x; the clip passes or stops it."""
    lengths = [int(row.sum()) for row in mask]
    gradient = [[0.0] * mask.shape[1] for _ in lengths]
    for i, j in itertools.product(range(len(lengths)), range(mask.shape[1])):
        if not mask[i, j]:
            continue
        lp, a, w = new[i][j], float(advantages[i, 0]), weights[i][j]
        r, x = math.exp(lp - float(old[i, j])), math.exp(float(ref[i, j]) - lp)
        s = w * r if placement == "ratio" else r
        stopped = (a > 0 and s > 1 + CLIP_HIGH) or (a < 0 and s < 1 - CLIP_LOW)
        gain = 0.0 if stopped else w * r * a  # in both placements: w multiplies r once
        gain += beta * w * (x - 1) if placement == "surrogate" else beta * (w * x - 1)
        divisor = {
            "sequence": len(lengths) * lengths[i],
            "token": sum(lengths),
            "constant": len(lengths) * max_new_tokens,
        }[aggregation]
        gradient[i][j] = -gain / divisor
    return gradient


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("placement", ["surrogate", "ratio"])
@pytest.mark.parametrize("reading", ["offset", "centred", "reverse", "constant", "none"])
def test_loss_and_gradient_equal_a_double_loop(reading, placement, beta, aggregation):
    new, old, ref, advantages, mask, lengths = batch()
    objective = Objective(weights=reading)
    mean = step_mean([new[i, :n].tolist() for i, n in enumerate(lengths)], objective)
    weights = weights_of(new, objective, mean)
    loss = policy_loss(
        new, old, advantages, mask, weights=weights, ref_logprobs=ref, clip_low=CLIP_LOW, clip_high=CLIP_HIGH,
        beta=beta, placement=placement, denominator=denominators(lengths, aggregation, 16).double(),
    )  # fmt: skip
    loss.backward()
    values = new.tolist()
    fixed = loop_weights(values, mask, reading)  # the weight carries no gradient
    arguments = (old, ref, advantages, mask, fixed, placement, beta, aggregation, 16)
    expected = loop_loss(values, *arguments)
    assert loss.item() == pytest.approx(expected, rel=1e-12)

    expected_gradient = torch.tensor(loop_gradient(values, *arguments), dtype=torch.float64)
    assert ((new.grad - expected_gradient).norm() / expected_gradient.norm()).item() < 1e-12
    # and the derivative worked out by hand is that of the loop: central differences, error h^2 f''' + 1e-16 / h
    h, (i, j) = 1e-5, (0, 2)
    shifted, lowered = (
        loop_loss(
            [[lp + d * ((r, c) == (i, j)) for c, lp in enumerate(row)] for r, row in enumerate(values)], *arguments
        )
        for d in (h, -h)
    )
    assert (shifted - lowered) / (2 * h) == pytest.approx(expected_gradient[i, j].item(), rel=1e-6, abs=1e-10)


def test_weight_one_is_grpo():
    new, old, ref, advantages, mask, lengths = batch()
    denominator = denominators(lengths, "sequence", 16).double()
    ones = torch.ones_like(old)
    losses = [
        policy_loss(
            new, old, advantages, mask, weights=w, ref_logprobs=ref, beta=0.1, placement=p, denominator=denominator
        )
        for w, p in itertools.product([None, ones], ["surrogate", "ratio"])
    ]
    assert all(loss.item() == pytest.approx(losses[0].item(), rel=1e-14) for loss in losses)


def test_what_stands_in_the_padding_never_matters():
    new, old, ref, advantages, mask, lengths = batch()
    denominator = denominators(lengths, "sequence", 16).double()

    def loss_and_gradient(fill):
        leaf = torch.where(mask, new.detach(), fill).requires_grad_()
        loss = policy_loss(
            leaf, torch.where(mask, old, fill), advantages, mask, weights=token_weights(leaf),
            ref_logprobs=torch.where(mask, ref, fill), beta=0.1, denominator=denominator,
        )  # fmt: skip
        loss.backward()
        return loss.item(), leaf.grad

    (a, grad_a), (b, grad_b) = loss_and_gradient(0.0), loss_and_gradient(-30.0)
    assert a == b
    assert torch.equal(grad_a, grad_b)
    assert (grad_a[~mask] == 0).all()


# -- advantages ---------------------------------------------------------------------------------------------


def test_advantages_of_a_group_by_hand():
    # rewards 1, 0, 0, 1: mean 1/2, unbiased std sqrt(4 * 1/4 / 3) = 0.577350
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    expected = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    got = group_advantages(rewards)
    torch.testing.assert_close(got, torch.tensor([[1, -1, -1, 1]]).double() * expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        group_advantages(rewards, estimator="dr-grpo"), torch.tensor([[0.5, -0.5, -0.5, 0.5]]).double()
    )
    # against the mean of the other three: 1 - 1/3 and 0 - 2/3
    torch.testing.assert_close(
        group_advantages(rewards, estimator="rloo"), torch.tensor([[2 / 3, -2 / 3, -2 / 3, 2 / 3]]).double()
    )


@pytest.mark.parametrize("estimator", ["grpo", "dr-grpo", "rloo"])
def test_ungradable_answers_are_as_if_never_sampled(estimator):
    nan = float("nan")
    with_gap = group_advantages(torch.tensor([[1.0, nan, 0.0, 3.0, nan]]).double(), estimator=estimator)
    without = group_advantages(torch.tensor([[1.0, 0.0, 3.0]]).double(), estimator=estimator)
    assert with_gap[0, [1, 4]].tolist() == [0, 0]
    torch.testing.assert_close(with_gap[0, [0, 2, 3]], without[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("estimator", ["grpo", "dr-grpo", "rloo"])
@pytest.mark.parametrize("row", [[0.1] * 8, [float("nan")] * 8, [0.3] + [float("nan")] * 7, [1e9] * 8, [-0.7] * 8])
def test_groups_without_spread_give_exactly_zero(estimator, row):
    assert group_advantages(torch.tensor([row]), estimator=estimator).eq(0).all()


def test_shift_scale_and_order_of_rewards():
    rewards = torch.randn(6, 8, dtype=torch.float64)
    order = torch.randperm(8)
    base = group_advantages(rewards)
    torch.testing.assert_close(group_advantages(rewards + 17), base, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(group_advantages(rewards[:, order]), base[:, order], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(group_advantages(rewards * 5, eps=0.0), group_advantages(rewards, eps=0.0))


def test_denominators_belong_to_the_step():
    lengths = torch.tensor([4, 0, 2])  # the middle one is not graded: two sequences count
    assert denominators(lengths, "sequence", 10).flatten().tolist() == [8, 2, 4]
    assert denominators(lengths, "token", 10).flatten().tolist() == [6, 6, 6]
    assert denominators(lengths, "constant", 10).flatten().tolist() == [20, 20, 20]


# -- what the method page states ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reading", "p", "w"),
    [
        ("offset", 0.122, 1.0),  # 2 (sigmoid(1.098) - 0.25) = 0.9998
        ("offset", 0.193, 1.2),  # 2 (sigmoid(1.737) - 0.25) = 1.2005
        ("offset", 0.327, 1.4),  # 2 (sigmoid(2.943) - 0.25) = 1.3999
        ("offset", 1.0, 1.4),
        ("centred", 0.25, 1.0),  # 2 sigmoid(0)
        ("centred", 0.344, 1.4),  # 2 sigmoid(0.846) = 1.3995
        ("centred", 0.0, 1.0),  # raw 2 sigmoid(-2.25) = 0.19
        ("reverse", 1.0, 1.0),
        ("reverse", 1 - 0.327, 1.4),
    ],
)
def test_published_values_of_the_weight(reading, p, w):
    got = weights_of(torch.tensor([[p]], dtype=torch.float64).log(), Objective(weights=reading), 1.0)
    assert got.item() == pytest.approx(w, abs=1e-3)


def test_dividing_by_tau_would_be_plain_grpo():
    # A public implementation has sigmoid(p / 9): at most sigmoid(1/9) = 0.528, and 2 (0.528 - 0.25) = 0.556 < 1,
    # so the lower bound makes every weight exactly 1.
    p = torch.linspace(1e-6, 1, 1000, dtype=torch.float64)
    assert (token_weights(p.log(), kappa=1 / 9) == 1.0).all()
    assert token_weights(p.log()).max() == 1.4


def test_weights_carry_no_gradient():
    leaf = torch.full((1, 3), -1.0, requires_grad=True)
    assert not token_weights(leaf).requires_grad


def on_policy(weight, advantage, placement, beta=0.0):
    """Loss and gradient of one token at pi = pi_old = pi_ref."""
    logprob = torch.tensor([[-0.1]], dtype=torch.float64, requires_grad=True)
    loss = policy_loss(
        logprob, logprob.detach(), torch.tensor([[advantage]]).double(), torch.tensor([[True]]),
        weights=torch.tensor([[weight]], dtype=torch.float64), ref_logprobs=logprob.detach(),
        beta=beta, placement=placement, denominator=1.0,
    )  # fmt: skip
    loss.backward()
    return loss.item(), logprob.grad.item()


def test_ratio_placement_stops_likely_tokens_of_good_answers():
    assert on_policy(1.4, 1.0, "ratio")[1] == 0.0  # w r = 1.4 > 1.2: clipped before the first update
    assert on_policy(1.15, 1.0, "ratio")[1] == pytest.approx(-1.15)
    assert on_policy(1.4, -1.0, "ratio")[1] == pytest.approx(1.4)  # bad answers are not clipped there
    assert on_policy(1.4, 1.0, "surrogate")[1] == pytest.approx(-1.4)


def test_printed_kl_is_not_zero_at_equality():
    # w x - log(w x) - 1 at w = 1.4, x = 1: 0.4 - ln 1.4 = 0.4 - 0.336472 = 0.063528
    assert on_policy(1.4, 0.0, "ratio", beta=1.0)[0] == pytest.approx(0.4 - math.log(1.4), rel=1e-12)
    assert on_policy(1.4, 0.0, "surrogate", beta=1.0) == (0.0, 0.0)
    # its minimum lies at pi = w pi_ref, that is log x = -log w
    log_x = torch.tensor(-math.log(1.4), dtype=torch.float64)
    assert kl_estimate(log_x + math.log(1.4)).item() == 0.0


def test_a_step_along_the_negative_gradient_raises_good_answers():
    assert on_policy(1.0, 1.0, "surrogate")[1] < 0 < on_policy(1.0, -1.0, "surrogate")[1]


@pytest.mark.parametrize("call", [
    lambda: group_advantages(torch.ones(1, 2), estimator="ppo"),
    lambda: denominators(torch.ones(1), "mean", 4),
    lambda: on_policy(1.0, 1.0, "inside"),
])  # fmt: skip
def test_unknown_names_are_refused(call):
    with pytest.raises(ValueError, match="is not one of"):
        call()
