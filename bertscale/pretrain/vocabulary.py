"""The pieces of the source against those of the data: which rows of the embedding and the decoder they get.

Pieces are the same where they stand for the same text and both begin a word or both do not; their ids may
differ. Between two tokenizers of one kind that is the piece as it is written; between two kinds the marks of
the vocabularies (##, ▁) are taken off. Special pieces are the same where they have the same role.

| `init.vocabulary` | pieces that both know | other pieces of the data | other pieces of the source |
| ----------------- | --------------------- | ------------------------ | -------------------------- |
| `same`            | keep their rows       | refused                  | refused                    |
| `extend`          | keep their rows       | a mean of rows           | refused                    |
| `replace`         | keep their rows       | first values             | dropped                    |

The mean is over the pieces that the source's tokenizer cuts the new piece's text into, as Gee et al., 2022
("Fast Vocabulary Transfer for Language Model Compression"), take it; since logits are linear in the decoder's
rows, the logit of a new piece begins as the mean of those of its parts. Texts that are cut into old pieces
give the same hidden states as before. A new piece without text of its own, such as a byte, gets the row of
[UNK].
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from bertscale.config import UserError
from bertscale.convert.sources import InitSource
from bertscale.pretrain.reshaped import Reshaped
from bertscale.tokenizer import Tokenizer

# The parameters that have a row for each piece; a generator shares both.
ROWS = ("encoder.embeddings.word_embeddings.weight", "predictions.decoder.bias")
SHOWN = 5  # missing pieces that a message names


class Vocabulary(NamedTuple):
    """Says where the rows of the data's pieces come from; `kept`, `new` and `dropped` count pieces."""

    parts: list[list[int]]  # [new vocabulary] the source's ids whose rows' mean each piece gets; [] for none
    old_size: int  # pieces of the source's tokenizer
    kept: int
    new: int
    dropped: int

    def __str__(self) -> str:
        return (
            f"{self.kept:,} pieces keep their rows, {self.new:,} are new, {self.dropped:,} of the source's "
            "are dropped"
        )

    def rows(self, table: Tensor, first: Tensor) -> Tensor:
        """The rows [V, ...] of the data's pieces, padded ones of 0 included, from the source's `table`;
        `first`, of the result's shape, has those of pieces without a part."""
        result = torch.zeros_like(first)
        single = [piece for piece, parts in enumerate(self.parts) if len(parts) == 1]
        result[single] = table[[self.parts[piece][0] for piece in single]]
        for piece, parts in enumerate(self.parts):
            if len(parts) != 1:
                result[piece] = table[parts].mean(dim=0) if parts else first[piece]
        return result


# --------------------------------------------------------------------------------- which pieces are which


def check_same(old: Tokenizer, new: Tokenizer) -> None:
    """Raises UserError unless the source's tokenizer and that of the data have the same pieces and rules."""
    if old.sha256 == new.sha256:
        return
    if old.vocab_size != new.vocab_size:
        difference = f"{old.vocab_size:,} pieces against {new.vocab_size:,}"
    else:
        ids = range(old.vocab_size)
        apart = next((i for i in ids if old.piece(i) != new.piece(i)), None)
        if apart is not None:
            difference = f"id {apart} is {old.piece(apart)!r} and {new.piece(apart)!r}"
        elif str(old) != str(new):
            difference = f"{old}, and {new}"
        else:
            return
    raise UserError(
        f"init.vocabulary=same, but the source's tokenizer {old.path} is not that of the data, {new.path} "
        f"({difference}): prepare the data by `bertscale prep` with tokenizer={old.path}, or take "
        "init.vocabulary=extend or replace"
    )


def extended(old: Tokenizer, new: Tokenizer) -> Vocabulary:
    """The vocabulary of the data, `new`, which has all pieces of the source's and more.

    Raises UserError where a piece of the source's is missing.
    """
    found = matches(old, new)
    if missing := sorted(set(range(old.vocab_size)) - set(found)):
        named = ", ".join(repr(old.piece(i)) for i in missing[:SHOWN])
        raise UserError(
            f"init.vocabulary=extend, but the tokenizer of the data, {new.path}, lacks {len(missing):,} of "
            f"the source's pieces, such as {named}: extend that tokenizer by `bertscale prep` with "
            f"tokenizer={old.path} train_tokenizer.extend_to=N, or take init.vocabulary=replace"
        )
    return _counted(old, found, _cut(old, new, [piece for piece, i in enumerate(found) if i is None]))


def replaced(old: Tokenizer, new: Tokenizer) -> Vocabulary:
    """The vocabulary of the data, `new`, where only pieces that the source knows too have a row."""
    return _counted(old, matches(old, new), {})


def _counted(old: Tokenizer, found: list[int | None], cut: dict[int, list[int]]) -> Vocabulary:
    parts = [cut.get(piece, []) if i is None else [i] for piece, i in enumerate(found)]
    known = [i for i in found if i is not None]
    dropped = old.vocab_size - len(set(known))
    return Vocabulary(parts, old.vocab_size, len(known), len(found) - len(known), dropped)


def matches(old: Tokenizer, new: Tokenizer) -> list[int | None]:
    """For each piece of `new` the id of the same one in `old`, or None."""
    alike = (type(old), old.mark) == (type(new), new.mark)
    ids: dict[Hashable, int] = {}
    # "." and "▁." may both be the word "." of another kind: the one without a mark comes first.
    keys = sorted(enumerate(_keys(old, alike)), key=lambda pair: old.text_of(pair[0]) != old.piece(pair[0]))
    for i, key in keys:
        ids.setdefault(key, i)
    return [ids.get(key) for key in _keys(new, alike)]


def _keys(tokenizer: Tokenizer, alike: bool) -> list[Hashable]:
    """For each piece what is equal for the same pieces of two tokenizers, `alike` if of one kind."""
    roles = {i: ("special", role) for role, i in enumerate(tokenizer.special_ids[:5])}
    spells_byte = set(tokenizer.byte_ids)

    def key(i: int) -> Hashable:
        if i in roles:
            return roles[i]
        if alike or i in spells_byte:
            return tokenizer.piece(i)
        return tokenizer.text_of(i), bool(tokenizer.starts_word[i])

    return [key(i) for i in range(tokenizer.vocab_size)]


def _cut(old: Tokenizer, new: Tokenizer, pieces: list[int]) -> dict[int, list[int]]:
    """For each of some pieces of `new` the ids that `old` cuts its text into, [UNK] where it has none.

    A text that is given alone begins a word, or by other rules does not: where the piece is not so, its first
    part is the one with the same text that is.
    """
    special, spells_byte = set(old.special_ids), set(new.byte_ids)
    by_text = {
        (old.text_of(i), bool(old.starts_word[i])): i for i in range(old.vocab_size) if i not in special
    }
    texts = ["" if i in spells_byte else old.normalize(new.text_of(i)) for i in pieces]
    result = {}
    for piece, parts in zip(pieces, old.encode(texts), strict=True):
        begins = bool(new.starts_word[piece])
        if len(parts) > 1 and not begins and not old.text_of(parts[0]):  # "▁" alone
            parts = parts[1:]
        elif parts and parts[0] not in special:
            parts = [by_text.get((old.text_of(parts[0]), begins), parts[0]), *parts[1:]]
        result[piece] = parts or [old.unk_id]
    return result


# --------------------------------------------------------------------------------------------- the weights


def reworded(
    source: InitSource, vocabulary: Vocabulary, new: Tokenizer, first: Callable[[str], Tensor]
) -> InitSource:
    """`source` with the rows of the data's pieces.

    `first(name)`: the whole first value of a parameter, padded rows included; asked only for those in `ROWS`.
    Raises UserError where the source has fewer rows than its tokenizer has pieces.
    """
    if source.vocab_size < vocabulary.old_size:
        raise UserError(
            f"{source.folder} has rows for {source.vocab_size:,} pieces, but its tokenizer "
            f"{source.tokenizer} has {vocabulary.old_size:,}: put the model's own tokenizer there"
        )

    def tensor(name: str) -> Tensor:
        value = source.tensor(name)
        return vocabulary.rows(value, first(name)) if name in ROWS else value

    return Reshaped(source, tensor, vocab_size=new.vocab_size, tokenizer=new.path)
