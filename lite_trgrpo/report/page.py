"""The page of one run: what it is, its held-out score, its curves."""

from collections.abc import Iterator, Mapping, Sequence

from lite_trgrpo.report import account, answers
from lite_trgrpo.report.charts import Curve, chart
from lite_trgrpo.report.html import Html, document, pairs, table, tag
from lite_trgrpo.report.reading import Answer, Line, Story

# title, hint, metrics by the name that the legend gives them, whether they are shares
CURVES: tuple[tuple[str, str, Mapping[str, str], bool], ...] = (
    ("Length", "Tokens of an answer. A steady rise to the cap without reward is hacking.",
     {"mean length": "length_mean", "longest answer": "length_max"}, False),
    ("Cut off, and with signal", "Answers cut off by the cap; prompts whose answers differ in reward: others teach "
     "nothing.", {"answers cut off": "truncated", "prompts with signal": "groups_with_signal"}, True),
    ("Entropy", "How much answers vary (nats a token). Near 0 there is nothing left to learn from.",
     {"all sampled tokens": "entropy_sampled", "tokens in the update": "entropy"}, False),
    ("KL", "How far an update moved the policy, and where measured how far it is from its base (nats a token)."
     " Estimated on a few answers, so it may fall below 0.",
     {"moved by the update": "update_kl", "distance to the base": "kl"}, False),
    ("Gradient norm", "Before clipping. Single peaks are usual, growth is not.", {"norm": "grad_norm"}, False),
    ("Mean token weight", "What the objective gives a token on average; 1 is plain GRPO.",
     {"weight": "weight_mean"}, False),
)  # fmt: skip


def of_run(story: Story, answer: Answer | None) -> str:
    sections = [_head(story), *_scores(story), _curves(story), *answers.pairs_of(story)]
    if answer is not None:
        sections.append(answers.tokens(answer))
    return document(story.name, [*sections, account.events(story), account.cost(story), account.settings(story)])


# -- the head and the score ---------------------------------------------------------------------------------


def _head(story: Story) -> Html:
    settings, prompts = story.settings, story.facts.get("prompts", {})
    rewards = ", ".join(f"{name} x {weight:g}" for name, weight in settings["rewards"]["functions"].items())
    steps, planned = len(story.metrics), settings["train"]["steps"]
    facts = {
        "base": story.facts.get("base", settings["model"]["name"]),
        "data": f"{settings['data']['source']} ({prompts.get('training', '?')} prompts)",
        "reward": rewards,
        "a step": f"{settings['train']['prompts_per_step']} prompts x {settings['rollout']['group_size']} answers",
        "steps": f"{steps}" if steps == planned else f"{steps} of {planned}",
        "last step": f"{story.written:%Y-%m-%d %H:%M}",
    }
    return tag("header", tag("h1", story.name), pairs(facts))


def _scores(story: Story) -> Iterator[Html]:
    if not story.evaluations:
        yield tag("section", tag("h2", "Held-out score"), tag("p", "None yet, or no rows are held out."))
        return
    scored = [story.evaluations[0], *story.evaluations[1:][-1:]]  # before and, once there is one, after
    last = scored[-1]
    tiles = [_tile(name, [line[name] for line in scored]) for name in score_names(last) if name in scored[0]]
    named = {"gain in pass@1": "gain", "gain in pass@k": "gain_k"}
    tiles += [_gain(name, last[key]) for name, key in named.items() if key in last]
    when = f"before training and after step {last['step']}" if len(scored) > 1 else "before training"
    others = [
        ("greedy answers cut off", *(f"{line['truncated']:.1%}" for line in scored)),
        ("their mean length (tokens)", *(f"{line['length_mean']:.1f}" for line in scored)),
    ]
    note = (
        f"{len(last['rows'])} held-out prompts, with 95 % intervals, {when}. pass@1 is the greedy answer's; "
        "pass@k asks whether one of k sampled answers is right."
    )
    yield tag(
        "section", tag("h2", "Held-out score"), tag("p", note), tag("div", *tiles, class_="tiles"),
        table(("", "before", "after")[: 1 + len(scored)], others),
    )  # fmt: skip


def score_names(evaluation: Line) -> list[str]:
    """`pass@1` and, where samples were drawn, `pass@k`."""
    return [name for name, value in evaluation.items() if name.startswith("pass@") and isinstance(value, Mapping)]


def estimate(value: Mapping[str, float], sign: str = "") -> str:
    return f"{value['value']:{sign}.3f} [{value['low']:{sign}.3f}, {value['high']:{sign}.3f}]"


def _tile(name: str, values: Sequence[Mapping[str, float]]) -> Html:
    """Before and after, each with its interval on a bar from 0 to 1."""
    bars = [
        tag("div", tag("i", style=f"left:{100 * one['low']:.1f}%;width:{100 * (one['high'] - one['low']):.1f}%"),
            tag("b", style=f"left:{100 * one['value']:.1f}%"), class_=f"bar {when}")
        for when, one in zip(("before", "after"), values, strict=False)
    ]  # fmt: skip
    *earlier, last = (f"{one['value']:.3f}" for one in values)
    large = tag("p", *(tag("span", f"{value} → ") for value in earlier), tag("b", last), class_="large")
    ranges = " → ".join(f"[{one['low']:.3f}, {one['high']:.3f}]" for one in values)
    return tag("div", tag("h3", name), large, tag("p", ranges), *bars, class_="tile")


def _gain(name: str, gain: Mapping[str, float]) -> Html:
    if gain["low"] > 0:
        verdict, colour = "better: the interval is above 0", "good"
    elif gain["high"] < 0:
        verdict, colour = "worse: the interval is below 0", "bad"
    else:
        verdict, colour = "no certain difference: the interval holds 0", ""
    large = tag("p", tag("b", f"{gain['value']:+.3f}"), class_=f"large {colour}")
    ranges = tag("p", f"[{gain['low']:+.3f}, {gain['high']:+.3f}], prompt by prompt")
    return tag("div", tag("h3", name), large, ranges, tag("p", verdict), class_="tile")


# -- curves -------------------------------------------------------------------------------------------------


def _curves(story: Story) -> Html:
    if not story.metrics:
        return Html()
    parts = [name for name in story.metrics[-1] if name.startswith("reward/")]
    shown = {"reward": "reward_mean"} | ({name[7:]: name for name in parts} if len(parts) > 1 else {})
    figures = [
        chart("Reward", "Mean of a step's answers, and of each reward function.", curves(story.metrics, shown)),
        chart("Solved", "Held-out scores with their intervals; the share of training answers solved.",
              [*scores(story.evaluations), *curves(story.metrics, {"training": "solved"})], share=True),
        *(chart(title, hint, curves(story.metrics, names), share=share) for title, hint, names, share in CURVES),
    ]  # fmt: skip
    note = "Thin: each step. Thick: running mean. The number is the last step's."
    return tag("section", tag("h2", "Curves"), tag("p", note), tag("div", *figures, class_="charts"))


def curves(metrics: Sequence[Line], names: Mapping[str, str]) -> list[Curve]:
    steps = [line["step"] for line in metrics]
    return [Curve(label, steps, [line.get(name) for line in metrics]) for label, name in names.items()]


def scores(evaluations: Sequence[Line]) -> list[Curve]:
    """One curve of points for each score."""
    steps = [line["step"] for line in evaluations]
    return [
        Curve(name, steps, [line[name]["value"] for line in evaluations],
              [(line[name]["low"], line[name]["high"]) for line in evaluations])
        for name in (score_names(evaluations[-1]) if evaluations else ())
    ]  # fmt: skip
