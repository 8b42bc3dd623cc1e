"""Answers of a model to a run's held-out prompts from a fresh process, which shares no memory with the export.

`ask` starts `python -m lite_trgrpo.export.verify`, which loads the model that the options name, answers greedily,
scores the answers with the run's rewards, and gives the log-probabilities of given tokens.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from lite_trgrpo.config.loading import validate
from lite_trgrpo.config.schema import Config
from lite_trgrpo.errors import ExportError, LiteError

ROWS = 32  # where a run held out none: enough to tell whether two models answer alike
FAILED = 3  # exit code: a known error, already one line; any other is a crash


@dataclass(frozen=True, slots=True)
class Answers:
    """Answers to every held-out prompt, in order."""

    prompts: list[str]
    ids: list[list[int]]
    texts: list[str]
    solved: list[bool | None]
    logprobs: list[list[float]]
    """Log-probabilities of the tokens that were asked for: of its own answers, unless others were given."""
    facts: dict[str, Any] = field(default_factory=dict)
    """`build.machine_facts` of the process that answered."""


def ask(config: Config, what: str, *, gguf: Path | None = None, tokens: list[list[int]] | None = None) -> Answers:
    """The configured model's answers; with `gguf` that file's (`model.name` is then the merged folder it came from).

    `what` names the model in errors. Raises ExportError.
    """
    if config.rollout.engine == "vllm":  # the other engines are at hand wherever the export is read
        config = config.changed("rollout", engine="groups")
    with tempfile.TemporaryDirectory(prefix="lite-trgrpo-") as folder:
        request, result = Path(folder, "request.json"), Path(folder, "result.json")
        given = {"config": config.model_dump(), "gguf": gguf and str(gguf), "tokens": tokens, "result": str(result)}
        request.write_text(json.dumps(given), encoding="utf-8")
        # a GGUF that transformers reads is converted into the cache: not worth keeping
        env = os.environ | ({"LITE_TRGRPO_CACHE": folder} if gguf else {})
        words = [sys.executable, "-m", "lite_trgrpo.export.verify", str(request)]
        done = subprocess.run(words, capture_output=True, text=True, encoding="utf-8", errors="replace", env=env)
        if "OutOfMemoryError" in done.stderr and config.model.device != "cpu":
            # unquantised weights may not fit the card that trained on quantised ones
            return ask(config.changed("model", device="cpu"), what, gguf=gguf, tokens=tokens)
        if done.returncode != 0:
            said = done.stderr.strip().splitlines() or ["nothing"]
            # below 0: killed by a signal
            how = "" if done.returncode == FAILED else f" (exit code {done.returncode})"
            raise ExportError(f"{what}, loaded in a fresh process, failed{how}: {said[-1]}")
        return Answers(**json.loads(result.read_text(encoding="utf-8")))


def answer(config: Config, gguf: Path | None, tokens: list[list[int]] | None) -> Answers:
    """Answer in this process."""
    import torch

    from lite_trgrpo import build, evaluate
    from lite_trgrpo.build import encode
    from lite_trgrpo.data.examples import load_examples
    from lite_trgrpo.evaluate import eval_sampling
    from lite_trgrpo.model.packing import batches

    _, heldout = load_examples(config.data, config.eval.rows or ROWS)
    policy = _policy(config, gguf)
    encoded, _ = encode(policy, heldout, config.data.max_prompt_tokens)
    sampling = eval_sampling(config)
    with build.scoring_of(config) as scorer:
        solved_at = config.rewards.solved_at
        rows = evaluate.evaluate(policy, encoded, scorer, sampling, samples=0, solved_at=solved_at)["rows"]
    asked = tokens or [row["ids"] for row in rows]
    pairs = [(i, prompt.ids, tuple(ids)) for i, ((_, prompt), ids) in enumerate(zip(encoded, asked, strict=True))]
    logprobs: list[list[float]] = [[] for _ in pairs]
    for batch in batches(pairs, lambda pair: pair[1:], config.train.micro_batch_tokens, policy.packs):
        with torch.no_grad():
            found, _ = policy.logprobs([(prompt, ids) for _, prompt, ids in batch], sampling.temperature)
        for (i, _, ids), row in zip(batch, found, strict=True):
            logprobs[i] = row[: len(ids)].tolist()
    return replace(of_rows(rows, logprobs), facts=build.machine_facts(config, policy))


def of_rows(rows: Sequence[Mapping[str, Any]], logprobs: list[list[float]]) -> Answers:
    """From the rows of an evaluation (`evaluate.evaluate`, a line of eval.jsonl)."""
    texts = ([row["prompt"] for row in rows], [row["ids"] for row in rows], [row["greedy"] for row in rows])
    return Answers(*texts, [row["solved"] for row in rows], logprobs)


def _policy(config: Config, gguf: Path | None) -> Any:
    from lite_trgrpo.model import hf

    model = config.model if gguf is None else config.model.model_copy(update={"name": str(gguf)})
    return hf.load(model, seed=config.train.seed)


def _end_with(parent: psutil.Process) -> None:
    """The export may be killed: nobody would read the answers."""
    while parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.5)
    os._exit(FAILED)


def main(path: str) -> None:
    threading.Thread(target=_end_with, args=(psutil.Process(os.getppid()),), daemon=True).start()
    request = json.loads(Path(path).read_text(encoding="utf-8"))
    try:
        found = answer(validate(request["config"]), request["gguf"] and Path(request["gguf"]), request["tokens"])
    except LiteError as error:
        print(" ".join(str(error).splitlines()), file=sys.stderr)
        sys.exit(FAILED)
    content = {name: getattr(found, name) for name in Answers.__slots__}
    Path(request["result"]).write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
