"""A SentencePiece model with the five special pieces of BERT, and its Hugging Face form.

    tokenizer = load_tokenizer("runs/quickstart/data/tokenizer.model")

The SentencePiece model is the reference; `export_hugging_face` writes the same vocabulary as a Unigram or BPE
model of `tokenizers`, and `agreement` measures on how many texts the two give the same ids.

Model format: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import sentencepiece

from bertscale.config import UserError
from bertscale.tokenizer.base import (
    CLS,
    DROPPED_RULE,
    MASK,
    PAD,
    SENTENCE_PIECE_NAME,
    SEP,
    SPACES_RULE,
    SPECIAL,
    SPECIAL_KEYS,
    UNK,
    Ids,
    Spans,
    Tokenizer,
    begins_like_a_word,
    fast_settings,
    normalize,
    normalize_with_offsets,
    starts_by_bytes,
)

SPACE = "▁"
OTHER_NAMES = {PAD: "<pad>", UNK: "<unk>"}  # as ALBERT calls them
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # ModelProto.SentencePiece.Type


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece tokenizer, made by `load_tokenizer`; pieces that follow a space begin with "▁"."""

    file_name = SENTENCE_PIECE_NAME
    mark = SPACE

    def __init__(self, path: Path, content: bytes) -> None:
        """Raises UserError if `content` is no SentencePiece model or lacks a special piece."""
        self.path, self.content = path, content
        try:
            if not content:  # which the library would take for "no model yet"
                raise RuntimeError("empty")
            # One thread: prep runs one process for each core already.
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content, num_threads=1)
            self.vocab_size = self._model.vocab_size()
            self._model.id_to_piece(list(range(self.vocab_size)))  # a damaged piece is no text
        except (RuntimeError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not a SentencePiece model") from error
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (
            self._special_id(name) for name in SPECIAL
        )
        # The model does not name its normal form: a circled 1 becomes "1" in NFKC and stays in NFC.
        compatible = self._model.normalize("\u2460").strip(SPACE) == "1"
        self.form: Literal["NFC", "NFKC"] = "NFKC" if compatible else "NFC"

    def __str__(self) -> str:
        return f"a SentencePiece model with {self.vocab_size:,} pieces, for text in {self.form}"

    def normalize(self, text: str) -> str:
        """NFC, or NFKC where the model was trained so; no control characters, one space for white space."""
        return normalize(text, self.form)

    def extended(self, pieces: Sequence[tuple[str, float]]) -> bytes:
        """The model that has new `pieces`, with their scores, after all others."""
        from sentencepiece import sentencepiece_model_pb2

        proto = sentencepiece_model_pb2.ModelProto.FromString(self.content)
        for piece, score in pieces:
            proto.pieces.add(piece=piece, score=score, type=_NORMAL)
        proto.trainer_spec.vocab_size = len(proto.pieces)
        content: bytes = proto.SerializeToString()
        return content

    def encode(self, texts: list[str]) -> list[Ids]:
        ids: list[Ids] = self._model.encode(texts, out_type=int)
        return ids

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[Ids, Spans]]:
        results = []
        for text in texts:
            clean, sources = normalize_with_offsets(text, self.form)
            encoded = self._model.encode(clean, return_type="offset_mapping")
            spans: Spans = []
            # From the end: of the bytes of a character, only the last has the character's span.
            begin, end = len(clean), len(clean)
            for piece, span in zip(reversed(encoded["pieces"]), reversed(encoded["offsets"]), strict=True):
                if span[0] < span[1] or piece == SPACE:
                    begin, end = span
                if piece.startswith(SPACE) and clean[begin:end].startswith(" "):
                    begin += 1
                if begin < end:
                    spans.append((sources[begin][0], sources[end - 1][1]))
                else:
                    offset = sources[begin][0] if begin < len(sources) else len(text)
                    spans.append((offset, offset))
            results.append((encoded["ids"], spans[::-1]))
        return results

    def token_starts(self, texts: list[str], encoded: list[Ids]) -> npt.NDArray[np.int64]:
        """Where each token begins, in characters of all `texts`, counted from the bytes of the pieces; -1
        inside a character."""
        ids = np.fromiter(chain.from_iterable(encoded), np.int64)
        counts = np.fromiter(map(len, encoded), np.int64, len(encoded))  # [texts] tokens
        # Of pieces that begin with a space, the first of a text has one that is not there.
        starts, surplus = starts_by_bytes(texts, counts, self._piece_bytes[ids])
        first_token = np.cumsum(counts) - counts
        # Where bytes do not add up, the model has changed the text or has no piece for some of it.
        for number in np.flatnonzero((surplus < 0) | (surplus > 1)).tolist():
            [(pieces, spans)] = self.encode_with_offsets([texts[number]])
            first, last = sum(map(len, texts[:number])), len(texts[number]) - 1
            for token, (begin, _) in enumerate(spans):
                inside = self._model.is_byte(pieces[token]) and token and spans[token - 1] == spans[token]
                starts[first_token[number] + token] = -1 if inside else first + min(begin, last)
        return starts

    @cached_property
    def _piece_bytes(self) -> npt.NDArray[np.int64]:
        """Bytes of text that each piece stands for, [vocabulary]; very many where that is not known."""
        sizes = [
            1 if self._model.is_byte(i) else len(self.piece(i).replace(SPACE, " ").encode())
            for i in range(self.vocab_size)
        ]
        return np.where(np.isin(np.arange(self.vocab_size), self.special_ids), 2**40, sizes)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special ids give no text."""
        special = set(self.special_ids)
        text: str = self._model.decode([int(i) for i in ids if i not in special])
        return text

    def piece(self, piece_id: int) -> str:
        """The piece as it is written in the vocabulary, with "▁" for a space before a word."""
        name: str = self._model.id_to_piece(int(piece_id))
        return name

    def spelling(self, piece_id: int) -> tuple[str, bool]:
        piece = self.piece(piece_id)
        return piece.lstrip(SPACE).replace(SPACE, " "), piece.startswith(SPACE)

    def _starts_word(self, piece_id: int) -> bool:
        piece = self.piece(piece_id)
        if self._model.is_byte(piece_id):
            # The first byte of a character beyond the scripts that are written in words: a symbol, a Han
            # character, an emoji.
            return int(piece[3:5], 16) in (*range(0xE2, 0xEA), *range(0xF0, 0xF5))
        return piece.startswith(SPACE) or begins_like_a_word(piece)

    def _special_id(self, name: str) -> int:
        for other in (name, OTHER_NAMES.get(name, name)):
            piece_id: int = self._model.piece_to_id(other)
            if self._model.id_to_piece(piece_id) == other:
                break
        else:
            raise UserError(
                f"the tokenizer {self.path} has no {name} piece; leave `tokenizer` out and `bertscale prep` "
                f"trains one, or train yours with unk_piece={UNK}, pad_piece={PAD} and "
                f"control_symbols={CLS},{SEP},{MASK}"
            )
        if not (self._model.is_control(piece_id) or self._model.is_unknown(piece_id)):
            raise UserError(
                f"in the tokenizer {self.path} the piece {name} is ordinary text, so that a text could "
                "write it; train it as one of control_symbols"
            )
        return piece_id

    # ---------------------------------------------------------------------------------- Hugging Face

    def export_hugging_face(self, folder: str | Path, max_length: int) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which AutoTokenizer loads.

        Raises UserError for a SentencePiece model of words, or with the space after a word.
        """
        from tokenizers import AddedToken, decoders, processors
        from tokenizers import Tokenizer as Fast

        proto = self._proto()
        fast = Fast(self._fast_model(proto))
        fast.normalizer = self._fast_normalizer(proto)
        fast.pre_tokenizer = self._fast_pre_tokenizer(proto)
        spaces, first = decoders.Replace(SPACE, " "), decoders.Strip(" ", 1, 0)
        fast.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), first])
        fast.post_processor = processors.TemplateProcessing(
            single=f"{CLS}:0 $A:0 {SEP}:0",
            pair=f"{CLS}:0 $A:0 {SEP}:0 $B:1 {SEP}:1",
            special_tokens=[(CLS, self.cls_id), (SEP, self.sep_id)],
        )
        names = [self.piece(i) for i in self.special_ids]
        # lstrip: the mask takes the space before it, which would otherwise be a piece "▁" of its own.
        mask = AddedToken(MASK, special=True, normalized=False, lstrip=True)
        others = [AddedToken(name, special=True, normalized=False) for name in names[:-1]]
        fast.add_special_tokens([*others, mask])
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # Not by its own `save`, whose errors of a full disk are no OSError.
        (folder / "tokenizer.json").write_text(fast.to_str(pretty=True), encoding="utf-8")
        settings: dict[str, Any] = {
            **fast_settings(max_length),
            **dict(zip(SPECIAL_KEYS[:-1], names[:-1], strict=True)),
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

    @cached_property
    def proto(self) -> Any:
        """The model as SentencePiece's message `ModelProto`, not to be changed."""
        from sentencepiece import sentencepiece_model_pb2

        return sentencepiece_model_pb2.ModelProto.FromString(self.content)

    def _proto(self) -> Any:
        proto = self.proto
        trainer = proto.trainer_spec
        if trainer.model_type not in (_UNIGRAM, _BPE) or trainer.treat_whitespace_as_suffix:
            kind = "with the space after a word" if trainer.treat_whitespace_as_suffix else "of words"
            raise UserError(
                f"the tokenizer {self.path} is a SentencePiece model {kind}, which has no Hugging Face form; "
                "use one of the kinds unigram and bpe"
            )
        return proto

    def _fast_model(self, proto: Any) -> Any:
        from tokenizers import models

        bytes_ = bool(proto.trainer_spec.byte_fallback)
        if proto.trainer_spec.model_type == _UNIGRAM:
            vocab = [(piece.piece, piece.score) for piece in proto.pieces]
            return models.Unigram(vocab, unk_id=self.unk_id, byte_fallback=bytes_)
        ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
        merges = _merges(proto)
        return models.BPE(ids, merges, unk_token=self.piece(self.unk_id), fuse_unk=True, byte_fallback=bytes_)

    def _fast_normalizer(self, proto: Any) -> Any:
        from tokenizers import Regex, normalizers

        one_space = normalizers.Replace(Regex(SPACES_RULE), " ")
        steps: list[Any] = [normalizers.Replace(Regex(DROPPED_RULE), "")]
        if proto.normalizer_spec.add_dummy_prefix:
            # Metaspace sets the first "▁" only before the very first character of the given text: where that
            # one is dropped, a space in its place becomes the "▁".
            steps.insert(0, normalizers.Replace(Regex(f"\\A{DROPPED_RULE}"), " "))
        steps += [{"NFC": normalizers.NFC, "NFKC": normalizers.NFKC}[self.form](), one_space]
        if proto.normalizer_spec.precompiled_charsmap:  # it drops some of the spaces, and makes others
            steps += [normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap), one_space]
        # Not at the start: the text after a [MASK] begins with the space of its first word.
        steps.append(normalizers.Replace(Regex(" $"), ""))
        if not proto.normalizer_spec.add_dummy_prefix:  # then a space at the start is a piece more
            steps.append(normalizers.Replace(Regex("^ "), ""))
        return normalizers.Sequence(steps)

    def _fast_pre_tokenizer(self, proto: Any) -> Any:
        from tokenizers import Regex, pre_tokenizers

        prepend: Literal["first", "never"] = "first" if proto.normalizer_spec.add_dummy_prefix else "never"
        # Any piece of a `tokenizers` Unigram can match text, special and byte pieces too: a literal "[MASK]"
        # is cut after its bracket, so that only the search for added tokens, which can be switched off,
        # finds it.
        names = [piece.piece for piece in proto.pieces if piece.type in (_UNKNOWN, _CONTROL)]
        literals = [f"(?<={re.escape(name[0])}){re.escape(name[1:])}" for name in names]
        literals.append("(?<=<)0x[0-9A-F]{2}>")
        steps = [
            pre_tokenizers.Metaspace(SPACE, prepend_scheme=prepend, split=True),
            pre_tokenizers.Split(Regex("|".join(literals)), "merged_with_next"),
        ]
        if proto.trainer_spec.byte_fallback and proto.trainer_spec.model_type == _UNIGRAM:
            # A `tokenizers` Unigram spells a run of characters without a piece as one, and gives all of its
            # bytes the offsets of the run: so each such character stands alone.
            steps.append(pre_tokenizers.Split(Regex(f"[^{_ranges(_letters(proto))}]"), "isolated"))
        return pre_tokenizers.Sequence(steps)


def _letters(proto: Any) -> set[str]:
    """The characters that some piece of text has."""
    return set().union(*(piece.piece for piece in proto.pieces if piece.type in (_NORMAL, _USER_DEFINED)))


def _ranges(characters: set[str]) -> str:
    """`characters` as ranges of code points, for a character class in a regular expression."""
    codes = set(map(ord, characters))
    starts = sorted(code for code in codes if code - 1 not in codes)
    ends = sorted(code for code in codes if code + 1 not in codes)
    return "".join(f"\\x{{{first:x}}}-\\x{{{last:x}}}" for first, last in zip(starts, ends, strict=True))


def _merges(proto: Any) -> list[tuple[str, str]]:
    """The pairs that may be joined, those of the best pieces first, as BPE of `tokenizers` needs them.

    SentencePiece joins any two neighbours that together are a piece, the piece with the highest score first.
    """
    scores = {p.piece: p.score for p in proto.pieces if p.type in (_NORMAL, _USER_DEFINED)}
    merges = []
    for piece in sorted(scores, key=scores.__getitem__, reverse=True):  # stable: equal scores by id
        for cut in range(1, len(piece)):
            if piece[:cut] in scores and piece[cut:] in scores:
                merges.append((piece[:cut], piece[cut:]))
    return merges
