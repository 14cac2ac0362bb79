"""Tables: JSON that a program has written and this one reads back, checked by a pydantic model.

    class _Facts(Table):
        labels: list[str]

    facts = read_object(path, remedy)
    check_table(_Facts, facts, path, remedy)

A table that somebody has edited, or that a disk has damaged, is refused before anything is read by it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bertscale.errors import UserError

Count = Annotated[int, Field(ge=0, lt=2**62)]
Size = Annotated[int, Field(ge=1, lt=2**62)]
FileName = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]  # in the table's folder, never in another one


class Table(BaseModel):
    """A part of a table: its types are exact, keys that it does not name may be there too."""

    model_config = ConfigDict(strict=True, extra="allow")


Checked = TypeVar("Checked", bound=Table)


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in `path`. Raises UserError, in one line that ends with `remedy`."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise damaged(path, error.strerror or error, remedy) from error
    return parse_object(content, path, remedy)


def parse_object(content: bytes, path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object that is `content`, read from `path`. Raises UserError as `read_object`."""
    try:
        values = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise damaged(path, error, remedy) from error
    if not isinstance(values, dict):
        raise damaged(path, "it is not a mapping of keys to values", remedy)
    return values


def check_table(table: type[Checked], values: dict[str, Any], path: Path, remedy: str) -> Checked:
    """`values`, those of `path`, as a `table`. Raises UserError, in one line with the first wrong key."""
    try:
        return table.model_validate(values)
    except ValidationError as error:
        raise damaged(path, _explain(error.errors()[0]), remedy) from error


def damaged(path: Path, reason: object, remedy: str) -> UserError:
    """The error of a file that cannot be read as what it is."""
    return UserError(" ".join(f"{path} is damaged: {reason}; {remedy}".split()))


def _explain(problem: Any) -> str:
    key = ".".join(map(str, problem["loc"]))
    message: str = problem["msg"].removeprefix("Value error, ")
    if not key:
        return message
    if problem["type"] == "missing":
        return f"{key} is missing"
    value = "" if isinstance(problem["input"], dict | list) else f"={problem['input']!r:.60}"
    return f"{key}{value}: {message[0].lower()}{message[1:]}"
