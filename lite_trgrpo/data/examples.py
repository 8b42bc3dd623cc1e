"""Rows -> examples, the held-out split, and the order in which a run sees them."""

import functools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lite_trgrpo.config.loading import is_hub_id, nearest
from lite_trgrpo.config.schema import Data
from lite_trgrpo.data import difficulty
from lite_trgrpo.data.sources import rows
from lite_trgrpo.errors import DataError
from lite_trgrpo.records import Example

SHOWN = 5  # bad rows named in one message


def load_examples(data: Data, eval_rows: int) -> tuple[list[Example], list[Example]]:
    """-> (training examples, held-out examples). No held-out prompt occurs in training, compared by text.

    Held-out rows come from `eval_source` or `eval_split` where one is given, else from the source itself: at most half
    of its distinct prompts. A prompt that stands in many rows is as likely held out as it is trained on. Which rows are
    held out depends on `data.seed` alone, never on the run's seed. With `scan`, those of medium difficulty are left for
    training.
    """
    if data.eval_split and not is_hub_id(data.eval_source or data.source):
        raise DataError(f"data.eval_split = {data.eval_split!r}: only a Hub data set has splits; use data.eval_source")
    own = read_examples(data, data.source, data.split)
    if data.eval_source or data.eval_split:
        other = data.model_copy(update={"subset": None, "revision": None, "options": {}}) if data.eval_source else data
        pool = read_examples(other, data.eval_source or data.source, data.eval_split or data.split)
        limit = eval_rows
    else:
        pool, limit = own, min(eval_rows, len({row.text for row in own}) // 2)
    firsts = {row.text: row for row in reversed(pool)}  # the first row of each text
    count = min(limit, len(firsts))
    if len(firsts) == len(pool):
        heldout = random.Random(data.seed).sample(pool, count)
    else:
        drawn = dict.fromkeys(row.text for row in random.Random(data.seed).sample(pool, len(pool)))
        heldout = [firsts[text] for text in list(drawn)[:count]]
    texts = {row.text for row in heldout}
    training = [row for row in own if row.text not in texts]
    if not training:
        raise DataError(
            f"{data.source}: no row is left for training after {len(heldout)} were held out; lower eval.rows"
        )
    return training if data.scan is None else difficulty.kept(training, Path(data.scan)), heldout


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


def read_examples(data: Data, source: str, split: str) -> list[Example]:
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
    found = flat(row)
    for option, column in (("data.prompt", data.prompt), ("data.answer", data.answer)):
        if column and column not in found:
            raise DataError(
                f"{origin}: no column '{column}'.{nearest(column, list(found))} It has {', '.join(row)}; "
                f"type --set {option}=NAME" + (' (or "" if no reward needs one)' if option == "data.answer" else "")
            )
    columns = {name: value for name, value in row.items() if name != data.prompt}
    if data.answer:
        columns["answer"] = found[data.answer]
    example = Example(_prompt(found[data.prompt], origin, data.system), columns, origin)
    try:
        example.text.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{origin}: the prompt contains invalid Unicode (a lone surrogate). Write the file again as UTF-8"
        ) from None
    return example


def flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns, and the fields inside of them under names such as `reward_model.ground_truth`."""
    nested = [(name, value) for name, value in row.items() if isinstance(value, Mapping)]
    return {f"{name}.{key}": field for name, value in nested for key, field in value.items()} | dict(row)


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
    if messages[-1]["role"] in ("assistant", "system"):  # the one may hold the answer, to the other none is due
        raise DataError(
            f"{origin}: the last message of the prompt is the {messages[-1]['role']}'s. A prompt ends with the user: "
            "move an answer into a column of its own, and a lone instruction into data.system"
        )
    if system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages
