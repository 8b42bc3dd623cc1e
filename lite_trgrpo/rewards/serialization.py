"""Values as one line of JSON and back, exactly: also tuples, dates, odd keys and text that is no valid Unicode."""

import json
from collections.abc import Callable, Mapping
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any

TAG = "\0"  # key of the objects that stand for what JSON has no word for

# What data sources hold besides JSON's own types; a datetime is a date too, so it comes first
_KINDS: Mapping[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "datetime": (datetime, datetime.isoformat, datetime.fromisoformat),
    "date": (date, date.isoformat, date.fromisoformat),
    "time": (time, time.isoformat, time.fromisoformat),
    "decimal": (Decimal, str, Decimal),
    "bytes": (bytes, bytes.hex, bytes.fromhex),
}


def dumps(value: Any) -> bytes:
    """One line. `surrogatepass` keeps lone surrogates, which model text can hold and UTF-8 cannot."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def loads(line: bytes) -> Any:
    return json.loads(line.decode("utf-8", "surrogatepass"))


def pack(value: Any) -> Any:
    """-> what JSON can say without loss; `unpack` is its inverse. Raises TypeError for an object of another kind."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [pack(item) for item in value]
    if isinstance(value, tuple):
        return {TAG: "tuple", "value": [pack(item) for item in value]}
    if isinstance(value, dict):
        if all(isinstance(key, str) and key != TAG for key in value):
            return {key: pack(item) for key, item in value.items()}
        return {TAG: "dict", "value": [[pack(key), pack(item)] for key, item in value.items()]}
    for kind, (type_, plain, _) in _KINDS.items():
        if isinstance(value, type_):
            return {TAG: kind, "value": plain(value)}
    raise TypeError(f"{type(value).__name__} {value!r:.60}")


def unpack(value: Any) -> Any:
    if isinstance(value, list):
        return [unpack(item) for item in value]
    if not isinstance(value, dict):
        return value
    if TAG not in value:
        return {key: unpack(item) for key, item in value.items()}
    kind, inside = value[TAG], value["value"]
    if kind == "tuple":
        return tuple(unpack(item) for item in inside)
    if kind == "dict":
        return {unpack(key): unpack(item) for key, item in inside}
    return _KINDS[kind][2](inside)
