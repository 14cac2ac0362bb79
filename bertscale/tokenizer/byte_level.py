"""BPE that can spell any text in bytes, with the ids that the tokenizer.json of a published model gives.

    tokenizer = load_tokenizer("ModernBERT-base")     # a folder with tokenizer.json and tokenizer_config.json
    tokenizer.save("runs/data")                       # tokenizer.json, which says its special pieces itself

There are two forms. Byte-level BPE (GPT-2, RoBERTa, ModernBERT, Ettin, EuroBERT) joins the bytes of a text,
each written as a character of its own: "Ġ" is a space. BPE with byte fallback (Gemma, mmBERT) joins
characters, "▁" is a space, and pieces such as <0xE4> spell the bytes of a character that has no piece. All
rules (Unicode form, where words are cut, added tokens) are those of the file, by Hugging Face `tokenizers`.

tokenizer.json alone does not say which piece is the mask or the padding. Where it is read, the special pieces
are found by their roles, and the post-processor (what is put around a text) is replaced by one that names
them. Ids of texts do not change; a pair becomes CLS A SEP B SEP, as everywhere in bertscale.

Byte-level BPE: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.2
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from bertscale.config import UserError
from bertscale.config.table import Count, Table, check_table, damaged, parse_object, read_object
from bertscale.tokenizer.base import (
    CONFIG_NAME,
    DROPPED_RULE,
    FAST_NAME,
    REMEDY,
    SPACES_RULE,
    SPECIAL_KEYS,
    Ids,
    Spans,
    begins_like_a_word,
    fast_settings,
    joins,
    starts_by_bytes,
)
from bertscale.tokenizer.fast import FastTokenizer
from bertscale.tokenizer.wordpiece import CACHE_BYTES, WORD_BYTES

SPACE, SPACE_BYTE = "▁", "Ġ"  # a space in the pieces of the form with byte fallback, and of byte-level BPE
SPECIAL_TOKENS_NAME = "special_tokens_map.json"
# Names of the special pieces in published models, for a tokenizer.json with nothing beside it.
KNOWN_NAMES = {
    "pad_token": ("[PAD]", "<pad>", "<|pad|>", "<|padding|>"),
    "unk_token": ("[UNK]", "<unk>"),
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
    "mask_token": ("[MASK]", "<mask>", "<|mask|>"),
}
OTHER_KEYS = {"cls_token": "bos_token", "sep_token": "eos_token"}  # of tokenizers of language models
# First bytes of characters beyond the scripts that are written in words: symbols, Han characters, emoji.
FIRST_BYTES = (*range(0xE2, 0xEA), *range(0xF0, 0xF5))

# A space between two characters that are none, before which text may be cut: no piece of these tokenizers
# goes on over it. U+2581 is a space to the form with byte fallback.
_find_words = re.compile("(?<=[^\\s\u2581])(?= [^\\s\u2581])").split
# Rules that see nothing beyond such a space: those of words in GPT-2 (by ByteLevel itself), in Llama 3 and
# EuroBERT, and in Gemma, whose texts have no space any more; and normal forms.
SPLITS = (
    {
        "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    },
    {"String": " "},
)
FORMS = ("NFC", "NFD", "NFKC", "NFKD", "Strip")
REPLACED = ({"String": " "}, {"Regex": DROPPED_RULE}, {"Regex": SPACES_RULE})

_surrogate = re.compile("[\ud800-\udfff]")
_byte_piece = re.compile(r"<0x([0-9A-F]{2})>")
Roles = dict[str, str]  # pad_token, unk_token, ... -> the piece


class ByteLevelTokenizer(FastTokenizer):
    """A BPE tokenizer, made by `load_tokenizer`; the pieces of words after a space begin with that space."""

    file_name = FAST_NAME

    def __init__(self, path: Path, content: bytes) -> None:
        """Reads `content`, that of a tokenizer.json; raises UserError if it is not one of these two forms."""
        # No threads: prep runs one process for each core already, and threads of a process that was forked
        # would hang.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from tokenizers import Tokenizer as Fast

        values = parse_object(content, path, REMEDY)
        parts = _check(path, values)
        self._in_bytes = not parts.model.byte_fallback
        self.mark = SPACE_BYTE if self._in_bytes else SPACE
        if (roles := _named_roles(values)) is None:
            roles = _find_roles(path, values, parts)
            content = _with_roles(values, parts, roles)
        self.path, self.content = path, content
        try:
            self._fast = Fast.from_str(content.decode())
        except Exception as error:  # the library has no narrower class
            raise damaged(path, error, REMEDY) from error
        self._fast.no_truncation()
        self._fast.no_padding()
        self._fast.encode_special_tokens = True  # a literal "<mask>" is text
        self.vocab_size = self._fast.get_vocab_size()
        self.roles = roles
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (
            parts.ids[roles[key]] for key in SPECIAL_KEYS
        )
        self._added = {token.id: token for token in parts.added_tokens}
        # Words are encoded one by one, and each only once: this is several times as fast as the library.
        self._known: dict[str, tuple[int, ...]] = {}
        self._known_bytes = 0
        self._cuts_words = self._may_cut_words(values)
        self._check_that_text_stays_text()
        # Like "NFC" in a SentencePiece model: text in NFKC is not what this tokenizer is for.
        self.form = "NFKC" if '"NFKC"' in json.dumps(values.get("normalizer")) else "NFC"
        [alone, after_space] = self._encode(["a", " a"])
        # False where the tokenizer itself puts a space before each text.
        self.keeps_spaces = alone != after_space and not self._bytes(alone[0]).startswith(b" ")

    def __str__(self) -> str:
        kind = "byte-level BPE" if self._in_bytes else "BPE with byte fallback"
        return f"{kind} with {self.vocab_size:,} pieces"

    @cached_property
    def special_ids(self) -> tuple[int, ...]:
        five = (self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id)
        others = (number for number, token in self._added.items() if token.special and number not in five)
        return (*five, *others)

    @cached_property
    def byte_ids(self) -> list[int]:
        """The pieces that are a part of a character, from which some byte is missing."""
        if not self._in_bytes:
            return super().byte_ids
        pieces = map(self._bytes, range(self.vocab_size))
        return [i for i, piece in enumerate(pieces) if piece.decode(errors="ignore").encode() != piece]

    def normalize(self, text: str) -> str:
        """`text` without lone surrogates: the tokenizer's own rules do the rest in `encode`."""
        return text if text.isascii() else _surrogate.sub("", text)

    def encode(self, texts: list[str]) -> list[Ids]:
        if not self._cuts_words:
            return self._encode(texts)
        known = self._known
        lines = list(map(_find_words, texts))
        if new := list(set(chain.from_iterable(lines)).difference(known)):
            for word, ids_of_word in zip(new, self._encode(new), strict=True):
                known[word] = tuple(ids_of_word)
                self._known_bytes += WORD_BYTES + 12 * len(word)
        ids = [list(chain.from_iterable(map(known.__getitem__, line))) for line in lines]
        if self._known_bytes > CACHE_BYTES:  # the frequent words are back after a few lines
            self._known, self._known_bytes = {}, 0
        return ids

    def _encode(self, texts: list[str]) -> list[Ids]:
        return [e.ids for e in self._fast.encode_batch_fast(texts, add_special_tokens=False)]

    def _may_cut_words(self, values: dict[str, Any]) -> bool:
        """Whether a text has the pieces of its words, each with the space before it."""
        for step in _steps(values.get("pre_tokenizer")):
            if step["type"] != "ByteLevel" and step.get("pattern") not in SPLITS:
                return False
        for step in _steps(values.get("normalizer")):
            if step["type"] not in FORMS and step.get("pattern") not in REPLACED:
                return False
        if any(token.rstrip for token in self._added.values()):
            return False
        pieces = (self._bytes(i) for i in range(self.vocab_size) if i not in self.special_ids)
        if any(b" " in piece.replace(SPACE.encode(), b" ").lstrip() for piece in pieces):
            return False
        [whole, first, second] = self._encode(["a b", "a", " b"])
        return whole == first + second

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[Ids, Spans]]:
        results = []
        for text in texts:
            clean = self.normalize(text)
            encoding = self._fast.encode(clean, add_special_tokens=False)
            spans = [
                (begin, begin) if number in self._blank_ids else _trim(clean, begin, end)
                for number, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True)
            ]
            if not clean.isascii():
                spans = self._with_marks(clean, spans)
            if len(clean) < len(text):
                kept = [i for i, character in enumerate(text) if not _surrogate.match(character)]
                kept.append(len(text))
                spans = [(kept[a], kept[b - 1] + 1 if a < b else kept[a]) for a, b in spans]
            results.append((encoding.ids, spans))
        return results

    def _with_marks(self, text: str, spans: Spans) -> Spans:
        """`spans`, but to the end of several characters that Unicode's form makes one, not of the first."""
        assert self.form is not None
        whole, limit = [], len(text)  # `limit`: where the next piece begins
        for number, (begin, end) in reversed(list(enumerate(spans))):
            if number + 1 < len(spans) and spans[number + 1][0] > begin:
                limit = spans[number + 1][0]
            while begin < end < limit and joins(text[begin:end], text[end], self.form):
                end += 1
            whole.append((begin, end))
        return whole[::-1]

    def token_starts(self, texts: list[str], encoded: list[Ids]) -> npt.NDArray[np.int64]:
        """Where each token begins, in characters of all `texts`, counted from the bytes of the pieces; -1
        inside a character."""
        counts = np.fromiter(map(len, encoded), np.int64, len(encoded))  # [texts] tokens
        sizes = self._piece_bytes[np.fromiter(chain.from_iterable(encoded), np.int64)]  # [tokens]
        # Of each text the bytes of the pieces add up to its own, or to one more: the space put before it.
        starts, surplus = starts_by_bytes(texts, counts, sizes)
        first_token = np.cumsum(counts) - counts
        # Where they do not, the tokenizer's rules have changed the text.
        for number in np.flatnonzero((surplus < 0) | (surplus > 1)).tolist():
            [(_, spans)] = self.encode_with_offsets([texts[number]])
            first, last, behind = sum(map(len, texts[:number])), len(texts[number]) - 1, 0
            for token, (begin, end) in enumerate(spans):
                inside = begin < behind
                starts[first_token[number] + token] = -1 if inside else first + min(begin, last)
                behind = max(behind, end)
        return starts

    def text_of(self, piece_id: int) -> str:
        return self._bytes(piece_id).decode(errors="replace").removeprefix(" ")

    def spelling(self, piece_id: int) -> tuple[str, bool]:
        return self.text_of(piece_id), self._bytes(piece_id).startswith(b" ")

    def _bytes(self, piece_id: int) -> bytes:
        """The bytes of text that the piece stands for."""
        piece = self.piece(piece_id)
        if piece_id in self._added:
            return piece.encode()
        if self._in_bytes:
            values = [BYTE_OF.get(character, -1) for character in piece]
            return piece.encode() if -1 in values else bytes(values)
        if match := _byte_piece.fullmatch(piece):
            return bytes([int(match[1], 16)])
        return piece.replace(SPACE, " ").encode()

    @cached_property
    def _piece_bytes(self) -> npt.NDArray[np.int64]:
        """Bytes of text that each piece stands for, [vocabulary]."""
        return np.array([len(self._bytes(i)) for i in range(self.vocab_size)])

    @cached_property
    def _blank_ids(self) -> set[int]:
        """The pieces that are nothing but white space."""
        return {i for i in range(self.vocab_size) if not self._bytes(i).strip()}

    def _starts_word(self, piece_id: int) -> bool:
        piece = self._bytes(piece_id)
        text = piece.decode(errors="ignore")
        if text and piece.startswith(text[0].encode()):  # its first character is whole
            return text[0].isspace() or begins_like_a_word(text)
        return piece != b"" and piece[0] in FIRST_BYTES

    def _check_that_text_stays_text(self) -> None:
        """Raises UserError where a text that spells a special piece becomes that piece."""
        special = set(self.special_ids)
        names = [self.piece(number) for number in self.special_ids]
        for name, *encoded in zip(
            names, self.encode(names), self.encode([f"a {n}" for n in names]), strict=True
        ):
            if special.intersection(chain.from_iterable(encoded)):
                raise UserError(
                    f"in the tokenizer {self.path} the piece {name} is ordinary text, so that a text could "
                    'write it; give it "special": true among added_tokens, and no merge that makes it'
                )

    def export_hugging_face(self, folder: str | Path, max_length: int) -> None:
        """Writes tokenizer.json, the same as `save`, with tokenizer_config.json beside it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.save(folder)
        settings: dict[str, Any] = {
            **fast_settings(max_length),
            **self.roles,
        }
        if (mask := self._added[self.mask_id]).lstrip:
            settings["mask_token"] = {"__type": "AddedToken", **mask.model_dump(exclude={"id"})}
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        (folder / CONFIG_NAME).write_text(text, encoding="utf-8")


def _trim(text: str, begin: int, end: int) -> tuple[int, int]:
    """The part of a span without the white space at its ends."""
    while begin < end and text[begin].isspace():
        begin += 1
    while begin < end and text[end - 1].isspace():
        end -= 1
    return begin, end


def _byte_characters() -> dict[str, int]:
    """The characters that byte-level BPE writes for bytes: those that can be seen, and U+0100 and following.

    As `bytes_to_unicode` in https://github.com/openai/gpt-2/blob/master/src/encoder.py.
    """
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in seen]
    return {chr(b): b for b in seen} | {chr(0x100 + n): b for n, b in enumerate(others)}


BYTE_OF = _byte_characters()


# ------------------------------------------------------------------------------------- tokenizer.json


class _Model(Table):
    vocab: dict[str, Count]
    unk_token: str | None = None
    byte_fallback: bool = False
    dropout: float | None = None
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None


class _AddedToken(Table):
    id: Count
    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False


class _TokenizerJson(Table):
    model: _Model
    added_tokens: list[_AddedToken] = Field(default_factory=list)

    @cached_property
    def ids(self) -> dict[str, int]:
        """Of all pieces."""
        return self.model.vocab | {token.content: token.id for token in self.added_tokens}


def _check(path: Path, values: dict[str, Any]) -> _TokenizerJson:
    """The parts of a tokenizer.json. Raises UserError unless they are those of one of the two forms."""
    parts = check_table(_TokenizerJson, values, path, REMEDY)
    model, ids = parts.model, parts.ids
    in_bytes = any(step["type"] == "ByteLevel" for step in _steps(values.get("pre_tokenizer")))
    if in_bytes == model.byte_fallback or model.continuing_subword_prefix or model.end_of_word_suffix:
        raise UserError(
            f"the tokenizer {path} is a BPE that this version does not know: neither byte-level, as that of "
            "RoBERTa and ModernBERT, nor with byte fallback, as that of Gemma and mmBERT"
        )
    if model.dropout:
        raise UserError(f"the tokenizer {path} cuts texts at random: set model.dropout to null in it")
    if sorted(ids.values()) != list(range(len(ids))):
        raise damaged(path, "the ids of its pieces are not 0, 1, 2, ..., each once", REMEDY)
    return parts


def _steps(part: Any) -> list[dict[str, Any]]:
    """A part of a tokenizer.json, such as its pre-tokenizer, as the list of its steps."""
    if not isinstance(part, dict):
        return []
    names = ("normalizers", "pretokenizers", "processors", "decoders")
    inner = next((part[name] for name in names if name in part), None)
    return [part] if inner is None else [step for one in inner for step in _steps(one)]


# ------------------------------------------------------------------------------------- special pieces


def _named_roles(values: dict[str, Any]) -> Roles | None:
    """The special pieces that the post-processor names by their roles, if it is one of `_with_roles`."""
    for step in _steps(values.get("post_processor")):
        tokens = step.get("special_tokens", {})
        if all(key in tokens for key in SPECIAL_KEYS):
            return {key: tokens[key]["tokens"][0] for key in SPECIAL_KEYS}
    return None


def _find_roles(path: Path, values: dict[str, Any], parts: _TokenizerJson) -> Roles:
    """The special pieces as the files beside `path` name them, else the post-processor, else their names.

    A tokenizer without an unknown piece has no use for one: then it is the padding, which is in no text
    either. Raises UserError where one is missing.
    """
    roles: Roles = {}
    for name in (CONFIG_NAME, SPECIAL_TOKENS_NAME):
        if path.with_name(name).is_file():
            settings = read_object(path.with_name(name), REMEDY)
            for key in (*SPECIAL_KEYS, *OTHER_KEYS.values()):
                value = settings.get(key)
                value = value.get("content") if isinstance(value, dict) else value
                if isinstance(value, str):
                    roles.setdefault(key, value)
    around = _put_around(values)
    for key in SPECIAL_KEYS:
        known = [n for n in KNOWN_NAMES[key] if n in parts.ids]
        told = (around.get(key), roles.get(OTHER_KEYS.get(key, "")), *known)
        if key not in roles and (first := next(filter(None, told), None)):
            roles[key] = first
    if parts.model.unk_token:
        roles.setdefault("unk_token", parts.model.unk_token)
    if "pad_token" in roles:
        roles.setdefault("unk_token", roles["pad_token"])
    for key in SPECIAL_KEYS:
        if key not in roles:
            raise UserError(
                f"the tokenizer {path} does not say which piece is its {key}: name it in a {CONFIG_NAME} "
                f'beside it, such as {{"{key}": "{KNOWN_NAMES[key][0]}"}}, and it must be a piece of its own'
            )
        if roles[key] not in parts.ids:
            raise UserError(
                f"the {key} of the tokenizer {path} is {roles[key]}, which is none of its pieces; add it to "
                "added_tokens, with an id of its own"
            )
    if roles["mask_token"] in [roles[key] for key in SPECIAL_KEYS[:-1]]:
        raise UserError(f"the mask_token {roles['mask_token']} of the tokenizer {path} has two roles")
    return {key: roles[key] for key in SPECIAL_KEYS}


def _put_around(values: dict[str, Any]) -> Roles:
    """What the post-processor puts before and behind a single text."""
    roles: Roles = {}
    for step in _steps(values.get("post_processor")):
        if step["type"] in ("RobertaProcessing", "BertProcessing"):
            roles = {"cls_token": step["cls"][0], "sep_token": step["sep"][0]}
        elif step["type"] == "TemplateProcessing":
            first, last = step["single"][0], step["single"][-1]
            for key, part in (("cls_token", first), ("sep_token", last)):
                if "SpecialToken" in part:
                    name = part["SpecialToken"]["id"]
                    roles[key] = step["special_tokens"][name]["tokens"][0]
    return roles


def _with_roles(values: dict[str, Any], parts: _TokenizerJson, roles: Roles) -> bytes:
    """The content of a tokenizer.json whose post-processor names the special pieces by their roles."""
    names = {key: {"id": key, "ids": [parts.ids[roles[key]]], "tokens": [roles[key]]} for key in SPECIAL_KEYS}
    cls, sep = "cls_token", "sep_token"
    single = [_part("SpecialToken", cls, 0), _part("Sequence", "A", 0), _part("SpecialToken", sep, 0)]
    pair = [*single, _part("Sequence", "B", 1), _part("SpecialToken", sep, 1)]
    template = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": names}
    steps = [step for step in _steps(values.get("pre_tokenizer")) if step["type"] == "ByteLevel"]
    if steps:  # offsets without the space before a word
        trim = {**steps[0], "trim_offsets": True}
        values = {**values, "post_processor": {"type": "Sequence", "processors": [trim, template]}}
    else:
        values = {**values, "post_processor": template}
    content = {**values, "truncation": None, "padding": None}
    return (json.dumps(content, ensure_ascii=False) + "\n").encode()


def _part(kind: str, name: str, token_type: int) -> dict[str, Any]:
    return {kind: {"id": name, "type_id": token_type}}
