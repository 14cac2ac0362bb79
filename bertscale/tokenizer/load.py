"""Finds and loads the tokenizer of a data set or a model: SentencePiece, WordPiece, or BPE of bytes.

    tokenizer = load_tokenizer("runs/quickstart/data")
    tokenizer.encode([tokenizer.normalize("The apple is red.")])     # [[1012, 2411, 12, 874, 7]]

A folder holds its tokenizer as one file that needs no other: `tokenizer.model`, a SentencePiece model, or
`tokenizer.json`, a WordPiece or BPE tokenizer. Text that spells a special piece, such as a literal "[MASK]",
is ordinary text to all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bertscale.config import UserError
from bertscale.config.table import parse_object
from bertscale.run_folder import checkpoints
from bertscale.tokenizer.base import (
    REMEDY,
    SENTENCE_PIECE_NAME,
    TOKENIZER_NAMES,
    VOCABULARY_NAME,
    Tokenizer,
)


def find_tokenizer(folder: str | Path) -> Path:
    """The path of the tokenizer in the folder of a data set, a checkpoint or a model; it may not exist yet.

    A run's is that of its newest checkpoint. tokenizer.model comes before tokenizer.json, which beside it is
    its Hugging Face form. A published model may have its vocab.txt alone.
    """
    folder = Path(folder)
    for place in (folder, *checkpoints(folder)[-1:]):
        for name in (*TOKENIZER_NAMES, VOCABULARY_NAME):
            if (place / name).is_file():
                return place / name
    return folder / SENTENCE_PIECE_NAME


def load_tokenizer(path: str | Path, lowercase: bool | None = None) -> Tokenizer:
    """Loads a SentencePiece model, a tokenizer.json of WordPiece or BPE, or a WordPiece vocab.txt.

    `path` is the file, or the folder of a data set, a run, a checkpoint or a model that holds one.
    `tokenizer.encode(texts)` takes a list of S texts and returns S lists of ids, without [CLS] and [SEP].
    `lowercase` is for WordPiece: whether text is put in lower case; by default as tokenizer.json says, or if
    no piece of vocab.txt has a capital letter.

    Raises UserError if `path` is missing, is none of these, or lacks a special piece.

        tokenizer = load_tokenizer("runs/quickstart/data")
    """
    path = Path(path)
    if path.is_dir():
        path = find_tokenizer(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {path}: {error.strerror or error}") from error
    # The libraries are imported only when needed: reading shards needs neither.
    if path.suffix == ".json" and _model_type(parse_object(content, path, REMEDY)) == "BPE":
        from bertscale.tokenizer.byte_level import ByteLevelTokenizer

        if lowercase is not None:
            raise UserError(f"lowercase={lowercase} is for a WordPiece vocabulary, but {path} is BPE")
        return ByteLevelTokenizer(path, content)
    if path.suffix in (".txt", ".json"):
        from bertscale.tokenizer import wordpiece

        return wordpiece.load(path, content, lowercase)
    from bertscale.tokenizer.sentence_piece import SentencePieceTokenizer

    return SentencePieceTokenizer(path, content)


def _model_type(values: dict[str, Any]) -> object:
    model = values.get("model")
    return model.get("type") if isinstance(model, dict) else None
