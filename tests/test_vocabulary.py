"""The vocabulary of a source against that of the data: which pieces are the same, and what the others get."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_reshape import PRESETS, Source, model_of, shape

from bertscale.config import ModelConfig, UserError, padded_vocab_size
from bertscale.convert.sources import InitSource
from bertscale.model.model import PretrainingModel, initial_value
from bertscale.pretrain.vocabulary import (
    ROWS,
    Vocabulary,
    check_same,
    extended,
    matches,
    replaced,
    reworded,
)
from bertscale.tokenizer import Tokenizer, load_tokenizer
from data_prep.extend_tokenizer import extend_tokenizer
from data_prep.train_tokenizer import train_tokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
OLD = [*SPECIAL, *"abcdehlot", *(f"##{letter}" for letter in "abcdehlot"), "the", "##at", ".", "[unused0]"]
# Others between the old ones, and these in another order.
NEW = [*OLD[:5], "that", *OLD[:4:-1], "##hat", "cold", "☃"]
SENTENCES = ["the cat that the old cobbler had", "hello hello cold cat", "a bad deed. the ladle. the bead."]


def word_pieces(folder: Path, pieces: list[str], name: str = "vocab.txt") -> Tokenizer:
    (folder / name).write_text("\n".join(pieces), encoding="utf-8")
    return load_tokenizer(folder / name)


@pytest.fixture(scope="module")
def sentence_pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("model")
    (folder / "text.txt").write_text("\n".join(SENTENCES * 20))
    train_tokenizer([folder / "text.txt"], folder / "tokenizer.model", "bpe", 300)
    return load_tokenizer(folder / "tokenizer.model")


def source_of(tokenizer: Tokenizer, model: ModelConfig | None = None) -> Source:
    source = Source(model or shape("bert"), tokenizer.vocab_size)
    source.tokenizer = tokenizer.path
    return source


def in_words_of(source: InitSource, vocabulary: Vocabulary, new: Tokenizer) -> InitSource:
    def first(name: str) -> torch.Tensor:
        size = padded_vocab_size(new.vocab_size)
        width = (source.model.hidden_size,) * (name == ROWS[0])
        return initial_value(name, (size, *width), source.model, new.vocab_size, seed=0)

    return reworded(source, vocabulary, new, first)


def outputs(model: PretrainingModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [T, H] and logits [T, V] of one text."""
    sample = ids, torch.zeros_like(ids), torch.arange(len(ids)), [len(ids)]
    with torch.no_grad():
        hidden, _ = model.encoder(*sample)
        guessed = hidden if model.generator is None else model.generator(*sample, model.encoder.embeddings)[0]
        return hidden, model.predictions.logits(guessed)


@pytest.mark.parametrize("preset", [*PRESETS, "generator"])
def test_text_of_old_pieces_keeps_its_outputs(tmp_path: Path, preset: str) -> None:
    old, new = word_pieces(tmp_path, OLD), word_pieces(tmp_path, NEW, "new.txt")
    model = shape("bert", generator_size=1 / 3) if preset == "generator" else shape(preset)
    source = source_of(old, model)
    vocabulary = extended(old, new)
    assert str(vocabulary) == "27 pieces keep their rows, 4 are new, 0 of the source's are dropped"
    assert len(NEW) == 31
    large = in_words_of(source, vocabulary, new)
    assert (large.vocab_size, large.tokenizer, large.digest()) == (31, new.path, source.digest())

    place = torch.tensor([NEW.index(piece) for piece in OLD])  # [old vocabulary] -> new ids
    [ids] = old.encode(["the cat ate a tabloid"])
    before, after = model_of(source), model_of(large)
    (hidden, logits), (hidden_then, logits_then) = (
        outputs(before, torch.tensor(ids)),
        outputs(after, place[ids]),
    )
    assert (hidden - hidden_then).abs().max() < 1e-6
    assert (logits[:, : len(OLD)] - logits_then[:, place]).abs().max() < 1e-6
    # A new piece begins as the mean of its parts: that = t ##h ##at.
    parts = [OLD.index(piece) for piece in ("t", "##h", "##at")]
    assert torch.allclose(logits_then[:, NEW.index("that")], logits[:, parts].mean(dim=1), atol=1e-5)


def test_parts_of_new_pieces(tmp_path: Path) -> None:
    old, new = word_pieces(tmp_path, OLD), word_pieces(tmp_path, NEW, "new.txt")
    parts = {piece: [OLD[i] for i in ids] for piece, ids in zip(NEW, extended(old, new).parts, strict=True)}
    assert parts["that"] == ["t", "##h", "##at"]
    assert parts["##hat"] == ["##h", "##at"]  # not h, as it would be at the begin of a word
    assert parts["cold"] == ["c", "##o", "##l", "##d"]
    assert parts["☃"] == ["[UNK]"]
    assert parts["[unused0]"] == ["[unused0]"]


def test_rows_of_replaced_pieces(tmp_path: Path) -> None:
    old, new = word_pieces(tmp_path, OLD), word_pieces(tmp_path, [*SPECIAL, "the", "cat", "a"], "new.txt")
    vocabulary = replaced(old, new)
    assert (vocabulary.kept, vocabulary.new, vocabulary.dropped) == (7, 1, 20)
    source = source_of(old)
    rows = in_words_of(source, vocabulary, new).tensor(ROWS[0])
    theirs = source.tensor(ROWS[0])
    assert rows.shape == (128, 24)
    assert torch.equal(rows[5], theirs[OLD.index("the")])
    assert torch.equal(rows[7], theirs[OLD.index("a")])
    assert torch.equal(rows[6], initial_value(ROWS[0], (128, 24), source.model, 8, seed=0)[6])
    assert not rows[8:].any()
    other = in_words_of(source, vocabulary, new)
    name = "encoder.embeddings.position_embeddings.weight"
    assert torch.equal(other.tensor(name), source.tensor(name))


def test_pieces_of_two_kinds(tmp_path: Path, sentence_pieces: Tokenizer) -> None:
    words = word_pieces(tmp_path, OLD)
    pieces = [sentence_pieces.piece(i) for i in range(sentence_pieces.vocab_size)]
    found = dict(zip(pieces, matches(words, sentence_pieces), strict=True))
    assert [found[name] for name in SPECIAL] == [0, 1, 2, 3, 4]
    assert found["▁the"] == OLD.index("the")
    assert found["a"] == OLD.index("##a")
    assert found["."] == OLD.index(".")
    assert found["<0x61>"] is None
    back = dict(zip(OLD, matches(sentence_pieces, words), strict=True))
    assert back["the"] == pieces.index("▁the")
    assert back["##a"] == pieces.index("a")
    assert back["."] == pieces.index(".")
    assert replaced(sentence_pieces, words).kept == sum(i is not None for i in back.values())


def test_an_extended_sentence_piece_model_keeps_the_rows_of_its_pieces(
    tmp_path: Path, sentence_pieces: Tokenizer
) -> None:
    (tmp_path / "text.txt").write_text("the cold beadle had a table\n" * 9)
    more = tmp_path / "more.model"
    extend_tokenizer([tmp_path / "text.txt"], more, sentence_pieces.path, None, 306, 1.0)
    new = load_tokenizer(more)
    vocabulary = extended(sentence_pieces, new)
    assert (vocabulary.kept, vocabulary.new, vocabulary.dropped) == (300, 6, 0)
    source = source_of(sentence_pieces)
    rows, theirs = (each.tensor(ROWS[0]) for each in (in_words_of(source, vocabulary, new), source))
    assert torch.equal(rows[:300], theirs[:300])
    for piece in range(300, 306):
        parts = vocabulary.parts[piece]
        assert len(parts) > 1
        assert "".join(sentence_pieces.piece(i) for i in parts) == new.piece(piece)
        assert torch.equal(rows[piece], theirs[parts].mean(dim=0))


def test_more_pieces_of_a_sentence_piece_model(tmp_path: Path, sentence_pieces: Tokenizer) -> None:
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES * 20))
    train_tokenizer([tmp_path / "text.txt"], tmp_path / "more.model", "bpe", 320)
    more = load_tokenizer(tmp_path / "more.model")
    vocabulary = extended(sentence_pieces, more)
    assert (vocabulary.kept, vocabulary.new) == (300, 20)
    for piece, parts in enumerate(vocabulary.parts):
        text = "".join(sentence_pieces.piece(i) for i in parts)
        assert text == more.piece(piece), (text, more.piece(piece))


def test_what_is_refused(tmp_path: Path, sentence_pieces: Tokenizer) -> None:
    old, less = word_pieces(tmp_path, OLD), word_pieces(tmp_path, OLD[:-2], "less.txt")
    with pytest.raises(UserError, match=r"lacks 2 of the source's pieces, such as '\.', '\[u"):
        extended(old, less)
    with pytest.raises(UserError, match=r"extend_to=N, or take init\.vocabulary=replace"):
        extended(old, sentence_pieces)
    source = source_of(less)
    with pytest.raises(UserError, match=r"has rows for 25 pieces, but its tokenizer .* has 27"):
        in_words_of(source, replaced(old, old), old)


def test_the_same_tokenizer(tmp_path: Path, sentence_pieces: Tokenizer) -> None:
    old = word_pieces(tmp_path, OLD)
    check_same(old, word_pieces(tmp_path, OLD, "copy.txt"))
    # transformers writes the same tokenizer in other bytes.
    written = tmp_path / "tokenizer.json"
    written.write_bytes(old.content.replace(b"\n ", b"\n    "))
    check_same(old, load_tokenizer(written))
    swapped = [*OLD[:5], "b", "a", *OLD[7:]]
    for other, difference in (
        (word_pieces(tmp_path, NEW, "new.txt"), "27 pieces against 31"),
        (word_pieces(tmp_path, swapped, "swapped.txt"), "id 5 is 'a' and 'b'"),
        (load_tokenizer(tmp_path / "vocab.txt", lowercase=False), "in lower case and without accents, and "),
        (sentence_pieces, "27 pieces against 300"),
    ):
        with pytest.raises(UserError, match=difference) as error:
            check_same(old, other)
        assert "take init.vocabulary=extend or replace" in str(error.value)
