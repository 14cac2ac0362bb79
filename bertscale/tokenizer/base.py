"""The interface of tokenizers, the normal form of text, what a word is, and offsets in the given text.

The kinds are in `sentence_piece`, `wordpiece` and `byte_level`; `load` makes one of a file. A piece is always
an entry of the vocabulary, an id its number; an offset counts characters of the text that was given.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

PAD, UNK, CLS, SEP, MASK = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_byte_piece = re.compile(r"<0x[0-9A-F]{2}>")
SPECIAL_KEYS = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")  # in tokenizer_config.json
SENTENCE_PIECE_NAME = "tokenizer.model"
FAST_NAME = "tokenizer.json"  # of the library `tokenizers`: a WordPiece or a BPE tokenizer
TOKENIZER_NAMES = (SENTENCE_PIECE_NAME, FAST_NAME)
VOCABULARY_NAME = "vocab.txt"  # of published models
CONFIG_NAME = "tokenizer_config.json"  # beside one of those
REMEDY = "put a sound copy of it there"


def spell(characters: str) -> str:
    """The characters of a Python character class, unescaped, for the regular expressions of `tokenizers`."""
    return re.sub(r"\\x(..)|\\u(....)", lambda m: chr(int(m[1] or m[2], 16)), characters)


Ids = list[int]
Spans = list[tuple[int, int]]  # begin and end in characters of the given text

# Characters that carry no text: controls, soft hyphen, byte order mark, lone surrogates. Both classes are
# spelt out because `\s` means different sets in Python and in the regular expressions of `tokenizers`.
# U+2581 is among the spaces: SentencePiece writes a space as that character and cannot tell the two apart.
DROPPED = "\\x00-\\x08\\x0e-\\x1b\\x7f-\\x84\\x86-\\x9f\\u00ad\\ufeff"
SPACES = "\\x09-\\x0d\\x1c-\\x20\\x85\\u00a0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000\\u2581"
# Both as the regular expressions of `tokenizers` take them.
DROPPED_RULE, SPACES_RULE = f"[{spell(DROPPED)}]+", f"[{spell(SPACES)}]+"
_find_dropped = re.compile(f"[{DROPPED}\\ud800-\\udfff]+")
_find_spaces = re.compile(f"[{SPACES}]+")

# Characters that are words of their own: Kana, Han and what is written among them.
_HAN_AND_KANA = (
    "\\u3005-\\u3007\\u3021-\\u3029\\u3031-\\u3035\\u3041-\\u30ff\\u31f0-\\u31ff\\u3400-\\u4dbf\\u4e00-\\u9fff"
    "\\uf900-\\ufaff\\uff66-\\uff9f\\U0001b000-\\U0001b16f\\U00020000-\\U000323af"
)
han_or_kana = re.compile(f"[{_HAN_AND_KANA}]")


def is_han_or_kana(characters: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
    """Whether each of the `characters`, given by their code points [N], is one of those; [N]."""
    inside: npt.NDArray[np.bool_] = np.searchsorted(_edges(), characters, side="right") % 2 == 1
    return inside


@cache
def _edges() -> npt.NDArray[np.int64]:
    """The first of each range of those characters, and the first one behind it."""
    matches = [bool(han_or_kana.match(chr(code))) for code in range(0x32400)]
    return np.flatnonzero(np.diff(matches, prepend=False))


def normalize(text: str, form: Literal["NFC", "NFKC"] = "NFC") -> str:
    """Normalised text: `form`, no control characters, one space for any white space, none at the ends."""
    text = _find_dropped.sub("", text)
    if not text.isascii():
        text = unicodedata.normalize(form, text)
    return _find_spaces.sub(" ", text).strip(" ")


class Tokenizer(ABC):
    """What training, fine-tuning and prep know of a tokenizer; made by `load_tokenizer`."""

    file_name: ClassVar[str]  # in the folder of a data set or model
    mark: str = ""  # of the vocabulary, before pieces that begin a word, or that do not

    path: Path  # where it was read
    content: bytes  # of the one file that holds it
    vocab_size: int  # special pieces included
    pad_id: int
    unk_id: int
    cls_id: int
    sep_id: int
    mask_id: int
    form: Literal["NFC", "NFKC"] | None = None  # Unicode's, that text is to have; None: WordPiece's own rules
    # Whether the white space before a sentence belongs to its pieces, so that prep encodes it with it.
    keeps_spaces: bool = False

    @cached_property
    def sha256(self) -> str:
        """The digest (hex) of the file that `save` writes."""
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def special_ids(self) -> tuple[int, ...]:
        """Those of the five roles, in this order; special pieces without such a role follow."""
        return (self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id)

    @cached_property
    def byte_ids(self) -> list[int]:
        """The pieces that spell a character that has no piece, by some of its bytes; none in WordPiece."""
        return [i for i in range(self.vocab_size) if _byte_piece.fullmatch(self.piece(i))]

    @cached_property
    def starts_word(self) -> npt.NDArray[np.bool_]:
        """Whether each piece begins a word, bool [vocabulary]: for masks of whole words.

        Words are those of BERT, whatever the tokenizer: runs of letters or digits, each punctuation mark,
        each piece of Han characters or Kana. Special pieces begin one too.
        """
        return np.array([self._starts_word(i) for i in range(self.vocab_size)]) | np.isin(
            np.arange(self.vocab_size), self.special_ids
        )

    def text_of(self, piece_id: int) -> str:
        """The text that a piece stands for, without the mark that the vocabulary gives it."""
        return self.piece(piece_id).removeprefix(self.mark)

    def spelt(self, piece_id: int) -> str:
        """A piece as text; one without any, such as a special piece or half a character, as it is named."""
        text = self.decode([piece_id]).strip()
        return text if text.strip("\ufffd ") else self.piece(piece_id)

    def save(self, folder: str | Path) -> Path:
        """Writes the tokenizer's file into `folder`; returns its path."""
        path = Path(folder) / self.file_name
        path.write_bytes(self.content)
        return path

    @abstractmethod
    def __str__(self) -> str:
        """The tokenizer's kind, size and rules, for people."""

    @abstractmethod
    def normalize(self, text: str) -> str:
        """The normal form of `text`, which `encode` needs."""

    @abstractmethod
    def encode(self, texts: list[str]) -> list[Ids]:
        """Encodes each text, which must be normalised, into its ids, without [CLS] and [SEP]."""

    @abstractmethod
    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[Ids, Spans]]:
        """Normalises and encodes each text: its ids, and the span of the given text that each piece is of.

        Spans leave out the space before a word. The bytes of one character all have its span; a piece that
        is nothing but a space has an empty one.
        """

    @abstractmethod
    def token_starts(self, texts: list[str], encoded: list[Ids]) -> npt.NDArray[np.int64]:
        """Where each token of `encoded`, the ids of normalised `texts`, begins: [tokens] of all of them.

        In characters, counted through all texts laid end to end; -1 where a token continues a character, or
        continues a word by the tokenizer's own rules.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special ids give no text."""

    @abstractmethod
    def piece(self, piece_id: int) -> str:
        """The piece as it is written in the vocabulary."""

    @abstractmethod
    def spelling(self, piece_id: int) -> tuple[str, bool]:
        """A piece without its marks, for people, and whether a space goes before it."""

    @abstractmethod
    def export_hugging_face(self, folder: str | Path, max_length: int) -> None:
        """Writes what AutoTokenizer loads; `max_length` in tokens, [CLS] and [SEP] included.

        Pairs become [CLS] A [SEP] B [SEP] with token types 0 and 1. Unlike `encode`, and as in any Hugging
        Face tokenizer, "[MASK]" in a text is the mask.
        """

    @abstractmethod
    def _starts_word(self, piece_id: int) -> bool: ...

    def agreement(self, folder: str | Path, texts: Sequence[str]) -> float:
        """Fraction of `texts` for which this tokenizer and the one exported to `folder` give the same ids."""
        from tokenizers import Tokenizer as Fast

        fast = Fast.from_file(str(Path(folder) / "tokenizer.json"))
        fast.encode_special_tokens = True  # a literal "[MASK]" is text, as it is to `encode`
        theirs = fast.encode_batch_fast(list(texts), add_special_tokens=False)
        ours = self.encode([self.normalize(text) for text in texts])
        return sum(a == b.ids for a, b in zip(ours, theirs, strict=True)) / max(len(texts), 1)


# --------------------------------------------------------------------------------------------- words


def begins_like_a_word(text: str) -> bool:
    """Whether a piece with this text begins a word even where no space is before it."""
    first = text[:1]
    return bool(han_or_kana.match(first)) or is_punctuation(first)


def fast_settings(max_length: int) -> dict[str, Any]:
    """What tokenizer_config.json says of a tokenizer.json, for transformers, beside the special pieces."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
    }


def starts_by_bytes(
    texts: list[str], counts: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where each token begins, in characters of all `texts`, -1 inside a character [tokens]; and how many
    bytes more than its own the tokens of each text have [texts], 1 at most where the places are right.

    `counts` [texts]: the tokens of each text; `sizes` [tokens]: the bytes of text that each stands for. Of a
    byte too many the first token has it: the space that was put before the text.
    """
    owner = np.repeat(np.arange(len(texts)), counts)  # [tokens]
    first_token = np.cumsum(counts) - counts
    content = [text.encode() for text in texts]
    lengths = np.fromiter(map(len, content), np.int64, len(content))  # [texts] bytes
    surplus = np.bincount(owner, sizes, len(texts)).astype(np.int64) - lengths
    before = np.cumsum(np.append(0, sizes))  # [tokens + 1] bytes of all tokens before it
    place = before[:-1] - (before[first_token] + surplus)[owner]
    place = np.clip(place, 0, (lengths - 1)[owner]) + (np.cumsum(lengths) - lengths)[owner]
    begins = np.frombuffer(b"".join(content), np.uint8) & 0xC0 != 0x80  # of characters, [bytes]
    starts: npt.NDArray[np.int64] = np.where(begins, np.cumsum(begins) - 1, -1)[place]
    return starts, surplus


def is_punctuation(character: str) -> bool:
    """Whether BERT's rules call it so: Unicode's punctuation, and all of ASCII but letters and digits."""
    if character.isascii():
        return character.isprintable() and not character.isalnum() and character not in ("", " ")
    return unicodedata.category(character)[0] == "P"


# ------------------------------------------------------------------------------------------- offsets


def normalize_with_offsets(text: str, form: Literal["NFC", "NFKC"]) -> tuple[str, Spans]:
    """`normalize(text, form)`, and for each of its characters the span of `text` that it comes from."""
    clean = normalize(text, form)
    if clean == text:
        return clean, [(i, i + 1) for i in range(len(text))]
    # The steps of `normalize`, character by character. Unicode's form has no offsets: so the text is cut into
    # runs of characters that have no influence on each other, and each run is normalised alone.
    remaining = [(c, i) for i, c in enumerate(text) if not _find_dropped.match(c)]
    characters: list[tuple[str, int, int]] = []
    start = 0
    for end in range(1, len(remaining) + 1):
        run = "".join(c for c, _ in remaining[start:end])
        if end < len(remaining) and joins(run, remaining[end][0], form):
            continue
        normal = unicodedata.normalize(form, run)
        if normal == run:
            characters += [(c, i, i + 1) for c, i in remaining[start:end]]
        else:  # every character of the normalised run gets the span of the whole run
            begin, stop = remaining[start][1], remaining[end - 1][1] + 1
            characters += [(c, begin, stop) for c in normal]
        start = end
    result: list[str] = []
    spans: Spans = []
    for character, begin, end in characters:
        if not _find_spaces.match(character):
            result.append(character)
            spans.append((begin, end))
        elif result and result[-1] == " ":  # one space for several
            spans[-1] = (spans[-1][0], end)
        elif result:  # none at the begin
            result.append(" ")
            spans.append((begin, end))
    if result and result[-1] == " ":
        result.pop()
        spans.pop()
    assert "".join(result) == clean
    return clean, spans


def joins(before: str, character: str, form: Literal["NFC", "NFKC"]) -> bool:
    """Whether the normal form of `character` depends on the characters `before` it, or theirs on it."""
    if character < "\u0300":  # the first combining character
        return False
    alone = unicodedata.normalize(form, character)
    if unicodedata.combining(alone[0]):
        return True
    return unicodedata.normalize(form, before + character) != unicodedata.normalize(form, before) + alone
