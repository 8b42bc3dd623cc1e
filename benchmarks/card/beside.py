"""A step and rollouts beside TRL in bf16: what the quick forms of benchmarks/step.py and rollouts.py leave out."""

from kit import guarded
from rollouts import KINDS, policy_for, table
from step import compare

from lite_trgrpo.model.policy import sample_all
from lite_trgrpo.records import Sampling


def rollouts() -> None:
    policy = policy_for(**KINDS["bf16"])
    sample_all(policy, [policy.encode("Hello")], Sampling(8, 8))  # libraries warm up outside the clock
    table("bf16", policy, KINDS["bf16"], [(1, False), (4, False), (4, True)])


if __name__ == "__main__":
    guarded("step, bf16", lambda: compare("bf16", {"dtype": "bfloat16"}, False, 1))
    guarded("rollouts, bf16", rollouts)
