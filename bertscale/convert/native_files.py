"""Weights under our own names that are no checkpoint of ours: DeepSpeed's folders, and files of a state dict.

    source = NativeFiles(open_deepspeed(folder), folder, Given(model=("model.num_attention_heads=12",)))

| source                                      | what is read                                               |
| ------------------------------------------- | ---------------------------------------------------------- |
| DeepSpeed, ZeRO 1 to 3 or universal         | float32 weights, moments, the number of updates            |
| a file of torch.save or safetensors         | weights; of DeepSpeed's model states those of the `module` |

Their shape is told by what lies beside them (`model_shape`), their tokenizer lies there too or is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bertscale.config import UserError
from bertscale.convert.deepspeed_files import REMEDY, DeepSpeedFiles
from bertscale.convert.hf_names import PADDED
from bertscale.convert.model_shape import PARTS, WORDS, check_rows, native_shapes, read_shape
from bertscale.convert.tensor_files import TensorFiles, checked_digest
from bertscale.files import json_digest
from bertscale.optim.groups import is_matrix
from bertscale.tokenizer import find_tokenizer, load_tokenizer
from bertscale.train.checkpoint_table import STATES

DECODER = "predictions.decoder.weight"  # the word embeddings, which a state dict has once more
EXTRA = "._extra_state"  # ends what layers of megatron-core save, which is nothing


@dataclass(frozen=True)
class Given:
    """What the command line says of a source that does not tell it: `model.KEY=VALUE`, and its tokenizer."""

    model: tuple[str, ...] = ()
    tokenizer: Path | None = None


class StateDict:
    """A file of tensors by their names, as `DeepSpeedFiles` are: weights alone."""

    updates = 0

    def __init__(self, path: Path) -> None:
        self.files = TensorFiles(path, {})
        self.paths = [path]
        self.shapes = {
            name: torch.Size(self.files.shape(name)) for name in self.files.names if not name.endswith(EXTRA)
        }

    def states(self, name: str) -> tuple[str, ...]:
        """The weight, and no moment."""
        return ("weight",)

    def tensor(self, name: str, state: str = "weight") -> Tensor:
        """Reads a tensor."""
        return self.files.tensor(name)


class NativeFiles:
    """A source of weights under our names; see `sources.InitSource`."""

    def __init__(
        self,
        files: DeepSpeedFiles,
        origin: Path,
        given: Given,
    ) -> None:
        self.files, self.folder = files, origin
        folder = origin if origin.is_dir() else origin.parent
        places = (folder, folder.parent)
        self.tokenizer = self._tokenizer(places, given)
        pieces = load_tokenizer(self.tokenizer)
        self.vocab_size: int = pieces.vocab_size
        self.model = self.whole = read_shape(files.shapes, places, given.model, origin)
        check_rows(files.shapes[WORDS], self.vocab_size, origin, self.tokenizer)
        relates = not self.model.rotary and self.model.generator_size is None
        may_relate = self.model.model_copy(update={"sentence_head": relates or self.model.sentence_head})
        whole = native_shapes(self.model, self.vocab_size)
        known = whole | native_shapes(may_relate, self.vocab_size)
        self.shapes = {name: shape for name, shape in known.items() if name in files.shapes}
        self.names: list[str] = list(self.shapes)
        self.missing = [name for name in whole if name not in self.shapes]
        for name in self.missing:
            part = next((each for each in PARTS if name.startswith(each)), None)
            # A part that is there in part is a damaged file, and all but heads has to be there.
            if part is None or any(each.startswith(part) for each in self.shapes):
                raise UserError(f"{origin} lacks the parameter {name}; use another checkpoint")
        matrices = {name for name in self.names if is_matrix(name)}
        for state in STATES[1:]:
            lacking = {name for name in self.names if state not in files.states(name)}
            if lacking not in (set(), set(self.names), matrices):  # Muon keeps one moment of matrices
                raise UserError(
                    f"{origin} lacks {state} of {min(lacking)} and has that of others; use another checkpoint"
                )
        self.left_out = sorted(files.shapes.keys() - known.keys() - {DECODER})
        if DECODER in files.shapes and not files.tensor(DECODER).equal(files.tensor(WORDS)):
            raise UserError(
                f"{origin}: {DECODER} differs from {WORDS}, and in this version both are one; a model that "
                "was trained without tied weights is not read"
            )

    @property
    def updates(self) -> int:
        """Counts the steps that the moments have seen."""
        return self.files.updates

    def states(self, name: str) -> tuple[str, ...]:
        """The states that there are of a parameter of `names`."""
        return self.files.states(name)

    def tensor(self, name: str, state: str = "weight") -> Tensor:
        """Returns a state of a parameter of `names`, whole and float32.

        Raises UserError where it is misshapen, or has values that are not finite.
        """
        value = self.files.tensor(name, state)
        if not value.is_floating_point():
            raise UserError(f"{self.folder}: {name} has the data type {value.dtype}")
        value, shape = value.detach().float(), self.shapes[name]
        if name in PADDED and value.shape[0] == self.vocab_size:
            value = torch.cat([value, value.new_zeros(shape[0] - self.vocab_size, *value.shape[1:])])
        if value.shape != shape:
            raise UserError(
                f"{self.folder}: {name} has the shape {list(value.shape)}, the model asks for "
                f"{list(shape)}; they do not belong together"
            )
        if not bool(value.isfinite().all()):
            raise UserError(f"{self.folder}: {state} of {name} has values that are not finite")
        return value

    def digest(self) -> str:
        """One of the digests of all files that are read, and of the shape."""
        files = [checked_digest(path, REMEDY) for path in (*self.files.paths, self.tokenizer)]
        return json_digest([*files, self.model.model_dump()])

    def _tokenizer(self, places: tuple[Path, ...], given: Given) -> Path:
        for place in places if given.tokenizer is None else (given.tokenizer,):
            path = place if place.is_file() else find_tokenizer(place)
            if path.is_file():
                return path
        where = given.tokenizer or " and ".join(map(str, places))
        raise UserError(
            f"{where}: no tokenizer.model, tokenizer.json or vocab.txt there; give the tokenizer of the "
            "model by --tokenizer FILE"
        )
