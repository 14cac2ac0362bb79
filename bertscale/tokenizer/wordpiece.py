"""WordPiece with the vocabulary of a published BERT, with the ids that transformers' BertTokenizer gives.

    tokenizer = load_tokenizer("bert-base-uncased/vocab.txt")
    tokenizer.save("runs/data")                     # tokenizer.json: vocabulary and rules in one file

The rules (clean text, lower case, spaces around Han characters and punctuation, the longest match first) are
those of Hugging Face `tokenizers`, named BertNormalizer, BertPreTokenizer and WordPiece there.

WordPiece: Devlin et al., "BERT", 2018, https://arxiv.org/abs/1810.04805
"""

from __future__ import annotations

import io
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from bertscale.config import UserError
from bertscale.config.table import Count, Table, check_table, damaged, parse_object, read_object
from bertscale.tokenizer.base import (
    CLS,
    CONFIG_NAME,
    FAST_NAME,
    REMEDY,
    SEP,
    SPECIAL,
    SPECIAL_KEYS,
    UNK,
    VOCABULARY_NAME,
    Ids,
    Spans,
    begins_like_a_word,
)
from bertscale.tokenizer.fast import FastTokenizer

CONTINUES = "##"  # before a piece that does not begin a word
CACHE_BYTES = 64 * 2**20  # for words whose ids are known, about
WORD_BYTES = 250  # of a known word, about, beside its characters

_surrogates = re.compile("[\ud800-\udfff]")
_named = re.compile(r"\[.*\]|<.*>", re.DOTALL)  # pieces that no text can write
# Characters that BERT's rules always make words of their own, so that text may be cut there: Han, and ASCII's
# punctuation.
_ALONE = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df!-/:-@[-`{-~"
_find_words = re.compile(f"[{_ALONE}]|[^ {_ALONE}]+").findall


class WordPieceTokenizer(FastTokenizer):
    """A WordPiece tokenizer, made by `load_tokenizer`; pieces that continue a word begin with "##"."""

    file_name = FAST_NAME
    mark = CONTINUES

    def __init__(self, path: Path, content: bytes) -> None:
        """Reads `content`, that of a tokenizer.json; raises UserError if it is not one of BERT's kind."""
        # No threads: prep runs one process for each core already, and threads of a process that was forked
        # would hang.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from tokenizers import Tokenizer as Fast

        self.path, self.content = path, content
        parts = _read(path, content)
        try:
            self._fast = Fast.from_str(content.decode())
        except Exception as error:  # the library has no narrower class
            raise damaged(path, error, REMEDY) from error
        rules = parts.normalizer
        self.lowercase = rules.lowercase
        stripped = rules.strip_accents
        self.strips_accents = self.lowercase if stripped is None else stripped
        self._fast.no_truncation()
        self._fast.no_padding()
        self._fast.encode_special_tokens = True  # a literal "[MASK]" is text
        self.vocab_size = self._fast.get_vocab_size()
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (
            parts.model.vocab[name] for name in SPECIAL
        )
        # Text is encoded word by word, since no rule looks beyond a word, and each word only once: this is
        # three times as fast as the library.
        self._known: dict[str, tuple[int, ...]] = {}
        self._known_bytes = 0

    def __str__(self) -> str:
        rules = ["in lower case"] * self.lowercase + ["without accents"] * self.strips_accents
        return f"WordPiece with {self.vocab_size:,} pieces, for text {' and '.join(rules) or 'as it is'}"

    def normalize(self, text: str) -> str:
        """`text` without lone surrogates: BERT's own rules do the rest in `encode`."""
        return text if text.isascii() else _surrogates.sub("", text)

    def encode(self, texts: list[str]) -> list[Ids]:
        known = self._known
        lines = [_find_words(text) for text in texts]
        if new := set(chain.from_iterable(lines)).difference(known):
            self._learn(list(new))
        ids = [list(chain.from_iterable(map(known.__getitem__, line))) for line in lines]
        if self._known_bytes > CACHE_BYTES:  # the frequent words are back after a few lines
            self._known, self._known_bytes = {}, 0
        return ids

    def _learn(self, words: list[str]) -> None:
        encoded = self._fast.encode_batch_fast(words, add_special_tokens=False)
        for word, encoding in zip(words, encoded, strict=True):
            self._known[word] = tuple(encoding.ids)
            self._known_bytes += WORD_BYTES + 12 * len(word)

    def words(self, text: str) -> list[str]:
        """The words of normalised `text`, each in the form that is cut into pieces."""
        form: str = self._fast.normalizer.normalize_str(text)
        return [word for word, _ in self._fast.pre_tokenizer.pre_tokenize_str(form)]

    def extended(self, pieces: Sequence[str]) -> bytes:
        """The content of the tokenizer.json that has new `pieces` after all others."""
        content = json.loads(self.content)
        content["model"]["vocab"] |= {piece: self.vocab_size + n for n, piece in enumerate(pieces)}
        return _bytes_of(content)

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[Ids, Spans]]:
        results = []
        for text in texts:
            # BERT's rules drop a null character, which until then keeps the offsets behind it right.
            clean = text if text.isascii() else _surrogates.sub("\x00", text)
            encoding = self._fast.encode(clean, add_special_tokens=False)
            results.append((encoding.ids, encoding.offsets))
        return results

    def token_starts(self, texts: list[str], encoded: list[Ids]) -> npt.NDArray[np.int64]:
        """Where the first token of each word begins, in characters of all `texts`; -1 for its others."""
        words = list(chain.from_iterable(map(_find_words, texts)))
        if new := set(words).difference(self._known):
            self._learn(list(new))
        characters = np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32)
        places = np.flatnonzero(characters != ord(" "))  # words are all that is no space
        lengths = np.fromiter(map(len, words), np.int64, len(words))
        counts = np.fromiter(map(len, map(self._known.__getitem__, words)), np.int64, len(words))
        first = np.cumsum(counts) - counts  # [words] token
        starts = np.full(counts.sum(), -1)  # [tokens]
        starts[first[counts > 0]] = places[np.cumsum(lengths) - lengths][counts > 0]
        return starts

    def spelling(self, piece_id: int) -> tuple[str, bool]:
        piece = self.piece(piece_id)
        if piece.startswith(CONTINUES):
            return piece[len(CONTINUES) :], False
        return piece, True

    def _starts_word(self, piece_id: int) -> bool:
        piece = self.piece(piece_id)
        if not piece.startswith(CONTINUES) or piece == CONTINUES:
            return True
        return begins_like_a_word(piece[len(CONTINUES) :])

    def export_hugging_face(self, folder: str | Path, max_length: int) -> None:
        """Writes tokenizer.json, the same as `save`, with tokenizer_config.json and vocab.txt beside it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.save(folder)
        settings: dict[str, Any] = {
            "tokenizer_class": "BertTokenizer",
            "model_max_length": max_length,
            "do_lower_case": self.lowercase,
            "strip_accents": self.strips_accents,
            "tokenize_chinese_chars": True,
            **dict(zip(SPECIAL_KEYS, SPECIAL, strict=True)),
        }
        text = json.dumps(settings, indent=2) + "\n"
        (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
        pieces = "".join(f"{self.piece(i)}\n" for i in range(self.vocab_size))
        (folder / VOCABULARY_NAME).write_text(pieces, encoding="utf-8", newline="\n")


def load(path: Path, content: bytes, lowercase: bool | None) -> WordPieceTokenizer:
    """Makes the tokenizer of a tokenizer.json or a vocab.txt; see `load_tokenizer`."""
    if path.suffix != ".json":
        return WordPieceTokenizer(path, from_vocabulary(path, content, lowercase, _settings_beside(path)))
    if lowercase is not None:
        parts = _read(path, content)
        if parts.normalizer.lowercase != lowercase:
            vocabulary = sorted(parts.model.vocab, key=parts.model.vocab.__getitem__)
            content = _tokenizer_json(vocabulary, lowercase)
    return WordPieceTokenizer(path, content)


def _settings_beside(path: Path) -> dict[str, Any]:
    """The rules in the tokenizer_config.json beside a vocab.txt, as transformers has them; {} without one."""
    path = path.with_name(CONFIG_NAME)
    if not path.is_file():
        return {}
    settings = read_object(path, REMEDY)
    check_table(_Rules, settings, path, REMEDY)
    if settings.get("tokenize_chinese_chars") is False:
        raise UserError(f"{path}: tokenize_chinese_chars=false, but this version always cuts there")
    return settings


def from_vocabulary(
    path: Path, content: bytes, lowercase: bool | None = None, settings: dict[str, Any] | None = None
) -> bytes:
    """The tokenizer.json of a vocab.txt with a piece a line; `lowercase` as in `load_tokenizer`.

    `settings`, those of a tokenizer_config.json, tell the rules where `lowercase` does not; without them they
    are found from the pieces. Raises UserError that names the line of a piece that is there twice, or the
    special piece that is missing.
    """
    settings = settings or {}
    try:
        # As Python reads text: \n, \r\n and \r end a line; some vocabularies have U+2028 as a piece.
        pieces = [line.rstrip("\n") for line in io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig")]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not the vocabulary of a WordPiece tokenizer: no UTF-8 text") from error
    for name in SPECIAL:
        if name not in pieces:
            raise UserError(
                f"{path} is not the vocabulary of a BERT WordPiece tokenizer: it has no {name}; "
                f"there must be a line for each piece, {', '.join(SPECIAL)} among them"
            )
    piece, times = Counter(pieces).most_common(1)[0]
    if times > 1:
        first = pieces.index(piece)
        second = pieces.index(piece, first + 1)
        raise UserError(
            f"{path} has the piece {piece!r} in line {first + 1:,} and again in line {second + 1:,}: "
            "each id must have a piece of its own"
        )
    told = settings.get("do_lower_case")
    if lowercase is None:
        lowercase = told
    if lowercase is None:
        lowercase = not any(p != p.lower() for p in pieces if not _named.fullmatch(p))
    strip_accents = settings.get("strip_accents")
    if strip_accents is None and told is not None:
        strip_accents = lowercase  # as transformers reads a config that does not tell it
    return _tokenizer_json(pieces, lowercase, strip_accents)


def _tokenizer_json(pieces: list[str], lowercase: bool, strip_accents: bool | None = None) -> bytes:
    """The content of a tokenizer.json, the same bytes whatever the version of `tokenizers`."""
    if strip_accents is None:
        # A vocabulary in lower case that has letters with accents was made without taking them off.
        accents = any(p != unicodedata.normalize("NFD", p) for p in pieces if not _named.fullmatch(p))
        strip_accents = lowercase and not accents
    special = {name: pieces.index(name) for name in SPECIAL}
    single = [_part("SpecialToken", CLS, 0), _part("Sequence", "A", 0), _part("SpecialToken", SEP, 0)]
    pair = [*single, _part("Sequence", "B", 1), _part("SpecialToken", SEP, 1)]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": piece_id, "content": name, "single_word": False, "lstrip": False, "rstrip": False}
            | {"normalized": False, "special": True}
            for name, piece_id in sorted(special.items(), key=lambda item: item[1])
        ],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": strip_accents,
            "lowercase": lowercase,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": pair,
            "special_tokens": {
                name: {"id": name, "ids": [special[name]], "tokens": [name]} for name in (CLS, SEP)
            },
        },
        "decoder": {"type": "WordPiece", "prefix": CONTINUES, "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": UNK,
            "continuing_subword_prefix": CONTINUES,
            "max_input_chars_per_word": 100,
            "vocab": {piece: number for number, piece in enumerate(pieces)},
        },
    }
    return _bytes_of(content)


def _bytes_of(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def _part(kind: str, name: str, token_type: int) -> dict[str, Any]:
    return {kind: {"id": name, "type_id": token_type}}


# ------------------------------------------------------------------------------------- tokenizer.json


class _Rules(Table):
    """Of a tokenizer_config.json."""

    do_lower_case: bool | None = None
    strip_accents: bool | None = None
    tokenize_chinese_chars: bool | None = None


class _Normalizer(Table):
    clean_text: bool
    handle_chinese_chars: bool
    strip_accents: bool | None = None
    lowercase: bool


class _Model(Table):
    vocab: dict[str, Count]


class _AddedToken(Table):
    content: str
    special: bool


class _TokenizerJson(Table):
    normalizer: _Normalizer
    model: _Model
    added_tokens: list[_AddedToken] = Field(default_factory=list)

    @model_validator(mode="after")
    def _check_ids(self) -> _TokenizerJson:
        ids = set(self.model.vocab.values())
        if ids != set(range(len(self.model.vocab))):
            raise ValueError("model.vocab: the ids are not 0, 1, 2, ..., each once")
        return self


def _read(path: Path, content: bytes) -> _TokenizerJson:
    """The parts of a tokenizer.json. Raises UserError unless they are those of a BERT tokenizer."""
    values = parse_object(content, path, REMEDY)
    named = (values.get(name) for name in ("normalizer", "pre_tokenizer", "model"))
    types = [part.get("type") if isinstance(part, dict) else None for part in named]
    if types != ["BertNormalizer", "BertPreTokenizer", "WordPiece"]:
        raise UserError(
            f"{path} is not the tokenizer of a BERT (a WordPiece model with BERT's rules), nor BPE; where it "
            "is the Hugging Face form of a SentencePiece model, put that model beside it as tokenizer.model"
        )
    parts = check_table(_TokenizerJson, values, path, REMEDY)
    for name in SPECIAL:
        if name not in parts.model.vocab:
            raise UserError(f"the tokenizer {path} has no piece {name}")
    if not (parts.normalizer.clean_text and parts.normalizer.handle_chinese_chars):
        raise UserError(
            f"the tokenizer {path} does not clean text or does not make words of Chinese characters, which "
            "this version needs"
        )
    for token in parts.added_tokens:
        if not token.special:
            raise UserError(
                f"the tokenizer {path} has the added token {token.content!r}, which is not supported"
            )
    return parts
