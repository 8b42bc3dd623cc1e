"""Rewards: plain functions that read answers and give a number to each.

    load(functions, options) -> [Reward]       by the name of a built-in, or path/file.py:function
    score(groups, rewards) -> [Group]          the same groups with `rewards` and `parts` filled in
    Sandbox(functions, options, ...)              both in a process of its own, with a deadline and a memory limit

A reward function follows TRL's calling convention, so one written for TRL works here unchanged:

    def reward(prompts, completions, completion_ids, **columns) -> list[float | None]

All lists have one entry for each completion. `columns` are the data's other columns, `answer` among them,
repeated for each completion of a prompt. None means: this answer cannot be graded.
"""

from lite_trgrpo.rewards.loading import BUILTINS, Reward, load
from lite_trgrpo.rewards.sandbox import Sandbox
from lite_trgrpo.rewards.scoring import Scorer, failure_counts, score

__all__ = ["BUILTINS", "Reward", "Sandbox", "Scorer", "failure_counts", "load", "score"]
