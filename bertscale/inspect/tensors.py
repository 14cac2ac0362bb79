"""The parameters of a folder with their statistics, one in memory at a time.

bertscale inspect runs/base --tensors
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from bertscale.inspect.facts import weights_in
from bertscale.inspect.sources import open_any

COLUMNS = ("parameter", "shape", "dtype", "mean", "deviation", "largest")


def statistics(path: Path) -> Iterator[dict[str, Any]]:
    """Name, shape, dtype, mean, standard deviation and largest absolute value of each parameter.

    Of a checkpoint they are the native ones, of a model's folder those of its files. Values that are not
    finite are counted as `not_finite` and make the others null. Raises UserError where a file is damaged.
    """
    folder = path / "model" if not (path / "config.json").is_file() else path
    if (folder / "config.json").is_file():
        from bertscale.convert.tensor_files import open_tensors

        files = open_tensors(folder)
        for name, (dtype, shape) in weights_in(folder).items():
            yield {"name": name, "shape": shape, "dtype": dtype, **_of(files.tensor(name))}
        return
    source = open_any(path)
    for name in source.weights.names:
        value = source.tensor(name)
        yield {"name": name, "shape": list(value.shape), "dtype": "float32", **_of(value)}


def _of(tensor: Tensor) -> dict[str, Any]:
    values = tensor.double()
    if bad := int((~values.isfinite()).sum()):
        return {"mean": None, "deviation": None, "largest": None, "not_finite": bad}
    return {
        "mean": float(values.mean()),
        "deviation": float(values.std(correction=0)),
        "largest": float(values.abs().max()),
    }


def table_of(rows: list[dict[str, Any]]) -> list[str]:
    """The lines of a table of `statistics`."""
    cells = [COLUMNS]
    for row in rows:
        figures = [row[key] for key in COLUMNS[3:]]
        words = ["" if figure is None else f"{figure:.4g}" for figure in figures]
        if "not_finite" in row:
            words[0] = f"{row['not_finite']:,} not finite"
        shape = " x ".join(map(str, row["shape"])) or "one value"
        cells.append((row["name"], shape, row["dtype"], *words))
    widths = [max(len(row[column]) for row in cells) for column in range(len(COLUMNS))]
    return [
        "  ".join(
            word.ljust(width) if column < 3 else word.rjust(width)
            for column, (word, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
