"""The table of a checkpoint, bertscale.json: what must be in it, and that its parts fit together.

A table that somebody has edited, or that a disk has damaged, is refused before anything is read by it.
"""

from __future__ import annotations

import math
import stat
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from bertscale.config.table import Count, FileName, Size, Table, check_table, damaged, read_object
from bertscale.errors import UserError
from bertscale.files import json_digest
from bertscale.run_folder import TABLE

FORMAT = 1
DIGEST = "digest"  # of all the rest of the table
STATES = ("weight", "exp_avg", "exp_avg_sq")
AVERAGE = "average"  # a further state: the moving average of the weight, where a run keeps one


class _Topology(Table):
    tensor: Size
    data: Size


class _Parameter(Table):
    shape: list[Size]
    tensor_parallel_dimension: Count | None
    states: list[str] = Field(default_factory=lambda: list(STATES))

    def share(self, degree: int) -> int:
        """Values of a tensor rank's share; raises ValueError where the shape cannot be shared by `degree`."""
        dim = self.tensor_parallel_dimension
        if dim is None:
            return math.prod(self.shape)
        if dim >= len(self.shape) or self.shape[dim] % degree:
            raise ValueError(f"dimension {dim} of {self.shape} among {degree} ranks")
        return math.prod(self.shape) // degree


class _File(Table):
    name: FileName
    bytes: Count
    digest: str
    tensor_rank: Count
    pieces: dict[str, Annotated[list[Count], Field(min_length=2, max_length=2)]]  # start, length


class _Ancestor(Table):
    folder: str
    step: Count | None
    digest: str


class _Table(Table):
    has_moments: bool
    step: Count
    samples_consumed: Count
    skipped_steps: Count = 0
    elapsed_seconds: float = Field(0.0, ge=0, allow_inf_nan=False, strict=False)
    updates_before: Count = 0
    lineage: list[_Ancestor] = Field(default_factory=list)
    vocab_size: Size
    tokenizer_sha256: str
    model: dict[str, Any]
    topology: _Topology
    parameters: dict[str, _Parameter]
    files: list[_File]

    @model_validator(mode="after")
    def _check_pieces(self) -> _Table:
        """Raises ValueError where the pieces of a parameter are not the whole of it, each value once."""
        pieces: dict[tuple[str, int], list[list[int]]] = defaultdict(list)
        for file in self.files:
            for name, piece in file.pieces.items():
                pieces[name, file.tensor_rank].append(piece)
        expected: dict[tuple[str, int], int] = {}
        for name, parameter in self.parameters.items():
            if not {"weight"} <= set(parameter.states) <= {*STATES, AVERAGE}:
                raise ValueError(f"the states of {name} are {parameter.states}")
            degree = 1 if parameter.tensor_parallel_dimension is None else self.topology.tensor
            expected |= {(name, rank): parameter.share(degree) for rank in range(degree)}
        if unknown := pieces.keys() - expected.keys():
            raise ValueError(f"pieces of {min(unknown)[0]}, which is no parameter")
        for (name, rank), size in expected.items():
            end = 0
            for start, length in sorted(pieces[name, rank]):
                if start != end:
                    break
                end += length
            if end != size:
                raise ValueError(f"a piece of {name} is missing or too much")
        return self


def read_table(folder: Path) -> dict[str, Any]:
    """The table of the checkpoint `folder`, checked, without its digest; raises UserError, in one line."""
    path, remedy = folder / TABLE, "use another checkpoint"
    if not path.exists():
        raise UserError(
            f"{folder} is not a finished checkpoint: it has no {TABLE}, which is written last; "
            "use an older checkpoint of the run"
        )
    table = read_object(path, remedy)
    if table.get("format") != FORMAT:
        raise UserError(f"{folder} has checkpoint format {table.get('format')}, this version reads {FORMAT}")
    signed = DIGEST in table  # the first checkpoints are not
    if signed and table.pop(DIGEST) != json_digest(table):
        raise damaged(path, "its digest is not that of its content", remedy)
    check_table(_Table, table, path, remedy)
    return table


def check_files(folder: Path, table: dict[str, Any], part: int = 0, parts: int = 1) -> None:
    """Raises UserError where one of the table's files `part`, `part` + `parts`, ... is missing or has another
    size."""
    for file in table["files"][part::parts]:
        path = folder / file["name"]
        try:
            found = path.stat()  # once: a file system shared by thousands of ranks answers each time
            size = found.st_size if stat.S_ISREG(found.st_mode) else None
        except OSError:
            size = None
        if size != file["bytes"]:
            state = "missing" if size is None else f"{size:,} bytes instead of {file['bytes']:,}"
            raise UserError(f"the checkpoint file {path} is damaged: {state}; use another checkpoint")
