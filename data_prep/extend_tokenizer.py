"""A given WordPiece vocabulary and sentences of the corpus -> the same vocabulary with more pieces behind it.

Old pieces keep their ids, so that a model that knows them can go on (docs/pretrain.md); only the way in which
a text is cut changes, since the longest piece that matches is taken.

Candidates are learnt by byte-pair encoding of the corpus' words, as WordPiece vocabularies are. Of these, the
characters that the vocabulary lacks come first, without which whole words are [UNK], then the pieces that the
words are cut into most frequently.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from bertscale.config import UserError
from bertscale.files import write_bytes
from bertscale.tokenizer import CONTINUES, WordPieceTokenizer, load_tokenizer
from data_prep.trainer import lines_of, trained_model

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
    """Writes the WordPiece tokenizer `given` with `size` pieces to `output`, learnt of files with a sentence
    a line. `coverage`: the share of characters that get pieces. Raises UserError if the text has too few.
    """
    tokenizer = load_tokenizer(given, lowercase)
    assert isinstance(tokenizer, WordPieceTokenizer)
    words = count_words(tokenizer, lines_of(sentences))
    known = {tokenizer.piece(i) for i in range(tokenizer.vocab_size)}
    found = [piece for piece in learn_pieces(words, size, coverage, log) if piece not in known]
    pieces = choose_pieces(words, known, found, size - tokenizer.vocab_size)
    if (most := tokenizer.vocab_size + len(pieces)) < size:
        raise UserError(
            f"train_tokenizer.extend_to={size} is too large for this text; the largest that fits is {most}"
        )
    write_bytes(output, tokenizer.extended(pieces))


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
    try:
        model = trained_model(
            lines,
            log,
            input_format="tsv",
            model_type="bpe",
            vocab_size=size,
            hard_vocab_limit=False,  # of a small text it makes fewer
            normalization_rule_name="identity",
            character_coverage=coverage,
            unk_id=0,
            pad_id=-1,
            bos_id=-1,
            eos_id=-1,
        )
    except RuntimeError as error:
        raise UserError(
            f"train_tokenizer.extend_to={size}: this text does not train a vocabulary ({error})"
        ) from error
    from sentencepiece import sentencepiece_model_pb2

    learnt = [entry.piece for entry in sentencepiece_model_pb2.ModelProto.FromString(model).pieces[1:]]
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
