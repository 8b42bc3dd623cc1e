"""What scoring in a process of its own costs.

    python benchmarks/sandbox.py          two minutes

The `math` reward on batches of 1,000 answers (125 prompts, groups of 8), in this process and in the sandbox by
turns: the same answers in both, new ones in every round; each has scored a batch before the clock starts. `number`
shows the pipe: it does little itself. Ends with 1 if the median throughput
of `math` in the sandbox is below 90 % of that outside, or if a single value differs.
"""

import datetime
import logging
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version

import psutil

from lite_trgrpo.records import Completion, Example, Group, Prompt
from lite_trgrpo.rewards import Sandbox, load, score

PROMPTS, MEMBERS, ROUNDS = 125, 8, 7
LEAST = 0.9
FORMS = (r"So the answer is $\boxed{%s}$.", "The answer is %s.", r"\boxed{\frac{%s}{1}}", "<answer>%s</answer>")


def batch(seed: int) -> list[Group]:
    """Sums of three numbers with a worked answer of about 150 tokens; half of the answers are wrong."""
    draw, groups = random.Random(seed), []
    for row in range(PROMPTS):
        a, b, c = (draw.randint(10, 99_999) for _ in range(3))
        completions = []
        for member in range(MEMBERS):
            result = a + b + c + member % 2
            steps = " ".join(f"Adding ${a + k}$ and ${b - k}$ gives ${a + b}$, then ${c}$ more." for k in range(6))
            text = f"{steps} {FORMS[draw.randrange(len(FORMS))] % result}"
            completions.append(Completion(tuple(range(150)), (), (), text, stopped=True))
        example = Example(f"What is {a} + {b} + {c}?", {"answer": f"... #### {a + b + c}"}, f"row:{row}")
        groups.append(Group(example, Prompt((), ""), completions))
    return groups


def measure(name: str) -> float:
    """Print one reward's rounds; -> median throughput in the sandbox over that outside."""
    rewards = load({name: 1.0}, {})
    speed: dict[str, list[float]] = {"outside": [], "in the sandbox": []}
    with Sandbox({name: 1.0}, {}, seconds=5.0, memory=4 * 2**30) as sandbox:
        ways: dict[str, Callable[[list[Group]], list[Group]]] = {
            "outside": lambda groups: score(groups, rewards),
            "in the sandbox": sandbox.score,
        }
        for seed in range(1 + ROUNDS):
            groups = batch(seed)
            found = []
            for way, scorer in ways.items():
                started = time.perf_counter()
                found.append([group.rewards for group in scorer(groups)])
                if seed:  # the first round warms up
                    speed[way].append(PROMPTS * MEMBERS / (time.perf_counter() - started))
            if found[0] != found[1]:
                sys.exit(f"{name}: the sandbox gives other values")
    for way, values in speed.items():
        print(f"{name:8} {way:12} {statistics.median(values):10,.0f}   {min(values):,.0f} to {max(values):,.0f}")
    return statistics.median(speed["in the sandbox"]) / statistics.median(speed["outside"])


def main() -> None:
    logging.disable()  # math-verify's word that its time-outs are off
    print(
        f"{datetime.date.today()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, math-verify {version('math-verify')}, sympy {version('sympy')}, load average "
        f"{psutil.getloadavg()[0]:.1f}"
    )
    print(f"answers a second, batches of {PROMPTS * MEMBERS:,}, {ROUNDS} rounds each\n")
    print(f"{'reward':8} {'':12} {'median':>10}   range")
    ratio = measure("math")
    print(f"math in the sandbox: {ratio:.1%} of outside (at least {LEAST:.0%} wanted)\n")
    measure("number")
    if ratio < LEAST:
        sys.exit(1)


if __name__ == "__main__":
    main()
