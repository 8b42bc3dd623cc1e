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
from lite_trgrpo.data.examples import read_examples
from lite_trgrpo.errors import DataError
from lite_trgrpo.model.hf import template_at_hand
from lite_trgrpo.records import Example
from lite_trgrpo.rewards import BUILTINS, gold

BASES = ("math-7b", "math-4b", "math-1.5b", "math-0.5b")  # presets whose base and options suit any task; else demo
PROMPTS = ("prompt", "question", "problem", "instruction", "query", "input", "messages", "text")
ANSWERS = ("answer", "gold", "final_answer", "solution", "target", "label", "expected", "output", "response", "result")
LOOKED_AT = 64  # answers on which a reward is tried
LONG_PROMPT, WORDS = 1024, 8  # tokens; words of an answer that a model could be expected to hit exactly
LETTERS = 4  # of a token, where no tokenizer is at hand
STEPS = "Please reason step by step, and put your final answer within \\boxed{}."
ALONE = "Answer with nothing but the answer itself."
REASONED = {"number": STEPS, "math": STEPS, "exact": ALONE}
"""System messages by reward, for bases that can reason; the demo's can only answer."""
BRIEF = {"number": "Answer with the number.", "math": "Answer with \\boxed{} alone.", "exact": ALONE}
_WORDS = re.compile(
    r"(?<![\\A-Za-z])[A-Za-z]{2,}|^[A-Za-z](?:[ ,]+[A-Za-z])*$"
)  # letters are no algebra: there "b a" would be "a b"
_NUMBER = re.compile(r"[-+\u2212]?\s?[$€£]?\d[\d,]*(?:\.\d+)?\s?[%€£]?")


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
    letters = max(len(gold.final(row[answer])) for row in rows)
    for name in (*(BASES if card is not None else ()), "demo"):
        system = None if named else (BRIEF if name == "demo" else REASONED)[reward]
        columns: dict[str, Any] = {"source": source, "prompt": prompt, "answer": answer, "system": system}
        examples = read_examples(Data(**columns), source, "train")
        lengths, how = _lengths(name, examples)
        settings = _settings(name, columns, reward, _rounded(_limit(lengths)), letters)
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
    found = []
    for _, row in sources.rows(Data(source=source), source, "train"):
        if isinstance(row, DataError):
            raise row
        found.append(row)
    if not found:
        raise DataError(f"{source} has no rows")
    return found


# -- columns ----------------------------------------------------------------------------------------------------


def _columns(rows: Sequence[Mapping[str, Any]], source: str) -> tuple[str, str]:
    """-> the column that is asked and the one with the answers: by name, else the longest and the shortest text."""
    names = [name for name in rows[0] if all(name in row for row in rows)]
    asked = [name for name in names if all(_is_prompt(row[name]) for row in rows)]
    given = [name for name in names if all(_is_answer(row[name]) for row in rows) and name.lower() not in COUNTED]
    prompt = _named(asked, PROMPTS) or max(
        (name for name in asked if name not in ANSWERS), key=lambda name: _letters(rows, name), default=None
    )
    given = [name for name in given if name != prompt]
    answer = _named(given, ANSWERS) or min(given, key=lambda name: _letters(rows, name), default=None)
    if prompt is None or answer is None:
        raise DataError(f"{source}: {_missing(rows[0], source, prompt)}")
    if isinstance(rows[0][prompt], list) and rows[0][prompt][-1]["role"] == "assistant":
        raise DataError(
            f"{source}: the last message of '{prompt}' is the assistant's: move it to a column 'answer', so that the "
            "prompt ends with the user"
        )
    return prompt, answer


def _named(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    return next((name for want in wanted for name in names if name.lower() == want), None)


def _letters(rows: Sequence[Mapping[str, Any]], name: str) -> int:
    return sum(len(str(row[name])) for row in rows)


def _is_prompt(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, list) and bool(value) and all(isinstance(m, Mapping) and "role" in m for m in value)


def _is_answer(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool) and str(value).strip() != ""


def _missing(row: Mapping[str, Any], source: str, prompt: str | None) -> str:
    """The error for a file without a column for the prompt or the answer, with what to do."""
    inside = {
        key: f".{name}.{key}" for name, value in row.items() if isinstance(value, Mapping) for key in value
    }  # fmt: skip
    what = "prompts" if prompt is None else "answers"
    line = f"no column holds {what} (text in every row); it has {', '.join(row)}"
    if (ask := _named(list(inside), PROMPTS)) and (right := _named(list(inside), ANSWERS)):
        flat = f"jq -c '{{prompt: {inside[ask]}, answer: {inside[right]}}}' {source} > flat.jsonl"
        return f"{line}, with fields inside of them. Write them side by side: {flat}"
    hint = "; without answers write a reward of your own, as examples/own_reward.py does" if prompt else ""
    return f"{line}. Name them prompt and answer{hint}"


# -- reward -----------------------------------------------------------------------------------------------------


def _reward(answers: Sequence[Any]) -> tuple[str, str]:
    """-> the built-in that can tell right from wrong by these gold answers, and why."""
    finals = [gold.final(answer) for answer in answers]
    if all(_NUMBER.fullmatch(final) for final in finals):
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
    if reward == "exact" or preset == "demo":  # the answer alone
        settings["rollout"]["max_new_tokens"] = min(512, -(-letters // 2 // 32) * 32 + 32)
    return settings


def _plain(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {section: dict(values) for section, values in settings.items()}


def written(proposal: Proposal, source: str) -> str:
    """The proposal as a config file with comments: what was guessed and why, and what the other options mean."""
    lines = [f"# Written by `lite-trgrpo init {source}`.", f"# {proposal.summary}.", ""]
    for section, values in proposal.settings.items():
        lines += [f"[{section}]", *_section(section, values, proposal.reasons), ""]
    return "\n".join(lines)


def _section(section: str, values: Mapping[str, Any], reasons: Mapping[str, str]) -> Iterator[str]:
    for key, value in values.items():
        reason = reasons.get(f"{section}.{key}")
        yield f"# {reason or SECTIONS[section].model_fields[key].description}".replace("\n", " ")
        yield loading.toml_line(key, value)


def validated(proposal: Proposal) -> Config:
    """Options as they will be read from the file."""
    return loading.validate(_plain(proposal.settings))
