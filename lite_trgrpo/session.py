"""What a command does once its options are known: load everything, check it, run it, show it."""

import platform
import shutil
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lite_trgrpo import __version__, checkpoint, data, rewards, screen, trainer
from lite_trgrpo import evaluate as evaluation
from lite_trgrpo.errors import RunError
from lite_trgrpo.options import Config, memory_bytes
from lite_trgrpo.records import Example, Sampling
from lite_trgrpo.run import Run
from lite_trgrpo.screen import talk
from lite_trgrpo.update import prepare_rows

if TYPE_CHECKING:
    from lite_trgrpo.backends.transformers import TransformersPolicy

CHATTING = 2  # stream of random numbers, beside the trainer's


def train(config: Config, output: Path, resume: Path | None) -> Run:
    """A whole run: everything that can fail is loaded before the folder is written."""
    found = None
    if resume is not None:
        found = checkpoint.newest(Run.existing(resume).checkpoints)
        if found is None:
            raise RunError(f"{resume} has no whole checkpoint to continue from; start again with another --output")
        if (done := checkpoint.steps_done(found)) >= config.train.steps:
            raise RunError(f"{resume} has done {done} steps of {config.train.steps}; type --steps with a larger number")
    with scoring_of(config) as scoring:
        return _train(config, output, resume, found, scoring)


def _train(config: Config, output: Path, resume: Path | None, found: Path | None, scoring: rewards.Cage) -> Run:
    examples, heldout_examples = data.load(config.data, config.eval.rows)
    policy = _policy(config)
    training, too_long = trainer.encode(policy, examples, config.data.max_prompt_tokens)
    heldout, heldout_too_long = trainer.encode(policy, heldout_examples, config.data.max_prompt_tokens)
    if policy.located.revision:  # a resumed run must find the same weights, whatever the branch is then
        pinned = config.model.model_copy(update={"revision": policy.located.revision})
        config = config.model_copy(update={"model": pinned})
    run = Run.create(output, config) if resume is None else Run(resume)
    run.describe(config, _facts(policy, len(training), len(heldout), too_long + heldout_too_long))
    if policy.device.type == "cpu" and config.model.device == "auto" and shutil.which("nvidia-smi"):
        talk.print("warning: there is an NVIDIA card, but this torch cannot use it, so the CPU is used; install a CUDA "
                   "build (pytorch.org/get-started), or say --set model.device=cpu if that is meant")  # fmt: skip
    talk.print(
        f"{config.model.name} on {policy.device}, {sum(p.numel() for p in policy.trainable().values()):,} trainable "
        f"weights; {len(training)} prompts, {len(heldout)} held out, {too_long + heldout_too_long} too long and left "
        f"out\nrun folder {run.folder}\nthe first prompt as the model reads it:",
        markup=False,
        soft_wrap=True,
    )
    talk.print(screen.plain(training[0][1].text), style="dim", markup=False)
    with screen.progress(config.train.steps) as on_step:

        def stepped(metrics: Mapping[str, Any]) -> None:
            on_step(metrics)
            _warn_of_gap(config, metrics)

        listener = trainer.Listener(
            stepped, lambda line: talk.print(screen.eval_line(line), markup=False, soft_wrap=True)
        )
        trainer.train(config, policy, training, heldout, scoring, run, listener, resume=found)
    talk.print(f"adapter in {run.adapter}", markup=False, soft_wrap=True)
    return run


def evaluate(config: Config) -> dict[str, Any]:
    """Held-out scores of the configured model: `evaluate.evaluate`'s result."""
    with scoring_of(config) as scoring:
        heldout = _heldout(config)
        policy = _policy(config)
        encoded, too_long = trainer.encode(policy, heldout, config.data.max_prompt_tokens)
        if too_long:
            talk.print(f"{too_long} prompts are longer than data.max_prompt_tokens and were left out")
        return evaluation.evaluate(
            policy, encoded, scoring, trainer.eval_sampling(config),
            samples=config.eval.samples, solved_at=config.rewards.solved_at,
        )  # fmt: skip


def kl_to_base(config: Config, prompts: int = 64) -> float:
    """KL of the configured adapter to its base, per token (nats), on answers to held-out prompts."""
    heldout = _heldout(config)
    policy = _policy(config)
    encoded, _ = trainer.encode(policy, heldout[:prompts], config.data.max_prompt_tokens)
    return evaluation.kl_to_base(
        policy, [prompt for _, prompt in encoded], trainer.eval_sampling(config), config.train.micro_batch_tokens
    )


def diagnose(config: Config, prompts: int) -> dict[str, Any]:
    """Sample groups for `prompts` training prompts and measure whose gradient is how large: see `diagnose.py`."""
    from lite_trgrpo import diagnose as diagnosis

    sampled = config.model_copy(update={"train": config.train.model_copy(update={"prompts_per_step": prompts})})
    clock = {"rollout_s": 0.0, "reward_s": 0.0}
    with scoring_of(config) as scoring:
        examples, _ = data.load(config.data, config.eval.rows)
        policy = _policy(config)
        training, _ = trainer.encode(policy, examples, config.data.max_prompt_tokens)
        groups, _ = trainer.rollout(sampled, policy, training, scoring, step=0, clock=clock)
    rows = prepare_rows(groups, config.objective, config.rollout.max_new_tokens)
    if not rows:
        raise RunError("no group has a spread of rewards, so there is no gradient to look at; try more --prompts")
    temperature, budget = config.rollout.temperature, config.train.micro_batch_tokens
    result = diagnosis.quartile_gradients(policy, rows, config.objective, temperature, budget)
    result["single_tokens"] = diagnosis.token_gradient_norms(policy, rows, temperature, tokens=96)
    return {"prompts": prompts, "rows": len(rows), **result}


def chat(config: Config) -> None:
    """A conversation on the terminal; the model sees all of it at every turn."""
    policy = _policy(config)
    messages = [{"role": "system", "content": config.data.system}] if config.data.system else []
    sampling = Sampling(1, config.rollout.max_new_tokens, temperature=config.rollout.temperature)
    for turn, line in enumerate(iter(_ask, "")):
        messages.append({"role": "user", "content": line})
        keyed = replace(sampling, key=(config.train.seed, CHATTING, turn))
        [[answer]] = policy.sample([policy.encode(messages)], keyed)
        messages.append({"role": "assistant", "content": answer.text})
        print(screen.plain(answer.text))


def _ask() -> str:
    """A line from the person; nothing more is the end of the conversation."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _heldout(config: Config) -> list[Example]:
    _, heldout = data.load(config.data, config.eval.rows)
    if not heldout:
        raise RunError("there are no held-out rows to score: set eval.rows above 0, or give data.eval_source")
    return heldout


def scoring_of(config: Config) -> rewards.Cage:
    """The configured rewards, running; `overlong` knows the run's own cap, and DAPO's buffer of a fifth of it."""
    cap = config.rollout.max_new_tokens
    options = dict(config.rewards.options)
    if "overlong" in config.rewards.functions:
        options["overlong"] = {"max_tokens": cap, "buffer": max(1, cap // 5)} | options.get("overlong", {})
    return rewards.Cage(
        config.rewards.functions, options, config.rewards.must_stop,
        seconds=config.rewards.seconds, memory=memory_bytes(config.rewards.memory),
        on_failure=config.rewards.on_failure,
        tell=lambda line: talk.print(f"warning: {line}", markup=False, soft_wrap=True),
    )  # fmt: skip


def _policy(config: Config) -> "TransformersPolicy":
    from lite_trgrpo.backends import transformers

    return transformers.load(
        config.model, seed=config.train.seed, gradient_checkpointing=config.train.gradient_checkpointing
    )


def _facts(policy: "TransformersPolicy", training: int, heldout: int, too_long: int) -> dict[str, Any]:
    """What was resolved at the start and cannot be read from config.toml."""
    packages = ("torch", "transformers", "peft", "bitsandbytes")
    return {
        "base": policy.located.upstream,
        "revision": policy.located.revision,
        "device": str(policy.device),
        "dtype": str(policy.dtype),
        "end_ids": sorted(policy.end_ids),
        "prompts": {"training": training, "heldout": heldout, "too_long": too_long},
        "versions": {"lite-trgrpo": __version__, **{name: version(name) for name in packages}},
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def _warn_of_gap(config: Config, metrics: Mapping[str, Any]) -> None:
    """Once, after the first step: what a filtered sampler costs, measured."""
    top_p, top_k = config.rollout.top_p, config.rollout.top_k
    if metrics["step"] == 1 and (top_p < 1 or top_k > 0):
        mean, largest = metrics.get("sampler_gap_mean", 0.0), metrics.get("sampler_gap_max", 0.0)
        talk.print(
            f"warning: with rollout.top_p = {top_p} and top_k = {top_k} answers do not come from the policy that is "
            f"trained: log-probabilities differ by {mean:.3f} on average, at most {largest:.3f}. Set them to 1.0 and 0 "
            "for an unbiased update"
        )
