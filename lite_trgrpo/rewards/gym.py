"""Scoring by reasoning-gym's own task scorers, with answers kept away from its calls of `eval`."""

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from lite_trgrpo.errors import MissingPackageError, RewardError
from lite_trgrpo.rewards.text import completion_text

# Of reasoning-gym 0.1.25's scorers these run the answer as Python code: the first by `eval`, the others by
# sympy's parse_expr, which ends in `eval` too. They are shown nothing but plain data and plain arithmetic.
EVALUATED_LISTS = ("binary_matrix", "n_queens", "spiral_matrix", "string_insertion")
EVALUATED_ARITHMETIC = ("countdown", "puzzle24")
EVALUATED_ALGEBRA = ("intermediate_integration", "polynomial_multiplication", "simple_integration")

LONGEST_EVALUATED = 500  # characters
FUNCTIONS = (
    *("sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh", "tanh"),
    *("asinh", "acosh", "atanh", "exp", "log", "ln", "sqrt", "pi", "Integral"),
)
# x**12, x**-1, (2*x + 1)**(3/2), E**x: exponents that do not make huge numbers
_SMALL_POWER = r"\*\*\s*(?:-?\d{1,2}(?!\d)|\(-?\d{1,2}(?:/\d{1,2})?\)|[A-Za-z](?!\w))(?!\s*\*\*)"

Scorer = Callable[[str, Mapping[str, Any]], float]


def reasoning_gym_task(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Any],
    answer: Sequence[Any],
    metadata: Sequence[Any],
    **columns: Any,
) -> list[float | None]:
    """The score, 0 to 1, that the row's own reasoning-gym task gives to the extracted answer.

    `metadata` is the row's, and names the task in `source_dataset`. See `extract` for what counts as the
    answer; with or without its final period, whichever scores better. A row whose gold answer is None is not
    gradable. A scorer that raises on an answer gives it 0; if it raises on the gold answer too, the row is at
    fault and that is an error.

    Raises MissingPackageError without reasoning-gym, RewardError for a row that is none of its tasks.
    """
    _package()
    rows = [{"answer": gold, "metadata": about} for gold, about in zip(answer, metadata, strict=True)]
    return [
        None if row["answer"] is None else _grade(extract(completion_text(completion)), row)
        for completion, row in zip(completions, rows, strict=True)
    ]


def extract(text: str) -> str:
    r"""The answer in a completion. The first of these that is there:

    what stands inside the last `<answer>...</answer>`; inside the last `\boxed{...}`; after the last
    "answer is" or "answer:", to the end of the line; the last line that is not blank. Stripped.
    """
    found = re.findall(r"<answer>(.*?)</answer>", text, flags=re.DOTALL)
    if found:
        return found[-1].strip()
    boxed = last_box(text)
    if boxed is not None:
        return boxed.strip()
    found = re.findall(r"\banswer(?: is|:)[ :]*(\S.*)", text, flags=re.IGNORECASE)
    lines = found or text.strip().splitlines() or [""]
    return lines[-1].strip()


def last_box(text: str) -> str | None:
    """Content of the last box; braces inside may nest. None if there is no box or it never closes."""
    _, mark, inside = text.rpartition("\\boxed{")
    depth = 1
    for i, letter in enumerate(inside if mark else ""):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return inside[:i]
    return None


def _grade(answer: str, row: Mapping[str, Any]) -> float:
    about = row["metadata"]
    task = about.get("source_dataset") if isinstance(about, Mapping) else None
    if not isinstance(task, str):
        raise RewardError(
            f"reward 'reasoning-gym': metadata = {str(about)[:60]!r} names no task; it must be that of a "
            "reasoning-gym row, with source_dataset. Set data.source = reasoning-gym:TASK"
        )
    return max(_score(task, text, row) for text in {answer, answer.removesuffix(".")})


def _score(task: str, answer: str, row: Mapping[str, Any]) -> float:
    scorer = _scorer(task)
    try:
        return float(scorer(answer if is_harmless(task, answer) else "", row))
    except Exception:
        scorer(str(row["answer"]), row)  # if this raises as well the row is at fault, not the answer
        return 0.0


@cache
def _scorer(task: str) -> Scorer:
    try:
        return _package().get_score_answer_fn(task)
    except ValueError:
        raise RewardError(
            f"reward 'reasoning-gym': source_dataset = '{task}' is no task of the installed reasoning-gym; "
            "set data.source = reasoning-gym:TASK"
        ) from None


def _package() -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise MissingPackageError(
            "reward 'reasoning-gym' needs the package reasoning-gym. Type: pip install 'lite-trgrpo[data]'"
        ) from error
    return reasoning_gym


def is_harmless(task: str, answer: str) -> bool:
    """False if the task's scorer would evaluate this answer and it is more than the data it should be."""
    if task not in EVALUATED_LISTS + EVALUATED_ARITHMETIC + EVALUATED_ALGEBRA:
        return True
    if len(answer) > LONGEST_EVALUATED:
        return False
    if task in EVALUATED_ARITHMETIC:
        return re.fullmatch(r"[\d\s.()+*/-]*", answer, flags=re.ASCII) is not None and "**" not in answer
    return _is_data(answer) if task in EVALUATED_LISTS else _is_algebra(answer)


def _is_data(answer: str) -> bool:
    """Words and digits (nothing to call, no operator), or a Python literal such as [[0, 1], [1, 0]]."""
    if re.fullmatch(r"[\w\s]*", answer, flags=re.ASCII):
        return True
    try:
        ast.literal_eval(answer)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False
    return True


def _is_algebra(answer: str) -> bool:
    """Numbers, one-letter symbols and known functions; small exponents, at most two powers of brackets.

    N and S are not symbols to sympy: they evaluate what they are given.
    """
    words = re.findall(r"[A-Za-z_]\w*", answer)
    return (
        re.fullmatch(r"(?:\d+\.\d+|[\w\s()+*/,-])*", answer, flags=re.ASCII) is not None
        and all((len(word) == 1 and word not in "_NS") or word in FUNCTIONS for word in words)
        and len(re.findall(_SMALL_POWER, answer)) == answer.count("**")
        and len(re.findall(r"\)\s*\*\*", answer)) <= 2
    )
