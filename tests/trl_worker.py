"""One of the processes of tests/test_scale_out.py: real training steps of TRGRPOTrainer on answers that are given.

    python -m tests.trl_worker CONFIG OUTPUT       or under torch.distributed.run
Writes every case's gradients (after the average over processes) and losses, then trains a step on answers of its own.
"""

import importlib.util
import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

from safetensors.torch import save_file
from transformers import TrainerCallback
from trl.trainer import utils as trl_utils

from lite_trgrpo.config import loading
from lite_trgrpo.integrations.trl import trainer_of
from tests.tiny import END, VOCABULARY

MEMBERS, LONGEST = 4, 6
CASES = {
    "tr-grpo": [],
    "printed": ["objective.placement=ratio", "objective.beta=0.05", "train.updates_per_batch=2"],
    "constant": ["objective.weights=constant", "objective.aggregation=constant", "objective.mask_truncated=true"],
    "sampling": ["objective.weights_from=sampling", "objective.beta=0.05", "train.updates_per_batch=2"],
    "gspo": ["objective.trust_region=sequence", "objective.weights=reverse", "train.updates_per_batch=2"],
}


def answers(prompt: str) -> list[list[int]]:
    """Ids of MEMBERS answers: from one token to the cap, every other one ended."""
    draw = random.Random(prompt)
    made = [[draw.randrange(3, VOCABULARY) for _ in range(length)] for length in draw.sample(range(1, LONGEST + 1), 4)]
    return [[*ids[:-1], END] if member % 2 else ids for member, ids in enumerate(made)]


def given(prompts: Sequence[str], trainer) -> dict[str, object]:
    """A process holds a slice of the step's answers, a prompt's one after the other."""
    first = trainer.accelerator.process_index * len(prompts)
    ids = [answers(prompt)[(first + i) % MEMBERS] for i, prompt in enumerate(prompts)]
    return {"prompt_ids": trainer._tokenize_prompts(prompts)[0], "completion_ids": ids, "logprobs": None}


class Recorder(TrainerCallback):
    """Loss and gradients of each optimizer step, as the optimizer sees them."""

    def __init__(self, trainer) -> None:
        self.trainer, self.losses, self.gradients, self.total = trainer, [], {}, 0.0
        compute = trainer.compute_loss

        def recorded(*arguments, **named):
            loss = compute(*arguments, **named)
            self.total = self.total + loss.detach()
            return loss

        trainer.compute_loss = recorded

    def on_pre_optimizer_step(self, *_, model, **__) -> None:
        number = len(self.losses)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.gradients[f"{number}/{name.removeprefix('module.')}"] = parameter.grad.clone()
        self.losses.append(self.trainer.accelerator.reduce(self.total, reduction="mean").item())
        self.total = 0.0


def run(file: Path, output: Path, settings: Sequence[str], rows: int) -> tuple[list[float], Mapping[str, object]]:
    config = loading.load(file=file, overrides=settings)
    changes = {"optim": "sgd", "max_grad_norm": 1e9, "save_strategy": "no", "disable_tqdm": True}
    longest = config.data.max_prompt_tokens + LONGEST
    config = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch_tokens": rows * longest})})
    with trainer_of(config, output, rollout_func=given, **changes) as trainer:
        recorder = Recorder(trainer)
        trainer.add_callback(recorder)
        trainer.train()
        assert trainer.args.per_device_train_batch_size == rows
    return recorder.losses, recorder.gradients


def sampled(file: Path, output: Path) -> None:
    """A step of TRL's own sampling, its metrics and the adapter it leaves."""
    with trainer_of(loading.load(file=file), output, save_strategy="no", disable_tqdm=True) as trainer:
        trainer.train()
        trainer.save_model(str(output / "adapter"))
        (output / "log.json").write_text(json.dumps(trainer.state.log_history))


def main(file: Path, output: Path) -> None:
    path = Path(__file__).parents[1] / "benchmarks" / "trl_equality.py"
    spec = importlib.util.spec_from_file_location("trl_equality", path)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    if not module.OWN_KERNEL:  # TRL's needs Triton and a card
        trl_utils._ChunkedLogProbFunction = SimpleNamespace(apply=module.plain_logprobs)
    losses = {}
    for name, settings in CASES.items():
        losses[name], gradients = run(file, output / name, settings, rows=2)
        save_file(gradients, output / f"{name}-{_rank()}.safetensors")
    (output / f"losses-{_rank()}.json").write_text(json.dumps(losses))
    sampled(file, output / "sampled")


def _rank() -> int:
    from accelerate import PartialState

    return PartialState().process_index


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
