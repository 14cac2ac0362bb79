"""The output folder of a conversion: what was written into it, and whether it may be replaced.

A conversion leaves a record beside what it writes, `bertscale-convert.json`: the digest of its source, and
the name and digest of each file. A folder in which somebody has added, changed or trained something is no
longer the output of a conversion.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from bertscale.errors import UserError
from bertscale.files import file_digest, write_json
from bertscale.run_folder import CHECKPOINTS, TABLE, checkpoint_step

RECORD = "bertscale-convert.json"


class Written(NamedTuple):
    """What was written: the lines that tell of it, and the digests that are known, by the files' names."""

    said: list[str]
    digests: dict[str, str]


def write_record(folder: Path, source: str, known: Mapping[str, str]) -> None:
    """Writes the record of all files in `folder`; `source` is the digest of what they were made of, `known`
    has those of files that were written with them: they are not read for it."""
    write_json(folder / RECORD, {"source": source, "files": _digests(folder, known)})


def check_source(folder: Path) -> None:
    """Raises UserError where a file that a conversion wrote into `folder` is gone or another one now.

    Model cards are for people to change, and a checkpoint has digests of its own.
    """
    if (folder / TABLE).is_file():
        return
    (_, files), there = _read_record(folder), _digests(folder)
    for name, digest in files.items():
        if not name.endswith(".md") and there.get(name) != digest:
            state = "is not as it was when" if name in there else "is gone since"
            raise UserError(
                f"{folder / name} {state} `bertscale convert` wrote this folder; convert its source again, "
                f"or remove {folder / RECORD} if the change is meant"
            )


def is_output_of(output: Path, source: str) -> bool:
    """Whether `output` is a whole conversion of `source`, a digest, with every file as it was written."""
    if output.is_symlink() or not output.is_dir():
        return False
    recorded_source, files = _read_record(output)
    return recorded_source == source and files == _digests(output)


def check_output(output: Path, source: Path, *, replace: bool) -> None:
    """Raises UserError where `output` holds a file that no conversion has written, or not as it is now.

    With `replace` such files may be deleted, but never a run's checkpoints, nor a folder that holds the
    source or is the current one.
    """
    there = Path(os.path.abspath(output))  # without `..`, links as they are
    if output.is_symlink():
        raise UserError(f"{output} is a link; name the folder that it leads to, or another one")
    for path in (there, *there.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file, not a folder; choose another output")
    for what, inside in (("the current folder", Path.cwd()), ("the source", Path(os.path.abspath(source)))):
        if there == inside or there in inside.parents:
            raise UserError(f"{output} is, or holds, {what}; choose another folder")
    of_a_run = there.parent.name == CHECKPOINTS and checkpoint_step(there) is not None
    if of_a_run or (output / CHECKPOINTS).exists():
        raise UserError(f"{output} holds a run's checkpoints; they are never replaced: choose another folder")
    if replace or not output.exists():
        return
    _, files = _read_record(output)
    for name, digest in _digests(output).items():
        if files.get(name) != digest:
            state = "was changed after" if name in files else "was not written by"
            raise UserError(
                f"{output} is there, and {name} in it {state} `bertscale convert`; choose another folder, or "
                "give --replace to delete all that is in it"
            )


def _digests(folder: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Name and digest of every file below `folder`, but for the record."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    names = {path.relative_to(folder).as_posix(): path for path in files if path != folder / RECORD}
    return {
        name: (known or {}).get(name) or (file_digest(path) if path.is_file() else "no file")
        for name, path in names.items()
    }


def _read_record(output: Path) -> tuple[str | None, dict[str, str]]:
    """Source and files of the record; a folder without a sound one has none."""
    try:
        record = json.loads((output / RECORD).read_text(encoding="utf-8"))
        return str(record["source"]), {str(name): str(digest) for name, digest in record["files"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None, {}
