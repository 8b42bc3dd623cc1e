"""The rewards section of `lite-trgrpo check`: data and rewards first, then, if they hold, samples of the base."""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lite_trgrpo import build
from lite_trgrpo.check import rewards, samples
from lite_trgrpo.check.findings import line
from lite_trgrpo.config.schema import Config
from lite_trgrpo.data import difficulty
from lite_trgrpo.data.examples import batch, load_examples
from lite_trgrpo.errors import RunError
from lite_trgrpo.model.policy import Policy, sample_groups
from lite_trgrpo.records import Group, Sampling
from lite_trgrpo.rewards import Scorer
from lite_trgrpo.training.state import Encoded

PROMPTS, MEMBERS = 8, 8  # of the sample; a group is no larger than in training
STREAM = 3  # stream of random numbers, beside the trainer's and chat's


def check_learnable(config: Config, scanned: int = 0, file: Path | None = None) -> dict[str, Any]:
    """Try everything that decides whether a run can learn.

    scanned, file: also measure how often the base solves so many training prompts, and keep that.
    -> {"data", "rewards", "samples": a report's facts and findings each, "heldout": rows, "prompt": the first as the
    model reads it, "scan": `scan.summary`'s, "seconds", "works"}; what comes after a report that is broken is missing.
    """
    started = time.perf_counter()
    if scanned:
        config = config.changed("data", scan=None)
    found: dict[str, Any] = {}
    with build.scoring_of(config) as scoring:
        examples, heldout = load_examples(config.data, config.eval.rows)
        found["heldout"] = len(heldout)
        reports = rewards.without_model(examples, heldout, scoring, config)
        if not any(report.broken for report in reports.values()):
            config, policy, training = build.ready(config, examples)
            found["prompt"] = training[0][1].text
            if scanned:
                path = file or difficulty.default_file(config.data.source)
                groups = list(_scanned(config, policy, training, scoring, scanned, path))
                rates = difficulty.read(path)
                found["scan"] = {"file": str(path), **difficulty.summary(rates, [example for example, _ in training])}
            else:
                groups = list(_groups(config, policy, _some(config, training, PROMPTS), scoring))
            ends = policy.template.tokenizer.added_tokens_decoder.items()
            running_on = {i: str(token) for i, token in ends if token.special and i not in policy.end_ids}
            if groups:
                reports["samples"] = samples.of_samples(groups, scoring, config, running_on)
    found |= {name: report.as_dict() for name, report in reports.items()}
    works = not any(report.broken for report in reports.values())
    return {**found, "seconds": time.perf_counter() - started, "works": works}


def _some(config: Config, training: Encoded, count: int) -> Encoded:
    """Training prompts in an order of their own: more of them are the same and some others."""
    return [training[i] for i in batch(len(training), min(count, len(training)), config.data.seed, 0)]


def _groups(config: Config, policy: Policy, pairs: Encoded, scorer: Scorer) -> Iterator[Group]:
    """Answers as in training, scored, group by group."""
    rollout = config.rollout
    sampling = Sampling(
        min(MEMBERS, rollout.group_size), rollout.max_new_tokens, rollout.temperature,
        key=(config.train.seed, STREAM), **rollout.decoding(),
    )  # fmt: skip
    for p, completions in sample_groups(policy, [prompt for _, prompt in pairs], sampling):
        yield from scorer.score([Group(*pairs[p], completions)])


def _scanned(
    config: Config, policy: Policy, training: Encoded, scorer: Scorer, count: int, path: Path
) -> Sequence[Group]:
    """Add what is not in the file yet, each prompt as soon as it is known: a scan can be stopped and goes on."""
    model = config.model.adapter or config.model.name
    known = difficulty.read(path, model) if path.exists() else {}
    left = [pair for pair in _some(config, training, count) if difficulty.key(pair[0]) not in known]
    shown: list[Group] = []
    try:
        with path.open("r+b" if path.exists() else "wb") as file:
            file.truncate(len(difficulty.whole(path)))
            file.seek(0, 2)
            for group in _groups(config, policy, left, scorer):
                solved, tried = sum(group.solved(config.rewards.solved_at)), group.graded()
                file.write(difficulty.line(group.example, solved, tried, model).encode())
                file.flush()
                shown += [group] if len(shown) < PROMPTS else []
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}; give another --scan-file") from None
    return shown


# -- as text ------------------------------------------------------------------------------------------------


def report_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """The result of `check_learnable` as lines. They hold model text: clean them before you print them."""
    if "prompt" in result:
        yield f"the first prompt as the model reads it:\n{result['prompt']}"
    data, rewards, samples = result["data"], result["rewards"], result.get("samples")
    yield f"data     {data['rows']} training rows, {data['prompts']} different prompts; {result['heldout']} held out"
    if rewards["rows"]:
        yield f"gold     {rewards['accepted']} of {rewards['rows']} accepted, written as {rewards['gold']!r:.60}"
        junk = [f"{kind} {_number(fact['reward'])}" for kind, fact in rewards["junk"].items()]
        yield f"junk     {', '.join(junk) or 'not graded'}"
    if samples is not None:
        yield (
            f"base     {samples['answers']} answers to {samples['prompts']} prompts: solved {samples['solved']:.1%}, "
            f"groups with signal {samples['groups_with_signal']:.0%}, truncated {samples['truncated']:.0%}, reward "
            f"{_number(samples['reward_mean'])}, length {samples['length_mean']:.1f}"
        )
        for asked, said in samples["examples"]:
            yield f"         {asked} -> {said}"
        if samples["format_failures"]:
            yield (
                f"form     {samples['format_failures']} of {samples['answers']} answers are not in the form "
                f"{line(samples['form'])}, e.g. {' '.join(samples['format_examples'])}"
            )
    if "scan" in result:
        yield _scan(result["scan"])
    for report in (data, rewards, samples or {"findings": []}):
        for finding in report["findings"]:
            yield f"{'STOP' if finding['stops'] else 'warning':8} {finding['problem']}: {finding['text']}"
    if result["works"]:
        yield f"ok       No problems found ({result['seconds']:.0f} s)"


def _scan(found: Mapping[str, Any]) -> str:
    line = (
        f"scan     {found['scanned']} prompts, solved {found['solved']:.1%}: {found['never']} never, {found['always']} "
        f"always, {found['teaching']} between 10 % and 90 %"
    )
    return f"{line}; train on these with: --set data.scan={found['file']}" if found["teaching"] else line


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
