"""Layouts of public data sets through `init` and the checks that need no model: which columns, reward, verdict?

    python benchmarks/layouts.py        half a minute

Every layout is forty rows made here, shaped as the data set is on the Hub.
"""

import json
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lite_trgrpo import build
from lite_trgrpo.check import proposal, rewards
from lite_trgrpo.data.examples import load_examples
from lite_trgrpo.errors import LiteError

ROWS = 40
Row = dict[str, Any]
DRAW = random.Random(0)
SUMS = [(DRAW.randint(11, 99), DRAW.randint(11, 99)) for _ in range(ROWS)]
ASK = [f"Ada has {a} coins and gets {b} more. How many has she now?" for a, b in SUMS]


def made(row: Callable[[int, int, int], Row]) -> list[Row]:
    return [row(i, *pair) for i, pair in enumerate(SUMS)]


def user(text: str) -> list[Row]:
    return [{"role": "user", "content": text}]


LAYOUTS: dict[str, list[Row]] = {
    "GSM8K": made(lambda i, a, b: {"question": ASK[i], "answer": f"She has {a} + {b} = {a + b}.\n#### {a + b}"}),
    "MATH": made(lambda i, a, b: {"problem": f"Find ${a} + {b}$.", "level": f"Level {i % 5 + 1}", "type": "Algebra",
                                  "solution": f"We add: $\\boxed{{{a + b}}}$."}),
    "MATH, fractions": made(lambda i, a, b: {"problem": f"Simplify {a}/{b}.", "level": i % 5,
                                             "solution": f"It is $\\boxed{{\\frac{{{a}}}{{{b}}}}}$."}),
    "AIME": made(lambda i, a, b: {"ID": f"2024-I-{i}", "Problem": ASK[i], "Solution": "Add both.", "Answer": a + b}),
    "verl": made(lambda i, a, b: {"data_source": "openai/gsm8k", "prompt": user(ASK[i]), "ability": "math",
                                  "reward_model": {"style": "rule", "ground_truth": str(a + b)},
                                  "extra_info": {"split": "train", "index": i}}),
    "DAPO": made(lambda i, a, b: {"data_source": "math_dapo", "prompt": user(ASK[i]), "ability": "MATH",
                                  "reward_model": {"ground_truth": str(a + b), "style": "rule-lighteval/MATH_v2"}}),
    "Alpaca, instruction alone": made(lambda i, a, b: {"instruction": ASK[i], "input": "", "output": str(a + b)}),
    "Alpaca, with input": made(lambda i, a, b: {"instruction": f"Add {a} to it.", "input": str(b),
                                                "output": str(a + b)}),
    "ShareGPT": made(lambda i, a, b: {"conversations": [{"from": "human", "value": ASK[i]},
                                                        {"from": "gpt", "value": str(a + b)}]}),
    "messages with the answer": made(lambda i, a, b: {"messages": [*user(ASK[i]), {
        "role": "assistant", "content": str(a + b)}], "answer": str(a + b)}),
    "messages": made(lambda i, a, b: {"messages": user(ASK[i]), "answer": str(a + b)}),
    "Countdown": made(lambda i, a, b: {"target": a + b, "nums": [a, b]}),
    "Countdown, as text": made(lambda i, a, b: {"prompt": f"Use {a} and {b} to make {a + b}.", "target": a + b,
                                                "nums": [a, b]}),
    "Knights and Knaves": made(lambda i, a, b: {"quiz": ASK[i], "names": ["Ada", "Bo"], "solution": [True, False],
                                                "solution_text": "Ada is a knight, and Bo is a knave."}),
    "multiple choice": made(lambda i, a, b: {"question": ASK[i], "choices": ["1", "2", "3", str(a + b)],
                                             "answer": 3}),
    "multiple choice, in the text": made(lambda i, a, b: {"question": f"{ASK[i]} A) 1 B) {a + b} C) 3 D) 4",
                                                          "answer": "ABCD"[(i * 7) % 4]}),
    "sentiment": made(lambda i, a, b: {"text": f"Film {i} was {['fine', 'poor'][i % 2]}.",
                                       "label": ["positive", "negative"][i % 2]}),
    "BoolQ": made(lambda i, a, b: {"question": f"Is {a} above {b}?", "passage": "Count.", "answer": a > b}),
    "reasoning-gym, exported": made(lambda i, a, b: {"question": f"State the result of {a} - {b} =",
                                                     "answer": str(a - b), "metadata": {"difficulty": i % 3}}),
    "French thousands": made(lambda i, a, b: {"question": f"{a} fois 1000 ?", "answer": f"{a} 000"}),
    "difficulty, nulls": made(lambda i, a, b: {"question": ASK[i], "ground_truth": None if i == 7 else str(a + b),
                                               "difficulty": i % 3}),
    "no answers": made(lambda i, a, b: {"prompt": f"Tell a story of {a} words.", "topic": ["sea", "war"][i % 2]}),
}  # fmt: skip


def row(name: str, rows: list[Row]) -> str:
    Path("data.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    try:
        config = proposal.validated(proposal.propose("data.jsonl", None))
    except LiteError as error:
        return f"| {name} | | | refused: {str(error).removeprefix('data.jsonl: ').splitlines()[0]} |"
    examples, heldout = load_examples(config.data, config.eval.rows)
    reward = next(iter(config.rewards.functions))
    with build.scoring_of(config) as scorer:
        reports = [rewards.of_data(examples, len(heldout), config), rewards.of_rewards(examples, scorer, config),
                   rewards.of_golds([*examples, *heldout], scorer, config)]  # fmt: skip
    found = [f"{one.problem}{' (stops)' * one.stops}" for report in reports for one in report.findings]
    columns = f"`{config.data.prompt}`, `{config.data.answer}`"
    return f"| {name} | {columns} | {reward}, cap {config.rollout.max_new_tokens} | {'; '.join(found) or 'works'} |"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        print("| layout | asked, answer | reward | verdict |\n| --- | --- | --- | --- |")
        for name, rows in LAYOUTS.items():
            print(row(name, rows), flush=True)


if __name__ == "__main__":
    main()
