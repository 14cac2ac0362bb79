"""Reads a frozen dataclass from the JSON that one process wrote for another: every type is compared.

    spec = from_json(JobSpec, text)

Standard library only: a batch host may have nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from typing import Any, TypeVar

Record = TypeVar("Record")


def from_json(kind: type[Record], text: str) -> Record:
    """The `kind` that is written in `text`. Raises ValueError, in one line, where it is not."""
    try:
        values = json.loads(text)
    except RecursionError as error:
        raise ValueError(str(error)) from error
    if not isinstance(values, dict):
        raise ValueError("it is not a mapping of keys to values")
    hints = typing.get_type_hints(kind)
    read = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name in values:
            read[field.name] = _read(values.pop(field.name), hints[field.name], field.name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{field.name} is missing")
    if values:
        raise ValueError(f"unknown key {min(values)}")
    return kind(**read)


def _read(value: Any, hint: Any, key: str) -> Any:
    """`value` as the type `hint`: bool, int, float, str, T | None, tuple[T, ...] or dict[str, T]."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind is types.UnionType:
        return None if value is None else _read(value, inner[0], key)
    if kind is tuple and isinstance(value, list):
        return tuple(_read(item, inner[0], key) for item in value)
    if kind is dict and isinstance(value, dict):
        return {name: _read(item, inner[1], key) for name, item in value.items()}
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is float and number:
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and (hint is not int or number):
        return value
    raise ValueError(f"{key}={value!r:.60} is not of the type {getattr(hint, '__name__', hint)}")
