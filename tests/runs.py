"""A finished run that is small: a random model, an adapter that changes its answers, a line of every log."""

import json
from pathlib import Path

import torch

from lite_trgrpo.build import run_facts
from lite_trgrpo.config import loading
from lite_trgrpo.config.schema import Config
from lite_trgrpo.export.verify import answer
from lite_trgrpo.store import checkpoint
from lite_trgrpo.store.run import Run
from tests.tiny import tiny_model_folder

BASE = "tiny/base"


def finished_run(folder: Path, kind: str = "llama", rows: int = 8, noise: float = 0.1, **model) -> tuple[Run, Config]:
    """The adapter is random, not trained, so that it has an effect; its answers are recorded as a run records them."""
    from lite_trgrpo.model import hf

    base = tiny_model_folder(folder / "base", kind)
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i} + 1", "answer": str(i + 1)}) + "\n" for i in range(4 * rows)))
    settings = {"name": str(base), "upstream": BASE, "lora_rank": 4, **model}
    config = loading.validate({
        "model": settings, "data": {"source": str(data)}, "rollout": {"max_new_tokens": 8},
        "eval": {"rows": rows, "samples": 0}, "train": {"steps": 2},
    })  # fmt: skip
    run = Run.vacant(folder / "run")
    run.create()
    policy = hf.load(config.model, seed=0)
    torch.manual_seed(1)
    for name, parameter in policy.trainable().items():
        change = noise * torch.randn_like(parameter)
        parameter.data = parameter.data * (1 + change) if "magnitude" in name else change
    written = checkpoint.save_adapter(policy.save_adapter, run.adapter)
    facts = run_facts(config, policy, [], [], 0)
    run.describe(config, facts | {"prompts": {"training": 24, "heldout": rows}})
    for step, adapter in ((0, None), (2, str(run.adapter))):
        run.log_eval(_evaluation(step, config.changed("model", adapter=adapter)))
    for step in (1, 2):
        run.log_step({"step": step, "reward_mean": 0.1 * step, "solved": 0.2 * step}, [], list)
    state = {"logs": run.offsets(), "complete": True, "adapter": written, "limits": {"rows": 128}}
    optimizer = torch.optim.AdamW(policy.trainable().values())
    checkpoint.save(run.checkpoints, 2, policy.trainable(), optimizer, state)
    return run, config


def _evaluation(step: int, config: Config) -> dict:
    """As the trainer logs it; the scores are made up, the answers are not."""
    found = answer(config, None, None)
    rows = [
        {"prompt": prompt, "answer": "7", "greedy": text, "ids": ids, "solved": solved}
        for prompt, ids, text, solved in zip(found.prompts, found.ids, found.texts, found.solved, strict=True)
    ]
    score = {"value": 0.25 * step, "low": 0.2 * step, "high": 0.3 * step}
    line = {"step": step, "pass@1": score, "pass@4": score, "truncated": 0.5, "length_mean": 3.0, "rows": rows}
    return line | ({"gain": score} if step else {})
