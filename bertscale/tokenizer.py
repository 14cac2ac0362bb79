"""The tokenizer: a SentencePiece model with the five special pieces of BERT, and its Hugging Face form.

    tokenizer = Tokenizer.load("runs/quickstart/data/tokenizer.model")
    tokenizer.encode([normalize("The apple is red.")])     # [[1012, 2411, 12, 874, 7]]

The SentencePiece model is the reference; `export_hugging_face` writes the same vocabulary as a `tokenizers`
Unigram model, and `agreement` measures on how many texts the two give the same ids. Text that spells a
special piece, such as a literal "[MASK]", is ordinary text to `encode`.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import sentencepiece

from bertscale.config import UserError

PAD, UNK, CLS, SEP, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"

# Characters that carry no text: controls, soft hyphen, byte order mark, lone surrogates. Both classes are
# spelt out because `\s` means different sets in Python and in the regular expressions of `tokenizers`.
# U+2581 is among the spaces: SentencePiece writes a space as that character and cannot tell the two apart.
_DROPPED = "\\x00-\\x08\\x0e-\\x1b\\x7f-\\x84\\x86-\\x9f\\u00ad\\ufeff"
_SPACES = "\\x09-\\x0d\\x1c-\\x20\\x85\\u00a0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000\\u2581"
_find_dropped = re.compile(f"[{_DROPPED}\\ud800-\\udfff]+")
_find_spaces = re.compile(f"[{_SPACES}]+")


def normalize(text: str) -> str:
    """Text as the tokenizer is trained on it: NFC, no control characters, one space for any white space."""
    text = _find_dropped.sub("", text)
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return _find_spaces.sub(" ", text).strip(" ")


class Tokenizer:
    """A SentencePiece model with [PAD], [UNK], [CLS], [SEP] and [MASK]; made by `Tokenizer.load`."""

    def __init__(self, path: Path, model: bytes) -> None:
        self.path = path
        self.sha256 = hashlib.sha256(model).hexdigest()
        # One thread: prep runs one process for each core already.
        self._model = sentencepiece.SentencePieceProcessor(model_proto=model, num_threads=1)
        self.vocab_size: int = self._model.vocab_size()
        ids = [self._special_id(name) for name in (PAD, UNK, CLS, SEP, MASK)]
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = ids
        self.special_ids = tuple(ids)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Raises UserError if `path` is missing, no SentencePiece model, or lacks a special piece."""
        path = Path(path)
        try:
            model = path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read the tokenizer {path}: {error.strerror or error}") from error
        try:
            if not model:  # which the library would take for "no model yet"
                raise RuntimeError("empty")
            return cls(path, model)
        except RuntimeError as error:
            raise UserError(f"{path} is not a SentencePiece model") from error

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without special ids (byte fallback leaves no unknown). Normalise first."""
        ids: list[list[int]] = self._model.encode(texts, out_type=int)
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; special ids give no text."""
        text: str = self._model.decode([int(i) for i in ids])
        return text

    def piece(self, piece_id: int) -> str:
        """The piece as it is written in the vocabulary, with "▁" for a space before a word."""
        name: str = self._model.id_to_piece(int(piece_id))
        return name

    def _special_id(self, name: str) -> int:
        piece_id: int = self._model.piece_to_id(name)
        if self._model.id_to_piece(piece_id) != name:
            raise UserError(
                f"the tokenizer {self.path} has no {name} piece; train it with `bertscale prep`, or with "
                f"unk_piece={UNK}, pad_piece={PAD} and control_symbols={CLS},{SEP},{MASK}"
            )
        if not (self._model.is_control(piece_id) or self._model.is_unknown(piece_id)):
            raise UserError(
                f"in the tokenizer {self.path} the piece {name} is ordinary text, so that a text could "
                "write it; train it as one of control_symbols"
            )
        return piece_id

    # ---------------------------------------------------------------------------------- Hugging Face

    def export_hugging_face(self, folder: str | Path, max_length: int) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which AutoTokenizer loads; `max_length` in tokens.

        Pairs become [CLS] A [SEP] B [SEP] with token types 0 and 1. Unlike `encode`, and as in any Hugging
        Face tokenizer, "[MASK]" in a text is the mask.
        """
        from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
        from tokenizers import Tokenizer as Fast

        vocab = [(self.piece(i), self._model.get_score(i)) for i in range(self.vocab_size)]
        fast = Fast(models.Unigram(vocab, unk_id=self.unk_id, byte_fallback=True))
        fast.normalizer = normalizers.Sequence(
            [
                normalizers.Replace(Regex(f"[{_spell(_DROPPED)}]+"), ""),
                normalizers.NFC(),
                normalizers.Replace(Regex(f"[{_spell(_SPACES)}]+"), " "),
                # Not at the start: the text after a [MASK] begins with the space of its first word.
                normalizers.Replace(Regex(" $"), ""),
            ]
        )
        # Any piece of a `tokenizers` Unigram can match text, special ones too: a literal "[MASK]" is cut
        # after its bracket, so that only the search for added tokens, which can be switched off, finds it.
        literal = Regex(r"(?<=\[)(?:PAD|UNK|CLS|SEP|MASK)(?=\])")
        fast.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=True),
                pre_tokenizers.Split(literal, "merged_with_next"),
            ]
        )
        fast.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        fast.post_processor = processors.TemplateProcessing(
            single=f"{CLS}:0 $A:0 {SEP}:0",
            pair=f"{CLS}:0 $A:0 {SEP}:0 $B:1 {SEP}:1",
            special_tokens=[(CLS, self.cls_id), (SEP, self.sep_id)],
        )
        # lstrip: the mask takes the space before it, which would otherwise be a piece "▁" of its own.
        mask = AddedToken(MASK, special=True, normalized=False, lstrip=True)
        others = [AddedToken(name, special=True, normalized=False) for name in (PAD, UNK, CLS, SEP)]
        fast.add_special_tokens([*others, mask])
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        fast.save(str(folder / "tokenizer.json"))
        settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_length,
            "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
            "padding_side": "right",
            "clean_up_tokenization_spaces": False,
            "pad_token": PAD,
            "unk_token": UNK,
            "cls_token": CLS,
            "sep_token": SEP,
            "mask_token": {
                "__type": "AddedToken",
                "content": MASK,
                "lstrip": True,
                "rstrip": False,
                "normalized": False,
                "single_word": False,
                "special": True,
            },
        }
        text = json.dumps(settings, indent=2) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

    def agreement(self, folder: str | Path, texts: list[str]) -> float:
        """Share of `texts` for which this model and the one exported to `folder` give the same ids."""
        from tokenizers import Tokenizer as Fast

        fast = Fast.from_file(str(Path(folder) / "tokenizer.json"))
        fast.encode_special_tokens = True  # a literal "[MASK]" is text, as it is to `encode`
        theirs = fast.encode_batch(texts, add_special_tokens=False)
        ours = self.encode([normalize(text) for text in texts])
        return sum(a == b.ids for a, b in zip(ours, theirs, strict=True)) / max(len(texts), 1)


def _spell(characters: str) -> str:
    """A Python character class as the same characters themselves, for the other regular expressions."""
    return re.sub(r"\\x(..)|\\u(....)", lambda m: chr(int(m[1] or m[2], 16)), characters)
