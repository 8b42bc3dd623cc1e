"""The model card of an exported run, written from what the run left: settings, scores, samples, how to load it."""

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lite_trgrpo.config import loading
from lite_trgrpo.config.loading import is_hub_id
from lite_trgrpo.config.schema import Config
from lite_trgrpo.store.run import Run

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

TAGS = ["lite-trgrpo", "tr-grpo", "grpo", "peft", "lora"]
SAMPLES = 5
SECRET = re.compile(
    r"\b(?:hf|sk|gh[a-z]|github_pat|glpat|xox[a-z])[-_][A-Za-z0-9_-]{16,}|\bAKIA[A-Z0-9]{16}\b|(?<=://)[^\s/]+(?=@)"
)
FORMS = {"unquantised": "adapter on the unquantised base", "merged": "merged weights (`merged/`)", "gguf": "GGUF"}


def write(
    run: Run, config: Config, report: Mapping[str, Any] | None, repo: str | None, files: Sequence[str], licence: str
) -> str:
    """The whole README.md. `report` is check.json's, None where nothing was exported yet."""
    from huggingface_hub import ModelCard

    facts = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))
    name = repo or f"USER/{run.folder.resolve().name}"
    base, lines, model, system = facts["base"], run.evaluations(), config.model, config.data.system
    linked = f"[{base}](https://huggingface.co/{base})" if is_hub_id(base) else base
    weights = config.objective.weights
    named = [f"`{_plain_name(key)}` (weight {value:g})" for key, value in config.rewards.functions.items()]
    variables = {
        "title": name.partition("/")[2], "name": name, "base": base, "base_link": linked, "licence": licence,
        "revision": facts["revision"], "at_revision": f', revision="{facts["revision"]}"' if facts["revision"] else "",
        "method": "TR-GRPO" if weights in ("offset", "centred") else "GRPO", "weights": weights,
        "weights_from": _plain_name(model.name) if model.name != base else "", "quantization": model.quantization,
        "source": _source(config), "prompts": facts["prompts"], "rewards": ", ".join(named),
        "scores": _scores(lines), "forms": _forms(report), "samples": _samples(lines), "curve": "curve.png" in files,
        "chat_template": model.prompt_format is None and not model.template_options,
        "system_message": f'{{"role": "system", "content": {_quoted(system)}}}, ' if system else "",
        "system": _cell(system) if system else "", "max_new_tokens": config.rollout.max_new_tokens,
        "vllm_rank": max(8, 2 ** math.ceil(math.log2(model.lora_rank))),  # vLLM serves LoRA at ranks of its own
        "chat_options": _chat_options(config, base), "merged": any(file.startswith("merged/") for file in files),
        "gguf": next((file for file in files if file.endswith(".gguf")), None), "settings": _settings(config),
        "device": facts["device"],
        "versions": ", ".join(f"{package} {version}" for package, version in facts["versions"].items()),
    }  # fmt: skip
    template = Path(__file__).with_name("card.md.j2").read_text(encoding="utf-8")
    card = ModelCard.from_template(_metadata(config, base, lines, name, licence), template_str=template, **variables)
    return _public(re.sub(r"\n{3,}", "\n\n", card.content).strip() + "\n")


def base_licence(config: Config, base: str) -> str | None:
    """Licence of the base as the presets state it; None where none of them has this base."""
    for name, path in loading.presets().items():
        model = loading.load(name).model
        if base in (model.name, model.upstream):
            return loading.head_comment(path)["licence"].lower()
    return None


def _metadata(
    config: Config, base: str, lines: Sequence[Mapping[str, Any]], name: str, licence: str
) -> "ModelCardData":
    from huggingface_hub import EvalResult, ModelCardData

    source = config.data.source
    called = source if is_hub_id(source) else _plain_name(source)
    results = [
        EvalResult(
            task_type="text-generation", dataset_type=source if is_hub_id(source) else "lite-trgrpo",
            dataset_name=called, metric_type=metric, metric_value=round(value["value"], 4),
            metric_name=f"held-out {metric}, {len(lines[-1]['rows'])} rows",
        )
        for metric, value in (lines[-1].items() if lines else ())
        if metric.startswith("pass@") and isinstance(value, Mapping)
    ]  # fmt: skip
    data = ModelCardData(
        base_model=base if is_hub_id(base) else None, license=licence if licence != "unknown" else None,
        library_name="peft", pipeline_tag="text-generation", tags=TAGS, model_name=name.partition("/")[2],
        datasets=[source] if is_hub_id(source) else None, eval_results=results or None,
    )  # fmt: skip
    if is_hub_id(base):
        data["base_model_relation"] = "adapter"
    return data


def _scores(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Held-out scores before and after; None where no rows were held out."""
    if not lines:
        return None
    before, after = lines[0], lines[-1]
    rows = [
        (metric, _estimate(before[metric]), _estimate(value))
        for metric, value in after.items()
        if metric.startswith("pass@") and isinstance(value, Mapping) and metric in before
    ]
    rows.append(("truncated answers", f"{before['truncated']:.1%}", f"{after['truncated']:.1%}"))
    if "gain" in after:
        rows.append(("gain in pass@1 (paired)", "", _estimate(after["gain"])))
    return {"count": len(after["rows"]), "rows": rows}


def _forms(report: Mapping[str, Any] | None) -> list[tuple[str, str, str, str]]:
    """Each exported form with its scores."""
    if report is None or "trained" not in report:
        return []
    trained = report["trained"]
    return [
        ("adapter, as in training", _estimate(trained["pass@1"]), _estimate(trained["base"]), "0"),
        *(
            (FORMS[form], _estimate(one["pass@1"]), _estimate(one["base"]), f"{one['logprob_difference']:.4f}")
            for form, one in report["forms"].items()
        ),
    ]


def _samples(lines: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    pairs = list(zip(lines[0]["rows"], lines[-1]["rows"], strict=False))[:SAMPLES] if lines else []
    return [
        [_cell(cell) for cell in (new["prompt"], new["answer"], old["greedy"], new["greedy"])] for old, new in pairs
    ]


def _quoted(text: str) -> str:
    """The text as a Python and TOML string, with nothing in it that could end a code block."""
    return json.dumps(_public(text), ensure_ascii=False).replace("`", "\\u0060")


def _chat_options(config: Config, base: str) -> str:
    """The options that `chat` needs: the run's own preset where there is one, else the base and what it was told."""
    for name in loading.presets():
        preset = loading.load(name)
        if (preset.model.name, preset.data) == (config.model.name, config.data):
            return f"--preset {name}"
    named = [f"--set model.name={base}", f"--set data.source={_plain_name(config.data.source)}"]
    if config.data.system:
        named.append(shlex.join(["--set", f"data.system={_quoted(config.data.system)}"]))
    return " ".join(named)


def _settings(config: Config) -> list[str]:
    """The numbers that decide the result. Free-form tables are left out: they may hold paths, or worse."""
    model = config.model
    shown: dict[str, Mapping[str, Any]] = {
        "model": {f"lora_{name}": getattr(model, f"lora_{name}") for name in ("rank", "alpha", "targets")}
        | {"rslora": model.rslora},
        "rollout": config.rollout.model_dump(exclude_none=True),
        "objective": config.objective.model_dump(exclude_none=True),
        "train": config.train.model_dump(exclude_none=True),
    }
    return [
        f"{section}.{loading.toml_line(key, value)}"
        for section, values in shown.items()
        for key, value in values.items()
    ]


# -- words --------------------------------------------------------------------------------------------------


def _public(text: str) -> str:
    """The text without what looks like a secret. Before it is escaped: an escaped `_` would hide one."""
    return SECRET.sub("(removed: it looks like a secret)", text)


def _source(config: Config) -> str:
    source = config.data.source
    if is_hub_id(source):
        subset = f", {config.data.subset}" if config.data.subset else ""
        return f"[{source}](https://huggingface.co/datasets/{source}){subset}"
    return f"`{_plain_name(source)}`"


def _plain_name(name: str) -> str:
    """`/home/me/file.py:function` -> `file.py:function`: nobody's folders belong on a card."""
    return name.replace("\\", "/").rpartition("/")[2] if "/" in name or "\\" in name else name


def _estimate(value: Mapping[str, float]) -> str:
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def _cell(text: Any) -> str:
    """Model text in a table: nothing in it can end the cell, open a tag, or make a link."""
    escaped = "".join(
        c if c.isalnum() or c in " .,:;?'+=/%-" else "\n" if c == "\n" else f"&#{ord(c)};" for c in _public(str(text))
    )
    return escaped.replace("\n", "<br>")
