"""Train and evaluate: the order in which a run happens, once its options are known."""

import logging
import traceback
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lite_trgrpo import evaluate as evaluation
from lite_trgrpo import report
from lite_trgrpo.build import encode, heldout_of, policy_of, run_facts, scoring_of, with_cache
from lite_trgrpo.check import machine, memory
from lite_trgrpo.check import rewards as preflight
from lite_trgrpo.config.loading import load
from lite_trgrpo.config.schema import Config, memory_bytes
from lite_trgrpo.data.examples import load_examples
from lite_trgrpo.errors import LiteError, PlanError, RunError, first_line
from lite_trgrpo.evaluate import eval_sampling
from lite_trgrpo.model import oom, select
from lite_trgrpo.records import Example
from lite_trgrpo.rewards import Scorer
from lite_trgrpo.store import trackers
from lite_trgrpo.store.lock import locked
from lite_trgrpo.store.resuming import checkpoint_of, compare_facts, cut_back
from lite_trgrpo.store.run import Run
from lite_trgrpo.terminal import progress, screen
from lite_trgrpo.terminal.panel import Panel
from lite_trgrpo.terminal.progress import Show
from lite_trgrpo.text import quoted
from lite_trgrpo.training import loop
from lite_trgrpo.training.stopping import Stop, Stopped

if TYPE_CHECKING:
    from lite_trgrpo.model.hf import TransformersPolicy

logger = logging.getLogger(__name__)


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
        examples, heldout_examples = load_examples(config.data, config.eval.rows)
        select.settle(config.model, config.rollout.engine == "vllm")
        if resume is None:
            _look_ahead(config, examples, heldout_examples, scoring, output)
        policy = policy_of(config)
        training, too_long = encode(policy, examples, config.data.max_prompt_tokens)
        heldout, heldout_too_long = encode(policy, heldout_examples, config.data.max_prompt_tokens)
        config = with_cache(config, policy)
        if policy.located.revision:  # a resumed run must find the same weights, whatever the branch is then
            config = config.changed("model", revision=policy.located.revision)
        facts = run_facts(config, policy, training, heldout, too_long + heldout_too_long)
        if resume is None:
            run.create()
            held.enter_context(locked(run.folder))
            Run.vacant(output)  # another may have taken it meanwhile
        else:
            compare_facts(run, facts)
        run.describe(config, facts)
        if resume is None:
            weights = sum(p.numel() for p in policy.trainable().values())
            progress.introduce(config, policy.device, weights, facts["prompts"], training[0][1], str(run.folder))
        else:
            cut_back(run, found)  # before anything reads the logs
        track = held.enter_context(trackers.tracked(config.train.track, run.folder, config.model_dump(), done))
        panel = _panel(config, run, _limit(config, policy))
        listener = held.enter_context(progress.watched(show, panel, track, lambda: _report(run)))
        try:
            with stop:
                loop.train(config, policy, training, heldout, scoring, run, listener, stop, resume=found)
        except Stopped as stopped:
            on = (
                f". Continue with: lite-trgrpo train --resume {quoted(run.folder)}"
                if stopped.code != 1
                else f" in {run.folder}"
            )
            raise Stopped(f"stopped by {stopped}, everything saved{on}", stopped.code) from None
        except LiteError:
            raise
        except Exception as error:
            raise RunError(_unexpected(run, error)) from None
    logger.info(f"adapter in {run.adapter}, report in {run.folder / report.NAME}")
    return run


def _look_ahead(
    config: Config, examples: Sequence[Example], heldout: Sequence[Example], scoring: Scorer, output: Path
) -> None:
    """Say before a new run what is odd, what memory it takes, and how long the one before it took.

    Raises RunError where nothing can be learned.
    """
    for problem in machine.card_problems() if config.model.device == "auto" else ():
        logger.warning(f"{problem.what}. To change that: {problem.fix}")
    if config.train.preflight:
        for line in preflight.before_training(examples, heldout, scoring, config):
            logger.info(line)
    try:
        planned, _ = memory.check_memory(config, None)
        logger.info(f"memory: {screen.memory_line(planned)}")
    except PlanError as error:
        logger.info(f"memory: {error}")
    if before := memory.past(config, output.parent):
        logger.info(screen.past_line(before))


def _unexpected(run: Run, error: Exception) -> str:
    """What to say of an error that nobody foresaw; its traceback goes into the run folder."""
    file = run.folder / "error.txt"
    with suppress(OSError):
        file.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    return (
        f"{type(error).__name__}: {first_line(error)}. The traceback is in {file}. Continue from the last checkpoint "
        f"with: lite-trgrpo train --resume {quoted(run.folder)}"
    )


def _panel(config: Config, run: Run, limit: int) -> Panel:
    """A panel that holds what an earlier part of the run did."""
    return Panel(
        run.folder.name, config.train.steps, config.eval.every, config.rollout.max_new_tokens, limit, run.metrics(),
        run.evaluations(),
    )  # fmt: skip


def _limit(config: Config, policy: "TransformersPolicy") -> int:
    """Memory that the run may take, of the card or of the machine (bytes)."""
    return memory_bytes(config.train.memory) if config.train.memory else oom.total(policy.device)


def _report(run: Run) -> None:
    """The report as far as the run is. No trouble with it, whatever it is, is worth a night of training."""
    try:
        report.write(run)
    except Exception as error:
        logger.warning(f"no report was written: {first_line(error)}")


def evaluate(config: Config) -> dict[str, Any]:
    """Held-out scores of the configured model: `evaluate.evaluate`'s result."""
    with scoring_of(config) as scoring:
        heldout = heldout_of(config)
        _warn_of_trained_rows(config)
        policy = policy_of(config)
        config = with_cache(config, policy)
        encoded, too_long = encode(policy, heldout, config.data.max_prompt_tokens)
        if too_long:
            logger.info(f"{too_long} prompts are longer than data.max_prompt_tokens and were left out")
        sampled = f" and {config.eval.samples} sampled" if config.eval.samples else ""
        logger.info(
            f"{config.model.adapter or 'the base'}: {len(encoded)} held-out rows, one greedy{sampled} answers each"
        )
        return evaluation.evaluate(
            policy, encoded, scoring, eval_sampling(config),
            samples=config.eval.samples, solved_at=config.rewards.solved_at,
        )  # fmt: skip


def _warn_of_trained_rows(config: Config) -> None:
    """Warn if other rows are held out than in the adapter's own run: it was trained on some of them."""
    file = Path(config.model.adapter or "").expanduser().parent / "config.toml"
    if config.model.adapter is None or config.data.eval_source or config.data.eval_split or not file.is_file():
        return
    try:
        run = load(file=file)
    except LiteError:  # of another version
        return
    there, here = (run.data.seed, run.eval.rows), (config.data.seed, config.eval.rows)
    if run.data.source == config.data.source and there != here:
        logger.warning(
            f"the run of this adapter held out {there[1]} rows with data.seed {there[0]}, here {here[1]} with "
            f"{here[0]}: it was trained on some of these rows. For rows it has not seen type --config {file}"
        )
