"""The tokenizer's sample is uniform, bounded and the same for any number of workers; so is the model."""

from __future__ import annotations

import os
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from pydantic import ValidationError

from bertscale.config import PrepConfig, TokenizerTraining, UserError
from bertscale.tokenizer import find_tokenizer, load_tokenizer, normalize
from data_prep import extend_tokenizer, train_tokenizer
from data_prep.extend_tokenizer import choose_pieces, count_pieces, words_in_pieces
from data_prep.plan import Plan
from data_prep.train_tokenizer import (
    EXCERPT,
    check_extension,
    draw_sample,
    finished_tokenizer,
    make_tokenizer,
    training_state,
)
from data_prep.workers import worker_pool

HAN = "北京是中国的首都我们学习人民大学生活水平东西南北上下左右"


def texts(number: int, seed: int = 0) -> list[str]:
    """Documents of random words that come back."""
    generator = random.Random(seed)
    letters = "abcdefghijklmnoprstuvw"
    words = ["".join(generator.choices(letters, k=generator.randint(2, 8))) for _ in range(300)]
    return [" ".join(generator.choices(words, k=generator.randint(5, 60))) + "." for _ in range(number)]


def prepare(folder: Path, documents: list[str], workers: int = 1, **settings: Any) -> Path:
    (folder / "input").mkdir(exist_ok=True, parents=True)
    (folder / "input" / "a.txt").write_text("\n\n".join(documents), encoding="utf-8")
    output = folder / f"output-{workers}"
    training = TokenizerTraining(**{"vocab_size": 400} | settings.pop("train_tokenizer", {}))
    config = PrepConfig(
        input=[str(folder / "input")],
        output=str(output),
        split_bytes=20_000,
        train_tokenizer=training,
        workers=workers,
        **settings,
    )
    plan = Plan(config)
    with plan.alone(), worker_pool(workers) as pool:
        plan.begin()
        tokenizer = make_tokenizer(pool, plan)
    assert not list((output / ".prep").glob("sample*"))
    again = finished_tokenizer(plan)
    assert again is not None
    assert again.sha256 == tokenizer.sha256
    return find_tokenizer(output)


def test_the_sample_is_uniform_and_repeatable() -> None:
    documents = [str(number) for number in range(40)]
    everything = [(number, text.encode()) for number, text in enumerate(documents)]
    assert draw_sample(documents, 100, 1000, "0") == everything
    one, same, other = (draw_sample(documents, 10, 1000, seed) for seed in ("0", "0", "1"))
    assert one == same != other
    drawn = [number for seed in range(400) for number, _ in draw_sample(documents, 10, 1000, str(seed))]
    counts = np.bincount(drawn, minlength=40)
    assert counts.sum() == 4000
    assert 60 < counts.min() <= counts.max() < 140  # 100 expected, standard deviation 8.7


def test_the_sample_is_bounded_in_bytes() -> None:
    # Long ones have the same chance as short ones: none of either sort is put off by its length.
    documents = ["x" * 10, "y" * 1000] * 200
    kinds = ""
    for seed in range(100):
        drawn = draw_sample(documents, 400, 20_000, str(seed))
        assert 18_000 < sum(len(content) for _, content in drawn) <= 20_000
        kinds += "".join(chr(content[0]) for _, content in drawn)
    assert 0.45 < kinds.count("y") / len(kinds) < 0.55


def test_parts_of_giant_documents_are_drawn() -> None:
    giant = " ".join(f"word{number}" for number in range(100_000))
    drawn = draw_sample(["small", giant], 1000, 2**24, "0")
    assert {number for number, _ in drawn} == {0, 1}
    parts = [content.decode() for number, content in drawn if number == 1]
    assert max(map(len, parts)) <= EXCERPT
    assert "".join(parts) == giant
    assert all(part.startswith("word") for part in parts)
    some = draw_sample([giant], 1000, 2 * EXCERPT, "0")
    assert 0 < sum(len(content) for _, content in some) <= 2 * EXCERPT
    unspaced = draw_sample([HAN * 10_000], 1000, 2**24, "0")
    assert b"".join(content for _, content in unspaced).decode() == HAN * 10_000


def test_the_same_model_for_any_number_of_workers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = texts(600)
    one = prepare(tmp_path, documents, 1, train_tokenizer={"sample_documents": 300}).read_bytes()
    shown = capsys.readouterr().out
    assert prepare(tmp_path, documents, 3, train_tokenizer={"sample_documents": 300}).read_bytes() == one
    # What was drawn, and how well the Hugging Face form agrees, is said.
    assert "training 400 unigram pieces on 300 documents: 0.1 MB" in shown
    assert "99.95 % of its characters get pieces" in shown
    assert "its Hugging Face form gives the same ids for 300 of 300 sentences (100 %)" in shown
    assert prepare(tmp_path / "again", documents, 1, seed=1).read_bytes() != one


def test_sentences_that_are_longer_than_the_trainer_takes(tmp_path: Path) -> None:
    """Without a space, and of several bytes a character: they train in parts."""
    assert [len(part) for part in train_tokenizer._trainable(HAN * 2000)] == [2**14] * 3 + [6848]
    assert list(train_tokenizer._trainable("word " * 13_000)) == ["word " * 13_000]
    documents = ["".join(random.Random(n).choices(HAN, k=60_000)) for n in range(3)]
    path = prepare(tmp_path, documents, language="zh", train_tokenizer={"vocab_size": 320})
    tokenizer = load_tokenizer(path)
    assert set(HAN) <= {tokenizer.piece(i) for i in range(tokenizer.vocab_size)}


@pytest.mark.parametrize("model", ["unigram", "bpe"])
def test_a_coverage_that_the_trainer_refuses(tmp_path: Path, model: Any) -> None:
    (tmp_path / "a.txt").write_text("\n".join(texts(100)))
    with pytest.raises(UserError, match=r"character_coverage=0\.9: SentencePiece takes 0\.98"):
        train_tokenizer.train_tokenizer([tmp_path / "a.txt"], tmp_path / "a.model", model, 400, 0.9)


def test_bpe_and_compatible_forms(tmp_path: Path) -> None:
    output = prepare(tmp_path, texts(300), normalization="nfkc", train_tokenizer={"model": "bpe"})
    tokenizer = load_tokenizer(output)
    assert tokenizer.normalize("①ﬁ") == "1fi"
    assert tokenizer.encode(["ﬁ"]) == tokenizer.encode(["fi"])


def test_coverage_follows_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = random.Random(0)
    documents = ["".join(generator.choices(HAN, k=60)) + "。" for _ in range(300)]
    path = prepare(tmp_path, documents, language="zh", train_tokenizer={"vocab_size": 320})
    assert "99.98 % of its characters" in capsys.readouterr().out
    tokenizer = load_tokenizer(path)
    pieces = {tokenizer.piece(i) for i in range(tokenizer.vocab_size)}
    assert set(HAN) <= pieces

    settings = {"vocab_size": 320, "character_coverage": 0.99}
    prepare(tmp_path / "other", documents, language="zh", train_tokenizer=settings)
    assert "99 % of its characters" in capsys.readouterr().out


def test_the_model_follows_the_language(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def kind(**settings: Any) -> str:
        return PrepConfig.model_validate({"input": "a", "output": "b", **settings}).tokenizer_model

    assert [kind(language=code) for code in ("zh", "zh-Hant", "ja", "th")] == ["bpe"] * 4
    assert [kind(language=code) for code in ("en", "ko", "lines")] == ["unigram"] * 3
    assert kind() == "unigram"
    assert kind(language="zh", train_tokenizer={"model": "unigram"}) == "unigram"
    # What is recorded of a prep in English is what it was.
    (tmp_path / "a.txt").write_text("Text.")
    plan = Plan(PrepConfig(input=[str(tmp_path / "a.txt")], output=str(tmp_path / "b")))
    assert plan.content["settings"]["train_tokenizer"]["model"] == "unigram"
    assert "space_before_text" not in plan.content["settings"]["train_tokenizer"]
    assert "words" not in plan.content["settings"]
    # Other text without spaces is told of it.
    documents = ["".join(random.Random(n).choices(HAN, k=60)) for n in range(200)]
    prepare(tmp_path, documents, train_tokenizer={"vocab_size": 320})
    assert "train_tokenizer.model=bpe is trained many times faster" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["unigram", "bpe"])
def test_training_shows_how_far_it_is(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: Any
) -> None:
    """The states that the log of a whole training goes through, line by line."""
    (tmp_path / "a.txt").write_text("\n".join(texts(600)))
    log = tmp_path / "log"
    train_tokenizer.train_tokenizer([tmp_path / "a.txt"], tmp_path / "a.model", model, 400, log=log)
    assert capfd.readouterr().err == ""  # all of it went to the log, and later errors do not
    os.write(2, b"after")
    assert capfd.readouterr().err == "after"
    lines = log.read_text().splitlines(keepends=True)
    states = [training_state("".join(lines[:n]), 400) for n in range(len(lines) + 1)]
    assert states[0] == (0, None, "reading the sample")
    assert {doing for _, _, doing in states} >= {"reading the sample", "counting characters"}
    done = [state[0] for state in states]
    assert done == sorted(done)
    counted = [(done, total) for done, total, _ in states if total]
    assert counted
    assert all(done <= total for done, total in counted)
    assert counted[-1][0] == counted[-1][1] if model == "unigram" else counted[-1][0] > 0

    monkeypatch.setattr(train_tokenizer, "POLL_SECONDS", 0.01)
    prepare(tmp_path, texts(300), train_tokenizer={"model": model})
    shown = capfd.readouterr()
    assert re.search(r"tokenizer: (\d+)/\1 steps, (?:[\d.,]+/s, )?in 0:\d\d", shown.out)
    assert shown.err == ""


def test_sizes_that_do_not_fit(tmp_path: Path) -> None:
    few = tmp_path / "few.txt"
    few.write_text("one two three\nfour five six\nabcdefghijklmnopqrstuvwxyz\nABCDEFGHIJKLMNOPQRSTUVWXYZ\n")
    models: tuple[Literal["unigram", "bpe"], ...] = ("unigram", "bpe")
    for model in models:
        with pytest.raises(UserError, match=r"vocab_size=5000 is too large .* largest that fits is \d+"):
            train_tokenizer.train_tokenizer([few], tmp_path / "few.model", model, 5000)
        with pytest.raises(UserError, match=r"vocab_size=270 is too small .* smallest that fits is 314"):
            train_tokenizer.train_tokenizer([few], tmp_path / "few.model", model, 270, 1.0)
    assert not (tmp_path / "few.model").exists()


VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", "##a", "##b", "the", "."]


def test_given_tokenizers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = prepare(tmp_path, texts(100))
    given = tmp_path / "given.model"
    given.write_bytes(own.read_bytes())
    assert prepare(tmp_path / "1", texts(10), tokenizer=str(given)).read_bytes() == given.read_bytes()
    with pytest.raises(UserError, match=r"normalization=nfkc, but the tokenizer .*given.model is for text"):
        prepare(tmp_path / "3", texts(10), tokenizer=str(given), normalization="nfkc")

    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(VOCABULARY))
    stored = prepare(tmp_path / "2", texts(10), tokenizer=str(vocabulary))
    assert stored.name == "tokenizer.json"
    assert "WordPiece with 17 pieces, for text in lower case and without accents" in capsys.readouterr().out
    tokenizer = load_tokenizer(stored)
    assert tokenizer.encode(["The hab."]) == [[VOCABULARY.index(p) for p in ("the", "h", "##a", "##b", ".")]]
    # Another kind in the same folder takes the place of the first.
    stored = prepare(tmp_path / "2", texts(100))
    assert stored.name == "tokenizer.model"
    assert not stored.with_name("tokenizer.json").exists()


def test_byte_level_pieces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer

    settings = {"train_tokenizer": {"model": "byte_bpe", "vocab_size": 400}}
    path = prepare(tmp_path, texts(300), 1, **settings)
    shown = capsys.readouterr().out
    assert "training 400 byte_bpe pieces on 297 documents" in shown
    assert "get pieces" not in shown
    assert path.name == "tokenizer.json"
    assert prepare(tmp_path / "other", texts(300), 2, **settings).read_bytes() == path.read_bytes()
    tokenizer = load_tokenizer(path)
    assert (tokenizer.vocab_size, tokenizer.special_ids) == (400, (0, 1, 2, 3, 4))
    # The first word is the same piece as after a space, and white space is what it is in prep.
    odd = ["The  end\n\tof\u00a0it \r\n", "\ufeffa\x00b e\u0301", " ", "[MASK] x", "😀 北京", "", "  [PAD]"]
    clean = [normalize(text) for text in odd]
    assert tokenizer.encode(odd) == tokenizer.encode(clean) == tokenizer.encode([f" {t}" for t in clean])
    assert tokenizer.decode(tokenizer.encode([odd[0]])[0]) == " The end of it"
    assert not tokenizer.keeps_spaces
    [(ids, spans)] = tokenizer.encode_with_offsets(["\ufeff😀  a \x00cafe\u0301b "])
    assert len(ids) == len(spans)
    found = ["\ufeff😀  a \x00cafe\u0301b "[begin:end] for begin, end in spans]
    assert found.count("😀") == 4
    assert "e\u0301" in found[-3]
    tokenizer.export_hugging_face(tmp_path / "exported", 64)
    fast = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert fast(odd, add_special_tokens=False, split_special_tokens=True)["input_ids"] == tokenizer.encode(
        odd
    )
    pieces = fast.convert_ids_to_tokens(fast("a [MASK] b")["input_ids"])
    assert pieces == ["[CLS]", "Ġa", "[MASK]", "Ġb", "[SEP]"]


def test_byte_level_pieces_of_other_text(tmp_path: Path) -> None:
    few = tmp_path / "few.txt"
    few.write_text("one two three\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"vocab_size=5000 is too large .* largest that fits is 27\d"):
        train_tokenizer.train_byte_level([few], tmp_path / "tokenizer.json", 5000)
    few.write_text("我们学习日本語とカタカナ。\n北京是中国的首都。\n" * 3, encoding="utf-8")
    log = tmp_path / "log"
    train_tokenizer.train_byte_level([few], tmp_path / "tokenizer.json", 300, "NFKC", False, log)
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert not tokenizer.keeps_spaces
    assert tokenizer.form == "NFKC"
    assert tokenizer.encode([" 北京", "ﬁ①"]) == tokenizer.encode(["北京", "fi1"])
    lines = log.read_text().splitlines(keepends=True)
    states = [training_state("".join(lines[:n]), 300) for n in range(1, len(lines) + 1)]
    assert states[0] == (1, 6, "counting words")
    assert states[-1] == (6, 6, "joining pieces")
    with pytest.raises(ValidationError, match=r"character_coverage=0\.9 is for SentencePiece models"):
        PrepConfig.model_validate(
            {"input": "a", "output": "b", "train_tokenizer": {"model": "byte_bpe", "character_coverage": 0.9}}
        )


# ------------------------------------------------------------------------- a given vocabulary, extended

GIVEN = [*VOCABULARY, "[unused0]", *(f"##{letter}" for letter in "cdefgh")]


def given_vocabulary(folder: Path) -> Path:
    (folder / "vocab.txt").write_text("\n".join(GIVEN))
    return folder / "vocab.txt"


def test_an_extended_vocabulary_keeps_its_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = given_vocabulary(tmp_path)
    documents = [*texts(300), *[f"The bézé hotel, {number}." for number in range(9)]]
    settings = {"extend_to": 140, "character_coverage": 1.0}
    stored = prepare(tmp_path, documents, tokenizer=str(given), train_tokenizer=settings)
    assert "tokenizer: learning 116 more pieces on 3" in capsys.readouterr().out

    old, new = load_tokenizer(given), load_tokenizer(stored)
    pieces = [new.piece(i) for i in range(new.vocab_size)]
    assert pieces[:24] == GIVEN
    assert len(set(pieces)) == len(pieces) == 140
    assert str(new) == str(old).replace("24", "140")
    assert old.encode(["the hotel"]) == [[GIVEN.index("the"), old.unk_id]]
    [ids] = new.encode(["the hotel"])
    assert ids[0] == GIVEN.index("the")
    assert new.unk_id not in ids
    assert not any("é" in piece for piece in pieces)  # its rules take accents off
    # Characters first; and the text is cut into each new piece.
    joined = [len(piece.removeprefix("##")) > 1 for piece in pieces[24:]]
    assert joined == sorted(joined)
    assert set(range(24, 140)) <= {i for ids in new.encode(documents) for i in ids}


def test_the_order_of_the_sentences_changes_no_piece(tmp_path: Path) -> None:
    given, sentences = given_vocabulary(tmp_path), texts(200)
    outputs = []
    for name in ("one", "other"):
        (tmp_path / name).write_text("\n".join(sentences))
        output = tmp_path / f"{name}.json"
        extend_tokenizer.extend_tokenizer([tmp_path / name], output, given, None, 100, 1.0)
        outputs.append(output.read_bytes())
        random.Random(1).shuffle(sentences)
    assert outputs[0] == outputs[1]
    with pytest.raises(UserError, match=r"extend_to=5000 is too large for this text; the largest .* is \d+$"):
        extend_tokenizer.extend_tokenizer([tmp_path / "one"], tmp_path / "a", given, None, 5000, 1.0)
    assert not (tmp_path / "a").exists()


def test_new_pieces_in_a_case_counted_by_hand() -> None:
    words = Counter({"abab": 5, "cab": 3, "d": 1, "a": 2})
    known = {"a", "##b", "##a", "c"}
    assert count_pieces(words, known) == {"a": 7, "##b": 13, "##a": 8, "c": 3}  # and d is [UNK]
    # With all four, abab is ab ##ab and cab is c ##ab: nothing is cut into ##ba.
    found = ["##ba", "ab", "##ab", "d"]
    assert choose_pieces(words, known, found, 4) == ["d", "##ab", "ab"]
    assert choose_pieces(words, known, found, 2) == ["d", "##ab"]
    assert choose_pieces(words, known, found, 1) == ["d"]


@pytest.fixture(scope="module")
def given_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of unigram.model and bpe.model, with 400 pieces each."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "a.txt").write_text("\n".join(texts(200)))
    for kind in KINDS:
        train_tokenizer.train_tokenizer([folder / "a.txt"], folder / f"{kind}.model", kind, 400)
    return folder


KINDS: tuple[Literal["unigram", "bpe"], ...] = ("unigram", "bpe")


@pytest.mark.parametrize("kind", KINDS)
def test_an_extended_sentence_piece_model_keeps_its_ids(
    kind: str, given_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = given_models / f"{kind}.model"
    documents = [text.replace("a", "å") for text in texts(300, seed=7)]
    settings = {"extend_to": 500, "character_coverage": 1.0}
    stored = prepare(tmp_path, documents, tokenizer=str(given), train_tokenizer=settings)
    assert "tokenizer: learning 100 more pieces on " in capsys.readouterr().out

    old, new = load_tokenizer(given), load_tokenizer(stored)
    pieces = [new.piece(i) for i in range(500)]
    assert new.vocab_size == len(set(pieces)) == 500
    assert pieces[:400] == [old.piece(i) for i in range(400)]
    assert (new.special_ids, new.byte_ids) == (old.special_ids, old.byte_ids)
    assert pieces[400] == "å"  # characters first
    before, after = old.encode(documents), new.encode(documents)
    assert sum(map(len, after)) < 0.8 * sum(map(len, before))
    assert not {i for ids in after for i in ids} & set(new.byte_ids)
    assert new.unk_id not in {i for ids in after for i in ids}
    used = {i for ids in after for i in ids if i >= 400}
    assert len(used) == 100 if kind == "unigram" else len(used) > 80  # others are parts of these
    new.export_hugging_face(tmp_path / "hf", 128)
    assert new.agreement(tmp_path / "hf", documents) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_may_have_too_few_pieces_for_a_model(kind: str, given_models: Path, tmp_path: Path) -> None:
    given, output = given_models / f"{kind}.model", tmp_path / "more.model"
    (tmp_path / "text").write_text("\n".join(texts(50)))
    with pytest.raises(UserError, match=r"extend_to=9000 is too large for this text; the largest .* is \d+$"):
        extend_tokenizer.extend_tokenizer([tmp_path / "text"], output, given, None, 9000, 1.0)
    assert not output.exists()


def test_words_in_pieces_end_where_no_piece_may_reach_over(given_models: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(given_models / "bpe.model")
    (tmp_path / "text").write_text("ab ab. ab3\nab北ab", encoding="utf-8")
    words, pieces = words_in_pieces(tokenizer, [tmp_path / "text"])  # type: ignore[arg-type]
    spelt = Counter({"".join(pieces[symbol] for symbol in word): times for word, times in words.items()})
    assert spelt["▁ab"] == 4
    assert spelt["ab"] in (0, 1)  # if it is two pieces
    assert set(spelt) <= {"▁ab", "ab"}  # 3 and . stand alone, 北 is bytes


def test_only_given_vocabularies_are_extended(tmp_path: Path, given_models: Path) -> None:
    train_tokenizer.train_byte_level([given_models / "a.txt"], tmp_path / "tokenizer.json", 300)
    with pytest.raises(
        UserError, match=r"of the kinds unigram and bpe are extended, and .*json is byte-level"
    ):
        check_extension(load_tokenizer(tmp_path / "tokenizer.json"), 500)
    check_extension(load_tokenizer(given_models / "bpe.model"), 500)
    with pytest.raises(UserError, match=r"extend_to=24, but .*vocab\.txt has 24 pieces already"):
        check_extension(load_tokenizer(given_vocabulary(tmp_path)), 24)
    with pytest.raises(ValueError, match="extend_to=500 extends a given tokenizer: name it by `tokenizer`"):
        PrepConfig(input=["a"], output="b", train_tokenizer=TokenizerTraining(extend_to=500))
    # A plan without it is that of an earlier version.
    plan = Plan(PrepConfig(input=[str(given_models / "a.txt")], output=str(tmp_path / "c")))
    assert "extend_to" not in plan.content["settings"]["train_tokenizer"]
