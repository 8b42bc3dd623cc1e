"""Build what every command needs first: the model, the rewards, the prompts as the model reads them."""

import hashlib
import json
import logging
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lite_trgrpo import __version__, rewards
from lite_trgrpo.config.loading import adapter_folder
from lite_trgrpo.config.schema import Config, memory_bytes
from lite_trgrpo.data.examples import load_examples
from lite_trgrpo.errors import DataError, LiteError, OutOfMemoryError, RunError
from lite_trgrpo.model import oom, select
from lite_trgrpo.model.policy import Policy
from lite_trgrpo.model.weights import digests
from lite_trgrpo.records import Example
from lite_trgrpo.text import sha256
from lite_trgrpo.training.state import Encoded

if TYPE_CHECKING:
    from lite_trgrpo.model.hf import TransformersPolicy

logger = logging.getLogger(__name__)


def scoring_of(config: Config) -> rewards.Sandbox:
    """Start the configured rewards, the function that decides what is solved first. `overlong` gets the run's own cap
    and DAPO's buffer of a fifth of it.
    """
    decisive = config.rewards.decisive
    functions = {decisive: config.rewards.functions[decisive]} | config.rewards.functions
    cap = config.rollout.max_new_tokens
    options = dict(config.rewards.options)
    if "overlong" in config.rewards.functions:
        options["overlong"] = {"max_tokens": cap, "buffer": max(1, cap // 5)} | options.get("overlong", {})
    return rewards.Sandbox(
        functions, options, config.rewards.truncated_max_zero,
        seconds=config.rewards.seconds, memory=memory_bytes(config.rewards.memory),
        on_failure=config.rewards.on_failure, pass_env=config.rewards.pass_env,
        tell=logger.warning,
    )  # fmt: skip


def ready(config: Config, examples: Sequence[Example]) -> tuple[Config, "TransformersPolicy", Encoded]:
    """The model, its cache resolved, and the prompts as it reads them."""
    policy = policy_of(config)
    config = with_cache(config, policy)
    return config, policy, encode(policy, examples, config.data.max_prompt_tokens)[0]


def policy_of(config: Config) -> "TransformersPolicy":
    """The configured model with its adapter, within `train.memory`. Raises OutOfMemoryError where it does not fit."""
    from lite_trgrpo.model.loading import resolve_device

    if config.train.memory is not None:
        device = resolve_device(config.model.device)
        if not oom.cap(memory_bytes(config.train.memory), device):
            logger.warning("train.memory has no effect: this system cannot limit the memory of a process")
    longest = config.data.max_prompt_tokens + max(config.rollout.max_new_tokens, config.eval.max_new_tokens or 0)
    try:
        return select.load(
            config.model,
            seed=config.train.seed,
            gradient_checkpointing=config.train.gradient_checkpointing,
            longest=longest,
            vllm=config.rollout.engine == "vllm",
        )
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, LiteError) or not oom.ran_out(error):
            raise
    raise OutOfMemoryError(oom.advice("the model does", "model.lora_rank"))


def with_cache(config: Config, policy: "TransformersPolicy") -> Config:
    """`rollout.cache_mib` resolved: a run keeps it, so that a resumed one decodes in the same batches."""
    if config.rollout.cache_mib is not None:
        return config
    return config.changed("rollout", cache_mib=policy.cache_mib())


def machine_facts(config: Config, policy: "TransformersPolicy") -> dict[str, Any]:
    """What answers depend on besides the options: files by their SHA-256, and what bears on rounding."""
    import torch

    packages = ("torch", "transformers", "peft", "bitsandbytes")
    own = {Path(name.rpartition(":")[0]).expanduser() for name in config.rewards.functions if ".py:" in name}
    folder = None if config.model.adapter is None else adapter_folder(config.model.adapter)
    adapter = () if folder is None else (folder / "adapter_config.json", folder / "adapter_model.safetensors")
    if policy.device.type == "cuda":
        processor = torch.cuda.get_device_name(policy.device)
    else:
        processor = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return {
        "revision": policy.located.revision,
        "files": {
            "base": digests(policy.located),
            "adapter": {str(path): sha256(path) for path in adapter},
            "rewards": {str(path): sha256(path) for path in sorted(own)},
        },
        "device": str(policy.device),
        "processor": processor,
        "dtype": str(policy.dtype),
        "backend": policy.backend,
        "versions": {"lite-trgrpo": __version__, **{name: version(name) for name in packages}},
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def run_facts(
    config: Config, policy: "TransformersPolicy", training: Encoded, heldout: Encoded, too_long: int
) -> dict[str, Any]:
    """Facts resolved at the start that config.toml does not hold."""
    rows = json.dumps([[e.prompt, dict(e.columns)] for e, _ in (*training, *heldout)], default=str, sort_keys=True)
    return {
        "base": policy.located.upstream,
        **machine_facts(config, policy),
        "end_ids": sorted(policy.end_ids),
        "prompts": {
            "training": len(training),
            "heldout": len(heldout),
            "too_long": too_long,
            "sha256": hashlib.sha256(rows.encode()).hexdigest(),
        },
    }


def encode(policy: Policy, examples: Sequence[Example], max_prompt_tokens: int) -> tuple[Encoded, int]:
    """-> examples with their prompts, and how many were left out because their prompt is too long."""
    encoded = [(example, policy.encode(example.prompt)) for example in examples]
    kept = [pair for pair in encoded if len(pair[1].ids) <= max_prompt_tokens]
    if examples and not kept:
        shortest = min(len(prompt.ids) for _, prompt in encoded)
        raise DataError(
            f"every prompt is longer than data.max_prompt_tokens = {max_prompt_tokens}; the shortest has {shortest}"
        )
    return kept, len(encoded) - len(kept)


def heldout_of(config: Config) -> list[Example]:
    _, heldout = load_examples(config.data, config.eval.rows)
    if not heldout:
        raise RunError("there are no held-out rows to score: set eval.rows above 0, or give data.eval_source")
    return heldout
