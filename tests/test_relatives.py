"""Every relative against one token at a time in plain Python floats: cases instead of min and clamp, slopes by hand."""

import importlib.util
import itertools
import math
import statistics
import sys
import tomllib
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from lite_trgrpo.config import loading
from lite_trgrpo.config.schema import Objective
from lite_trgrpo.errors import ConfigError
from lite_trgrpo.objective import denominators, group_advantages, linear_weights, policy_loss
from lite_trgrpo.training.weighting import weights_of

# on both sides of every bound below: 0.8, 1.28, the dual clip at 3, CISPO's cap at 5, DPPO's at 20
RATIOS = [0.04, 0.5, 0.79, 0.81, 0.9, 1.0, 1.1, 1.27, 1.29, 2.5, 2.9, 3.1, 4.9, 5.1, 19.0, 21.0, 30.0]
SEQUENCE_RATIOS = [0.7, 0.79, 0.81, 0.9995, 0.9998, 1.0003, 1.0005, 1.27, 1.29, 3.1]  # the means of whole rows
LENGTHS = [17, 17, 16, 17, 1, 13, 5, 9, 17, 2]


Batch = namedtuple("Batch", "logprobs old ref advantages mask weights denominator")


def batch(per_sequence=False, aggregation="sequence"):
    """Every ratio with both signs of A, in likely and unlikely tokens; ragged rows, one with a gap."""
    generator = torch.Generator().manual_seed(7)
    rows, width = 2 * len(SEQUENCE_RATIOS), len(RATIOS)
    lengths = torch.tensor(LENGTHS * 2)
    mask = torch.arange(width) < lengths[:, None]
    mask[2, 3] = False
    r = torch.stack([torch.tensor(RATIOS, dtype=torch.float64)[torch.randperm(width, generator=generator)]
                     for _ in range(rows)])  # fmt: skip
    if per_sequence:
        mean = torch.where(mask, r.log(), 0.0).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        r = (r.log() - mean + torch.tensor(SEQUENCE_RATIOS * 2, dtype=torch.float64)[:, None].log()).exp()
    likely = torch.rand(rows, width, generator=generator) < 0.5
    old = ((0.95 / r).clamp(max=0.95) * torch.where(likely, 0.9, 0.02)).log()
    ref = (old + torch.randn(rows, width, generator=generator, dtype=torch.float64)).clamp(max=-1e-3)
    sign = torch.tensor([1.0] * (rows // 2) + [-1.0] * (rows // 2), dtype=torch.float64)
    advantages = (sign * (0.2 + torch.rand(rows, generator=generator, dtype=torch.float64)))[:, None]
    weights = 0.5 + torch.rand(rows, width, generator=generator, dtype=torch.float64)
    denominator = denominators(mask.sum(1), aggregation, 32).double()
    return Batch(old + r.log(), old, ref, advantages, mask, weights, denominator)


def ppo(r, a, low, high, dual):
    """-> gain, its slope in log pi, where the token stands."""
    if a > 0 and r > 1 + high:
        return a * (1 + high), 0.0, "good, too high"
    if a < 0 and dual is not None and r > dual:
        return a * dual, 0.0, "bad, dual"
    if a < 0 and r < 1 - low:
        return a * (1 - low), 0.0, "bad, too low"
    return a * r, a * r, ("good" if a > 0 else "bad") + (", high" if r > 1 + high else ", low" if r < 1 - low else "")


def gain_and_slope(region, lp, old, a, s, weight, low, high, dual, penalty):
    """One token under every trust region. The slope is the derivative that each paper prints, not autograd's."""
    r = math.exp(lp - old)
    side = "good" if a > 0 else "bad"
    if region == "ratio":  # Eq. 9: the weight inside
        return ppo(weight * r, a, low, high, dual)
    if region == "clip":
        gain, slope, place = ppo(r, a, low, high, dual)
    elif region == "sequence":
        gain, slope, place = ppo(s, a, low, high, dual)
    elif region == "cispo":
        fixed, place = (r, "below") if r <= 1 + high else (1 + high, "capped")
        gain, slope, place = fixed * a * lp, fixed * a, f"{side}, {place}"
    elif region == "sapo":
        tau = 1.0 if a > 0 else 1.05
        gate = 1 / (1 + math.exp(-tau * (r - 1)))
        gain, slope, place = (
            4 / tau * gate * a,
            4 * gate * (1 - gate) * r * a,
            f"{side}, {'above' if r > 1 else 'below'}",
        )
    elif region == "dppo":
        moved = math.exp(lp) - math.exp(old)
        out = moved > high if a > 0 else moved < -low
        fixed = 0.0 if out else min(r, 20.0)
        beyond = "other way" if not out and not -low <= moved <= high else "out" if out else "near"
        gain, slope, place = fixed * a * lp, fixed * a, f"{side}, {beyond}{', capped' if fixed == 20 else ''}"
    else:
        gain, slope = r * a - penalty * (r - 1) ** 2, r * a - 2 * penalty * (r - 1) * r
        place = f"{side}, {'above' if r > 1 else 'below'}"
    return weight * gain, weight * slope, place


def kl_and_slope(kind, log_x):
    return {
        "k1": (-log_x, 1.0),
        "k2": (log_x * log_x / 2, -log_x),
        "k3": (math.exp(log_x) - 1 - log_x, 1 - math.exp(log_x)),
    }[kind]


def loop(given, region, weighted, low, high, dual=None, penalty=1.0, beta=0.0, kl="k3"):
    """-> loss, gradient [B][T], the places where tokens stood."""
    logprobs, old, ref, mask = (part.tolist() for part in (given.logprobs, given.old, given.ref, given.mask))
    loss, gradient, places = 0.0, [[0.0] * len(row) for row in mask], set()
    for i, row in enumerate(mask):
        a, n = given.advantages[i].item(), given.denominator[i].item()
        moves = [logprobs[i][j] - old[i][j] for j, there in enumerate(row) if there]
        s = math.exp(math.fsum(moves) / len(moves))
        for j in itertools.compress(range(len(row)), row):
            w = given.weights[i, j].item() if weighted else 1.0
            gain, slope, place = gain_and_slope(region, logprobs[i][j], old[i][j], a, s, w, low, high, dual, penalty)
            inside = math.log(w) if region == "ratio" else 0.0
            value, incline = kl_and_slope(kl, ref[i][j] - logprobs[i][j] + inside)
            outside = 1.0 if region == "ratio" else w
            loss -= (gain - beta * outside * value) / n
            gradient[i][j] = -(slope - beta * outside * incline) / n
            places.add(place)
    return loss, gradient, places


def ours(given, region, weighted, low, high, dual=None, penalty=1.0, beta=0.0, kl="k3"):
    leaf = given.logprobs.clone().requires_grad_()
    placed = {"placement": "ratio"} if region == "ratio" else {"trust_region": region}
    loss = policy_loss(
        leaf, given.old, given.advantages, given.mask, weights=given.weights if weighted else None,
        ref_logprobs=given.ref, clip_low=low, clip_high=high, dual_clip=dual, penalty=penalty, beta=beta, kl=kl,
        denominator=given.denominator, **placed,
    )  # fmt: skip
    loss.backward()
    return loss.item(), leaf.grad


def assert_same(given, *arguments, **options):
    """Loss and every token's gradient; -> the places where tokens stood."""
    loss, gradient = ours(given, *arguments, **options)
    expected, slopes, places = loop(given, *arguments, **options)
    assert loss == pytest.approx(expected, rel=1e-10, abs=0)
    # atol: where a slope is a difference (k3, penalty) its rounding is that of its terms
    torch.testing.assert_close(gradient, torch.tensor(slopes, dtype=torch.float64), rtol=1e-10, atol=1e-15)
    assert gradient[~given.mask].eq(0).all()
    return places


PPO_PLACES = {"good", "good, low", "good, too high", "bad", "bad, too low", "bad, high"}
ABOVE_BELOW = {"good, above", "good, below", "bad, above", "bad, below"}
REGIONS = {  # name: (region, bounds and the like, every place that a token can stand in)
    "clip": ("clip", {"low": 0.2, "high": 0.28}, PPO_PLACES),
    "dual clip": ("clip", {"low": 0.2, "high": 0.28, "dual": 3.0}, PPO_PLACES | {"bad, dual"}),
    "ratio": ("ratio", {"low": 0.2, "high": 0.28, "dual": 3.0}, PPO_PLACES | {"bad, dual"}),
    "sequence": ("sequence", {"low": 0.2, "high": 0.28, "dual": 3.0}, PPO_PLACES | {"bad, dual"}),
    "gspo": ("sequence", {"low": 3e-4, "high": 4e-4}, PPO_PLACES),
    "cispo": ("cispo", {"low": 0.2, "high": 4.0}, {"good, below", "good, capped", "bad, below", "bad, capped"}),
    "sapo": ("sapo", {"low": 0.2, "high": 0.2}, ABOVE_BELOW),
    "dppo": ("dppo", {"low": 0.15, "high": 0.2}, {f"{side}, {place}" for side in ("good", "bad") for place in (
        "near", "out", "other way", "near, capped")} | {"bad, other way, capped"}),
    "penalty": ("penalty", {"low": 0.2, "high": 0.2, "penalty": 0.7}, ABOVE_BELOW),
}  # fmt: skip


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", REGIONS)
def test_trust_regions_equal_a_double_loop(name, weighted, aggregation):
    region, bounds, every_place = REGIONS[name]
    given = batch(per_sequence=region == "sequence", aggregation=aggregation)
    assert assert_same(given, region, weighted, **bounds) == every_place


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", REGIONS)
def test_kl_estimators_equal_a_double_loop(name, weighted, kl):
    region, bounds, _ = REGIONS[name]
    assert_same(batch(per_sequence=region == "sequence"), region, weighted, **bounds, beta=0.3, kl=kl)


@pytest.mark.parametrize("fill", [math.inf, -math.inf, math.nan, -30.0, 30.0])
@pytest.mark.parametrize("name", REGIONS)
def test_garbage_in_the_padding_never_matters(name, fill):
    region, bounds, _ = REGIONS[name]
    given = batch()
    wide = given._replace(advantages=given.advantages.expand(given.mask.shape))
    dirty = Batch(*(torch.where(given.mask, part, fill) for part in wide[:4]), given.mask,
                  torch.where(given.mask, given.weights, fill), given.denominator)  # fmt: skip
    clean, noisy = (ours(part, region, True, **bounds, beta=0.3) for part in (given, dirty))
    assert noisy[0] == clean[0]
    assert torch.equal(noisy[1], clean[1])
    assert noisy[1][~given.mask].eq(0).all()


def loop_advantages(rewards, estimator, eps=1e-4):
    there = [reward for reward in rewards if not math.isnan(reward)]
    if len(there) < 2 or min(there) == max(there):
        return [0.0] * len(rewards)
    advantage = {
        "grpo": lambda reward: (reward - statistics.fmean(there)) / (statistics.stdev(there) + eps),
        "dr-grpo": lambda reward: reward - statistics.fmean(there),
        "rloo": lambda reward: reward - (math.fsum(there) - reward) / (len(there) - 1),
        "reinforce-rej": lambda reward: reward,
    }[estimator]
    return [0.0 if math.isnan(reward) else advantage(reward) for reward in rewards]


@pytest.mark.parametrize("estimator", ["grpo", "dr-grpo", "rloo", "reinforce-rej"])
def test_advantages_equal_a_double_loop(estimator):
    nan = math.nan
    rewards = [[1.0, 0.0, 0.0, 1.0, -1.5], [0.1] * 5, [nan] * 5, [2.0, nan, nan, nan, nan], [nan, 0.3, 0.3, nan, 0.3],
               [nan, 0.25, -2.0, 3.5, nan], [0.0] * 4 + [1e-3], [-0.7, -0.7, nan, -0.2, 0.0]]  # fmt: skip
    got = group_advantages(torch.tensor(rewards, dtype=torch.float64), estimator=estimator)
    expected = torch.tensor([loop_advantages(row, estimator) for row in rewards], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-15)
    assert got[1:5].eq(0).all()  # exactly: no rounding becomes signal


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_linear_weights_equal_a_loop(share):
    logprobs = torch.tensor([[-30.0, -3.0, -0.5], [-1e-3, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    expected = [[share * math.exp(lp) + (1 - share) for lp in row] for row in logprobs.tolist()]
    got = linear_weights(logprobs, share=share)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    assert not got.requires_grad
    torch.testing.assert_close(weights_of(logprobs, Objective(weights="linear", weight={"a": share}), 1.0), got)


RECIPES = loading.objectives()


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_complete_and_loads(name):
    head = loading.head_comment(RECIPES[name])
    assert all(len(head.get(key, "")) > 3 for key in ("what", "formula", "source"))
    raw = tomllib.loads(RECIPES[name].read_text(encoding="utf-8"))
    explicit = {"weights", "placement", "advantage", "trust_region", "aggregation", "clip_low", "clip_high"}
    assert explicit <= raw["objective"].keys()
    loaded, plain = loading.load("demo", objective=name), loading.load("demo")
    values = loaded.objective.model_dump()
    assert raw["objective"].pop("weight", {}).items() <= values["weight"].items()
    assert raw["objective"].items() <= values.items()
    assert plain.rewards.functions.keys() <= loaded.rewards.functions.keys()  # added to, never replaced
    assert (loaded.model, loaded.data, loaded.train) == (plain.model, plain.data, plain.train)


def test_no_two_recipes_are_the_same_and_all_choices_occur():
    shown = [loading.load("demo", objective=name).objective for name in RECIPES]
    assert len({objective.model_dump_json() for objective in shown}) == len(RECIPES) >= 16
    for option in ("weights", "advantage", "trust_region", "aggregation", "placement"):
        allowed = set(Objective.model_fields[option].annotation.__args__)
        assert {getattr(objective, option) for objective in shown} == allowed


def plain_loss(**options):
    logprobs, old, ref, advantages, mask, *_ = batch()
    return policy_loss(logprobs, old, advantages, mask, **{"ref_logprobs": ref, **options}, denominator=1.0)


@pytest.mark.parametrize("region", ["sequence", "cispo", "sapo", "dppo", "penalty"])
def test_the_ratio_placement_is_refused_with_another_trust_region(region):
    wrong = {"placement": "ratio", "trust_region": region}
    with pytest.raises(ConfigError, match="placement = surrogate"):
        loading.load("demo", overrides=[f"objective.{key}={value}" for key, value in wrong.items()])
    with pytest.raises(ValueError, match=rf"'ratio'.*{region}"):
        plain_loss(**wrong)


@pytest.mark.parametrize("wrong", [{"trust_region": "ppo"}, {"placement": "inside"}, {"kl": "k4", "beta": 0.1}])
def test_unknown_names_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong.values()))):
        plain_loss(**wrong)
    with pytest.raises(ConfigError):
        loading.load("demo", named={f"objective.{key}": value for key, value in wrong.items()})


def test_what_is_missing_or_unknown_is_refused():
    with pytest.raises(ConfigError, match="'gspo'"):
        loading.load("demo", objective="gsp")
    with pytest.raises(ValueError, match="raft"):
        group_advantages(torch.zeros(1, 2), estimator="raft")
    with pytest.raises(ValueError, match="ref_logprobs"):
        plain_loss(beta=0.1, ref_logprobs=None)


@pytest.mark.slow
@pytest.mark.parametrize(("project", "cases"), [("TRL", 11), ("verl", 14)])
def test_the_relatives_are_those_of_trl_and_verl(project, cases):
    pytest.importorskip("trl", reason="trl, one of the two compared with, is not installed (dev extra)")
    path = Path(__file__).parents[1] / "benchmarks" / "relatives.py"
    spec = importlib.util.spec_from_file_location("relatives", path)
    relatives = sys.modules["relatives"] = importlib.util.module_from_spec(spec)  # its dataclass looks itself up
    spec.loader.exec_module(relatives)
    verl = relatives.load_verl() if project == "verl" else "not asked for"
    if project == "verl" and isinstance(verl, str):
        pytest.skip(f"verl is {verl}")
    same = [relatives.compare_advantages(name, verl) for name in relatives.ESTIMATORS]
    same += [relatives.compare(case, verl) for case in relatives.CASES]
    errors = [found[project] for found in same if project in found]
    assert len(errors) == cases
    assert all(error < 1e-5 for pair in errors for error in pair)
    parted = [relatives.compare(case, verl).get(project, [1.0]) for case in relatives.PARTINGS]
    assert all(max(pair) > 1e-3 for pair in parted)  # they part where the table says so
