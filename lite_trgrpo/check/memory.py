"""Before a run: will it fit, and how long will it take?"""

from pathlib import Path
from statistics import fmean
from typing import Any

import psutil
import torch

from lite_trgrpo.check.plan import Plan, fitting, plan
from lite_trgrpo.config.loading import load
from lite_trgrpo.config.schema import Config
from lite_trgrpo.errors import FOREIGN, LiteError, ModelError, PlanError, first_line
from lite_trgrpo.model.loading import load_config, resolve_device, resolve_dtype
from lite_trgrpo.model.template import NO_TEMPLATE
from lite_trgrpo.model.weights import has_chat_template
from lite_trgrpo.store.run import Run

CARD_OVERHEAD = 700 * 2**20  # a CUDA context (527 MiB) and the libraries of a first product (158), as an H100 has them
DESKTOP = 512 * 2**20  # left for what else the card shows


def check_memory(config: Config, vram: int | None, fit: bool = True) -> tuple[dict[str, Any], Config | None]:
    """Compare the memory that the run will take with what there is (bytes), and find options that fit if these do not.

    vram: of a card to plan for; None: this machine's card, or its memory. Prompts are taken as long as
    `data.max_prompt_tokens` allows. fit: look for options that fit, which takes several plans.
    Raises PlanError where the model cannot be run without data, and ModelError for a base whose prompts have no format.

    -> {"parts", "peak", "available", "slots", "path", "fits", "changes" (None: nothing helps)}
    """
    if config.model.prompt_format is None and not has_chat_template(config.model.name, config.model.revision):
        raise ModelError(NO_TEMPLATE)
    device = torch.device("cuda") if vram is not None else resolve_device(config.model.device)
    assumed = config.model.dtype == "auto" and vram is not None
    dtype = torch.bfloat16 if assumed else resolve_dtype(config.model.dtype, device)
    shape, longest = load_config(config.model), config.data.max_prompt_tokens
    given = config
    try:
        found = plan(config, shape, dtype, longest)
    except LiteError:  # an option that cannot be, whatever the model
        raise
    except FOREIGN as error:
        # The plan runs the model on tensors without data, and not every model's code can.
        kind = getattr(shape, "model_type", "?")
        raise PlanError(f"no plan for the model type {kind!r} ({first_line(error)})") from None
    overhead, available = _room(device, vram, found)
    if device.type == "cuda" and config.rollout.cache_mib is None:
        config = _with_cache(config, found, available - overhead)
        found = plan(config, shape, dtype, longest)
    parts = {name: getattr(found, name) for name in ("weights", "adapter", "cache", "rollout", "update")}
    result = {
        "parts": {**parts, "overhead": overhead},
        "peak": found.peak + overhead,
        "available": available,
        "slots": found.slots,
        "path": found.path,
        "fits": found.peak + overhead <= available,
        "changes": [],
    }
    if result["fits"] or not fit:
        return result, given
    fitted = fitting(config, shape, dtype, longest, available - overhead)
    result["changes"] = None if fitted is None else fitted[1]
    return result, None if fitted is None else fitted[0]


def _with_cache(config: Config, found: Plan, room: int) -> Config:
    """The options with the cache that a run chooses: a third of what is free once the model is loaded."""
    mib = max(1, (room - found.weights) // 3 // 2**20)
    return config.changed("rollout", cache_mib=mib)


def past(config: Config, runs: Path) -> dict[str, Any] | None:
    """How long a run will take, and what the same model took before, by the newest run of it in `runs`; None: none yet.

    -> {"run", "step_s", "hours" (evaluations included), "peak" (bytes; of the card where there is one), "least":
    answers may get longer than then}. A token is taken to cost as much as then, answers to be as long.
    """
    written = sorted(runs.glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in written:
        try:
            run = Run.existing(path.parent)
            before, steps, scores = load(file=run.folder / "config.toml"), run.metrics(), run.evaluations()
        except LiteError:  # an older version's, or a broken one
            continue
        kept = ("name", "quantization", "device")
        same = all(getattr(before.model, key) == getattr(config.model, key) for key in kept)
        if not same or not any(step["groups_with_signal"] for step in steps):  # without signal there is no update
            continue
        clocks = [step["clock"] for step in steps]
        seconds = sum(clock["rollout_s"] + clock["reward_s"] + clock["update_s"] for clock in clocks)
        length = min(fmean(step["length_mean"] for step in steps), config.rollout.max_new_tokens)
        tokens = length * config.train.prompts_per_step * config.rollout.group_size
        step_s = seconds / max(1, sum(step["tokens"] for step in steps)) * tokens
        times = 2 + (config.train.steps - 1) // config.eval.every if config.eval.every else 2
        answers = [len(score["rows"]) * (1 + before.eval.samples) for score in scores]
        answer_s = sum(score["clock"]["eval_s"] for score in scores) / max(1, sum(answers))
        eval_s = times * answer_s * config.eval.rows * (1 + config.eval.samples)
        peak = max(clock.get("cuda_peak_mib", clock["rss_mib"]) for clock in clocks)
        hours = (step_s * config.train.steps + eval_s) / 3600
        least = config.rollout.max_new_tokens > before.rollout.max_new_tokens
        return {"run": str(run.folder), "step_s": step_s, "hours": hours, "peak": int(peak * 2**20), "least": least}
    return None


def _room(device: torch.device, vram: int | None, found: Plan) -> tuple[int, int]:
    """-> what the libraries themselves take, and what there is for the run (bytes).

    On a CPU the C library keeps what sampling has freed while the update runs, and about a fifth of the update in gaps
    (benchmarks/growth.txt); the libraries of the run have been loaded by the time that there is a plan.
    """
    if vram is not None:
        return CARD_OVERHEAD, vram - DESKTOP
    if device.type == "cuda":
        return CARD_OVERHEAD, torch.cuda.mem_get_info(device)[0] - DESKTOP
    taken = psutil.Process().memory_info().rss
    kept = min(found.cache + found.rollout, found.update) + found.update // 5
    return taken + kept, psutil.virtual_memory().available + taken
