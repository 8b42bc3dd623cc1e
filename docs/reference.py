"""Write docs/options.md, the table of all options, from the code that defines them.

python docs/reference.py > docs/options.md
"""

import typing
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from lite_trgrpo.config.loading import MAY_CHANGE, toml_line
from lite_trgrpo.config.schema import SECTIONS

HEAD = """# Options

Set an option with `--set section.key=value`, or in a TOML file under `[section]` (`--config`). Values are TOML:
`--set "rewards.functions={ exact = 1.0 }"`, `--set "model.lora_targets=['q_proj']"`, `--set objective.weight.alpha=2`.
`--set section.key=` unsets an option that may be unset. You may change options marked with a star when you resume a
run; all others stay fixed. This page is generated: `python docs/reference.py > docs/options.md`."""


def lines() -> Iterator[str]:
    yield HEAD
    for section, model in SECTIONS.items():
        yield f"\n## {section}\n\n{model.__doc__}\n\n| option | type | default | |\n|---|---|---|---|"
        yield from _rows(section, model)


def _rows(section: str, model: type[BaseModel], table: str = "") -> Iterator[str]:
    """A row for each option; the entries of a table with fixed keys have rows of their own."""
    for key, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _rows(section, field.annotation, f"{key}.")
            continue
        star = " \\*" if f"{section}.{key}" in MAY_CHANGE else ""
        default = "required" if field.default is PydanticUndefined else _value(field.default)
        yield f"| `{table}{key}`{star} | {_type(field.annotation)} | {default} | {_cell(field.description or '')} |"


def _value(value: Any) -> str:
    return "unset" if value is None else f"`{_cell(toml_line('x', value).partition(' = ')[2])}`"


def _type(annotation: Any) -> str:
    """`"a", "b"` of a Literal, `int or unset` of an optional number, `list of str`."""
    kind, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if kind is typing.Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if kind in (typing.Union, UnionType):
        return " or ".join(_type(part) for part in parts if part is not NoneType)
    if kind is list:
        return f"list of {_type(parts[0])}"
    return {dict: "table", str: "text", int: "whole number", float: "number", bool: "true, false"}[kind or annotation]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print("\n".join(lines()))
