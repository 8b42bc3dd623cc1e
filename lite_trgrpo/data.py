"""Sources -> examples, held-out rows, and the order in which a run sees them.

A source is a .jsonl, .csv or .parquet file, a data set on the Hub, `reasoning-gym:TASK`, or `builtin:addition`.
Nothing is dropped silently: a row that cannot be used is an error that names file, line and reason.
"""

import csv
import functools
import importlib.util
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lite_trgrpo.config import nearest
from lite_trgrpo.errors import DataError, HubError, MissingPackageError, first_line
from lite_trgrpo.hub import fetch
from lite_trgrpo.options import Data
from lite_trgrpo.preflight import scan
from lite_trgrpo.records import Example

FILES = (".jsonl", ".json", ".csv", ".parquet")
SHOWN = 5  # bad rows named in one message
Row = tuple[str, Mapping[str, Any] | DataError]  # where it came from; its columns, or why there are none


def load(data: Data, eval_rows: int) -> tuple[list[Example], list[Example]]:
    """-> (training examples, held-out examples). No held-out prompt occurs in training, compared by text.

    Held-out rows come from `eval_source` or `eval_split` where one is given, else from the source itself: at most half
    of its distinct prompts. Which rows are held out depends on `data.seed` alone, never on the run's seed. With `scan`,
    those of medium difficulty are left for training.
    """
    if data.eval_split and not _is_hub_id(data.eval_source or data.source):
        raise DataError(f"data.eval_split = {data.eval_split!r}: only a Hub data set has splits; use data.eval_source")
    own = examples(data, data.source, data.split)
    if data.eval_source or data.eval_split:
        other = data.model_copy(update={"subset": None, "revision": None, "options": {}}) if data.eval_source else data
        pool = examples(other, data.eval_source or data.source, data.eval_split or data.split)
        limit = eval_rows
    else:
        pool, limit = own, min(eval_rows, len({row.text for row in own}) // 2)
    distinct = list({row.text: row for row in reversed(pool)}.values())[::-1]  # the first row of each text
    heldout = random.Random(data.seed).sample(distinct, min(limit, len(distinct)))
    texts = {row.text for row in heldout}
    training = [row for row in own if row.text not in texts]
    if not training:
        raise DataError(
            f"{data.source}: no row is left for training after {len(heldout)} were held out; lower eval.rows"
        )
    return training if data.scan is None else scan.kept(training, Path(data.scan)), heldout


def batch(count: int, per_step: int, seed: int, step: int, refill: int = 0) -> list[int]:
    """Indices of the examples of a step: a pure function, so a resumed run continues exactly where it was.

    Each epoch is its own shuffle; a step may span two epochs. Refills above 0 are fresh prompts for the same step, from
    shuffles of their own.
    """
    indices = []
    for position in range(step * per_step, (step + 1) * per_step):
        epoch, place = divmod(position, count)
        indices.append(_order(count, f"{seed}:{epoch}:{refill}" if refill else f"{seed}:{epoch}")[place])
    return indices


@functools.lru_cache(maxsize=8)
def _order(count: int, seed: str) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


# -- from rows to examples ----------------------------------------------------------------------------------


def examples(data: Data, source: str, split: str) -> list[Example]:
    """All rows of a source as examples, or one DataError that names the rows that cannot be used."""
    found, problems, kinds = [], [], set()
    for origin, row in rows(data, source, split):
        try:
            if isinstance(row, DataError):
                raise row
            found.append(_example(row, origin, data))
        except DataError as error:
            problems.append(str(error))
            kinds.add(str(error).removeprefix(origin))
    if problems:
        if len(kinds) == 1 and len(problems) > 1 and not found:
            raise DataError(f"{problems[0]} (the same in all {len(problems)} rows)")
        more = f"\n... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise DataError("\n".join(problems[:SHOWN]) + more)
    if not found:
        raise DataError(f"{source} has no rows")
    return found


def _example(row: Mapping[str, Any], origin: str, data: Data) -> Example:
    for option, column in (("data.prompt", data.prompt), ("data.answer", data.answer)):
        if column and column not in row:
            raise DataError(
                f"{origin}: no column '{column}'.{nearest(column, list(row))} It has {', '.join(row)}; "
                f"type --set {option}=NAME" + (" (or '' if no reward needs one)" if option == "data.answer" else "")
            )
    columns = {name: value for name, value in row.items() if name != data.prompt}
    if data.answer:
        columns["answer"] = row[data.answer]
    example = Example(_prompt(row[data.prompt], origin, data.system), columns, origin)
    try:
        example.text.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{origin}: the prompt holds half a surrogate pair, which is no text; write the file anew"
        ) from None
    return example


def _prompt(value: Any, origin: str, system: str | None) -> str | list[dict[str, str]]:
    """A string, or chat messages; with a system message in front where the run declares one."""
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"{origin}: the prompt is empty")
        return value if system is None else [{"role": "system", "content": system}, {"role": "user", "content": value}]
    if not isinstance(value, Sequence):
        raise DataError(f"{origin}: the prompt is {type(value).__name__}, not a string or a list of messages")
    for message in value:
        if not (isinstance(message, Mapping) and all(isinstance(message.get(k), str) for k in ("role", "content"))):
            raise DataError(f"{origin}: {message!r:.80} is not a message; it needs 'role' and 'content', both strings")
    messages = [{"role": m["role"], "content": m["content"]} for m in value]
    if not any(m["content"].strip() for m in messages):
        raise DataError(f"{origin}: the prompt is empty")
    if system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


# -- sources ------------------------------------------------------------------------------------------------


def rows(data: Data, source: str, split: str) -> Iterable[Row]:
    """Every row as it stands in the source, with what is wrong with those that are none."""
    kind, colon, name = source.partition(":")
    if colon and kind == "builtin":
        return _builtin(name, data)
    if colon and kind == "reasoning-gym":
        return _reasoning_gym(name, data)
    if source.endswith(FILES):
        return _file(Path(source))
    if _is_hub_id(source):
        return _hub(data, source, split)
    raise DataError(
        f"data.source {source!r} is not a file ending in {', '.join(FILES)}, a Hub id such as openai/gsm8k, "
        "reasoning-gym:TASK or builtin:addition"
    )


def _is_hub_id(source: str) -> bool:
    local = source.endswith(FILES) or source.startswith((".", "/", "builtin:", "reasoning-gym:"))
    return source.count("/") == 1 and not local


def _builtin(name: str, data: Data) -> Iterator[Row]:
    if name != "addition":
        raise DataError(f"no built-in generator '{name}'; there is: addition")
    unknown = set(data.options) - {"first", "second"}
    if unknown:
        raise DataError(f"builtin:addition has no option {', '.join(sorted(unknown))}; it has first and second")
    for name, value in data.options.items():
        if not (isinstance(value, list) and len(value) == 2 and all(type(n) is int for n in value)):
            raise DataError(
                f"builtin:addition: {name} = {value!r} is not a range such as [10, 59]; correct data.options"
            )
    for i, row in enumerate(addition(data.seed, **data.options)):
        yield f"builtin:addition:{i + 1}", row


def addition(seed: int, first: Sequence[int] = (10, 59), second: Sequence[int] = (10, 39)) -> list[dict[str, str]]:
    """Every sum of a number of `first` and one of `second` (inclusive ranges), once, shuffled."""
    pairs = [(a, b) for a in range(first[0], first[1] + 1) for b in range(second[0], second[1] + 1)]
    random.Random(seed).shuffle(pairs)
    return [{"prompt": f"What is {a} + {b}? Answer with the number.", "answer": str(a + b)} for a, b in pairs]


def _reasoning_gym(task: str, data: Data) -> Iterator[Row]:
    _need("reasoning_gym", f"reasoning-gym:{task}")
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise DataError(f"reasoning-gym has no task '{task}'.{nearest(task, list(DATASETS))}")
    try:
        rows = reasoning_gym.create_dataset(task, **({"size": 2000, "seed": data.seed} | data.options))
    except (TypeError, AssertionError, ValueError) as error:
        raise DataError(f"reasoning-gym:{task}: {error}. Look at data.options") from None
    for i, row in enumerate(rows):
        yield f"reasoning-gym:{task}:{i + 1}", {"prompt": row["question"], **row}


def _file(path: Path) -> Iterator[Row]:
    if not path.is_file():
        raise DataError(f"no file {path} (from {Path.cwd()}); give data.source a path that exists")
    try:
        if path.suffix == ".csv":
            yield from _csv(path)
        elif path.suffix == ".parquet":
            yield from _parquet(path)
        else:
            yield from _jsonl(path)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from None


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", _json_object(line, f"{path}:{number}")


def _json_object(line: str, origin: str) -> Mapping[str, Any] | DataError:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError of its own
        return DataError(f"{origin}: not a JSON object on one line: {error}")
    if not isinstance(row, dict):
        return DataError(f"{origin}: a JSON {type(row).__name__}, not an object with columns")
    return row


def _csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)  # strict: a quote that never closes is an error, not a huge field
        try:
            header = next(reader, [])
            for row in reader:
                origin = f"{path}:{reader.line_num}"
                if row and len(row) != len(header):
                    yield origin, DataError(f"{origin}: {len(row)} fields, but the header has {len(header)}")
                elif row:
                    yield origin, dict(zip(header, row, strict=True))
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not valid CSV: {error}") from None


def _parquet(path: Path) -> Iterator[Row]:
    _need("pyarrow", str(path))
    import pyarrow.parquet
    from pyarrow import ArrowException

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except ArrowException as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from None
    for i, row in enumerate(rows):
        yield f"{path}:{i + 1}", row


def _hub(data: Data, source: str, split: str) -> Iterator[Row]:
    _need("datasets", source)
    from datasets import config, load_dataset
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError, DatasetBuildError

    revision = data.revision
    if not config.HF_HUB_OFFLINE:
        # Tells gone, gated and unreachable apart at once; `datasets` retries for half a minute and blurs them.
        revision = fetch(source, revision, ["README.md"], "data.source").name
    try:
        rows = load_dataset(source, data.subset, split=split, revision=revision)
    except (ValueError, RuntimeError, EmptyDatasetError, DataFilesNotFoundError, DatasetBuildError) as error:
        # an unknown subset or split (the library lists those there are), or files that it cannot read
        line = first_line(error.__cause__ or error)
        raise DataError(f"data set {source}: {line}. Look at data.source, data.subset and data.split") from None
    except Exception as error:  # whatever the client's transport raises: it differs between its versions
        hint = (
            "HF_HUB_OFFLINE is set: unset it and run this again, or give data.source a file" if config.HF_HUB_OFFLINE
            else "Check the connection; a gated or private one needs `hf auth login`; one fetched before works with "
            "HF_HUB_OFFLINE=1"
        )  # fmt: skip
        raise HubError(f"data set {source} could not be fetched: {first_line(error)}. {hint}") from None
    for i, row in enumerate(rows):
        yield f"{source}:{split}:{i + 1}", row


def _need(package: str, what: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise MissingPackageError(f"{what} needs the package {package}. Type: pip install 'lite-trgrpo[data]'")
