"""The weights in a folder of transformers: one file or several with an index, as safetensors or as a pickle.

    weights = open_tensors(Path("roberta-base"))
    weights.tensor("roberta.pooler.dense.bias")    # as it is stored, memory-mapped where the file allows it

| file                                                | how it is read                                      |
| --------------------------------------------------- | --------------------------------------------------- |
| model.safetensors                                   | memory-mapped                                       |
| model.safetensors.index.json and the shards it names | memory-mapped                                      |
| pytorch_model.bin                                   | tensors alone, no code in it runs; memory-mapped    |
| pytorch_model.bin.index.json and its shards         | likewise                                            |

The first that is there is taken, as transformers does. A pickle older than torch 1.6 cannot be mapped: it is
read into memory.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bertscale.config import UserError
from bertscale.config.table import FileName, Table, check_table, damaged, read_object
from bertscale.files import file_digest

WEIGHTS = "model.safetensors"
PICKLE = "pytorch_model.bin"
INDEX = ".index.json"  # ends the name of the index of shards
REMEDY = "save the model there again with model.save_pretrained(folder)"


class _Index(Table):
    """Which shard holds which tensor."""

    weight_map: dict[str, FileName] = Field(min_length=1)


class TensorFiles:
    """Tensors by the names that they have in the files.

    `main` is the file to name where something is missing: the only one, or the index. `paths` are all files,
    the index included.
    """

    def __init__(self, main: Path, shards: Mapping[str, Path]) -> None:
        self.main = main
        self.paths: list[Path] = sorted({main, *shards.values()})
        self._shards = shards
        self._open = {path: _open_file(path) for path in self.paths if not path.name.endswith(INDEX)}
        self.names: set[str] = set(shards)
        if not shards:
            self._shards = dict.fromkeys(_names(self._open[main]), main)
            self.names = set(self._shards)
        found = {path: _names(file) for path, file in self._open.items()}
        for name, path in self._shards.items():
            if name not in found[path]:
                raise damaged(path, f"{main.name} says that it holds {name}, and it does not", REMEDY)

    def path_of(self, name: str) -> Path:
        """The file that holds a tensor of `names`."""
        return self._shards[name]

    def tensor(self, name: str) -> Tensor:
        """A tensor of `names`, of the data type that it is stored in."""
        file = self._open[self._shards[name]]
        value: Tensor = file[name] if isinstance(file, dict) else file.get_tensor(name)
        return value

    def shape(self, name: str) -> list[int]:
        """The shape of a tensor of `names`, which is not read for it."""
        file = self._open[self._shards[name]]
        shape = file[name].shape if isinstance(file, dict) else file.get_slice(name).get_shape()
        return list(shape)


def weight_files(folder: Path) -> list[Path]:
    """The files that the weights of `folder` lie in, an index included, without opening any weights; empty
    where there are none. Raises UserError where the index is damaged."""
    main = _main_file(folder)
    return sorted({main, *_shards_of(main).values()}) if main else []


def open_tensors(folder: Path) -> TensorFiles:
    """Opens the weights of a folder. Raises UserError where they are missing or damaged."""
    main = _main_file(folder)
    if main is None:
        raise UserError(
            f"cannot read {folder / WEIGHTS}: there is no such file, nor a {PICKLE}, nor an index of shards; "
            "save the model there with model.save_pretrained(folder)"
        )
    return TensorFiles(main, _shards_of(main))


def _main_file(folder: Path) -> Path | None:
    files = (folder / name for name in (WEIGHTS, WEIGHTS + INDEX, PICKLE, PICKLE + INDEX))
    return next((file for file in files if file.exists()), None)


def _shards_of(main: Path) -> dict[str, Path]:
    """The file of each tensor that an index names; none where `main` is no index."""
    if not main.name.endswith(INDEX):
        return {}
    index = check_table(_Index, read_object(main, REMEDY), main, REMEDY)
    kind = Path(main.name.removesuffix(INDEX)).suffix
    shards = {name: main.with_name(file) for name, file in index.weight_map.items()}
    for path in sorted(set(shards.values())):
        if path.suffix != kind:
            raise damaged(main, f"it names {path.name}, which is no {kind} file", REMEDY)
        if not path.is_file():
            raise damaged(main, f"it names the file {path.name}, which is not there", REMEDY)
    return shards


def _names(file: Any) -> set[str]:
    return set(file.keys())


def _open_file(path: Path) -> Any:
    """The open safetensors file, or the dictionary of tensors of a pickle."""
    if path.suffix == ".safetensors":
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot read {path}: {error}; save the model there with model.save_pretrained(folder), "
                "which writes safetensors"
            ) from error
    values = load_pickle(path, REMEDY)
    if not isinstance(values, dict) or not all(isinstance(value, Tensor) for value in values.values()):
        raise UserError(f"cannot read {path}: it is no table of tensors by their names; {REMEDY}")
    return dict(values)


def checked_digest(path: Path, remedy: str = REMEDY) -> str:
    """The digest of a file. Raises UserError where a file of torch.save is not as it was written: it has a
    checksum of each tensor, which torch.load does not compare."""
    if path.suffix in (".bin", ".pt", ".pth") and zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as file:
                wrong = file.testzip()
        except Exception as error:  # a damaged archive fails in as many ways as there are bytes
            raise damaged(path, error, remedy) from error
        if wrong:
            raise damaged(path, f"the checksum of {wrong} in it differs", remedy)
    try:
        return file_digest(path)
    except OSError as error:
        raise damaged(path, error.strerror or error, remedy) from error


def load_pickle(path: Path, remedy: str, classes: Sequence[Any] = ()) -> Any:
    """What torch.save has put into `path`, memory-mapped where the file allows it; no code in it runs.

    `classes`: (what is made, the name in the pickle) of what may be there beside tensors and containers.
    Raises UserError, in one line that ends with `remedy`, where it is damaged or asks for more.
    """
    try:
        # `weights_only`: tensors and plain containers are made; what else a pickle asks for is not called.
        with torch.serialization.safe_globals(list(classes)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle fails in as many ways as there are bytes
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            reason = "it holds more than tensors, and code in a file of weights is never run"
            raise UserError(f"cannot read {path}: {reason}; {remedy}") from error
        raise damaged(path, "it is not a whole file of torch.save", remedy) from error
