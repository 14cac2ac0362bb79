"""Whatever holds weights, opened: one reader for conversions, for the start of a pretraining and fine-tuning.

    source = open_source_weights(Path("roberta-base"))
    source.names                                     # encoder.embeddings.word_embeddings.weight, ...
    source.missing, source.left_out                  # heads that it lacks, and what it has beyond our network

| source                             | becomes                                                            |
| ---------------------------------- | ------------------------------------------------------------------ |
| a run, a checkpoint                | itself                                                             |
| Bert*, MegatronBert*, ModernBert*  | the preset                                                         |
| Roberta*, XLMRoberta*, Camembert*  | `bert`: the rows of positions behind the pad token's; both types   |
|                                    | of a pair are the only one that they have, or their two            |
| DistilBert*                        | `bert`: both token types are zero                                  |
| Electra*                           | `bert` with a generator: that in the folder `generator` inside, or |
|                                    | a missing one                                                      |
| ElectraForMaskedLM alone           | `bert`; where it is narrower than its embeddings, the generator of |
|                                    | a `bert` whose layers are missing                                  |
| a folder of DeepSpeed, a file      | the preset that its tensors are of, with our names (`native_files`) |
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from bertscale.config import ModelConfig, UserError
from bertscale.config.table import damaged
from bertscale.convert.deepspeed_files import find_deepspeed, is_deepspeed, open_deepspeed
from bertscale.convert.electra import GENERATOR
from bertscale.convert.folders import FolderSource, PairSource
from bertscale.convert.hf_folder import CONFIG_FILE, has_config, tokenizer_of
from bertscale.convert.model_shape import WORDS, native_shapes
from bertscale.convert.native_files import Given, NativeFiles, StateDict
from bertscale.convert.tensor_files import weight_files
from bertscale.run_folder import TABLE
from bertscale.train.checkpoint import Checkpoint, open_checkpoint


class InitSource(Protocol):
    """Gives native tensors by their names in `PretrainingModel`."""

    folder: Path
    model: ModelConfig  # with a sentence head if the source relates sentences
    vocab_size: int
    names: list[str]  # the parameters that it has; a pooler even where `model` has no sentence head
    missing: list[str]  # parameters of `model` that it lacks
    left_out: list[str]  # its own tensors, by their own names, that become no parameter

    @property
    def tokenizer(self) -> Path: ...  # of the tokenizer's file; raises UserError where there is none

    def tensor(self, name: str) -> Tensor: ...  # whole, float32, CPU, of `names`

    def digest(self) -> str: ...  # of all that it is read from; raises UserError where that is damaged


def open_source_weights(
    path: Path, given: Given | None = None
) -> CheckpointSource | FolderSource | PairSource | NativeFiles:
    """Opens a source of the table; `given` is what else is known of one that does not tell its shape.

    Raises UserError where `path` is none of them, is damaged, or is a network that no preset equals.
    """
    given = given or Given()
    if path.is_file():
        return _of_file(path, given)
    if is_deepspeed(path) or not has_config(path):
        if folder := find_deepspeed(path):
            return NativeFiles(open_deepspeed(folder), folder, given)
        return CheckpointSource(open_whole_checkpoint(path))
    source = FolderSource(path)
    if source.form == "electra" and (path / GENERATOR / CONFIG_FILE).is_file():
        return PairSource(source, FolderSource(path / GENERATOR, source.model))
    return source


def _of_file(path: Path, given: Given) -> FolderSource | NativeFiles:
    """Opens a file of tensors under our names, or under those of transformers, beside a config.json."""
    files = StateDict(path)
    if WORDS in files.shapes:
        return NativeFiles(files, path, given)
    if not path.with_name(CONFIG_FILE).is_file():
        raise UserError(
            f"{path} lacks {WORDS}, and no {CONFIG_FILE} lies beside it; its tensors must have our names, or "
            f"those of transformers with the model's {CONFIG_FILE} in the same folder"
        )
    return FolderSource(path.parent, file=path)


def open_whole_checkpoint(path: Path) -> Checkpoint:
    """Opens a checkpoint, or the newest one of a run. Raises UserError where its parameters are not those of
    a model for pretraining."""
    if not path.exists():
        raise UserError(
            f"there is no folder {path}: give a run, a checkpoint, or a model's folder; nothing is "
            "downloaded, so save a published model and its tokenizer first, by save_pretrained(FOLDER)"
        )
    if not (path / TABLE).exists() and (weights := weight_files(path)):
        raise UserError(
            f"{path} has {weights[0].name} and no {CONFIG_FILE}, which tells what model it is; save the "
            "model there again with model.save_pretrained(folder)"
        )
    checkpoint = open_checkpoint(path)
    found = {name: torch.Size(entry["shape"]) for name, entry in checkpoint.parameters.items()}
    if found != native_shapes(checkpoint.model, checkpoint.vocab_size):
        reason = "its parameters are not those of its model"
        raise damaged(checkpoint.folder / TABLE, reason, "use another checkpoint")
    return checkpoint


class CheckpointSource:
    """All parameters of a model for pretraining."""

    def __init__(self, weights: Checkpoint) -> None:
        self.weights = weights
        self.folder, self.model, self.vocab_size = weights.folder, weights.model, weights.vocab_size
        self.names: list[str] = list(weights.parameters)
        self.missing: list[str] = []
        self.left_out: list[str] = []

    @property
    def tokenizer(self) -> Path:
        """The path of the checkpoint's tokenizer."""
        return tokenizer_of(self.folder)

    def tensor(self, name: str) -> Tensor:
        """Returns a parameter of `names`."""
        return self.weights.tensor(name)

    def digest(self) -> str:
        """The digest of the checkpoint."""
        return self.weights.digest()
