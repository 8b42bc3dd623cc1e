"""The model card of an exported run, written from what the run left: settings, scores, samples, how to load it."""

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lite_trgrpo.config import loading
from lite_trgrpo.config.schema import Config
from lite_trgrpo.store.run import Run

PAPER = "https://arxiv.org/abs/2511.00066"
TAGS = ["lite-trgrpo", "tr-grpo", "grpo", "peft", "lora"]
SAMPLES = 5
SECRET = re.compile(r"\b(?:hf|sk|ghp|github_pat)[-_][A-Za-z0-9_-]{16,}")
CURVE = "## Training reward\n\n![reward and share of solved answers by step](curve.png)"
FORMS = {
    "unquantised": "adapter on the unquantised base", "merged": "merged weights (`merged/`)", "gguf": "GGUF",
}  # fmt: skip


def write(
    run: Run, config: Config, report: Mapping[str, Any] | None, repo: str | None, files: Sequence[str], licence: str
) -> str:
    """The whole README.md. `report` is check.json's, None where nothing was exported yet."""
    facts = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))
    name = repo or f"USER/{run.folder.resolve().name}"
    lines = run.evaluations()
    parts = [
        _metadata(config, facts["base"], lines, name, licence),
        _head(config, facts, name, licence),
        _results(lines, report),
        CURVE if "curve.png" in files else "",
        _samples(lines),
        _loading(config, facts, name, files),
        _settings(config, facts),
    ]  # fmt: skip
    text = "\n\n".join(part for part in parts if part) + "\n"
    return SECRET.sub("(removed: it looks like a secret)", text)


def base_licence(config: Config, base: str) -> str | None:
    """As the presets state it; None where none of them has this base."""
    for name, path in loading.presets().items():
        model = loading.load(name).model
        if base in (model.name, model.upstream):
            return loading.head_comment(path)["licence"].lower()
    return None


def _metadata(config: Config, base: str, lines: Sequence[Mapping[str, Any]], name: str, licence: str) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    source = config.data.source
    called = source if _on_hub(source) else _plain_name(source)
    results = [
        EvalResult(
            task_type="text-generation", dataset_type=source if _on_hub(source) else "lite-trgrpo",
            dataset_name=called, metric_type=metric, metric_value=round(value["value"], 4),
            metric_name=f"held-out {metric}, {len(lines[-1]['rows'])} rows",
        )
        for metric, value in (lines[-1].items() if lines else ())
        if metric.startswith("pass@") and isinstance(value, Mapping)
    ]  # fmt: skip
    data = ModelCardData(
        base_model=base if is_hub_id(base) else None, license=licence if licence != "unknown" else None,
        library_name="peft", pipeline_tag="text-generation", tags=TAGS, model_name=name.partition("/")[2],
        datasets=[source] if _on_hub(source) else None, eval_results=results or None,
    )  # fmt: skip
    if is_hub_id(base):
        data["base_model_relation"] = "adapter"
    return f"---\n{data.to_yaml()}\n---"


def _head(config: Config, facts: Mapping[str, Any], name: str, licence: str) -> str:
    base = f"[{facts['base']}](https://huggingface.co/{facts['base']})" if is_hub_id(facts["base"]) else facts["base"]
    revision = f" at commit `{facts['revision']}`" if facts["revision"] else ""
    other = ""
    if config.model.name != facts["base"]:
        other = f" The weights it was trained and scored on came from `{_plain_name(config.model.name)}`: on others "
        other += "the score may differ."
    rewards = ", ".join(f"`{_plain_name(key)}` (weight {value:g})" for key, value in config.rewards.functions.items())
    weights = "TR-GRPO" if config.objective.weights in ("offset", "centred") else "GRPO"
    return f"""# {name.partition("/")[2]}

A LoRA adapter trained with **{weights}** by `lite-trgrpo`. TR-GRPO is token-regulated group relative policy
optimisation ([arXiv 2511.00066]({PAPER})): GRPO in which every token's part of the gradient is weighted by its
probability, so that unlikely tokens do not dominate. Token weights here: `{config.objective.weights}`.

| | |
|---|---|
| base | {base}{revision}, licence: {licence}.{other} |
| data | {_source(config)}: {facts["prompts"]["training"]} prompts, {facts["prompts"]["heldout"]} more held out |
| reward | {rewards} |
| quantisation in training | {config.model.quantization} |"""


def _results(lines: Sequence[Mapping[str, Any]], report: Mapping[str, Any] | None) -> str:
    if not lines:
        return "## Results\n\nThe run held out no rows, so there is no score."
    before, after = lines[0], lines[-1]
    table = ["## Results", "", f"On {len(after['rows'])} held-out rows, with 95 % intervals.", ""]
    table += ["| | before | after |", "|---|---|---|"]
    for metric, value in after.items():
        if metric.startswith("pass@") and isinstance(value, Mapping) and metric in before:
            table.append(f"| {metric} | {_estimate(before[metric])} | {_estimate(value)} |")
    table.append(f"| cut off by the token cap | {before['truncated']:.1%} | {after['truncated']:.1%} |")
    if "gain" in after:
        table.append(f"| gain in pass@1 (paired) | | {_estimate(after['gain'])} |")
    table.append("\npass@1 is the greedy answer's; pass@k asks whether one of k sampled answers is right.")
    if report is None:
        return "\n".join(table)
    table += ["", "Each form was loaded in a fresh process before it was published:", ""]
    table += ["| form | pass@1 | its base | mean difference of log-probabilities (nats) |", "|---|---|---|---|"]
    trained = report["trained"]
    table.append(f"| adapter, as in training | {_estimate(trained['pass@1'])} | {_estimate(trained['base'])} | 0 |")
    for form, scores in report["forms"].items():
        difference = f"{scores['logprob_difference']:.4f}"
        table.append(f"| {FORMS[form]} | {_estimate(scores['pass@1'])} | {_estimate(scores['base'])} | {difference} |")
    return "\n".join(table)


def _samples(lines: Sequence[Mapping[str, Any]]) -> str:
    if not lines:
        return ""
    table = ["## Samples", "", "The first held-out prompts, greedy.", ""]
    table += ["| prompt | gold | before | after |", "|---|---|---|---|"]
    for old, new in list(zip(lines[0]["rows"], lines[-1]["rows"], strict=False))[:SAMPLES]:
        cells = (new["prompt"], new["answer"], old["greedy"], new["greedy"])
        table.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    return "\n".join(table)


def _loading(config: Config, facts: Mapping[str, Any], name: str, files: Sequence[str]) -> str:
    base, short = facts["base"], name.partition("/")[2]
    revision = f', revision="{facts["revision"]}"' if facts["revision"] else ""
    parts = [f"""## How to load it

PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{base}"{revision})
tokenizer = AutoTokenizer.from_pretrained("{base}"{revision})
model = PeftModel.from_pretrained(base, "{name}")
{_asking(config)}```

{_vllm(config, base, short, name)}lite-trgrpo:

```sh
lite-trgrpo chat {_ours(config, base)} --adapter {name}
```"""]  # fmt: skip
    if any(file.startswith("merged/") for file in files):
        parts.append(f"""Merged weights, without PEFT:

```python
model = AutoModelForCausalLM.from_pretrained("{name}", subfolder="merged")
```""")
    if gguf := next((file for file in files if file.endswith(".gguf")), None):
        parts.append(f"""Ollama, in a folder that holds `{gguf}` and `Modelfile`:

```sh
ollama create {short.lower()} -f Modelfile && ollama run {short.lower()}
```""")
    if config.data.system:
        parts.append(f"It was trained with this system message: {_cell(config.data.system)}")
    return "\n\n".join(parts)


def _asking(config: Config) -> str:
    """The lines that ask the model something, in the form it was trained on."""
    if config.model.prompt_format is not None or config.model.template_options:
        return ""
    system = f'{{"role": "system", "content": {_quoted(config.data.system)}}}, ' if config.data.system else ""
    return f"""
messages = [{system}{{"role": "user", "content": "your question"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens={config.rollout.max_new_tokens}, do_sample=False)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def _quoted(text: str) -> str:
    """As Python and TOML write it, with nothing in it that could end a code block."""
    return json.dumps(text, ensure_ascii=False).replace("`", "\\u0060")


def _vllm(config: Config, base: str, short: str, name: str) -> str:
    """vLLM serves LoRA at ranks of its own."""
    rank = max(8, 2 ** math.ceil(math.log2(config.model.lora_rank)))
    serve = f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {short}={name}"
    return f"vLLM:\n\n```sh\n{serve}\n```\n\n"


def _ours(config: Config, base: str) -> str:
    """The options that `chat` needs: the run's own preset where there is one, else the base and what it was told."""
    for name in loading.presets():
        preset = loading.load(name)
        if (preset.model.name, preset.data) == (config.model.name, config.data):
            return f"--preset {name}"
    named = [f"--set model.name={base}", f"--set data.source={_plain_name(config.data.source)}"]
    if config.data.system:
        named.append(shlex.join(["--set", f"data.system={_quoted(config.data.system)}"]))
    return " ".join(named)


def _settings(config: Config, facts: Mapping[str, Any]) -> str:
    """The numbers that decide the result. Free-form tables are left out: they may hold paths, or worse."""
    model = config.model
    shown: dict[str, Mapping[str, Any]] = {
        "lora": {name: getattr(model, f"lora_{name}") for name in ("rank", "alpha", "targets")}
        | {"rslora": model.rslora},
        "rollout": config.rollout.model_dump(exclude_none=True),
        "objective": config.objective.model_dump(exclude_none=True),
        "train": config.train.model_dump(exclude_none=True),
    }  # fmt: skip
    lines = [
        f"{section}.{key} = {json.dumps(value)}" for section, values in shown.items() for key, value in values.items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return "\n".join(
        ["## Settings", "", "<details><summary>every number of the run</summary>", "", "```", *lines, "```", "",
         "</details>", "", f"Trained on {facts['device']} with {versions}."]
    )  # fmt: skip


# -- words --------------------------------------------------------------------------------------------------


def is_hub_id(name: str) -> bool:
    """USER/REPO, and no path here."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def _on_hub(source: str) -> bool:
    return is_hub_id(source) and Path(source).suffix not in (".jsonl", ".csv", ".parquet")


def _source(config: Config) -> str:
    source = config.data.source
    if _on_hub(source):
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
        c if c.isalnum() or c in " .,:;?'+=/%-" else "\n" if c == "\n" else f"&#{ord(c)};" for c in str(text)
    )
    return escaped.replace("\n", "<br>")
