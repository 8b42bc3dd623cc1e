"""A run's adapter as others load it: plain PEFT, merged weights, GGUF; and the proof that it does what it did here.

Everything is written beside the place where it belongs and moved there once the check has passed: `RUN/export` is never
an export that does not work. The check loads each form in a fresh process (`probe.py`).
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lite_trgrpo.config.schema import Config
from lite_trgrpo.errors import ExportError
from lite_trgrpo.evaluate import paired_gain, wilson
from lite_trgrpo.export import gguf, merge
from lite_trgrpo.export.verify import Answers, ask, of_rows
from lite_trgrpo.model.weights import Located, gguf_behind, locate
from lite_trgrpo.store.run import Run

WEIGHTS = "adapter_model.safetensors"
KEPT = 0.5  # share of the trained gain that a form must keep where the gain is certain
Report = dict[str, Any]
"""check.json: the base, the number of rows, the scores of each form, and the SHA-256 of every file."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which forms, beside the adapter itself."""

    merged: bool = False
    gguf: str | None = None
    """A type of `gguf.TYPES`."""


def folder_of(run: Run) -> Path:
    return run.folder / "export"


def gguf_name(run: Run, kind: str) -> str:
    return f"{run.folder.resolve().name}-{kind.upper()}.gguf"


def existing(run: Run, wanted: Wanted) -> Report | None:
    """The report of an export that holds what is wanted of this adapter, untouched since it passed; else None."""
    folder = folder_of(run)
    try:
        report = json.loads((folder / "check.json").read_text(encoding="utf-8"))
        forms = [name for name in ("merged", "gguf") if name in report["forms"]]
        same = forms == [name for name, on in (("merged", wanted.merged), ("gguf", wanted.gguf)) if on]
        same = same and (wanted.gguf is None or gguf_name(run, wanted.gguf) in report["files"])
        same = same and report["files"][WEIGHTS] == _digest(run.adapter / WEIGHTS)
        return (
            report if same and all(_digest(folder / name) == mark for name, mark in report["files"].items()) else None
        )
    except (OSError, ValueError, KeyError):
        return None


def export(run: Run, config: Config, wanted: Wanted, say: Callable[[str], None]) -> Report:
    """Write `RUN/export` and prove it. Raises ExportError where a form does not do what the run's adapter does."""
    if wanted.gguf:
        gguf.check(wanted.gguf)
    if not (run.adapter / WEIGHTS).is_file():
        raise ExportError(f"{run.folder} has no adapter yet; finish it with: lite-trgrpo train --resume {run.folder}")
    located = locate(
        config.model.name, config.model.revision, sha256=config.model.sha256, upstream=config.model.upstream,
        remote_code=config.model.trust_remote_code,
    )  # fmt: skip
    part = run.folder / ".export-part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        write_adapter(run, located, part)
        _write_forms(run, config, located, wanted, part, say)
    except OSError as error:
        raise ExportError(f"cannot write into {part}: {error.strerror}; make room, or change its rights") from None
    try:
        report = check(run, config, located, part, wanted, say)
    except ExportError as error:
        raise ExportError(f"{error}. Nothing was exported; what failed is in {part}") from None
    if not wanted.merged:  # it was the way to the GGUF
        shutil.rmtree(part / "merged", ignore_errors=True)
    report["files"] = {
        path.relative_to(part).as_posix(): _digest(path) for path in sorted(part.rglob("*")) if path.is_file()
    }
    (part / "check.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    final = folder_of(run)
    shutil.rmtree(final, ignore_errors=True)
    part.replace(final)
    return report


def write_adapter(run: Run, located: Located, folder: Path) -> None:
    """Plain PEFT that names the unquantised base and its commit, and nothing of this machine."""
    adapter = merge.read_adapter(run.adapter)
    settings = adapter.settings | {"base_model_name_or_path": located.upstream, "revision": located.revision}
    settings["target_modules"] = sorted(settings["target_modules"])  # a set, whose order is chance
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    shutil.copyfile(run.adapter / WEIGHTS, folder / WEIGHTS)


def _write_forms(
    run: Run, config: Config, located: Located, wanted: Wanted, folder: Path, say: Callable[[str], None]
) -> None:
    if not (wanted.merged or wanted.gguf):
        return
    merged, started = folder / "merged", time.perf_counter()
    merge.merge(located.folder, merge.read_adapter(folder), merged)
    say(f"merged into 16 bits in {time.perf_counter() - started:.0f} s")
    if wanted.gguf:
        started = time.perf_counter()
        name = gguf_name(run, wanted.gguf)
        gguf.write(merged, folder / name, wanted.gguf)
        if (donor := gguf_behind(config.model.name)) is not None:
            gguf.take_tokenizer(donor, folder / name)
        facts = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))
        text = gguf.modelfile(name, merged, facts["end_ids"], config.model, config.data.system)
        (folder / "Modelfile").write_text(text, encoding="utf-8")
        say(f"{name} in {time.perf_counter() - started:.0f} s")


# -- the check ----------------------------------------------------------------------------------------------


def check(
    run: Run, config: Config, located: Located, folder: Path, wanted: Wanted, say: Callable[[str], None]
) -> Report:
    """Every form in `folder` against the run's adapter. Raises ExportError at the first that fails."""
    _same_names(merge.read_adapter(run.adapter), merge.read_adapter(folder), located)
    say("checking the adapter in a fresh process, with the quantisation of the training")
    trained = ask(config.changed("model", adapter=str(folder)), "the exported adapter")
    expected = _of_the_run(run, config, trained)
    differing = sum(a != b for a, b in zip(trained.ids, expected, strict=True))
    if differing:
        raise ExportError(
            f"the exported adapter answers {differing} of {len(expected)} held-out prompts otherwise than the run's"
        )
    base = _base(run, config, trained)
    if trained.ids == base.ids:
        raise ExportError(
            f"with the adapter all {len(base.ids)} held-out answers equal those of the base: it has no effect"
        )
    report: Report = {
        "base": located.upstream, "revision": located.revision, "quantization": config.model.quantization,
        "rows": len(base.ids), "held_out": config.eval.rows > 0, "trained": _scores(base, trained), "forms": {},
    }  # fmt: skip
    plain = config.changed("model", quantization="none")
    if config.model.quantization != "none":
        say("scoring base and adapter on unquantised weights")
        base = ask(plain.changed("model", adapter=None), "the unquantised base")
        loaded = ask(
            plain.changed("model", adapter=str(folder)), "the adapter on its unquantised base", tokens=trained.ids
        )
        report["forms"]["unquantised"] = _compared(base, loaded, trained)
        _keeps_the_gain("the adapter on its unquantised base", report, "unquantised")
    merged = plain.changed("model", name=str(folder / "merged"), revision=None, sha256=None, adapter=None)
    if wanted.merged:
        say("scoring the merged model")
        report["forms"]["merged"] = _compared(base, ask(merged, "the merged model", tokens=trained.ids), trained)
        _keeps_the_gain("the merged model", report, "merged")
    if wanted.gguf:
        name = gguf_name(run, wanted.gguf)
        say(f"scoring {name}")
        loaded = ask(merged, name, gguf=folder / name, tokens=trained.ids)
        report["forms"]["gguf"] = _compared(base, loaded, trained)
        _keeps_the_gain(name, report, "gguf")
    return report


def _same_names(ours: merge.Adapter, theirs: merge.Adapter, located: Located) -> None:
    """Raises ExportError where base, revision, settings, or a tensor's name or shape is not the run's."""
    wanted = {"base_model_name_or_path": located.upstream, "revision": located.revision}
    wanted |= {key: ours.settings.get(key) for key in ("r", "lora_alpha", "use_rslora", "use_dora", "peft_type")}
    for key, value in wanted.items():
        if (found := theirs.settings.get(key)) != value:
            raise ExportError(f"the exported adapter has {key} = {found!r}, the run {value!r}")
    targets = [sorted(adapter.settings["target_modules"]) for adapter in (ours, theirs)]
    if targets[0] != targets[1]:
        raise ExportError(f"the exported adapter names the modules {targets[1]}, the run's {targets[0]}")
    mine, others = ours.shapes(), theirs.shapes()
    if odd := sorted(name for name in mine.keys() | others.keys() if mine.get(name) != others.get(name)):
        raise ExportError(f"{len(odd)} tensors of the exported adapter are not the run's, {odd[0]} among them")


def _of_the_run(run: Run, config: Config, answers: Answers) -> list[list[int]]:
    """The run's own answers: those at its end, where this machine gives the same, else those of its adapter here."""
    recorded = [line["rows"] for line in run.evaluations()[-1:]]
    if recorded and [row["ids"] for row in recorded[0]] == answers.ids:
        return answers.ids
    return ask(config.changed("model", adapter=str(run.adapter)), "the run's adapter").ids


def _base(run: Run, config: Config, answers: Answers) -> Answers:
    """The base as it was quantised in training: from the evaluation before the first step, or asked now."""
    lines = run.evaluations()
    if lines and lines[0]["step"] == 0 and config.model.adapter is None:
        rows = lines[0]["rows"]
        if [row["prompt"] for row in rows] == answers.prompts:
            return of_rows(rows, [])
    return ask(config.changed("model", adapter=None), "the base")


def _scores(base: Answers, answers: Answers) -> Report:
    return {
        "base": wilson(base.solved), "pass@1": wilson(answers.solved), "gain": paired_gain(base.solved, answers.solved)
    }  # fmt: skip


def _compared(base: Answers, answers: Answers, trained: Answers) -> Report:
    """Scores, and the distance from the adapter as trained: on its answers' tokens, mean |difference| in nats."""
    pairs = [
        abs(a - b)
        for row, other in zip(answers.logprobs, trained.logprobs, strict=True)
        for a, b in zip(row, other, strict=True)
    ]
    equal = sum(a == b for a, b in zip(answers.ids, trained.ids, strict=True))
    return {**_scores(base, answers), "equal": equal, "logprob_difference": sum(pairs) / len(pairs)}


def _keeps_the_gain(what: str, report: Report, form: str) -> None:
    """Judged only where the trained gain is certain (its 95 % interval above 0): else there is none to lose."""
    trained, kept = report["trained"]["gain"], report["forms"][form]["gain"]["value"]
    if trained["low"] > 0 and kept < KEPT * trained["value"]:
        raise ExportError(
            f"{what} gains {kept:+.3f} in pass@1 over its base, where the run's adapter gains {trained['value']:+.3f}: "
            "the gain is lost"
        )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
