"""A model's folder as transformers saves it: config.json, model.safetensors, and the tokenizer's files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from bertscale.config import ModelConfig, UserError
from bertscale.convert.hf_names import (
    first_position,
    form_of,
    from_hugging_face,
    hugging_face_names,
    read_config,
)
from bertscale.convert.tensor_files import TensorFiles, checked_digest, open_tensors
from bertscale.tokenizer import Tokenizer, find_tokenizer

CONFIG_FILE = "config.json"
# Begin the names of an encoder's tensors in a model with a head.
BASES = ("bert.", "model.", "electra.", "roberta.", "distilbert.")
BIASES = {  # one bias of the decoder under two names, of which a file may have either
    "cls.predictions.bias": "cls.predictions.decoder.bias",
    "lm_head.bias": "lm_head.decoder.bias",
}
DECODERS = {  # form -> the decoder's weight, which is that of the word embeddings and may be in a file again
    "bert": "cls.predictions.decoder.weight",
    "megatron-bert": "cls.predictions.decoder.weight",
    "modern": "decoder.weight",
    "roberta": "lm_head.decoder.weight",
    "distilbert": "vocab_projector.weight",
    "electra-generator": "generator_lm_head.weight",
}
BUFFERS = ("position_ids", "token_type_ids")  # end names of what old versions saved beside the parameters
POSITIONS = "encoder.embeddings.position_embeddings.weight"
TOKEN_TYPES = "encoder.embeddings.token_type_embeddings.weight"


class HuggingFaceFolder:
    """Reads config and tensors. Raises UserError where a file is missing or damaged."""

    wanted: ClassVar[str]  # what a complete folder holds, for messages
    plain: ClassVar[bool] = False  # whether names may lack the base's prefix, as in an encoder without head

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.origin = folder / CONFIG_FILE
        self.config: dict[str, Any] = read_config(self.origin)
        self.vocab_size: int = self.config["vocab_size"]
        self.form = form_of(self.config)  # of the names in the file

    def open_file(self, file: Path | None = None) -> None:
        """Opens the tensors, those of `file` where one is given; before, the config has been understood."""
        self.files: TensorFiles = TensorFiles(file, {}) if file else open_tensors(self.folder)
        self.names_in_file = self.files.names

    def find(self, name: str) -> str | None:
        """Returns the name in the file, which is another one in the oldest exports; None if it is missing."""
        older = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        older = older.replace("LayerNorm.bias", "LayerNorm.beta")
        candidates = [name, older, BIASES.get(name, name)]
        if self.plain:
            base = next((base for base in BASES if name.startswith(base)), "")
            candidates += [each.removeprefix(base) for each in candidates]
        return next((candidate for candidate in candidates if candidate in self.names_in_file), None)

    def there(self, name: str) -> str:
        """Returns the name in the file. Raises UserError where there is none."""
        found = self.find(name)
        if found is None:
            raise UserError(
                f"{self.files.main} lacks {name}: it is not a complete {self.wanted}; save such a model "
                "there with model.save_pretrained(folder)"
            )
        return found

    def check_copies(self) -> None:
        """Raises UserError where what the network has once is in the file twice, with other values."""
        words = self.find(hugging_face_names("encoder.embeddings.word_embeddings.weight", self.form)[0])
        for name, copy in [(words, DECODERS.get(self.form)), *BIASES.items()]:
            if name not in self.names_in_file or copy not in self.names_in_file:
                continue
            if not self.files.tensor(name).equal(self.files.tensor(copy)):
                raise UserError(
                    f"{self.files.path_of(copy)}: {copy} differs from {name}, and in this version both are "
                    "one; a model that was trained without tied weights is not read"
                )

    def unread(self, used: Iterable[str]) -> list[str]:
        """Lists the tensors of the file but those called `used`, copies of these, and buffers."""
        rest = self.names_in_file - {self.find(name) for name in used}
        rest -= {DECODERS.get(self.form, ""), *BIASES, *BIASES.values()}
        return sorted(name for name in rest if not name.endswith(BUFFERS))

    def read(self, name: str, theirs: list[str], model: ModelConfig, shape: torch.Size) -> Tensor:
        """Returns the native parameter `name` of tensors `theirs`, float32; raises UserError where one is
        missing or misshapen."""
        if not theirs and name == TOKEN_TYPES:  # of a network without them
            return torch.zeros(shape)
        values = []
        for each in theirs:
            name_in_file = self.there(each)
            file = self.files.path_of(name_in_file)
            stored = self.files.tensor(name_in_file)
            if not stored.is_floating_point():
                raise UserError(f"{file}: {name_in_file} has the data type {stored.dtype}")
            if len(theirs) > 1:
                check_shape(file, name_in_file, stored, [shape[0] // len(theirs), *shape[1:]])
            if not bool(stored.isfinite().all()):
                raise UserError(f"{file}: {name_in_file} has values that are not finite")
            values.append(stored.float())
        try:
            value = from_hugging_face(name, self._rows(name, values), model)
        except (RuntimeError, IndexError, TypeError):  # of a shape that cannot be put in our order
            value = values[0]
        check_shape(file, name, value, list(shape))
        return value

    def _rows(self, name: str, values: list[Tensor]) -> list[Tensor]:
        """The rows of a RoBERTa's embeddings that ours has; all other values as they are."""
        if self.form == "roberta" and name == POSITIONS:
            return [values[0][first_position(self.config) :]]
        if self.form == "roberta" and name == TOKEN_TYPES and len(values[0]) == 1:
            return [values[0].repeat(2, 1)]  # it gives both segments of a pair its only type
        return values

    def digest(self) -> str:
        """One of the digests of config, weights and tokenizer."""
        files = (self.origin, *self.files.paths, tokenizer_of(self.folder))
        return "-".join(checked_digest(file) for file in files)


def check_shape(file: Path, name: str, value: Tensor, shape: list[int]) -> None:
    """Raises UserError where a value that was read from `file` has another shape."""
    if list(value.shape) != shape:
        raise UserError(
            f"{file} has {name} with the shape {list(value.shape)}, config.json asks for {shape}: they do "
            "not belong together"
        )


def tokenizer_of(folder: Path) -> Path:
    """Returns the path of the folder's tokenizer. Raises UserError where it has none."""
    path = find_tokenizer(folder)
    if not path.is_file():
        raise UserError(
            f"{folder} holds no tokenizer.model, tokenizer.json or vocab.txt; put its tokenizer there"
        )
    return path


def write_config(folder: Path, config: dict[str, Any], dtype: str = "float32") -> None:
    """Writes config.json; `dtype` under its name of today and its older one. Raises OSError."""
    text = json.dumps({**config, "dtype": dtype, "torch_dtype": dtype}, indent=2) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def write_tokenizer(folder: Path, tokenizer: Tokenizer, max_length: int, *, token_types: bool) -> None:
    """Writes the tokenizer in its own format and in that of transformers. Raises OSError.

    `token_types`: whether the model's class takes them.
    """
    tokenizer.export_hugging_face(folder, max_length)
    if not token_types:
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings["model_input_names"] = ["input_ids", "attention_mask"]
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(folder)
