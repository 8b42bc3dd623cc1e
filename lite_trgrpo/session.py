"""What a command does once its options are known: load everything, check it, run it, show it."""

import hashlib
import json
import platform
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lite_trgrpo import __version__, check, data, display, memory, report, rewards, screen, trackers
from lite_trgrpo import evaluate as evaluation
from lite_trgrpo.backends import choice
from lite_trgrpo.config import load
from lite_trgrpo.display import Show
from lite_trgrpo.errors import LiteError, RunError, first_line
from lite_trgrpo.options import Config, memory_bytes
from lite_trgrpo.panel import Panel
from lite_trgrpo.preflight import rewards as preflight
from lite_trgrpo.records import Example
from lite_trgrpo.resuming import checkpoint_of, compare_facts
from lite_trgrpo.screen import say
from lite_trgrpo.store.lock import locked
from lite_trgrpo.store.run import Run
from lite_trgrpo.training import trainer
from lite_trgrpo.training.job import Encoded
from lite_trgrpo.training.stopping import Stop, Stopped
from lite_trgrpo.training.update import prepare_rows

if TYPE_CHECKING:
    from lite_trgrpo.backends.transformers import TransformersPolicy


def train(config: Config, output: Path, resume: Path | None, stop: Stop, show: Show = "panel") -> Run:
    """A whole run: everything that can fail is loaded before a new folder is written.

    Raises Stopped where it ends before its last step, with the words that say how to go on.
    """
    trackers.check(config.train.track)
    with ExitStack() as held:
        found, done = None, None
        if resume is None:
            run = Run.vacant(output)
        else:
            run = Run.existing(resume)
            held.enter_context(locked(run.folder))
            found, done = checkpoint_of(run, config.train.steps)
        scoring = held.enter_context(scoring_of(config))
        examples, heldout_examples = data.load(config.data, config.eval.rows)
        choice.settle(config.model)
        if resume is None:
            if config.train.preflight:
                for line in preflight.before_training(examples, len(heldout_examples), scoring, config):
                    say(line)
            planned, _ = check.memory(config, None)
            say(f"memory: {screen.memory_line(planned)}")
            if before := check.past(config, output.parent):
                say(screen.past_line(before))
        policy = policy_of(config)
        training, too_long = trainer.encode(policy, examples, config.data.max_prompt_tokens)
        heldout, heldout_too_long = trainer.encode(policy, heldout_examples, config.data.max_prompt_tokens)
        config = _with_cache(config, policy)
        if policy.located.revision:  # a resumed run must find the same weights, whatever the branch is then
            config = config.changed("model", revision=policy.located.revision)
        facts = _facts(policy, training, heldout, too_long + heldout_too_long)
        if resume is None:
            run.create()
            held.enter_context(locked(run.folder))
            Run.vacant(output)  # another may have taken it meanwhile
        else:
            compare_facts(run, facts)
        run.describe(config, facts)
        if resume is None:
            weights = sum(p.numel() for p in policy.trainable().values())
            display.introduce(config, policy.device, weights, facts["prompts"], training[0][1], str(run.folder))
        log = held.enter_context(trackers.tracked(config.train.track, run.folder, config.model_dump(), done))
        panel = _panel(config, run, done if found else None, _limit(config, policy))
        listener = held.enter_context(display.watched(show, panel, config.rollout, log, lambda: _report(run)))
        try:
            with stop:
                trainer.train(config, policy, training, heldout, scoring, run, listener, stop, resume=found)
        except Stopped as stopped:
            on = (
                f". Go on with: lite-trgrpo train --resume {_quoted(run)}" if stopped.code != 1 else f" in {run.folder}"
            )
            raise Stopped(f"stopped by {stopped}, everything saved{on}", stopped.code) from None
    say(f"adapter in {run.adapter}, report in {run.folder / report.NAME}")
    return run


def _panel(config: Config, run: Run, done: int | None, limit: int) -> Panel:
    """With what an earlier part of the run did, up to the step `done` whose checkpoint it goes on from."""
    kept = -1 if done is None else done
    return Panel(
        run.folder.name, config.train.steps, config.eval.every, config.rollout.max_new_tokens, limit,
        [line for line in run.metrics() if line["step"] <= kept],
        [line for line in run.evaluations() if line["step"] <= kept],
    )  # fmt: skip


def _limit(config: Config, policy: "TransformersPolicy") -> int:
    """Memory that the run may take, of the card or of the machine (bytes)."""
    return memory_bytes(config.train.memory) if config.train.memory else memory.total(policy.device)


def _report(run: Run) -> None:
    """The report as far as the run is. No trouble with it, whatever it is, is worth a night of training."""
    try:
        report.write(run)
    except Exception as error:
        say(f"warning: no report was written: {first_line(error)}")


def _quoted(run: Run) -> str:
    folder = str(run.folder)
    return f'"{folder}"' if " " in folder else folder


def evaluate(config: Config) -> dict[str, Any]:
    """Held-out scores of the configured model: `evaluate.evaluate`'s result."""
    with scoring_of(config) as scoring:
        heldout = _heldout(config)
        _warn_of_trained_rows(config)
        policy = policy_of(config)
        config = _with_cache(config, policy)
        encoded, too_long = trainer.encode(policy, heldout, config.data.max_prompt_tokens)
        if too_long:
            say(f"{too_long} prompts are longer than data.max_prompt_tokens and were left out")
        sampled = f" and {config.eval.samples} sampled" if config.eval.samples else ""
        say(f"{config.model.adapter or 'the base'}: {len(encoded)} held-out rows, one greedy{sampled} answers each")
        return evaluation.evaluate(
            policy, encoded, scoring, trainer.eval_sampling(config),
            samples=config.eval.samples, solved_at=config.rewards.solved_at,
        )  # fmt: skip


def _warn_of_trained_rows(config: Config) -> None:
    """Where other rows are held out than in the adapter's own run, some of them are rows that it was trained on."""
    file = Path(config.model.adapter or "").expanduser().parent / "config.toml"
    if config.model.adapter is None or config.data.eval_source or config.data.eval_split or not file.is_file():
        return
    try:
        run = load(file=file)
    except LiteError:  # of another version
        return
    there, here = (run.data.seed, run.eval.rows), (config.data.seed, config.eval.rows)
    if run.data.source == config.data.source and there != here:
        say(
            f"warning: its run held out {there[1]} rows with data.seed {there[0]}, here {here[1]} with {here[0]}: "
            f"some of these rows it has trained on. For rows it has not seen: --config {file}"
        )


def kl_to_base(config: Config, prompts: int = 64) -> float:
    """KL of the configured adapter to its base, per token (nats), on answers to held-out prompts."""
    heldout = _heldout(config)
    policy = policy_of(config)
    config = _with_cache(config, policy)
    encoded, _ = trainer.encode(policy, heldout[:prompts], config.data.max_prompt_tokens)
    return evaluation.kl_to_base(
        policy, [prompt for _, prompt in encoded], trainer.eval_sampling(config), config.train.micro_batch_tokens
    )


def diagnose(config: Config, prompts: int) -> dict[str, Any]:
    """Sample groups for `prompts` training prompts and measure whose gradient is how large: see `diagnose.py`."""
    from lite_trgrpo import diagnose as diagnosis

    config = config.changed("train", prompts_per_step=prompts)
    with scoring_of(config) as scoring:
        examples, _ = data.load(config.data, config.eval.rows)
        config, policy, training = ready(config, examples)
        groups, _ = trainer.rollout(
            config, policy, training, scoring, step=0, clock={"rollout_s": 0.0, "reward_s": 0.0}
        )
    rows = prepare_rows(groups, config.objective, config.rollout.max_new_tokens)
    if not rows:
        raise RunError("no group has a spread of rewards, so there is no gradient to look at; try more --prompts")
    temperature, budget = config.rollout.temperature, config.train.micro_batch_tokens
    result = diagnosis.quartile_gradients(policy, rows, config.objective, temperature, budget)
    result["single_tokens"] = diagnosis.token_gradient_norms(policy, rows, temperature, tokens=96)
    return {"prompts": prompts, "rows": len(rows), **result}


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
        tell=lambda line: say(f"warning: {line}"),
    )  # fmt: skip


def ready(config: Config, examples: Sequence[Example]) -> tuple[Config, "TransformersPolicy", Encoded]:
    """The model, its cache resolved, and the prompts as it reads them."""
    policy = policy_of(config)
    config = _with_cache(config, policy)
    return config, policy, trainer.encode(policy, examples, config.data.max_prompt_tokens)[0]


def policy_of(config: Config) -> "TransformersPolicy":
    from lite_trgrpo.backends.loading import resolve_device

    if config.train.memory is not None:
        device = resolve_device(config.model.device)
        if not memory.cap(memory_bytes(config.train.memory), device):
            say("warning: train.memory is not kept to: this system cannot limit a process on CPU")
    longest = config.data.max_prompt_tokens + max(config.rollout.max_new_tokens, config.eval.max_new_tokens or 0)
    return choice.load(
        config.model, seed=config.train.seed, gradient_checkpointing=config.train.gradient_checkpointing,
        longest=longest, vllm=config.rollout.engine == "vllm",
    )  # fmt: skip


def _with_cache(config: Config, policy: "TransformersPolicy") -> Config:
    """`rollout.cache_mib` resolved: a run keeps it, so that a resumed one decodes in the same batches."""
    if config.rollout.cache_mib is not None:
        return config
    return config.changed("rollout", cache_mib=policy.cache_mib())


def _facts(policy: "TransformersPolicy", training: Encoded, heldout: Encoded, too_long: int) -> dict[str, Any]:
    """What was resolved at the start and cannot be read from config.toml."""
    packages = ("torch", "transformers", "peft", "bitsandbytes")
    rows = json.dumps([[e.prompt, dict(e.columns)] for e, _ in (*training, *heldout)], default=str, sort_keys=True)
    return {
        "base": policy.located.upstream,
        "revision": policy.located.revision,
        "device": str(policy.device),
        "dtype": str(policy.dtype),
        "end_ids": sorted(policy.end_ids),
        "prompts": {
            "training": len(training),
            "heldout": len(heldout),
            "too_long": too_long,
            "sha256": hashlib.sha256(rows.encode()).hexdigest(),
        },
        "versions": {"lite-trgrpo": __version__, **{name: version(name) for name in packages}},
        "python": platform.python_version(),
        "system": platform.platform(),
    }
