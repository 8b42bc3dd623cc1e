"""What a command does once its options are known: load everything, check it, run it, show it."""

import hashlib
import json
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lite_trgrpo import __version__, check, data, memory, report, rewards, screen
from lite_trgrpo import evaluate as evaluation
from lite_trgrpo.backends import choice
from lite_trgrpo.errors import RunError, first_line
from lite_trgrpo.options import Config, memory_bytes
from lite_trgrpo.policy import sample_all
from lite_trgrpo.preflight import rewards as preflight
from lite_trgrpo.records import Example, Sampling
from lite_trgrpo.screen import talk
from lite_trgrpo.store import checkpoint
from lite_trgrpo.store.lock import locked
from lite_trgrpo.store.run import Run
from lite_trgrpo.training import trainer
from lite_trgrpo.training.job import Encoded, Listener
from lite_trgrpo.training.stopping import Stop, Stopped
from lite_trgrpo.training.update import prepare_rows

if TYPE_CHECKING:
    from lite_trgrpo.backends.transformers import TransformersPolicy

CHATTING = 2  # stream of random numbers, beside the trainer's


def train(config: Config, output: Path, resume: Path | None, stop: Stop) -> Run:
    """A whole run: everything that can fail is loaded before a new folder is written.

    Raises Stopped where it ends before its last step, with the words that say how to go on.
    """
    with ExitStack() as held:
        found = None
        if resume is None:
            run = Run.vacant(output)
        else:
            run = Run.existing(resume)
            held.enter_context(locked(run.folder))
            found = _checkpoint_of(run, config.train.steps)
        scoring = held.enter_context(scoring_of(config))
        examples, heldout_examples = data.load(config.data, config.eval.rows)
        choice.settle(config.model)
        if resume is None:
            if config.train.preflight:
                for line in preflight.before_training(examples, scoring, config):
                    talk.print(line, markup=False, soft_wrap=True)
            planned, _ = check.memory(config, None)
            talk.print(f"memory: {screen.memory_line(planned)}", markup=False, soft_wrap=True)
        policy = _policy(config)
        training, too_long = trainer.encode(policy, examples, config.data.max_prompt_tokens)
        heldout, heldout_too_long = trainer.encode(policy, heldout_examples, config.data.max_prompt_tokens)
        if policy.located.revision:  # a resumed run must find the same weights, whatever the branch is then
            pinned = config.model.model_copy(update={"revision": policy.located.revision})
            config = config.model_copy(update={"model": pinned})
        config = _with_cache(config, policy)
        facts = _facts(policy, training, heldout, too_long + heldout_too_long)
        if resume is None:
            run.create()
            held.enter_context(locked(run.folder))
            Run.vacant(output)  # another may have taken it meanwhile
        else:
            _compare_facts(run, facts)
        run.describe(config, facts)
        _introduce(config, policy, training, facts["prompts"], run)
        with screen.progress(config.train.steps) as on_step, stop:
            listener = _listener(config, run, on_step)
            try:
                trainer.train(config, policy, training, heldout, scoring, run, listener, stop, resume=found)
            except Stopped as stopped:
                raise Stopped(
                    f"stopped by {stopped}, everything saved. Go on with: lite-trgrpo train --resume {_quoted(run)}",
                    stopped.code,
                ) from None
    talk.print(f"adapter in {run.adapter}, report in {run.folder / report.NAME}", markup=False, soft_wrap=True)
    return run


def to_resume(run: Path | None) -> Path:
    """The folder of this run, or of the newest unfinished one in `runs`."""
    if run is None:
        run = newest_unfinished(Path("runs"))
        talk.print(f"going on with {run}", markup=False, soft_wrap=True)
    return Run.existing(run).folder


def newest_unfinished(folder: Path) -> Path:
    """The run that was written last among those in `folder` that are not complete."""
    runs = [path.parent for path in folder.glob("*/config.toml")]
    written = {run: max(path.stat().st_mtime for path in run.iterdir()) for run in runs}
    for run in sorted(runs, key=lambda run: written[run], reverse=True):
        found = checkpoint.newest(run / "checkpoints")
        if found is None or not checkpoint.is_complete(found):
            return run
    raise RunError(
        f"no unfinished run in {folder.absolute()}; a finished one goes on with --resume RUN and a larger --steps"
    )


def _checkpoint_of(run: Run, steps: int) -> Path | None:
    """Where a run goes on; None if it was ended before its first checkpoint. A complete run is refused."""
    for path in checkpoint.torn(run.checkpoints):
        talk.print(f"{path} is damaged and was passed over", markup=False, soft_wrap=True)
    found = checkpoint.newest(run.checkpoints)
    if found is None and any(run.checkpoints.glob("step-*")):
        raise RunError(f"{run.folder} has no whole checkpoint to continue from; start again with another --output")
    if found is not None:
        done = checkpoint.steps_done(found)
        if done > steps or (done == steps and checkpoint.is_complete(found)):
            raise RunError(f"{run.folder} has done {done} steps of {steps}; type --steps with a larger number")
    talk.print(f"going on after step {0 if found is None else done} of {steps}")
    return found


def _compare_facts(run: Run, facts: Mapping[str, Any]) -> None:
    """A resumed run needs the same rows; other versions or another machine only cost the last bits."""
    before = run.facts()
    if before.get("prompts", facts["prompts"]) != facts["prompts"]:
        raise RunError(
            f"the rows are no longer those that {run.folder} was started with ({before['prompts']} then, "
            f"{facts['prompts']} now): put the data back, or start again with another --output"
        )
    for key in ("revision", "device", "dtype", "versions"):
        if before.get(key, facts[key]) != facts[key]:
            talk.print(
                f"warning: {key} was {before[key]}, now it is {facts[key]}: the run goes on, but not bit for bit",
                markup=False,
                soft_wrap=True,
            )


def _introduce(
    config: Config, policy: "TransformersPolicy", training: Encoded, prompts: Mapping[str, Any], run: Run
) -> None:
    if policy.device.type == "cpu" and config.model.device == "auto" and shutil.which("nvidia-smi"):
        talk.print("warning: there is an NVIDIA card, but this torch cannot use it, so the CPU is used; install a CUDA "
                   "build (pytorch.org/get-started), or say --set model.device=cpu if that is meant")  # fmt: skip
    talk.print(
        f"{config.model.name} on {policy.device}, {sum(p.numel() for p in policy.trainable().values()):,} trainable "
        f"weights; {prompts['training']} prompts, {prompts['heldout']} held out, {prompts['too_long']} too long and "
        f"left out\nrun folder {run.folder}\nthe first prompt as the model reads it:",
        markup=False,
        soft_wrap=True,
    )
    talk.print(screen.plain(training[0][1].text), style="dim", markup=False)


def _listener(config: Config, run: Run, on_step: Callable[[Mapping[str, Any]], None]) -> Listener:
    def stepped(metrics: Mapping[str, Any]) -> None:
        on_step(metrics)
        _warn_of_gap(config, metrics)

    return Listener(
        stepped,
        lambda line: talk.print(screen.eval_line(line), markup=False, soft_wrap=True),
        lambda text: talk.print(text, markup=False, soft_wrap=True),
        lambda: _report(run),
    )


def _report(run: Run) -> None:
    """The report as far as the run is. No trouble with it, whatever it is, is worth a night of training."""
    try:
        report.write(run)
    except Exception as error:
        talk.print(f"warning: no report was written: {first_line(error)}", markup=False, soft_wrap=True)


def _quoted(run: Run) -> str:
    folder = str(run.folder)
    return f'"{folder}"' if " " in folder else folder


def evaluate(config: Config) -> dict[str, Any]:
    """Held-out scores of the configured model: `evaluate.evaluate`'s result."""
    with scoring_of(config) as scoring:
        heldout = _heldout(config)
        policy = _policy(config)
        config = _with_cache(config, policy)
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
    config = _with_cache(config, policy)
    encoded, _ = trainer.encode(policy, heldout[:prompts], config.data.max_prompt_tokens)
    return evaluation.kl_to_base(
        policy, [prompt for _, prompt in encoded], trainer.eval_sampling(config), config.train.micro_batch_tokens
    )


def diagnose(config: Config, prompts: int) -> dict[str, Any]:
    """Sample groups for `prompts` training prompts and measure whose gradient is how large: see `diagnose.py`."""
    from lite_trgrpo import diagnose as diagnosis

    config = config.model_copy(update={"train": config.train.model_copy(update={"prompts_per_step": prompts})})
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


def chat(config: Config) -> None:
    """A conversation on the terminal; the model sees all of it at every turn."""
    policy = _policy(config)
    messages = [{"role": "system", "content": config.data.system}] if config.data.system else []
    sampling = Sampling(1, config.rollout.max_new_tokens, temperature=config.rollout.temperature)
    for turn, line in enumerate(iter(_ask, "")):
        messages.append({"role": "user", "content": line})
        keyed = replace(sampling, key=(config.train.seed, CHATTING, turn))
        [[answer]] = sample_all(policy, [policy.encode(messages)], keyed)
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


def ready(config: Config, examples: Sequence[Example]) -> tuple[Config, "TransformersPolicy", Encoded]:
    """The model, its cache resolved, and the prompts as it reads them."""
    policy = _policy(config)
    config = _with_cache(config, policy)
    return config, policy, trainer.encode(policy, examples, config.data.max_prompt_tokens)[0]


def _policy(config: Config) -> "TransformersPolicy":
    from lite_trgrpo.backends.loading import resolve_device

    if config.train.memory is not None:
        device = resolve_device(config.model.device)
        if not memory.cap(memory_bytes(config.train.memory), device):
            talk.print("warning: train.memory is not kept to: this system cannot limit a process on CPU")
    longest = config.data.max_prompt_tokens + max(config.rollout.max_new_tokens, config.eval.max_new_tokens or 0)
    return choice.load(
        config.model, seed=config.train.seed, gradient_checkpointing=config.train.gradient_checkpointing,
        longest=longest,
    )  # fmt: skip


def _with_cache(config: Config, policy: "TransformersPolicy") -> Config:
    """`rollout.cache_mib` resolved: a run keeps it, so that a resumed one decodes in the same batches."""
    if config.rollout.cache_mib is not None:
        return config
    rollout = config.rollout.model_copy(update={"cache_mib": policy.cache_mib()})
    return config.model_copy(update={"rollout": rollout})


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
