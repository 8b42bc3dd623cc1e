"""The reports as lines for a person."""

from collections.abc import Iterator, Mapping
from typing import Any

from lite_trgrpo.check.findings import line


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """`survey.look`'s result. Model text is in it: to be made harmless before it is printed."""
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
