"""What an adapter trained on a 4-bit base does there after reloading, and on the unquantised base.

    lite-trgrpo train --preset demo --set model.quantization=nf4 --output runs/nf4
    python benchmarks/quantisation.py runs/nf4

Reloaded with the same quantisation the greedy answers must equal those of the run's last evaluation; on the unquantised
base scores are compared instead, with the difference of log-probabilities on the same answers.
"""

import sys
from importlib.metadata import version
from pathlib import Path

import torch

from lite_trgrpo import build, evaluate
from lite_trgrpo.build import encode
from lite_trgrpo.config import loading
from lite_trgrpo.config.schema import Config
from lite_trgrpo.data.examples import load_examples
from lite_trgrpo.evaluate import eval_sampling
from lite_trgrpo.model import hf
from lite_trgrpo.model.packing import by_prompt
from lite_trgrpo.store.run import Run


def scored(options: Config, run: Run, quantization: str, answers=None):
    """-> (evaluation with the adapter on this base, answers as ids, their log-probabilities); its own if none given."""
    model = options.model.model_copy(update={"adapter": str(run.adapter), "quantization": quantization})
    policy = hf.load(model, seed=0)
    _, heldout = load_examples(options.data, options.eval.rows)
    encoded, _ = encode(policy, heldout, options.data.max_prompt_tokens)
    sampling = eval_sampling(options)
    with build.scoring_of(options) as scorer:
        result = evaluate.evaluate(policy, encoded, scorer, sampling, samples=0, solved_at=options.rewards.solved_at)
    if answers is None:
        answers = [(prompt.ids, tuple(row["ids"])) for (_, prompt), row in zip(encoded, result["rows"], strict=True)]
    logprobs = []
    with torch.no_grad():
        for batch in by_prompt(answers, lambda row: row, 2048):
            found, _ = policy.logprobs(batch, options.rollout.temperature)
            logprobs += [found[i, : len(ids)] for i, (_, ids) in enumerate(batch)]
    return result, answers, torch.cat(logprobs)


def main(folder: str) -> None:
    run = Run.existing(Path(folder))
    options = loading.load(file=run.folder / "config.toml")
    if options.model.quantization != "nf4":
        sys.exit(f"{folder} was not trained on nf4: train one with --set model.quantization=nf4")
    quantised, answers, on_nf4 = scored(options, run, "nf4")
    plain, _, on_plain = scored(options, run, "none", answers)
    last = run.evaluations()[-1]["rows"]
    same = sum(a["greedy"] == b["greedy"] for a, b in zip(quantised["rows"], last, strict=True))
    moved = sum(a["greedy"] != b["greedy"] for a, b in zip(plain["rows"], last, strict=True))
    gap = (on_nf4 - on_plain).abs()
    print(f"torch {torch.__version__}, bitsandbytes {version('bitsandbytes')}, transformers {version('transformers')}")
    before, after = (run.evaluations()[i]["pass@1"]["value"] for i in (0, -1))
    print(f"before training, nf4:       pass@1 {before:.3f}")
    print(f"after, in the run, nf4:     pass@1 {after:.3f}")
    print(f"reloaded on nf4:            pass@1 {quantised['pass@1']['value']:.3f}, {same} of {len(last)} answers equal")
    print(f"on the unquantised base:    pass@1 {plain['pass@1']['value']:.3f}, {moved} of {len(last)} answers differ")
    print(f"|difference of log-probs|:  mean {gap.mean():.3f}, largest {gap.max():.3f} over {len(gap)} tokens")
    if same != len(last):
        sys.exit("reloaded answers differ: the adapter was not saved as it was trained")


if __name__ == "__main__":
    main(sys.argv[1])
