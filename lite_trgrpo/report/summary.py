"""The page of one run without its curves, as plain data: scores, answers, alerts, cost and settings."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lite_trgrpo import __version__
from lite_trgrpo.report import reading
from lite_trgrpo.report.reading import Answer, Line, Story

SHOWN, MOVED = 5, 4  # prompts: the first ones; of the most and least improved
LONGEST = 1500  # characters of an answer
SHADES = 8  # of the style sheet, for probabilities and weights
RAREST = 8  # tokens in the table


def of_run(story: Story, answer: Answer | None) -> dict[str, Any]:
    """The variables of run.html.j2, but for `figures`."""
    return {
        "title": story.name,
        "unfinished": len(story.metrics) < story.settings["train"]["steps"],
        "facts": _facts(story),
        **_scores(story),
        "comparisons": list(_comparisons(story)) if len(story.evaluations) > 1 else [],
        "answer": answer and _tokens(answer),
        "alerts": list(reading.events(story)),
        **_cost(story),
        **_settings(story),
    }


def _facts(story: Story) -> dict[str, str]:
    settings, prompts = story.settings, story.facts.get("prompts", {})
    steps, planned = len(story.metrics), settings["train"]["steps"]
    return {
        "base": story.facts.get("base", settings["model"]["name"]),
        "data": f"{settings['data']['source']} ({prompts.get('training', '?')} prompts)",
        "reward": ", ".join(f"{name} x {weight:g}" for name, weight in settings["rewards"]["functions"].items()),
        "a step": f"{settings['train']['prompts_per_step']} prompts x {settings['rollout']['group_size']} answers",
        "steps": f"{steps}" if steps == planned else f"{steps} of {planned}",
        "last step": f"{story.written:%Y-%m-%d %H:%M}",
    }


# -- the held-out score -------------------------------------------------------------------------------------


def _scores(story: Story) -> dict[str, Any]:
    if not story.evaluations:
        return {"tiles": None}
    scored = [story.evaluations[0], *story.evaluations[1:][-1:]]  # before and, once there is one, after
    last = scored[-1]
    when = f"before training and after step {last['step']}" if len(scored) > 1 else "before training"
    named = {"gain in pass@1": "gain", "gain in pass@k": "gain_k"}
    return {
        "tiles": [_tile(name, [line[name] for line in scored]) for name in score_names(last) if name in scored[0]],
        "gains": [_gain(name, last[key]) for name, key in named.items() if key in last],
        "score_note": f"{len(last['rows'])} held-out prompts, with 95 % intervals, {when}. pass@1 is the greedy "
        "answer's; pass@k asks whether one of k sampled answers is right.",
        "truncated": (
            ("", "before", "after")[: 1 + len(scored)],
            [
                ("greedy answers truncated", *(f"{line['truncated']:.1%}" for line in scored)),
                ("their mean length (tokens)", *(f"{line['length_mean']:.1f}" for line in scored)),
            ],
        ),
    }


def score_names(evaluation: Line) -> list[str]:
    """`pass@1` and, where samples were drawn, `pass@k`."""
    return [name for name, value in evaluation.items() if name.startswith("pass@") and isinstance(value, Mapping)]


def estimate(value: Mapping[str, float], sign: str = "") -> str:
    """A score with its 95 % interval."""
    return f"{value['value']:{sign}.3f} [{value['low']:{sign}.3f}, {value['high']:{sign}.3f}]"


def _tile(name: str, values: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Before and after, each with its interval on a bar from 0 to 1."""
    *earlier, last = (f"{one['value']:.3f}" for one in values)
    bars = [
        {
            "when": when,
            "left": f"{100 * one['low']:.1f}",
            "width": f"{100 * (one['high'] - one['low']):.1f}",
            "at": f"{100 * one['value']:.1f}",
        }
        for when, one in zip(("before", "after"), values, strict=False)
    ]
    ranges = " → ".join(f"[{one['low']:.3f}, {one['high']:.3f}]" for one in values)
    return {"name": name, "earlier": earlier, "last": last, "ranges": ranges, "bars": bars}


def _gain(name: str, gain: Mapping[str, float]) -> dict[str, str]:
    verdict, good_or_bad = "no certain difference: the interval holds 0", ""
    if gain["low"] > 0:
        verdict, good_or_bad = "better: the interval is above 0", "good"
    elif gain["high"] < 0:
        verdict, good_or_bad = "worse: the interval is below 0", "bad"
    interval = f"[{gain['low']:+.3f}, {gain['high']:+.3f}]"
    return {
        "name": name, "value": f"{gain['value']:+.3f}", "range": interval, "verdict": verdict,
        "good_or_bad": good_or_bad,
    }  # fmt: skip


# -- answers ------------------------------------------------------------------------------------------------


def _comparisons(story: Story) -> Iterator[dict[str, Any]]:
    """Answers before and after training: of the first prompts, the most improved and the least improved."""
    found = reading.gains(story)
    unseen = found[SHOWN:] + found[:SHOWN]  # among equals, what is not on the page yet
    better = [one for one in sorted(unseen, key=lambda one: -one[0]) if one[0] > 0][:MOVED]
    worse = [one for one in sorted(unseen, key=lambda one: one[0]) if one[0] < 0][:MOVED]
    more, fewer = sum(one[0] > 0 for one in found), sum(one[0] < 0 for one in found)
    for title, note, rows in (
        ("Before and after", "The first held-out prompts, greedy answers.", found[:SHOWN]),
        ("Most improved", f"{more} of {len(found)} prompts are answered better than before.", better),
        ("Least improved", f"{fewer} of {len(found)} prompts are answered worse than before.", worse),
    ):
        cards = [_card(old, new, story.settings["eval"]["samples"]) for _, old, new in rows]
        yield {"title": title, "note": note, "cards": cards}


def _card(old: Line, new: Line, samples: int) -> dict[str, Any]:
    sides = [
        {
            "solved": row["solved"],
            "head": when if (right := row.get("samples_solved")) is None else f"{when}, {right} of {samples} sampled",
            "text": _shortened(row["greedy"]),
        }
        for when, row in (("before", old), ("after", new))
    ]
    gold = None if new["answer"] is None else _shortened(new["answer"])
    return {"prompt": _shortened(new["prompt"]), "gold": gold, "sides": sides}


def _shortened(text: object) -> str:
    whole = str(text)
    return whole if len(whole) <= LONGEST else f"{whole[:LONGEST]} … ({len(whole) - LONGEST} more characters)"


def _tokens(answer: Answer) -> dict[str, Any]:
    """The same tokens twice: shaded by probability, then by weight. A table too, for who cannot hover."""
    weights = [weight for _, _, weight in answer.tokens]
    low, high = min(weights), max(weights)
    rarest = sorted(answer.tokens, key=lambda one: one[1])[:RAREST]
    return {
        "step": answer.step,
        "prompt": _shortened(answer.prompt),
        "reward": "not graded" if answer.reward is None else f"reward {answer.reward:.3g}",
        "low": f"{low:.2f}",
        "high": f"{high:.2f}",
        "tokens": [
            {
                "text": piece,
                "title": f"p {p:.4f}, weight {weight:.3f}",
                "rarity": _shade(1 - p),
                "heaviness": _shade((weight - low) / ((high - low) or 1)),
            }
            for piece, p, weight in answer.tokens
        ],
        "rarest": [(repr(piece), f"{p:.4f}", f"{weight:.3f}") for piece, p, weight in rarest],
    }


def _shade(strength: float) -> int:
    return min(SHADES - 1, int(strength * SHADES))


# -- cost and settings --------------------------------------------------------------------------------------


def _cost(story: Story) -> dict[str, Any]:
    clocks = [line["clock"] for line in story.metrics]
    spent = seconds(story)
    whole = sum(spent.values())
    tokens = sum(line["tokens"] for line in story.metrics)
    costs = {
        "tokens sampled": f"{tokens:,}",
        "sampling speed": f"{tokens / (spent['sampling'] or 1):,.0f} tokens/s",
        "memory of the process": _most(clocks, "rss_mib"),
        "memory of the card, peak": _most(clocks, "cuda_peak_mib"),
    }
    return {
        "times": [(name, duration(part), f"{part / (whole or 1):.0%}") for name, part in spent.items()],
        "whole_time": duration(whole),
        "costs": {name: value for name, value in costs.items() if value},
    }


def seconds(story: Story) -> dict[str, float]:
    """Seconds of a run by phase."""
    clocks = [line["clock"] for line in story.metrics]
    return {
        "sampling": sum(clock["rollout_s"] for clock in clocks),
        "waiting for rewards": sum(clock["reward_s"] for clock in clocks),
        "update": sum(clock["update_s"] for clock in clocks),
        "held-out scores": sum(line["clock"]["eval_s"] for line in story.evaluations),
    }


def _most(clocks: Sequence[Line], key: str) -> str:
    found = [clock[key] for clock in clocks if key in clock]
    return f"{max(found):,.0f} MiB" if found else ""


def duration(length: float) -> str:
    """Seconds as `1 h 02 min`, `3 min 04 s` or `5.6 s`."""
    minutes, rest = divmod(round(length), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{length:.1f} s"


def _settings(story: Story) -> dict[str, Any]:
    preset, found = reading.differences(story.settings)
    again = f"lite-trgrpo report {shlex.quote(str(story.folder))}"
    return {
        "against": f"the preset {preset}" if preset else "the defaults",
        "settings": [
            (name, reading.toml(theirs), reading.toml(ours))
            for name, (theirs, ours) in found.items()
            if name not in reading.RESOLVED
        ],
        "command": reading.command(story),
        "versions": {"machine": story.facts.get("device", "?"), **story.facts.get("versions", {})},
        "footer": f"Written by lite-trgrpo {__version__} from the files in {story.folder}; again with: {again}",
    }
