"""Data and rewards without a model: right answers must get full marks, junk must get less."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lite_trgrpo import build
from lite_trgrpo.check import findings
from lite_trgrpo.check.findings import Finding, Report, first, known, line, mean, short
from lite_trgrpo.config.schema import Config
from lite_trgrpo.errors import RunError
from lite_trgrpo.records import Completion, Example, Group, Prompt
from lite_trgrpo.rewards import Scorer, gold

ROWS = 16  # on which the rewards are tried
LETTERS = 4  # of a token, roughly: no tokenizer has been loaded yet
LONGEST = 20_000  # characters of junk
FEW = 3  # rows that are tried first
OTHERS = 6  # wrong answers among many at once
NEARLY_ALL, SOME = 0.9, 0.1  # shares
SHOWN = 5  # rows named in one message
COMPARING = ("number", "math", "exact", "reasoning-gym", "knights-and-knaves")
"""Built-in rewards that compare with a gold answer, and give None where they cannot read it."""
CONSTANT, LONG = "constant reward", "a very long answer"
FILLER = "Let us look at this once more. There is something to be said for it, and something against it as well. "


def before_training(
    examples: Sequence[Example], heldout: Sequence[Example], scorer: Scorer, config: Config
) -> list[str]:
    """The short form before every run, without a model: -> warnings, a line each.

    Raises RunError where nothing can be learned, or a gold answer cannot be graded.
    """
    reports = without_model(examples, heldout, scorer, config).values()
    if broken := [finding for report in reports for finding in report.broken]:
        reasons = "\n".join(f"{finding.problem}: {finding.text}" for finding in broken)
        raise RunError(f"{reasons}\nTo train anyway: --set train.preflight=false")
    return [f"warning: {finding.problem}: {finding.text}" for report in reports for finding in report.findings]


def without_model(
    examples: Sequence[Example], heldout: Sequence[Example], scorer: Scorer, config: Config
) -> dict[str, Report]:
    """-> "data", "rewards" and, where the rewards work at all, "golds"."""
    reports = {"data": of_data(examples, len(heldout), config), "rewards": of_rewards(examples, scorer, config)}
    if not reports["rewards"].broken:
        reports["golds"] = of_golds([*examples, *heldout], scorer, config)
    return reports


# -- data ---------------------------------------------------------------------------------------------------


def of_data(examples: Sequence[Example], heldout: int, config: Config) -> Report:
    """Whether the training rows are questions with answers of their own. All of them are looked at."""
    answers: dict[str, set[str]] = {}
    for example in examples:
        answers.setdefault(example.text, set()).add(str(example.columns.get("answer")))
    rows, prompts = len(examples), len(answers)
    torn = sum(len(answers[example.text]) > 1 for example in examples)
    found = []
    if torn > SOME * rows:
        found.append(Finding(
            "one prompt, several answers",
            f"{torn} of {rows} rows share their prompt with rows that have another answer, e.g. "
            f"{short(next(text for text, golds in answers.items() if len(golds) > 1))}: set data.prompt = "
            f"{config.data.prompt!r} to the column with the whole question",
            stops=torn > rows / 2,
        ))  # fmt: skip
    elif prompts < NEARLY_ALL * rows:
        text = f"{rows} rows hold only {prompts} different prompts, so some are trained on more often than others"
        found.append(Finding("repeated prompts", text, stops=False))
    golds = {gold.final(example.columns.get("answer")) for example in examples}
    if config.data.answer and rows >= ROWS and len(golds) == 1:
        found.append(Finding(
            "one answer for all",
            f"the answer to every prompt is {short(min(golds))}: set data.answer = {config.data.answer!r} to the "
            "column with the answers; else the model learns to say this",
            stops=False,
        ))  # fmt: skip
    if heldout < config.eval.rows and not (config.data.eval_source or config.data.eval_split):
        found.append(Finding(
            "few rows",
            f"eval.rows = {config.eval.rows}, but there are only {prompts + heldout} prompts, so half of them are held "
            "out: lower eval.rows to train on more, or name other rows to score in data.eval_source",
            stops=False,
        ))  # fmt: skip
    return Report({"rows": rows, "prompts": prompts}, found)


def of_golds(examples: Sequence[Example], scorer: Scorer, config: Config) -> Report:
    """Every gold answer must be one that the built-in rewards can grade; they say None to any answer where it is not.

    Functions of a person's own are left out: None may be their verdict on an empty answer.
    """
    names = [name for name in config.rewards.functions if name in COMPARING]
    if not (names and config.data.answer):
        return Report({"golds": 0}, [])
    texts = [[""]] * len(examples)
    if len(names) == len(config.rewards.functions):
        groups = _scored(examples, texts, scorer)
    else:
        options = {name: value for name, value in config.rewards.options.items() if name in names}
        functions = {"functions": dict.fromkeys(names, 1.0), "options": options, "solved_by": None}
        with build.scoring_of(config.changed("rewards", **functions)) as alone:
            groups = _scored(examples, texts, alone)
    found = []
    for name in names:
        bad = [group.example for group in groups if math.isnan(group.parts[name][0])]
        if bad:
            shown = "; ".join(f"{row.origin}: {short(row.columns.get('answer'), 40)}" for row in bad[:SHOWN])
            found.append(Finding(
                "gold answers cannot be graded",
                f"'{name}' cannot grade {len(bad)} of {len(examples)} gold answers: {shown}"
                f"{', ...' * (len(bad) > SHOWN)}. Correct or remove these rows, or take another reward in "
                "rewards.functions",
            ))  # fmt: skip
    return Report({"golds": len(examples)}, found)


# -- rewards, without a model -------------------------------------------------------------------------------


def of_rewards(examples: Sequence[Example], scorer: Scorer, config: Config) -> Report:
    """Right answers must get full marks and junk less, on a few training rows.

    Where `data.answer` is '' no right answer is known, so there is nothing to compare with.
    """
    if not config.data.answer:
        return Report({"rows": 0}, [])
    rows = random.Random(config.data.seed).sample(list(examples), min(ROWS, len(examples)))
    forms = [gold.asked(row.text) for row in rows]
    written = [_right(row, form) for row, form in zip(rows, forms, strict=True)]
    right = _scored(rows[:FEW], written[:FEW], scorer)  # a function that hangs on everything is not tried on all
    if (failing := _failing(right, "gold answers")) is not None and failing.stops:
        return Report({"rows": 0}, [failing])
    right += _scored(rows[FEW:], written[FEW:], scorer)
    failing = _failing(right, "gold answers")
    accepted = [_best(group, config) >= config.rewards.solved_at for group in right]
    facts: dict[str, Any] = {
        "rows": len(rows),
        "form": forms[0],
        "accepted": sum(accepted),
        "gold": _right(rows[0], forms[0])[-1],
        "reward": mean(max(known(group.rewards), default=math.nan) for group in right),
    }
    good = [i for i, whole in enumerate(accepted) if whole]
    compared = good or list(range(len(rows)))
    facts["junk"], found = _of_junk([right[i] for i in compared], bool(good), scorer, config)
    if any(finding.problem == CONSTANT for finding in found):
        return Report(facts, found)
    if failing is not None:
        found.append(failing)
    elif len(good) <= len(rows) / 2:
        found.append(_why_refused(rows, right, scorer, config))
    elif len(good) < len(rows):
        odd = right[accepted.index(False)].example
        found.append(Finding(
            "some gold answers not accepted",
            f"{len(rows) - len(good)} of {len(rows)} gold answers do not get full marks, e.g. "
            f"{short(odd.columns.get('answer'))} ({odd.origin}): correct these rows",
            stops=False,
        ))  # fmt: skip
    return Report(facts, found)


def _right(example: Example, form: str | None) -> list[str]:
    """The gold answer as the prompt asks for it; where it asks for nothing, as it stands in the data or alone."""
    answer = example.columns.get("answer")
    return [str(answer), gold.final(answer)] if form is None else [gold.written(form, answer)]


def _scored(examples: Sequence[Example], texts: Sequence[Sequence[str]], scorer: Scorer) -> list[Group]:
    """Texts as if a model had written them. Their ids are only as many as there might be."""
    return scorer.score([
        Group(example, Prompt((), ""), [_completion(text) for text in written])
        for example, written in zip(examples, texts, strict=True)
    ])  # fmt: skip


def _completion(text: str) -> Completion:
    tokens = max(1, len(text) // LETTERS)
    return Completion((0,) * tokens, (True,) * tokens, (0.0,) * tokens, text, True)


def _failing(groups: Sequence[Group], what: str) -> Finding | None:
    """A function that does not get through more than a few of these answers; it stops where it gets through none."""
    answers = sum(len(group.completions) for group in groups)
    for name in groups[0].parts:
        kinds = [kind for group in groups for kind in group.failures.get(name, {}).values()]
        if len(kinds) > SOME * answers:
            does = {"timeout": "takes too long", "crash": "ends its process"}.get(kinds[0], "raises an error")
            text = f"'{name}' {does} on {len(kinds)} of {answers} {what}: correct the function, which must "
            return Finding("the reward fails", f"{text}return a number for any text", len(kinds) == answers)
    return None


def _best(group: Group, config: Config) -> float:
    return max(known(first(group)), default=-math.inf)


def _why_refused(rows: Sequence[Example], right: Sequence[Group], scorer: Scorer, config: Config) -> Finding:
    """The gold answers of most rows do not get full marks: the likeliest reason first."""
    name, wanted = next(iter(config.rewards.functions)), config.rewards.solved_at
    answer = f"data.answer = {config.data.answer!r}"
    example = f"{short(rows[0].columns.get('answer'))} ({rows[0].origin})"
    if (other := _other_column(right, scorer, config)) is not None:
        text = f"{answer}: '{name}' gives these no full marks, e.g. {example}, but those of the column '{other}'. If "
        return Finding("wrong answer column", f"{text}that holds the answers set data.answer = {other!r}")
    form = gold.asked(rows[0].text)
    if (other := _other_form(rows, form, scorer, config)) is not None:
        asks = "names no form" if form is None else f"asks for {line(form)}"
        text = (
            f"the prompt {asks}, but '{name}' gives full marks to {line(other)}: ask for that in data.system, or take "
        )
        return Finding("prompt and reward disagree on the form", f"{text}another reward in rewards.functions")
    values = known(value for group in right for value in first(group))
    if not values:
        text = (
            f"'{name}' cannot compare anything with the gold answers, e.g. {example}: write them as it reads them, set "
        )
        return Finding("gold answers cannot be read", f"{text}{answer} to another column, or take another reward")
    text = f"'{name}' gives {max(values):g} at most to the gold answers, e.g. {example}, but full marks are "
    text += f"rewards.solved_at = {wanted:g}: "
    if ":" in name:  # a person's own function may want a form that is not among ours
        text += f"look at the function and at {answer}, unless right answers are written in another way"
        return Finding("gold answers not accepted", text, stops=False)
    advice = f"set it to {max(values):g}" if max(values) > 0 else "name the function that reads the answer first"
    return Finding("gold answers not accepted", text + advice)


def _other_form(rows: Sequence[Example], form: str | None, scorer: Scorer, config: Config) -> str | None:
    """A form in which gold answers get full marks, if they do not in the form that the prompt asks for."""
    for tried in gold.FORMS:
        texts = [[gold.written(tried, row.columns.get("answer"))] for row in rows]
        if tried != form and _solves(_scored(rows, texts, scorer), config):
            return tried
    return None


def _solves(groups: Sequence[Group], config: Config) -> bool:
    return sum(_best(group, config) >= config.rewards.solved_at for group in groups) > len(groups) / 2


def _other_column(groups: Sequence[Group], scorer: Scorer, config: Config) -> str | None:
    """A column that gets full marks for itself where `data.answer` does not."""
    for name in findings.other_columns(groups[0].example, config):
        rows = [findings.answered_by(group.example, name) for group in groups]
        if _solves(_scored(rows, [_right(row, gold.asked(row.text)) for row in rows], scorer), config):
            return name
    return None


# -- junk ---------------------------------------------------------------------------------------------------


def _junk(example: Example, form: str | None, others: Sequence[str], tokens: int) -> dict[str, str]:
    """Answers that deserve nothing, by kind. `others`: gold answers of other rows; `tokens`: the longest answer."""
    own = gold.final(example.columns.get("answer"))
    wrong = [other for other in dict.fromkeys(others) if other != own]
    prompt = example.prompt if isinstance(example.prompt, str) else example.prompt[-1]["content"]
    length = min(LONGEST, LETTERS * tokens)
    junk = {
        "an empty answer": "",
        LONG: (FILLER * (length // len(FILLER) + 1))[:length],
        "one word again and again": "yes " * min(200, max(1, length // LETTERS)),
        "the prompt itself": prompt,
    }
    if wrong:
        middle = len(wrong) // 2
        guesses = [*wrong[:middle], own, *wrong[middle:]]
        inner = form or gold.BARE
        listed = "\n".join(guesses) if "<" in inner else "\n".join(gold.written(inner, guess) for guess in guesses)
        junk["many answers at once"] = inner.replace("ANSWER", listed) if "<" in inner else listed
    return junk


def _of_junk(
    right: Sequence[Group], accepted: bool, scorer: Scorer, config: Config
) -> tuple[dict[str, Any], list[Finding]]:
    """-> by kind of junk its mean reward and in how many rows it is worth as much as the gold answer; what is wrong.

    Where gold answers were not accepted, junk has to get more than them to be held against the reward.
    """
    rows = [group.example for group in right]
    golds = [gold.final(row.columns.get("answer")) for row in rows]
    kinds = [
        _junk(row, gold.asked(row.text), golds[i + 1 :][:OTHERS] + golds[: max(0, i + 1 + OTHERS - len(rows))],
              config.rollout.max_new_tokens)
        for i, row in enumerate(rows)
    ]  # fmt: skip
    scored = _scored(rows[:FEW], [list(junk.values()) for junk in kinds[:FEW]], scorer)
    if (failing := _failing(scored, "answers that are junk")) is not None:
        return {}, [replace(failing, stops=False)]
    scored += _scored(rows[FEW:], [list(junk.values()) for junk in kinds[FEW:]], scorer)
    facts: dict[str, Any] = {}
    for kind in dict.fromkeys(kind for junk in kinds for kind in junk):
        got = [
            (group.rewards[list(junk).index(kind)], max(known(whole.rewards), default=math.nan))
            for group, whole, junk in zip(scored, right, kinds, strict=True)
            if kind in junk
        ]
        as_good = sum(value >= most if accepted else value > most for value, most in got)
        facts[kind] = {"reward": mean(value for value, _ in got), "rows": len(got), "as_good_as_gold": as_good}
    values = {value for group in (*scored, *right) for value in known(group.rewards)}
    return facts, _why_junk(facts, values, config)


def _why_junk(facts: Mapping[str, Any], values: set[float], config: Config) -> list[Finding]:
    names = findings.names(config)
    if len(values) == 1 and (value := min(values)) > 0:
        return [Finding(CONSTANT, f"{names} gives {value:g} to everything, empty answers and gold ones alike, so "
                        "nothing can be learned: fix the function, or name another in rewards.functions")]  # fmt: skip
    found = []
    for kind, fact in facts.items():
        share = fact["as_good_as_gold"] / fact["rows"]
        if share <= SOME or fact["reward"] is None:
            continue
        long = kind == LONG
        found.append(Finding(
            "length is rewarded" if long else "junk is rewarded",
            f"{kind} gets {fact['reward']:.2f} on average from {names}, in {fact['as_good_as_gold']} of {fact['rows']} "
            "rows no less than the gold answer, and a model will find that out: fix the function, or name another in "
            "rewards.functions" + (", or set rewards.truncated_max_zero = true" if long else ""),
            stops=share >= NEARLY_ALL,
        ))  # fmt: skip
    return found
