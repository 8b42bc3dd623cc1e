"""A reward function of one's own, for examples/own.toml. It needs nothing but Python.

A reward function gets lists with one entry for each completion and returns a list with a number for each:

    prompts          the prompts, as in the data
    completions      the answers: strings, or lists of one message where the prompt is a list of messages
    completion_ids   the answers' token ids
    and every other column of the data by its name: here `answer` and `other`, repeated for each completion

Name only those it uses and catch the rest with **columns. None instead of a number means that an answer
cannot be graded; it is then left out. Functions written for TRL's GRPOTrainer have the same form.
"""

import re


def picks_the_larger(completions, answer, max_words=8, **columns):
    """1 if the only number that the reply names is the larger one, in at most `max_words` words; else 0.

    A reply with several numbers has not chosen, and without the limit on words a model can learn to ramble. It
    is all or nothing on purpose: given a part for a half-right reply, a small model may settle for that.
    """
    rewards = []
    for completion, larger in zip(completions, answer, strict=True):
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        named = set(re.findall(r"\d+", text))
        rewards.append(1.0 if named == {larger} and len(text.split()) <= max_words else 0.0)
    return rewards
