"""Judge sampled answers of the base: is there something to learn from, and if not, why?"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, mode
from typing import Any

from lite_trgrpo.check import findings
from lite_trgrpo.check.findings import Finding, Report, first, known, line, mean, short
from lite_trgrpo.config.schema import Config
from lite_trgrpo.records import Group
from lite_trgrpo.rewards import Scorer, gold

NEARLY_ALL, HALF = 0.9, 0.5  # shares
SHOWN = 3  # answers quoted
TINY = 0.05  # rewards that differ by less are as good as equal
CHANCE = 2  # answers that may be right by another column without meaning anything


def of_samples(groups: Sequence[Group], scorer: Scorer, config: Config, not_ending: Mapping[int, str]) -> Report:
    """Report on scored answers to training prompts. `not_ending`: special tokens that do not end an answer, by id."""
    answers = [completion for group in groups for completion in group.completions]
    failed = [text for group in groups for text in _without_form(group)]
    cut = [completion for completion in answers if not completion.stopped]
    passed = [found for completion in cut for found in [i for i in completion.ids if i in not_ending][:1]]
    facts = {
        "prompts": len(groups),
        "answers": len(answers),
        "solved": fmean(value >= config.rewards.solved_at for group in groups for value in first(group)),
        "groups_with_signal": fmean(len(set(known(group.rewards))) > 1 for group in groups),
        "truncated": len(cut) / len(answers),
        "reward_mean": mean(value for group in groups for value in group.rewards),
        "length_mean": fmean(len(completion.ids) for completion in answers),
        "form": gold.asked(groups[0].example.text),
        "examples": [(short(g.example.text), short(g.completions[0].text)) for g in groups[:SHOWN]],
        "format_failures": len(failed),
        "format_examples": [short(text) for text in failed[:SHOWN]],
        "passed_over": not_ending[mode(passed)] if passed and len(passed) >= HALF * len(cut) else None,
    }
    return Report(facts, list(_why(facts, groups, scorer, config)))


def _without_form(group: Group) -> list[str]:
    """Answers that are not in the form that the prompt asks for."""
    form = gold.asked(group.example.text)
    texts = [group.prompt.prefix + completion.text for completion in group.completions]
    return [] if form is None else [text for text in texts if not gold.follows(text, form)]


def _why(facts: Mapping[str, Any], groups: Sequence[Group], scorer: Scorer, config: Config) -> Iterator[Finding]:
    """Findings, blocking where no group has signal. What explains most comes first and hides what it explains."""
    dead, count = facts["groups_with_signal"] == 0, facts["answers"]
    if facts["truncated"] >= (NEARLY_ALL if dead else HALF):
        yield _cut_off(facts, dead, config)
        if dead:
            return
    if facts["solved"] >= NEARLY_ALL:
        text = f"{facts['solved']:.0%} of {count} answers are right already, so there is little to learn: take harder "
        yield Finding("already solved", text + "prompts in data.source, or a smaller base", dead)
    elif facts["solved"] == 0 and (other := _answered_elsewhere(groups, scorer, config)) is not None:
        text = f"no answer is right by data.answer = {config.data.answer!r}, but some are by the column '{other}': "
        yield Finding("wrong answer column", f"{text}set data.answer = {other!r}")
    elif facts["solved"] == 0 and facts["format_failures"] > NEARLY_ALL * count:
        yield Finding(
            "the base does not keep to the form",
            f"{facts['format_failures']} of {count} answers are not in the form {line(facts['form'])} that the prompt "
            f"asks for, e.g. {facts['format_examples'][0]}: show an example in data.system, or take a larger base",
            dead,
        )
    elif facts["solved"] < HALF and (labels := _unnamed_labels(groups, config)):
        yield Finding(
            "the labels are not named",
            f"there are only {len(labels)} different answers, and the prompt does not name them: set data.system = "
            f'"Answer with one of: {", ".join(labels)}. Write nothing else." and lower rollout.max_new_tokens',
            dead,
        )
    elif facts["solved"] == 0 and dead:
        yield Finding(
            "nothing is solved",
            f"none of {count} answers is right, and {findings.names(config)} gives all of them the same: take easier "
            "prompts or a larger base, or give part of the reward for part of the way in rewards.functions",
        )
    elif facts["solved"] == 0 and (spread := max(map(_spread, groups))) < TINY:
        yield Finding(
            "hardly any signal",
            f"none of {count} answers is right, and the rewards in a group differ by {spread:.2g} at most: take easier "
            "prompts or a larger base, or look at the reward",
            stops=False,
        )
    elif dead:
        yield Finding(
            "no group with signal",
            f"the answers to each of {len(groups)} prompts all get the same reward: raise rollout.group_size or "
            "rollout.temperature, or take prompts of medium difficulty (`lite-trgrpo check --scan 500`, data.scan)",
        )


def _unnamed_labels(groups: Sequence[Group], config: Config) -> list[str]:
    """The gold answers, where they are a few words among many prompts that do not name them and `exact` compares."""
    labels = sorted({gold.final(group.example.columns.get("answer")) for group in groups})
    named = all(label in group.example.text for group in groups for label in labels)
    return [] if named or config.rewards.decisive != "exact" or 2 * len(labels) > len(groups) else labels


def _spread(group: Group) -> float:
    values = known(group.rewards)
    return max(values, default=0.0) - min(values, default=0.0)


def _cut_off(facts: Mapping[str, Any], dead: bool, config: Config) -> Finding:
    token, cap = facts["passed_over"], config.rollout.max_new_tokens
    if token is not None:
        return Finding(
            "no token ends an answer",
            f"answers run on past {token} until the cap: the model ends its turns with it, but declares another end "
            "token. Set eos_token_id in its generation_config.json, or unset model.prompt_format",
            dead,
        )
    return Finding(
        "answers are truncated",
        f"{facts['truncated']:.0%} of {facts['answers']} answers were truncated at rollout.max_new_tokens = {cap}: "
        f"raise it, e.g. to {4 * cap}, or ask for short answers in data.system",
        dead,
    )


def _answered_elsewhere(groups: Sequence[Group], scorer: Scorer, config: Config) -> str | None:
    """Another column that answers are right by. What stands in the question is repeated by any base: no sign."""
    for name in findings.other_columns(groups[0].example, config):
        telling = [g for g in groups if str(g.example.columns.get(name)) not in g.example.text]
        scored = scorer.score([replace(g, example=findings.answered_by(g.example, name)) for g in telling])
        if sum(value >= config.rewards.solved_at for group in scored for value in first(group)) > CHANCE:
            return name
    return None
