"""`lite-trgrpo init`: from a data file to a config: which columns, which reward, how long, which base."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from lite_trgrpo.check import memory
from lite_trgrpo.check.findings import COUNTED
from lite_trgrpo.config import loading
from lite_trgrpo.config.schema import SECTIONS, Config, Data, Eval
from lite_trgrpo.data import sources
from lite_trgrpo.data.examples import flat, read_examples
from lite_trgrpo.errors import DataError
from lite_trgrpo.model.hf import template_at_hand
from lite_trgrpo.records import Example
from lite_trgrpo.rewards import BUILTINS, gold
from lite_trgrpo.rewards.numerals import as_number
from lite_trgrpo.rewards.text import gold_text
from lite_trgrpo.text import quoted

BASES = ("math-7b", "math-4b", "math-1.5b", "math-0.5b")  # presets whose base and options suit any task; else demo
PROMPTS = ("prompt", "question", "problem", "instruction", "query", "input", "messages", "text")
ANSWERS = (
    "answer", "ground_truth", "gold", "final_answer", "correct_answer", "solution", "target", "label", "expected",
    "output", "response", "result",
)  # fmt: skip
DESCRIBING = ("source", "data_source", "level", "difficulty", "ability", "subject", "topic", "type", "split", "style")
"""Columns that tell what kind of row it is: never the answer unless it is called so in the config."""
FEW_LABELS = 10  # different answers up to which they are named in the prompt
LOOKED_AT = 64  # answers on which a reward is tried
LONG_PROMPT, WORDS = 1024, 8  # tokens; words of an answer that a model could be expected to hit exactly
LETTERS = 4  # of a token, where no tokenizer is at hand
STEPS = "Please reason step by step, and put your final answer within \\boxed{}."
ALONE = "Answer with nothing but the answer itself."
REASONED = {"number": STEPS, "math": STEPS, "exact": ALONE}
"""System messages by reward, for bases that can reason; the demo's can only answer."""
BRIEF = {"number": "Answer with the number.", "math": "Answer with \\boxed{} alone.", "exact": ALONE}
FORMAT = 'prompt_format = "Question: {prompt}\\nAnswer:"  # for a base without a chat template'
_WORDS = re.compile(
    r"(?<![\\A-Za-z])[A-Za-z]{2,}|^[A-Za-z](?:[ ,]+[A-Za-z])*$"
)  # letters are no algebra: there "b a" would be "a b"


@dataclass(frozen=True, slots=True)
class Proposal:
    """A config, and why it is as it is."""

    settings: Mapping[str, Mapping[str, Any]]
    reasons: Mapping[str, str]
    """Reason for each guessed option, by dotted name."""
    summary: str


def propose(source: str, vram: int | None) -> Proposal:
    """vram: of a card to plan for (bytes); None: this machine. Raises DataError where nothing can be guessed."""
    rows = _rows(source)
    prompt, answer = _columns(rows, source)
    reward, why = _reward([row[answer] for row in rows])
    plain = read_examples(Data(source=source, prompt=prompt, answer=answer), source, "train")
    looked = [example.text for example in plain[:LOOKED_AT]]
    named = any(map(gold.asked, looked)) or all("answer" in text.lower() for text in looked)  # they say how
    card = _card(vram)
    finals = [gold.final(row[answer]) for row in rows]
    labels = _labels(finals) if reward == "exact" else []
    letters = max(map(len, finals))
    for name in (*(BASES if card is not None else ()), "demo"):
        system = None if named else (BRIEF if name == "demo" else REASONED)[reward]
        if labels and not all(label in text for text in looked for label in labels):
            system = f"Answer with one of: {', '.join(labels)}. Write nothing else."
        columns: dict[str, Any] = {"source": source, "prompt": prompt, "answer": answer, "system": system}
        examples = read_examples(Data(**columns), source, "train")
        lengths, how = _lengths(name, examples)
        settings = _settings(name, columns, reward, _rounded(_limit(lengths)), letters)
        if labels:
            settings["rollout"]["max_new_tokens"] = max(8, letters)
        held = settings.setdefault("eval", {}).get("rows", Eval().rows)
        settings["eval"]["rows"] = min(held, max(1, len(rows) // 5))
        if name == "demo" or _fits(settings, vram):
            break
    reasons = {
        "data.prompt": f"guessed from the columns {', '.join(rows[0])}",
        "data.answer": f"guessed; e.g. {str(rows[0][answer])[-60:]!r}",
        "data.max_prompt_tokens": f"prompts have {median(lengths):.0f} tokens (median), {max(lengths)} at most ({how})",
        "rewards.functions": why,
        "eval.rows": f"of {len(rows)} rows these are held out and not trained on",
        "model.name": f"that of preset {name}, {'as there is no card' if card is None else 'the largest that fits'}",
    }
    few = "; a few hundred are a start" if len(rows) < 100 else ""
    return Proposal(settings, reasons, f"{len(rows)} rows{few}; '{prompt}' is asked, '{answer}' is right; {why}")


def _rows(source: str) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    for _, row in sources.rows(Data(source=source), source, "train"):
        if isinstance(row, DataError):
            raise row
        found.append(flat(row))
    if not found:
        raise DataError(f"{source} has no rows")
    return found


# -- columns ----------------------------------------------------------------------------------------------------


def _columns(rows: Sequence[Mapping[str, Any]], source: str) -> tuple[str, str]:
    """-> the column that is asked and the one with the answers: by name, else the longest and the shortest text.

    A column with an answer's name counts as that even where a row of it is no answer: then the row is named.
    """
    names = [name for name in rows[0] if all(name in row for row in rows)]
    asked = [name for name in names if all(_is_prompt(row[name]) for row in rows) and _varies(rows, name)]
    prompt = _named(asked, PROMPTS) or max(
        (name for name in asked if name not in ANSWERS), key=lambda name: _letters(rows, name), default=None
    )
    if prompt is not None and isinstance(rows[0][prompt], list) and rows[0][prompt][-1]["role"] == "assistant":
        raise DataError(
            f"{source}: the last message of '{prompt}' is the assistant's: move it to a column 'answer', so that the "
            "prompt ends with the user"
        )
    if prompt == "instruction" and any(str(row.get("input") or "").strip() for row in rows):
        raise DataError(
            f"{source}: 'instruction' and 'input' hold the question together. Write them into one column: "
            f"jq -c '{{prompt: (.instruction + \"\\n\" + .input), answer: .output}}' {quoted(source)} > flat.jsonl"
        )
    others = [name for name in rows[0] if name != prompt]
    if prompt is not None and (answer := _named(others, ANSWERS)) is not None:
        for number, row in enumerate(rows, 1):
            if gold_text(row.get(answer)) is None:
                raise DataError(
                    f"{source}: the column '{answer}' should hold the answers, but row {number} has "
                    f"{row.get(answer)!r:.60}. Correct it or remove the row; write text or a number"
                )
        return prompt, answer
    given = [name for name in names if name != prompt and all(gold_text(row[name]) is not None for row in rows)]
    given = [name for name in given if name.lower().rpartition(".")[2] not in (*COUNTED, *DESCRIBING)]
    answer = min(given, key=lambda name: _letters(rows, name), default=None)
    if prompt is None or answer is None:
        raise DataError(f"{source}: {_missing(rows[0], prompt)}")
    if len(rows) >= 10 and (kinds := len({row[answer] for row in rows})) <= len(rows) // 5:
        raise DataError(
            f"{source}: no column has a name such as answer, and '{answer}' has only {kinds} different values in "
            f"{len(rows)} rows. Rename the column with the answers to 'answer'"
        )
    return prompt, answer


def _named(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    """By the whole name, or its last part where it lies inside of another column."""
    return next((name for want in wanted for name in names if name.lower().rpartition(".")[2] == want), None)


def _varies(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    return len(rows) == 1 or any(row[name] != rows[0][name] for row in rows)


def _letters(rows: Sequence[Mapping[str, Any]], name: str) -> int:
    return sum(len(str(row[name])) for row in rows)


def _is_prompt(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, list) and bool(value) and all(isinstance(m, Mapping) and "role" in m for m in value)


def _missing(row: Mapping[str, Any], prompt: str | None) -> str:
    """The error for a file without a column for the prompt or the answer, with what to do."""
    what = "prompts" if prompt is None else "answers"
    hint = "; without answers write a reward of your own, as examples/own_reward.py does" if prompt else ""
    return f"no column holds {what} (text in every row); it has {', '.join(row)}. Name them prompt and answer{hint}"


# -- reward -----------------------------------------------------------------------------------------------------


def _reward(answers: Sequence[Any]) -> tuple[str, str]:
    """-> the built-in that can tell right from wrong by these gold answers, and why."""
    finals = [gold.final(answer) for answer in answers]
    if all(as_number(final) is not None for final in finals):
        return "number", "the answers are numbers: the last number of a completion counts"
    tried = finals[:LOOKED_AT]
    if not any(_WORDS.search(final) for final in tried) and _verified(tried):
        return "math", "the answers are mathematics: compared by math-verify"
    if all(len(str(answer).split()) <= WORDS for answer in answers):
        return "exact", "the answers are a few words: the whole completion must be the answer"
    return "exact", (
        "the answers are long texts, and exact pays only for the very same one: better write a reward of your own, as "
        "examples/own_reward.py does"
    )


def _labels(finals: Sequence[str]) -> list[str]:
    """The different answers, where they are so few that each stands beside many prompts."""
    labels = sorted(set(finals))
    return labels if len(labels) <= FEW_LABELS and len(finals) >= 5 * len(labels) else []


def _verified(finals: Sequence[str]) -> bool:
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that it has no deadline: init is no run
    boxed = [gold.written(gold.BOXED, final) for final in finals]
    return all(value == 1 for value in BUILTINS["math"]([], boxed, [], answer=finals))


# -- lengths and the machine ------------------------------------------------------------------------------------


def _lengths(preset: str, examples: Sequence[Example]) -> tuple[list[int], str]:
    """Tokens of the prompts, and how they were counted."""
    if (template := template_at_hand(loading.load(preset).model)) is not None:
        return [len(template.encode(example.prompt).ids) for example in examples], "counted"
    return [len(example.text) // LETTERS + 1 for example in examples], f"{LETTERS} characters each, a guess"


def _limit(lengths: Sequence[int]) -> int:
    """The longest prompt; of very long ones those that 95 of 100 are not longer than."""
    longest = max(lengths)
    return longest if longest <= LONG_PROMPT else max(LONG_PROMPT, sorted(lengths)[int(0.95 * len(lengths))])


def _rounded(tokens: int) -> int:
    """A round number with room for a guess that is wrong by a third."""
    return -(-tokens * 4 // 3 // 32) * 32 + 32


def _card(vram: int | None) -> int | None:
    """Bytes of the card to plan for; None: there is none."""
    if vram is not None or not torch.cuda.is_available():
        return vram
    return int(torch.cuda.get_device_properties(0).total_memory)


def _fits(settings: Mapping[str, Mapping[str, Any]], vram: int | None) -> bool:
    """Whether these options fit, by their memory plan."""
    return bool(memory.check_memory(loading.validate(_plain(settings)), vram, fit=False)[0]["fits"])


# -- the file ---------------------------------------------------------------------------------------------------


def _settings(
    preset: str, columns: Mapping[str, Any], reward: str, prompt_tokens: int, letters: int
) -> dict[str, dict[str, Any]]:
    """The preset's options with another task in them. letters: of the longest gold answer."""
    settings = loading.read_toml(loading.preset_path(preset))
    settings["data"] = {name: value for name, value in columns.items() if value is not None}
    settings["data"]["max_prompt_tokens"] = prompt_tokens
    settings["rewards"] = {**settings["rewards"], "functions": {reward: 1.0}}
    if reward == "exact" or preset == "demo":  # the answer alone; of a long question a small base says more than that
        shortest = 0 if reward == "exact" else prompt_tokens
        settings["rollout"]["max_new_tokens"] = min(512, max(shortest, -(-letters // 2 // 32) * 32 + 32))
    return settings


def _plain(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {section: dict(values) for section, values in settings.items()}


def written(proposal: Proposal, source: str) -> str:
    """The proposal as a config file with comments: what was guessed and why, and what the other options mean."""
    lines = [f"# Written by `lite-trgrpo init {source}`.", f"# {proposal.summary}.", ""]
    for section, values in proposal.settings.items():
        lines += [f"[{section}]", *_section(section, values, proposal.reasons), ""]
        if section == "model" and "prompt_format" not in values:
            lines[-1:] = [f"# {FORMAT}", ""]
    return "\n".join(lines)


def _section(section: str, values: Mapping[str, Any], reasons: Mapping[str, str]) -> Iterator[str]:
    for key, value in values.items():
        reason = reasons.get(f"{section}.{key}")
        yield f"# {reason or SECTIONS[section].model_fields[key].description}".replace("\n", " ")
        yield loading.toml_line(key, value)


def validated(proposal: Proposal) -> Config:
    """Options as they will be read from the file."""
    return loading.validate(_plain(proposal.settings))
