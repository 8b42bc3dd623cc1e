"""What happened in a run, what it took, and how to do it again."""

import shlex
from collections.abc import Sequence

from lite_trgrpo import __version__
from lite_trgrpo.report import reading
from lite_trgrpo.report.html import Html, pairs, table, tag
from lite_trgrpo.report.reading import Line, Story

EVENTS = 40


def events(story: Story) -> Html:
    found = list(reading.events(story))
    rows = [(step, tag("span", name, class_=f"guard {level}"), advice) for step, name, level, advice in found]
    if not rows:
        return tag("section", tag("h2", "Guards"), tag("p", "Every guard was ok."))
    more = [tag("p", f"... and {len(rows) - EVENTS} more")] if len(rows) > EVENTS else []
    return tag("section", tag("h2", "Guards"), table(("step", "guard", "what it means"), rows[:EVENTS]), *more)


def cost(story: Story) -> Html:
    clocks = [line["clock"] for line in story.metrics]
    spent = seconds(story)
    whole = sum(spent.values())
    rows = [(name, duration(part), f"{part / (whole or 1):.0%}") for name, part in spent.items()]
    tokens = sum(line["tokens"] for line in story.metrics)
    facts = {
        "tokens sampled": f"{tokens:,}",
        "sampling speed": f"{tokens / (spent['sampling'] or 1):,.0f} tokens/s",
        "memory of the process": _most(clocks, "rss_mib"),
        "memory of the card, peak": _most(clocks, "cuda_peak_mib"),
    }
    known = {name: value for name, value in facts.items() if value}
    timed = table(("", "time", "share"), [*rows, (tag("b", "all"), duration(whole), "")])
    return tag("section", tag("h2", "Time and memory"), timed, pairs(known))


def seconds(story: Story) -> dict[str, float]:
    """What the time of a run went into."""
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
    minutes, rest = divmod(round(length), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{length:.1f} s"


def settings(story: Story) -> Html:
    preset, found = reading.differences(story.settings)
    against = f"the preset {preset}" if preset else "the defaults"
    rows = [
        (tag("code", name), reading.toml(theirs), reading.toml(ours))
        for name, (theirs, ours) in found.items() if name not in reading.RESOLVED
    ]  # fmt: skip
    versions = {"machine": story.facts.get("device", "?"), **story.facts.get("versions", {})}
    return tag(
        "section", tag("h2", "Settings"),
        table(("option", against, "this run"), rows) if rows else tag("p", f"Those of {against}."),
        tag("h3", "The same run again"), tag("pre", reading.command(story), class_="command"), pairs(versions),
        tag("footer", f"Written by lite-trgrpo {__version__} from the files in {story.folder}; again "
            f"with: lite-trgrpo report {shlex.quote(str(story.folder))}"),
    )  # fmt: skip
