"""Sources -> rows.

A source is a .jsonl, .csv or .parquet file, a data set on the Hub, `reasoning-gym:TASK`, or `builtin:addition`.
Nothing is dropped silently: a row that cannot be used is an error that names file, line and reason.
"""

import csv
import importlib.util
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lite_trgrpo.config.loading import is_hub_id, nearest
from lite_trgrpo.config.schema import Data
from lite_trgrpo.data.hub import fetch
from lite_trgrpo.errors import DataError, HubError, MissingPackageError, first_line
from lite_trgrpo.text import quoted

FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
csv.field_size_limit(2**31 - 1)  # else a text of 131,073 characters is "not valid CSV"
Row = tuple[str, Mapping[str, Any] | DataError]  # where it came from; its columns, or why there are none


# -- sources ------------------------------------------------------------------------------------------------


def rows(data: Data, source: str, split: str) -> Iterable[Row]:
    """Every row as it stands in the source, with what is wrong with those that are none."""
    kind, colon, name = source.partition(":")
    if colon and kind == "builtin":
        return _builtin(name, data)
    if colon and kind == "reasoning-gym":
        return _reasoning_gym(name, data)
    if source.lower().endswith(FILES):
        return _file(Path(source).expanduser())
    if is_hub_id(source):
        return _hub(data, source, split)
    raise DataError(
        f"data.source {source!r} is not a file ending in {', '.join(FILES)}, a Hub id such as openai/gsm8k, "
        "reasoning-gym:TASK or builtin:addition"
    )


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
        kind = path.suffix.lower()
        if kind in (".csv", ".tsv"):
            yield from _csv(path, "," if kind == ".csv" else "\t")
        elif kind == ".parquet":
            yield from _parquet(path)
        else:
            yield from _json(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from None
    except UnicodeDecodeError:
        raise DataError(
            f"{path} is not UTF-8 text. Convert it, e.g. from Excel's encoding: iconv -f CP1252 -t UTF-8 {quoted(path)}"
            " (or -f UTF-16)"
        ) from None


def _json(path: Path) -> Iterator[Row]:
    """One object a line, or one array of objects."""
    with path.open(encoding="utf-8-sig") as file:
        if path.suffix.lower() == ".json" and file.read(1) == "[":
            file.seek(0)
            try:
                rows = json.load(file, object_pairs_hook=_object)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path} is not a JSON array: {error}") from None
            yield from ((f"{path}:{number}", _columns(row, f"{path}:{number}")) for number, row in enumerate(rows, 1))
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", _json_object(line, f"{path}:{number}")


def _json_object(line: str, origin: str) -> Mapping[str, Any] | DataError:
    try:
        return _columns(json.loads(line, object_pairs_hook=_object), origin)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError of its own
        return DataError(f"{origin}: not a JSON object on one line: {error}")


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which no key may stand twice: the last would win without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"the key {_twice([name for name, _ in pairs])!r} stands twice")
    return found


def _columns(row: Any, origin: str) -> Mapping[str, Any] | DataError:
    if isinstance(row, dict):
        return row
    return DataError(f"{origin}: a JSON {type(row).__name__}, not an object with columns")


def _twice(names: Sequence[str]) -> str | None:
    return next((name for i, name in enumerate(names) if name in names[:i]), None)


def _csv(path: Path, delimiter: str) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        # strict: a quote that never closes is an error, not a huge field
        reader = csv.reader(file, strict=True, delimiter=delimiter)
        try:
            header = next(reader, [])
            if (name := _twice(header)) is not None:
                raise DataError(f"{path}: the column {name!r} stands twice in the header; rename one")
            if len(header) == 1 and ";" in header[0]:
                convert = f"tr ';' '\\t' < {quoted(path)} > {quoted(path.with_suffix('.tsv'))}"
                raise DataError(f"{path} is separated by semicolons. Convert it: {convert}")
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
