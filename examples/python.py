"""A step of training from Python: load a preset, sample a group, score it, update the adapter. Needs no card.

python examples/python.py
"""

from pathlib import Path

from lite_trgrpo import build
from lite_trgrpo.config import loading
from lite_trgrpo.config.schema import Config
from lite_trgrpo.data.examples import load_examples
from lite_trgrpo.model.oom import Limits
from lite_trgrpo.model.policy import sample_all
from lite_trgrpo.records import Group, Sampling
from lite_trgrpo.training.optimizer import make_optimizer
from lite_trgrpo.training.update import prepare_rows, update


def train(options: Config, steps: int, adapter: Path) -> list[Group]:
    """Some steps of one prompt each; the adapter as plain PEFT in a folder. -> what was sampled and scored."""
    examples, _ = load_examples(options.data, options.eval.rows)
    policy = build.policy_of(options)
    optimizer = make_optimizer(list(policy.trainable().values()), options.train)
    limits = Limits(options.train.micro_batch_tokens, options.rollout.max_rows)
    temperature, cap = options.rollout.temperature, options.rollout.max_new_tokens
    done = []
    with build.scoring_of(options) as scoring:  # the reward functions, in a process of their own
        for step, example in enumerate(examples[:steps]):
            prompt = policy.encode(example.prompt)
            sampling = Sampling(options.rollout.group_size, cap, temperature, key=(options.train.seed, step))
            [completions] = sample_all(policy, [prompt], sampling, limits)
            [group] = scoring.score([Group(example, prompt, completions)])
            rows = prepare_rows([group], options.objective, cap)  # advantages; none where all rewards are equal
            statistics = update(
                policy, optimizer, rows, options.objective,
                temperature=temperature, updates=1, limits=limits, max_grad_norm=options.train.max_grad_norm,
            )  # fmt: skip
            print(example.text, group.rewards, f"gradient {statistics['grad_norm']:.3f}")
            done.append(group)
    policy.save_adapter(adapter)
    return done


if __name__ == "__main__":
    easy = ["data.options={ first = [1, 9], second = [1, 9] }", "rollout.max_new_tokens=32"]
    train(loading.load("demo", overrides=easy), steps=4, adapter=Path("runs/python/adapter"))
