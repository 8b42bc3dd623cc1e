"""How often the base solves each prompt, remembered in a file beside the data: which prompts are worth training on.

One line of JSON a prompt: {"prompt": hash, "solved": answers, "tried": answers, "model": what answered}.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lite_trgrpo.errors import DataError
from lite_trgrpo.records import Example

LOW, HIGH = 0.1, 0.9  # solve rates between which a prompt teaches: beyond them most groups have no spread
Rates = dict[str, tuple[int, int]]  # by prompt: answers solved, answers tried


def key(example: Example) -> str:
    """Key of a prompt as the run asks it, system message included."""
    return hashlib.sha256(example.text.encode()).hexdigest()[:32]


def default_file(source: str) -> Path:
    """Beside a data file; for other sources in this folder."""
    path = Path(source)
    if path.suffix in (".jsonl", ".json", ".csv", ".parquet"):
        return path.with_suffix(".scan.jsonl")
    return Path("".join(c if c.isalnum() else "-" for c in source) + ".scan.jsonl")


def read(path: Path, model: str | None = None) -> Rates:
    """Read the solve rates that a scan has found so far; with `model`, refuse those of another. Raises DataError."""
    if not path.is_file():
        raise DataError(
            f"no scan {path} (from {Path.cwd()}); make one with: lite-trgrpo check --scan 500 and the options"
        )
    found: Rates = {}
    for number, text in enumerate(whole(path).splitlines(), 1):
        try:
            row = json.loads(text)
            prompt, counts, by = str(row["prompt"]), (int(row["solved"]), int(row["tried"])), row["model"]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path}:{number} is not a line of a scan. Delete the file and scan again") from None
        if model is not None and by != model:
            raise DataError(f"{path} was made with {by}, not {model}; give another --scan-file, or delete it")
        found[prompt] = counts
    return found


def whole(path: Path) -> bytes:
    """The bytes of a scan without the half line that a killed one leaves."""
    found = path.read_bytes()
    return found[: found.rfind(b"\n") + 1]


def line(example: Example, solved: int, tried: int, model: str) -> str:
    return json.dumps({"prompt": key(example), "solved": solved, "tried": tried, "model": model}) + "\n"


def teaches(counts: tuple[int, int] | None) -> bool:
    return counts is not None and counts[1] > 0 and LOW <= counts[0] / counts[1] <= HIGH


def kept(examples: Sequence[Example], path: Path) -> list[Example]:
    """Those that the base solves sometimes. Raises DataError if there are none."""
    rates = read(path)
    found = [example for example in examples if teaches(rates.get(key(example)))]
    if not found:
        known = sum(key(example) in rates for example in examples)
        raise DataError(
            f"data.scan = {str(path)!r}: none of {len(examples)} training prompts is solved between {LOW:.0%} and "
            f"{HIGH:.0%} of the time ({known} of them are in the scan); scan more, or unset data.scan"
        )
    return found


def summary(rates: Rates, examples: Sequence[Example]) -> Mapping[str, Any]:
    """Counts of the training prompts: scanned, never solved, always solved, between LOW and HIGH."""
    known = [rates[name] for name in {key(example) for example in examples} if name in rates]
    return {
        "scanned": len(known),
        "never": sum(solved == 0 for solved, _ in known),
        "always": sum(solved == tried > 0 for solved, tried in known),
        "teaching": sum(map(teaches, known)),
        "solved": sum(solved for solved, _ in known) / max(1, sum(tried for _, tried in known)),
    }
