"""A model's folder as transformers saves it: config.json, model.safetensors, and the tokenizer's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bertscale.config import ModelConfig, UserError
from bertscale.convert.hf_names import from_hugging_face, read_config
from bertscale.files import file_digest
from bertscale.tokenizer import Tokenizer, find_tokenizer

CONFIG_FILE = "config.json"
WEIGHTS = "model.safetensors"
BASES = ("bert.", "model.", "electra.")  # begin the names of an encoder's tensors in a model with a head


class HuggingFaceFolder:
    """Reads config and tensors. Raises UserError where a file is missing or damaged."""

    wanted: ClassVar[str]  # what a complete folder holds, for messages
    plain: ClassVar[bool] = False  # whether names may lack the base's prefix, as in an encoder without head

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.origin = folder / CONFIG_FILE
        self.config: dict[str, Any] = read_config(self.origin)
        self.vocab_size: int = self.config["vocab_size"]

    def open_file(self) -> None:
        """Opens the tensors; before, the config has been understood."""
        try:
            self.file: Any = safe_open(self.folder / WEIGHTS, framework="pt")
            self.names_in_file: set[str] = set(self.file.keys())  # type: ignore[no-untyped-call,unused-ignore]
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot read {self.folder / WEIGHTS}: {error}; save the model there with "
                "model.save_pretrained(folder), which writes safetensors"
            ) from error

    def find(self, name: str) -> str | None:
        """Returns the name in the file, which is another one in the oldest exports; None if it is missing."""
        older = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        older = older.replace("LayerNorm.bias", "LayerNorm.beta")
        candidates = [name, older]
        if self.plain:
            base = next((base for base in BASES if name.startswith(base)), "")
            candidates += [each.removeprefix(base) for each in candidates]
        return next((candidate for candidate in candidates if candidate in self.names_in_file), None)

    def read(self, name: str, theirs: list[str], model: ModelConfig, shape: torch.Size) -> Tensor:
        """Returns the native parameter `name` of tensors `theirs`, float32; raises UserError where one is
        missing or misshapen."""
        values = []
        for each in theirs:
            name_in_file = self.find(each)
            if name_in_file is None:
                raise UserError(
                    f"{self.folder / WEIGHTS} lacks {each}: it is not a complete {self.wanted}; save such a "
                    "model there with model.save_pretrained(folder)"
                )
            stored = self.file.get_tensor(name_in_file)
            if not stored.is_floating_point():
                raise UserError(f"{self.folder / WEIGHTS}: {name_in_file} has the data type {stored.dtype}")
            values.append(stored.float())
        value = from_hugging_face(name, values, model)
        if not bool(value.isfinite().all()):
            raise UserError(f"{self.folder / WEIGHTS}: {name} has values that are not finite")
        if value.shape != shape:
            raise UserError(
                f"{self.folder / WEIGHTS} has {name} with the shape {list(value.shape)}, config.json asks "
                f"for {list(shape)}: they do not belong together"
            )
        return value

    def digest(self) -> str:
        """One of the digests of config, weights and tokenizer."""
        files = (self.origin, self.folder / WEIGHTS, tokenizer_of(self.folder))
        return "-".join(file_digest(file) for file in files)


def tokenizer_of(folder: Path) -> Path:
    """Returns the path of the folder's tokenizer. Raises UserError where it has none."""
    path = find_tokenizer(folder)
    if not path.is_file():
        raise UserError(
            f"{folder} holds no tokenizer.model, tokenizer.json or vocab.txt; put its tokenizer there"
        )
    return path


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Writes config.json. Raises OSError."""
    text = json.dumps({**config, "dtype": "float32"}, indent=2) + "\n"
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
