"""A given tokenizer and sentences of the corpus -> the same tokenizer with more pieces behind its own.

Old pieces keep their ids, so that a model that knows them can go on (docs/pretrain.md); only the way in which
a text is cut changes. In each case the characters that the vocabulary lacks come first.

- WordPiece, which takes the longest piece that matches: candidates are learnt by byte-pair encoding of the
  corpus' words, as WordPiece vocabularies are; those that the words are cut into most frequently are taken.
- SentencePiece Unigram, which takes the most probable cut: candidates and their log-probabilities are those
  of a Unigram model of the corpus, moved to the scale of the old ones by the mean difference of the pieces
  that both models have; those that the corpus is cut into most frequently are taken.
- SentencePiece BPE, which joins neighbours in the order of the scores: byte-pair encoding of the corpus goes
  on where the old model ends, with its pieces as symbols. Each new piece is joined of two, in the order in
  which they were learnt, after all that the old model joins; so each can be reached.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from bertscale.config import UserError
from bertscale.files import write_bytes
from bertscale.tokenizer import (
    CONTINUES,
    SENTENCE_PIECE_NAME,
    Tokenizer,
    WordPieceTokenizer,
    han_or_kana,
    load_tokenizer,
)
from data_prep.trainer import lines_of, trained_model

if TYPE_CHECKING:
    from bertscale.tokenizer.sentence_piece import SentencePieceTokenizer

SPACE = "▁"  # SentencePiece's mark of a piece that begins a word

LONGEST_WORD = 100  # characters; WordPiece makes longer ones [UNK]


def extend_tokenizer(
    sentences: list[Path],
    output: Path,
    given: Path,
    lowercase: bool | None,
    size: int,
    coverage: float,
    log: Path | None = None,
) -> None:
    """Writes the tokenizer `given` with `size` pieces to `output`, learnt of files with a sentence a line.
    `coverage`: the share of characters that get pieces. Raises UserError if the text has too few.
    """
    tokenizer = load_tokenizer(given, lowercase)
    number = size - tokenizer.vocab_size
    if log:
        log.touch()
    if isinstance(tokenizer, WordPieceTokenizer):
        words = count_words(tokenizer, lines_of(sentences))
        known = pieces_of(tokenizer)
        found = [piece for piece in learn_pieces(words, size, coverage, log) if piece not in known]
        pieces = choose_pieces(words, known, found, number)
        count, content = len(pieces), tokenizer.extended(pieces)
    else:
        assert tokenizer.file_name == SENTENCE_PIECE_NAME
        model = cast("SentencePieceTokenizer", tokenizer)
        spec = model.proto.trainer_spec
        learn = more_joins if spec.model_type == spec.BPE else more_unigrams
        scored = learn(model, sentences, number, coverage, log)
        count, content = len(scored), model.extended(scored)
    if count < number:
        raise UserError(
            f"train_tokenizer.extend_to={size} is too large for this text; the largest that fits is "
            f"{tokenizer.vocab_size + count}"
        )
    write_bytes(output, content)


def is_unigram_or_bpe(tokenizer: Tokenizer) -> bool:
    """Whether it is a SentencePiece model of a kind that is extended."""
    if tokenizer.file_name != SENTENCE_PIECE_NAME:
        return False
    spec = cast("SentencePieceTokenizer", tokenizer).proto.trainer_spec
    return spec.model_type in (spec.UNIGRAM, spec.BPE) and not spec.treat_whitespace_as_suffix


def pieces_of(tokenizer: Tokenizer) -> set[str]:
    """All pieces, as the vocabulary writes them."""
    return {tokenizer.piece(i) for i in range(tokenizer.vocab_size)}


# -------------------------------------------------------------------------------------------- WordPiece


def count_words(tokenizer: WordPieceTokenizer, lines: Iterable[str]) -> Counter[str]:
    """How often each word is in `lines`, in the form that the tokenizer cuts into pieces."""
    strings = Counter[str]()
    for line in lines:
        strings.update(tokenizer.normalize(line).split(" "))
    words = Counter[str]()
    for string, times in strings.items():
        for word in tokenizer.words(string):
            if len(word) <= LONGEST_WORD:
                words[word] += times
    return words


def learn_pieces(words: Counter[str], size: int, coverage: float, log: Path | None) -> list[str]:
    """Pieces of a vocabulary of `size` that the words alone would get, in the order in which they are added.

    Each character is there at the begin of a word and inside.
    """
    lines = (f"{word}\t{times}" for word, times in sorted(words.items()))
    trained = trained_pieces(
        lines, log, size, input_format="tsv", model_type="bpe", character_coverage=coverage
    )
    learnt = [piece for piece, _ in trained]
    single = [piece for piece in learnt if len(piece) == 1 and piece != SPACE]
    joined = [piece for piece in learnt if len(piece.removeprefix(SPACE)) > 1]
    pieces = [form for character in single for form in (character, CONTINUES + character)]
    return pieces + [p[1:] if p.startswith(SPACE) else CONTINUES + p for p in joined]


def choose_pieces(words: Counter[str], known: set[str], found: list[str], number: int) -> list[str]:
    """At most `number` of the pieces `found`: characters, then joined ones, the most frequent first.

    As a piece is frequent only where no longer one is taken, the rarest quarter is left out, the words are
    cut again, and so on.
    """
    kept = found
    while True:
        uses = count_pieces(words, known | set(kept))
        used = [piece for piece in kept if uses[piece]]
        used.sort(key=lambda piece: (len(piece.removeprefix(CONTINUES)) > 1, -uses[piece]))
        if len(used) * 3 // 4 <= number:
            return used[:number]
        kept = used[: len(used) * 3 // 4]


def count_pieces(words: Counter[str], vocabulary: set[str]) -> Counter[str]:
    """How often the words are cut into each piece: the longest that matches, again and again."""
    pieces, longest = Counter[str](), max(map(len, vocabulary))
    for word, times in words.items():
        begin, of_word = 0, list[str]()
        while begin < len(word):
            mark = CONTINUES if begin else ""
            ends = range(min(len(word), begin + longest), begin, -1)
            end = next((end for end in ends if mark + word[begin:end] in vocabulary), None)
            if end is None:  # the whole word is [UNK]
                break
            of_word.append(mark + word[begin:end])
            begin = end
        else:
            for piece in of_word:
                pieces[piece] += times
    return pieces


# ---------------------------------------------------------------------------------------- SentencePiece

Scored = list[tuple[str, float]]  # pieces and their scores
BATCH = 10_000  # sentences that are cut at once


def more_unigrams(
    tokenizer: SentencePieceTokenizer, sentences: list[Path], number: int, coverage: float, log: Path | None
) -> Scored:
    """At most `number` new pieces, from a Unigram model of the corpus that has as many as both together."""
    spec, old, known = tokenizer.proto.trainer_spec, scores_of(tokenizer), pieces_of(tokenizer)
    learnt = dict(
        trained_pieces(
            map(reader(tokenizer), lines_of(sentences)),
            log,
            tokenizer.vocab_size + number,
            model_type="unigram",
            character_coverage=coverage,
            add_dummy_prefix=tokenizer.proto.normalizer_spec.add_dummy_prefix,
            split_by_unicode_script=spec.split_by_unicode_script,
            split_by_number=spec.split_by_number,
            split_by_whitespace=spec.split_by_whitespace,
            split_digits=spec.split_digits,
            max_sentencepiece_length=spec.max_sentencepiece_length,
        )
    )
    shared = [piece for piece in learnt if piece in old]
    moved = 0.0
    if shared:
        differences = [old[piece] - learnt[piece] for piece in shared]
        moved = float(np.average(differences, weights=np.exp([learnt[piece] for piece in shared])))
    # Not below the old ones: the score of an unknown character is relative to the lowest.
    lowest = min(old.values())
    new = {piece: max(lowest, score + moved) for piece, score in learnt.items() if piece not in known}
    kept = list(new)
    while True:  # as choose_pieces does
        whole = tokenizer.extended([(piece, new[piece]) for piece in kept])
        uses = count_uses(type(tokenizer)(tokenizer.path, whole), sentences)
        counts = dict(zip(kept, uses[tokenizer.vocab_size :].tolist(), strict=True))
        used = [piece for piece in kept if counts[piece]]
        used.sort(key=lambda piece: (len(piece) > 1, -counts[piece]))
        if len(used) * 3 // 4 <= number:
            return [(piece, new[piece]) for piece in used[:number]]
        kept = used[: len(used) * 3 // 4]


def more_joins(
    tokenizer: SentencePieceTokenizer, sentences: list[Path], number: int, coverage: float, log: Path | None
) -> Scored:
    """At most `number` new pieces of a BPE model: characters, then joins of two, as they are learnt."""
    known, longest = pieces_of(tokenizer), tokenizer.proto.trainer_spec.max_sentencepiece_length
    new = missing_characters(tokenizer, sentences, coverage)[:number]
    lowest = min(scores_of(tokenizer).values())

    def scored() -> Scored:
        return [(piece, lowest - place) for place, piece in enumerate(new, 1)]

    whole = type(tokenizer)(tokenizer.path, tokenizer.extended(scored()))
    words, pieces = words_in_pieces(whole, sentences)
    if not words:
        return scored()
    symbols = set().union(*words)
    learnt = trained_pieces(
        (f"{word}\t{times}" for word, times in sorted(words.items())),
        log,
        # A text may be joined in two ways, which is one piece, and the unknown piece is one.
        1 + len(symbols) + number * 9 // 8 + 16,
        input_format="tsv",
        model_type="bpe",
        character_coverage=1.0,
        add_dummy_prefix=False,
        split_by_unicode_script=False,
        split_by_number=False,
        max_sentencepiece_length=longest,
    )
    for joined, _ in learnt:
        piece = "".join(pieces[symbol] for symbol in joined)
        if len(joined) > 1 and piece not in known and len(piece) <= longest and len(new) < number:
            new.append(piece)
            known.add(piece)
    return scored()


def missing_characters(
    tokenizer: SentencePieceTokenizer, sentences: list[Path], coverage: float
) -> list[str]:
    """The characters without a piece among the most frequent ones, which are the share `coverage` of the
    text; the most frequent first."""
    read, counts = reader(tokenizer), Counter[str]()
    for line in lines_of(sentences):
        counts.update(read(line))
    del counts[" "]
    known, left, missing = pieces_of(tokenizer), coverage * counts.total(), []
    for character, times in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])):
        if left <= 0:
            break
        left -= times
        if character not in known:
            missing.append(character)
    return missing


def words_in_pieces(
    tokenizer: SentencePieceTokenizer, sentences: list[Path]
) -> tuple[Counter[str], dict[str, str]]:
    """How often each word is in the sentences, written with a symbol, a character for private use, for each
    of its pieces; and the piece of each symbol.

    A word ends where the rules of the model let no piece reach over: at a space, where letters, digits and
    signs meet, at Han characters and Kana beside others, and beside a byte.
    """
    spec, ids = tokenizer.proto.trainer_spec, range(tokenizer.vocab_size)
    texts = [tokenizer.piece(i) for i in ids]
    apart = set(tokenizer.special_ids) | set(tokenizer.byte_ids)
    first, last = (np.array([_kind(text[end]) for text in texts]) for end in (0, -1))
    marks = (SPACE,) if spec.split_by_whitespace else ()
    begins = np.array([text.startswith(marks) or i in apart for i, text in enumerate(texts)])
    ends = np.array([i in apart for i in ids])
    symbols = np.array([_symbol(i) for i in ids], np.uint32)
    words = Counter[str]()
    for encoded in _batches(tokenizer, sentences):
        flat = np.concatenate([np.array(each, np.int64) for each in encoded])
        starts = np.zeros(len(flat) + 1, bool)
        starts[np.cumsum([0, *map(len, encoded)])] = True
        starts[:-1] |= begins[flat]
        starts[1:] |= ends[flat]
        left, right = last[flat[:-1]], first[flat[1:]]
        if spec.split_by_unicode_script:
            starts[1:-1] |= (left != right) & (left > 0) & (right > 0)
        if spec.split_digits:
            starts[1:-1] |= (left == DIGIT) & (right == DIGIT)
        line = symbols[flat].tobytes().decode("utf-32-le")
        places = np.flatnonzero(starts).tolist()
        words.update(line[a:b] for a, b in pairwise(places) if b - a > 1)
    return words, {chr(_symbol(i)): text for i, text in enumerate(texts)}


DIGIT = 3


def _kind(character: str) -> int:
    """What a character is to the rule that a piece has one kind of them; 0: what goes with all."""
    if character == SPACE:
        return 0
    if han_or_kana.match(character):
        return 1
    return {"L": 2, "M": 2, "N": DIGIT}.get(unicodedata.category(character)[0], 4)


def _symbol(piece_id: int) -> int:
    """The code point for private use that stands for a piece: 131,068 in two planes, whose last two are
    none."""
    return 0xF0000 + piece_id + 2 * (piece_id >= 0xFFFE)


def _batches(tokenizer: Tokenizer, sentences: list[Path]) -> Iterator[list[list[int]]]:
    lines = lines_of(sentences)
    while batch := list(islice(lines, BATCH)):
        if encoded := [ids for ids in tokenizer.encode(batch) if ids]:
            yield encoded


def count_uses(tokenizer: Tokenizer, sentences: list[Path]) -> Any:
    """How often each piece is used in the sentences, int64 [vocabulary]."""
    uses = np.zeros(tokenizer.vocab_size, np.int64)
    for encoded in _batches(tokenizer, sentences):
        flat = np.concatenate([np.array(ids, np.int64) for ids in encoded])
        uses += np.bincount(flat, minlength=tokenizer.vocab_size)
    return uses


def reader(tokenizer: SentencePieceTokenizer) -> Callable[[str], str]:
    """Returns what the model makes of a text before it cuts it: its own normal form, with plain spaces."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.content)
    return lambda text: processor.normalize(text).replace(SPACE, " ").strip()


def scores_of(tokenizer: SentencePieceTokenizer) -> dict[str, float]:
    """The scores of the pieces that text is cut into."""
    pieces = tokenizer.proto.pieces
    return {piece.piece: piece.score for piece in pieces if piece.type == piece.NORMAL}


def trained_pieces(lines: Iterable[str], log: Path | None, size: int, **settings: Any) -> Scored:
    """The pieces of a SentencePiece model of at most `size` that is trained on `lines`, in their order."""
    from sentencepiece import sentencepiece_model_pb2

    try:
        model = trained_model(
            lines,
            log,
            vocab_size=size,
            hard_vocab_limit=False,  # of a small text it makes fewer
            normalization_rule_name="identity",
            unk_id=0,
            pad_id=-1,
            bos_id=-1,
            eos_id=-1,
            **settings,
        )
    except RuntimeError as error:
        raise UserError(
            f"train_tokenizer.extend_to: this text does not train {size:,} pieces ({error})"
        ) from error
    pieces = sentencepiece_model_pb2.ModelProto.FromString(model).pieces
    return [(piece.piece, piece.score) for piece in pieces if piece.type == piece.NORMAL]
