"""A run's adapter as others load it: plain PEFT, merged weights, GGUF; and the proof that it does what it did here.

Everything is written beside the place where it belongs and moved there once the check has passed: `RUN/export` is never
an export that does not work. The check loads each form in a fresh process (`probe.py`).
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lite_trgrpo.config.schema import Config
from lite_trgrpo.errors import ExportError
from lite_trgrpo.evaluate import paired_gain, wilson
from lite_trgrpo.export import gguf, merge
from lite_trgrpo.export.verify import Answers, ask, of_rows
from lite_trgrpo.model.weights import Located, gguf_behind, locate, stored_quantization
from lite_trgrpo.store import checkpoint
from lite_trgrpo.store.resuming import changed_files, differences
from lite_trgrpo.store.run import Run
from lite_trgrpo.text import quoted, sha256

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
    """The report of an export that holds what is wanted of this adapter, untouched since it passed; else None.

    Raises ExportError where the adapter is not the run's own.
    """
    folder = folder_of(run)
    try:
        report = json.loads((folder / "check.json").read_text(encoding="utf-8"))
        of_the_end(run)
        forms = [name for name in ("merged", "gguf") if name in report["forms"]]
        same = forms == [name for name, on in (("merged", wanted.merged), ("gguf", wanted.gguf)) if on]
        same = same and (wanted.gguf is None or gguf_name(run, wanted.gguf) in report["files"])
        same = same and report["files"][WEIGHTS] == sha256(run.adapter / WEIGHTS)
        return report if same and all(sha256(folder / name) == mark for name, mark in report["files"].items()) else None
    except (OSError, ValueError, KeyError):
        return None


def export(run: Run, config: Config, wanted: Wanted, say: Callable[[str], None]) -> Report:
    """Write `RUN/export` and prove it. Raises ExportError where a form does not do what the run's adapter does."""
    if wanted.gguf:
        gguf.check(wanted.gguf)
    if not (run.adapter / WEIGHTS).is_file():
        raise ExportError(
            f"{run.folder} has no adapter yet; finish it with: lite-trgrpo train --resume {quoted(run.folder)}"
        )
    state = of_the_end(run)
    located = locate(config.model)
    if (wanted.merged or wanted.gguf) and (stored := stored_quantization(located.folder)):
        raise ExportError(
            f"{config.model.name} is already quantised ({stored}), so it has no merged weights and no GGUF: export "
            "without --merge and --gguf, or train on the unquantised model"
        )
    part = run.folder / ".export-part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        write_adapter(run, located, part)
        _write_forms(run, config, located, wanted, part, say)
    except OSError as error:
        raise ExportError(f"cannot write into {part}: {error.strerror}; make room, or change its rights") from None
    except KeyboardInterrupt:
        shutil.rmtree(part, ignore_errors=True)
        raise
    try:
        report = check(run, config, state, located, part, wanted, say)
    except KeyboardInterrupt:
        shutil.rmtree(part, ignore_errors=True)
        raise
    except ExportError as error:
        raise ExportError(f"{error}. Nothing was exported; what failed is in {part}") from None
    if not wanted.merged:  # it was the way to the GGUF
        shutil.rmtree(part / "merged", ignore_errors=True)
    report["files"] = {
        path.relative_to(part).as_posix(): sha256(path) for path in sorted(part.rglob("*")) if path.is_file()
    }
    (part / "check.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    final = folder_of(run)
    shutil.rmtree(final, ignore_errors=True)
    part.replace(final)
    return report


def write_adapter(run: Run, located: Located, folder: Path) -> None:
    """Plain PEFT that names the unquantised base and its commit, and nothing of this machine."""
    (folder / "adapter_config.json").write_text(json.dumps(_settings(run, located), indent=2), encoding="utf-8")
    shutil.copyfile(run.adapter / WEIGHTS, folder / WEIGHTS)


def _settings(run: Run, located: Located) -> dict[str, Any]:
    """adapter_config.json of the export."""
    settings = merge.read_adapter(run.adapter).settings
    targets = sorted(settings["target_modules"])  # a set, whose order is chance
    return settings | {
        "base_model_name_or_path": located.upstream, "revision": located.revision, "target_modules": targets
    }  # fmt: skip


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


def of_the_end(run: Run) -> dict[str, Any]:
    """State of the run's newest checkpoint, which records the adapter; empty where there is none any more.

    Raises ExportError where the run has not ended, or its adapter is not the one that it wrote.
    """
    newest = checkpoint.newest(run.checkpoints)
    state = {} if newest is None else checkpoint.state_of(newest)
    if newest is not None and not (state["complete"] or "adapter" in state):
        raise ExportError(
            f"{run.folder} was cut off at step {state['step']}, later than its adapter; finish it with: "
            f"lite-trgrpo train --resume {quoted(run.folder)}"
        )
    for name, digest in state.get("adapter", {}).items():
        path = run.adapter / name
        if not path.is_file() or sha256(path) != digest:
            raise ExportError(
                f"{path} is not the file that the run wrote: {newest} records SHA-256 {digest:.16}... of it. Put it "
                f"back, or train on from the checkpoint: lite-trgrpo train --resume {quoted(run.folder)} --steps "
                f"{state['step'] + 1}"
            )
    return state


def check(
    run: Run, config: Config, state: Mapping[str, Any], located: Located, folder: Path, wanted: Wanted,
    say: Callable[[str], None],
) -> Report:  # fmt: skip
    """Every form in `folder` against what the run recorded; `state` is `of_the_end`'s. Raises ExportError at the first
    that fails.
    """
    _is_the_runs(run, located, folder)
    say("checking the adapter in a fresh process, with the quantisation of the training")
    if "limits" in state:  # decode in batches as large as then: others round otherwise
        config = config.changed("rollout", max_rows=state["limits"]["rows"])
    trained = ask(config.changed("model", adapter=str(folder)), "the exported adapter")
    elsewhere, as_recorded = _as_recorded(run, state, trained, say)
    base = _base(run, config, trained, elsewhere)
    if trained.ids == base.ids:
        raise ExportError(
            f"with the adapter all {len(base.ids)} held-out answers equal those of the base: it has no effect"
        )
    stored = stored_quantization(located.folder)
    report: Report = {
        "base": located.upstream, "revision": located.revision, "quantization": stored or config.model.quantization,
        "rows": len(base.ids), "held_out": config.eval.rows > 0, "forms": {},
        "trained": _scores(base, trained) | {"equal": as_recorded},
    }  # fmt: skip
    plain = config.changed("model", quantization="none")
    if config.model.quantization != "none" and not stored:
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


def _is_the_runs(run: Run, located: Located, folder: Path) -> None:
    """Raises ExportError where a setting of the adapter in `folder`, or a byte of its weights, is not the run's."""
    theirs = merge.read_adapter(folder).settings
    for key, value in _settings(run, located).items():
        if theirs.get(key) != value:
            raise ExportError(f"the exported adapter has {key} = {theirs.get(key)!r}, the run {value!r}")
    if sha256(folder / WEIGHTS) != sha256(run.adapter / WEIGHTS):
        raise ExportError(f"the tensors in the exported {WEIGHTS} are not the run's")


def _as_recorded(
    run: Run, state: Mapping[str, Any], answers: Answers, say: Callable[[str], None]
) -> tuple[list[str], int | None]:
    """Compare the answers with those that the run recorded at its end. -> what is not as in training; how many answers
    are equal, None where none are recorded. Raises ExportError.

    On the same machine and versions every token must be the same. On others rounding may turn an answer, so there the
    scores are compared: a paired difference whose 95 % interval lies below 0 is no rounding.
    """
    before, now = run.facts(), answers.facts
    if changed := changed_files(before, now, "base"):
        raise ExportError(f"the files of the base are not those of the training: {changed}. Put them back")
    if changed := changed_files(before, now, "rewards"):
        say(f"warning: the rewards have changed since the training, so scores may differ: {changed}")
    lines = [line for line in run.evaluations() if line["step"] == state.get("step", line["step"])]
    if not lines and "adapter" not in state:
        raise ExportError(
            f"{run.folder} has neither a checkpoint that records its adapter nor held-out answers of it, so nothing "
            f"tells whether this is the trained one. Put {run.checkpoints} back"
        )
    other = differences(before, now) + ([] if "processor" in before else ["run.json does not name the processor"])
    if not lines:
        return other, None
    then = of_rows(lines[-1]["rows"], [])
    if then.prompts != answers.prompts:
        raise ExportError(f"the held-out prompts are not those of {run.folder / 'eval.jsonl'}: put the data back")
    total = len(then.ids)
    equal = sum(a == b for a, b in zip(answers.ids, then.ids, strict=True))
    wrong = f"the exported adapter answers {total - equal} of {total} held-out prompts otherwise than the run recorded"
    if equal < total and not other:
        raise ExportError(f"{wrong}, with the same versions on the same processor: it is not what was trained")
    if equal < total:
        change = paired_gain(then.solved, answers.solved)
        if change["high"] < 0:
            raise ExportError(f"{wrong}, and its pass@1 changes by {change['value']:+.3f} ({'; '.join(other)})")
        say(f"{wrong}; pass@1 changes by {change['value']:+.3f}, within the error ({'; '.join(other)})")
    return other, equal


def _base(run: Run, config: Config, answers: Answers, elsewhere: list[str]) -> Answers:
    """The base as it was quantised in training: from the evaluation before the first step, or asked now."""
    lines = run.evaluations()
    if lines and lines[0]["step"] == 0 and config.model.adapter is None and not elsewhere:
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
