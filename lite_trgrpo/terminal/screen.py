"""Lines and tables on the terminal. Messages go to stderr: stdout is for data."""

import io
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import IO, Any, TextIO, cast

from rich import box
from rich.console import Console
from rich.file_proxy import FileProxy
from rich.table import Table
from rich.text import Text

from lite_trgrpo.text import plain


class _Stderr(io.TextIOBase):
    """sys.stderr as it is at the moment. A terminal that was closed is talked to in vain, not a reason to stop."""

    @property
    def file(self) -> TextIO:
        """Under what a live display has put over it, which writes here."""
        return cast(TextIO, sys.stderr.rich_proxied_file) if isinstance(sys.stderr, FileProxy) else sys.stderr

    @property
    def encoding(self) -> str:  # type: ignore[override]  # a plain attribute in io.TextIOBase
        return self.file.encoding

    def write(self, text: str) -> int:
        with suppress(OSError):
            self.file.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.file.flush()

    def isatty(self) -> bool:
        return self.file.isatty()

    def fileno(self) -> int:
        return self.file.fileno()


console = Console(file=cast(IO[str], _Stderr()), highlight=False)


def say(line: str) -> None:
    """Print a message on stderr; what is unprintable in it is escaped."""
    console.print(plain(line), markup=False, soft_wrap=True)


class Messages(logging.Handler):
    """Show what the library logs (logger `lite_trgrpo`) on the terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"warning: {record.getMessage()}" if record.levelno >= logging.WARNING else record.getMessage())


def step_line(metrics: Mapping[str, Any]) -> str:
    """The headline of a step. The loss is not in it: with one update a batch it says nothing about learning."""
    reward = metrics["reward_mean"]
    return (
        f"reward {'  -  ' if reward is None else f'{reward:5.3f}'}  solved {metrics['solved']:4.0%}  "
        f"signal {metrics['groups_with_signal']:4.0%}  truncated {metrics['truncated']:4.0%}  "
        f"length {metrics['length_mean']:5.1f}  {metrics['clock']['tokens_per_s']:6.0f} tokens/s{ungraded(metrics)}"
    )


def ungraded(metrics: Mapping[str, Any]) -> str:
    """`  7 not graded`, where a reward function did not get through."""
    count = sum(metrics.get(f"reward_{kind}", 0) for kind in ("timeouts", "crashes", "errors"))
    return f"  {count} not graded" if count else ""


def eval_line(line: Mapping[str, Any]) -> str:
    """`held out after step 50: pass@1 0.700 [0.633, 0.759]  pass@4 ...`"""
    scores = [
        f"{_score(name)} {_estimate(value)}"
        for name, value in line.items()
        if isinstance(value, Mapping) and "low" in value
    ]
    when = "before training" if line["step"] == 0 else f"after step {line['step']}"
    return (
        f"held out, {when}: {'  '.join(scores)}  truncated {line['truncated']:.0%}  "
        f"length {line['length_mean']:.1f}  ({len(line['rows'])} rows, {line['clock']['eval_s']:.0f} s)"
    )


def _score(name: str) -> str:
    """pass@1 is the greedy answer's, pass@k that of k sampled ones: the second may well be lower."""
    if name.startswith("pass@"):
        return "pass@1 (greedy)" if name == "pass@1" else f"{name} (any of {name[5:]} sampled)"
    return "gain in pass@k" if name == "gain_k" else name


def _estimate(value: Mapping[str, float]) -> str:
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def comparison(before: Mapping[str, Any], after: Mapping[str, Any], samples: int = 3) -> Iterator[Table]:
    """Before and after, as tables: the scores, then the same held-out prompts side by side."""
    scores = Table(title="held-out score (95 % interval)", title_justify="left")
    for column in ("", "before", "after"):
        scores.add_column(column)
    for name, value in after.items():
        if isinstance(value, Mapping) and "low" in value and name in before:
            scores.add_row(_score(name), _estimate(before[name]), _estimate(value))
    scores.add_row("truncated", f"{before['truncated']:.1%}", f"{after['truncated']:.1%}")
    for name, key in (("gain in pass@1", "gain"), ("gain in pass@k", "gain_k")):
        if key in after:
            scores.add_row(name, "", _estimate(after[key]))
    answers = Table(title="greedy answers", title_justify="left")
    for column in ("prompt", "gold", "before", "after"):
        answers.add_column(column, overflow="fold")
    for old, new in list(zip(before["rows"], after["rows"], strict=True))[:samples]:
        answers.add_row(
            *(Text(plain(str(text))) for text in (new["prompt"], new["answer"], old["greedy"], new["greedy"]))
        )
    yield answers
    yield scores  # last, where it stays on the screen


def score_table(result: Mapping[str, Any], model: str) -> Table:
    """One evaluation as a table. model: what was scored."""
    title = f"held-out score of {model}, {len(result['rows'])} rows (95 % interval)"
    table = Table(title=title, title_justify="left")
    table.add_column("measure")
    table.add_column("value")
    for name, value in result.items():
        if isinstance(value, Mapping) and "low" in value:
            table.add_row(_score(name), _estimate(value))
    table.add_row("truncated", f"{result['truncated']:.1%}")
    table.add_row("length (tokens)", f"{result['length_mean']:.1f}")
    return table


def export_table(report: Mapping[str, Any]) -> Table:
    """One row for each form that was loaded again: its score, its base's, and how far it is from the training."""
    table = Table(title=f"loaded again, {report['rows']} rows (95 % interval)", title_justify="left")
    for column in ("form", "base", "pass@1", "gain", "answers as in training", "mean |log-prob difference|"):
        table.add_column(column)
    exact = {"equal": None, "logprob_difference": 0.0, **report["trained"]}
    name = "adapter" + (f" on {report['quantization']}" if report["quantization"] != "none" else "")
    for form, scores in {name: exact, **report["forms"]}.items():
        table.add_row(
            form, *(_estimate(scores[key]) for key in ("base", "pass@1", "gain")),
            "not recorded" if scores["equal"] is None else f"{scores['equal']} of {report['rows']}",
            f"{scores['logprob_difference']:.4f}",
        )  # fmt: skip
    return table


def diagnosis_table(result: Mapping[str, Any]) -> Iterator[Table]:
    """Quartiles of token probability against the share of the gradient, a table for each reading of the weight."""
    for reading, quartiles in result["readings"].items():
        table = Table(title=f"weights = {reading}", title_justify="left")
        for column in (
            "p of the token",
            "share of tokens",
            "mean weight",
            "share of gradient norm",
            "cosine with total",
        ):
            table.add_column(column)
        for q in quartiles:
            table.add_row(
                f"{q['p_low']:.3f} - {q['p_high']:.3f}", f"{q['tokens']:.1%}", f"{q['weight']:.3f}",
                f"{q['norm_share']:.1%}", f"{q['cosine']:.3f}",
            )  # fmt: skip
        yield table


PARTS = {
    "weights": "base weights",
    "adapter": "adapter, gradients, optimizer",
    "cache": "sampling: keys and values",
    "rollout": "sampling: the rest",
    "update": "update: activations and logits",
    "overhead": "libraries, and what is freed but kept",
}


def memory_tables(plan: Mapping[str, Any]) -> Iterator[Table]:
    """`check.memory`'s result. Sampling and update take turns, so the larger of them is in the peak."""
    table = Table(title="memory", title_justify="left")
    table.add_column("part")
    table.add_column("MiB", justify="right")
    for part, size in plan["parts"].items():
        table.add_row(PARTS[part], f"{size / 2**20:,.0f}")
    table.add_row("peak", f"{plan['peak'] / 2**20:,.0f}", style="bold")
    table.add_row("there is", f"{plan['available'] / 2**20:,.0f}")
    table.caption, table.caption_justify = f"path: {plan['path']}", "left"
    yield table


def memory_line(plan: Mapping[str, Any]) -> str:
    """The plan in a sentence, with what to change."""
    taken = f"about {plan['peak'] / 2**30:.1f} of {plan['available'] / 2**30:.1f} GB, {plan['slots']} answers at a time"
    if plan["fits"]:
        return f"fits: {taken}"
    if plan["changes"] is None:
        return f"does not fit: {taken}; lower rollout.max_new_tokens or data.max_prompt_tokens, or take a smaller model"
    return f"does not fit: {taken}. It fits with {', '.join(plan['changes'])}"


def past_line(before: Mapping[str, Any]) -> str:
    """`check.past`'s result in a sentence."""
    hours = before["hours"]
    whole = f"{hours:.1f} hours" if hours >= 1 else f"{max(1, 60 * hours):.0f} min"
    step = f"{'at least ' * before['least']}{before['step_s']:.1f} s per step"
    return f"Estimate from {before['run']}: {step}, {whole} in total, peak {before['peak'] / 2**30:.1f} GB"


def comparison_table(objectives: Iterable[Mapping[str, Any]]) -> Table:
    """One row an objective, means over its seeds; in Markdown's borders, so that it can be pasted."""
    table = Table(title="held-out pass@1 and training, means over seeds", title_justify="left", box=box.MARKDOWN)
    columns = (
        "objective", "before", "after", "each seed", "gain over the first (95 %)", "grad norm", "its variance",
        "entropy", "KL to base", "mean weight", "minutes",
    )  # fmt: skip
    for column in columns:
        table.add_column(column)
    for one in objectives:
        table.add_row(
            one["objective"], f"{one['before']:.3f}", f"{sum(one['after']) / len(one['after']):.3f}",
            " ".join(f"{value:.3f}" for value in one["after"]), _estimate(one["over_first"]),
            f"{one['grad_norm_mean']:.3f}", f"{one['grad_norm_variance']:.4f}", f"{one['entropy']:.3f}",
            f"{one['kl_to_base']:.4f}", f"{one['weight_mean']:.3f}", f"{one['minutes']:.1f}",
        )  # fmt: skip
    return table


def show(tables: Iterable[Table]) -> None:
    """Results are data: they go to stdout, uncut where that is a file or a pipe."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    for table in tables:
        console.print(table)


def machine_tables(found: Mapping[str, Any]) -> Iterator[Table]:
    """`machine.machine`'s result: what there is, which fast paths are taken, problems with a fix for each."""
    system, card, backend = found["system"], found["card"], found["backend"]
    table = Table(title="machine", title_justify="left", show_header=False)
    table.add_row("system", f"{system['name']}, Python {system['python']}, {system['cores']} cores")
    table.add_row("memory", _of(system["memory_free"], system["memory"]))
    if card is not None:
        use = f"compute capability {card['capability']}" if card["usable"] else "torch cannot use it"
        more = f", {card['count']} of them" if (card["count"] or 1) > 1 else ""
        table.add_row("card", f"{card['name']}{more}, driver {card['driver'] or 'unknown'}, {use}")
        table.add_row("its memory", _of(card["memory_free"], card["memory"]))
    else:
        table.add_row("card", "none")
    table.add_row("versions", ", ".join(f"{name} {version}" for name, version in found["versions"].items()))
    table.add_row("backend", f"{backend['name']}: {backend['why']}")
    login = "logged in" if found["hub"]["login"] else "not logged in (`hf auth login`; public models need none)"
    table.add_row("Hub", login + (", HF_HUB_OFFLINE is set" if found["hub"]["offline"] else ""))
    table.add_row("free disk", ", ".join(f"{place} {size / 2**30:.0f} GB" for place, size in found["disk"].items()))
    yield table
    paths = Table(title="fast paths", title_justify="left")
    for column in ("path", "used", "why"):
        paths.add_column(column)
    for name, path in found["paths"].items():
        paths.add_row(name, "yes" if path["used"] else "no", path["why"])
    yield paths
    if found["problems"]:
        problems = Table(title="Problems", title_justify="left")
        for column in ("", "problem", "type or do"):
            problems.add_column(column, overflow="fold")
        for problem in found["problems"]:
            problems.add_row("blocking" if problem["fatal"] else "", Text(problem["what"]), Text(problem["fix"]))
        yield problems


def _of(free: int | None, total: int | None) -> str:
    return "unknown" if free is None or total is None else f"{free / 2**30:.1f} of {total / 2**30:.1f} GB free"
