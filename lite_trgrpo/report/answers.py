"""Answers on the page: before and after side by side, and one token by token."""

from collections.abc import Iterator

from lite_trgrpo.report import reading
from lite_trgrpo.report.html import Html, table, tag
from lite_trgrpo.report.reading import Answer, Line, Story

SHOWN, MOVED = 5, 4  # prompts: the first ones; of the most and least improved
LONGEST = 1500  # characters of an answer
SHADES = 8  # of the style sheet, for probabilities and weights
RAREST = 8  # tokens in the table


def pairs_of(story: Story) -> Iterator[Html]:
    if len(story.evaluations) < 2:
        return
    found = reading.gains(story)
    unseen = found[SHOWN:] + found[:SHOWN]  # among equals, what is not on the page yet
    better = [one for one in sorted(unseen, key=lambda one: -one[0]) if one[0] > 0][:MOVED]
    worse = [one for one in sorted(unseen, key=lambda one: one[0]) if one[0] < 0][:MOVED]
    counts = [sum(one[0] > 0 for one in found), sum(one[0] < 0 for one in found)]
    samples = story.settings["eval"]["samples"]
    for title, note, rows in (
        ("Before and after", "The first held-out prompts, greedy answers.", found[:SHOWN]),
        ("Most improved", f"{counts[0]} of {len(found)} prompts are answered better than before.", better),
        ("Least improved", f"{counts[1]} of {len(found)} prompts are answered worse than before.", worse),
    ):
        cards = [_pair(old, new, samples) for _, old, new in rows]
        yield tag("section", tag("h2", title), tag("p", note), *cards)


def _pair(old: Line, new: Line, samples: int) -> Html:
    sides = [
        tag("div", tag("h4", f"{'✓' if row['solved'] else '✗'} {when}{_sampled(row, samples)}"),
            tag("pre", _cut(row["greedy"])), class_=f"side {'good' if row['solved'] else 'bad'}")
        for when, row in (("before", old), ("after", new))
    ]  # fmt: skip
    asked = tag("pre", _cut(new["prompt"]), class_="prompt")
    gold = [] if new["answer"] is None else [tag("p", "gold: ", tag("b", _cut(new["answer"])))]
    return tag("article", asked, *gold, tag("div", *sides, class_="sides"))


def _sampled(row: Line, samples: int) -> str:
    return f", {row['samples_solved']} of {samples} sampled" if "samples_solved" in row else ""


def _cut(text: object) -> str:
    whole = str(text)
    return whole if len(whole) <= LONGEST else f"{whole[:LONGEST]} … ({len(whole) - LONGEST} more characters)"


def tokens(answer: Answer) -> Html:
    """The same tokens twice: shaded by probability, then by weight. A table too, for who cannot hover."""
    reward = "not graded" if answer.reward is None else f"reward {answer.reward:.3g}"
    rarest = sorted(answer.tokens, key=lambda one: one[1])[:RAREST]
    rows = [(tag("code", repr(piece)), f"{p:.4f}", f"{weight:.3f}") for piece, p, weight in rarest]
    return tag(
        "section", tag("h2", "Token by token"),
        tag("p", f"An answer of step {answer.step}, {reward}."), tag("pre", _cut(answer.prompt), class_="prompt"),
        tag("p", "The stronger the shade, the less likely the token was when it was sampled:"),
        tag("pre", *(_token(one, 1 - one[1]) for one in answer.tokens), class_="tokens"),
        *_weighted(answer), tag("p", "The unlikeliest:"), table(("token", "probability", "weight"), rows),
    )  # fmt: skip


def _weighted(answer: Answer) -> Iterator[Html]:
    weights = [weight for _, _, weight in answer.tokens]
    low, high = min(weights), max(weights)
    if low == high:
        yield tag("p", f"Every token has the same weight in the update, {low:.2f}.")
        return
    yield tag("p", f"The stronger the shade, the more weight in the update, from {low:.2f} to {high:.2f}:")
    yield tag("pre", *(_token(one, (one[2] - low) / (high - low)) for one in answer.tokens), class_="tokens")


def _token(token: tuple[str, float, float], strength: float) -> Html:
    shade = min(SHADES - 1, int(strength * SHADES))
    return tag("span", token[0], class_=f"s{shade}", title=f"p {token[1]:.4f}, weight {token[2]:.3f}")
