"""Words of Chinese text: found by a segmenter, kept in the shards, masked as a whole."""

from __future__ import annotations

import json
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from damage import change_manifest
from test_prep import bytes_of

from bertscale.config import PrepConfig, SamplesConfig, TokenizerTraining, UserError
from bertscale.data.loader import Loader
from bertscale.data.mixture import Mixture
from bertscale.data.shards import FORMAT_VERSION, WORDS_VERSION, Dataset, open_dataset
from bertscale.tokenizer import Tokenizer, is_han_or_kana, load_tokenizer
from bertscale.tokenizer.base import han_or_kana
from data_prep.build import prep
from data_prep.train_tokenizer import train_tokenizer
from data_prep.words import join_words, split_words, word_starts

SENTENCES = [
    "我在北京大学学习自然语言处理。",
    "他买了一件T恤，花了2015年5月的工资。",
    "BERT模型 is a model，因为 it is naïve 𠮷野家。",
    "。",
    "她说：don't worry，没关系！",
]
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def word_piece(folder: Path) -> Tokenizer:
    """A WordPiece tokenizer with a piece for each character but one."""
    characters = sorted({c for sentence in SENTENCES for c in sentence if c not in " 𠮷"})
    letters = [c.lower() for c in characters if c.isascii() and c.isalnum()]
    pieces = dict.fromkeys([*PIECES, *(c.lower() for c in characters), *(f"##{c}" for c in letters)])
    path = folder / "vocab.txt"
    path.write_text("\n".join(pieces), encoding="utf-8")
    return load_tokenizer(path)


def sentence_piece(folder: Path, sentences: list[str] = SENTENCES, vocab_size: int = 330) -> Tokenizer:
    (folder / "text.txt").write_text("\n".join(sentences * 20), encoding="utf-8")
    train_tokenizer([folder / "text.txt"], folder / "a.model", "bpe", vocab_size, 1.0)
    return load_tokenizer(folder / "a.model")


def words_of(tokenizer: Tokenizer, sentence: str) -> list[str]:
    """The words of the sentence as its tokens have them, by `word_starts`."""
    sentence = tokenizer.normalize(sentence)
    [ids] = tokenizer.encode([sentence])
    starts = word_starts(tokenizer, [sentence], [ids])
    words: list[list[str]] = []
    for piece, start in zip(map(tokenizer.piece, ids), starts.tolist(), strict=True):
        if start:
            words.append([])
        words[-1].append(piece.replace("▁", "").replace("##", ""))
    return ["".join(word) for word in words if "".join(word)]


def test_words_are_the_segmenters(tmp_path: Path) -> None:
    tokenizer = word_piece(tmp_path)
    assert words_of(tokenizer, SENTENCES[0]) == ["我", "在", "北京大学", "学习", "自然语言", "处理", "。"]
    # Letters and digits stay what they are to the tokenizer, unless a word of the segmenter goes on.
    words = words_of(tokenizer, SENTENCES[1])
    assert [w for w in words if w not in ("他", "了", "的", "，", "。")] == [
        *("买", "一件", "t恤", "花", "2015", "年", "5", "月", "工资"),
    ]
    assert words_of(tokenizer, SENTENCES[4])[:2] == ["她", "说"]
    assert words_of(tokenizer, "don't")[:3] == ["don", "'", "t"]
    assert "没关系" in words_of(tokenizer, SENTENCES[4])


def test_words_of_sentence_piece(tmp_path: Path) -> None:
    # 258 pieces of bytes and three unused: the characters alone are pieces.
    alone = sentence_piece(tmp_path, vocab_size=261 + len(set("".join(SENTENCES)) - {" "}) + 1)
    assert words_of(alone, SENTENCES[0]) == ["我", "在", "北京大学", "学习", "自然语言", "处理", "。"]
    assert "t恤" in [word.lower() for word in words_of(alone, SENTENCES[1])]
    assert words_of(alone, SENTENCES[2])[:2] == ["BERT", "模型"]
    assert "naïve" in words_of(alone, SENTENCES[2])
    # A character without a piece is several bytes of one word.
    assert words_of(alone, "龘")[-1] == "<0xE9><0xBE><0x98>"


@pytest.mark.parametrize("kind", ["WordPiece", "SentencePiece", "no bytes"])
def test_tokens_begin_where_their_offsets_say(tmp_path: Path, kind: str) -> None:
    if kind == "WordPiece":
        tokenizer = word_piece(tmp_path)
    elif kind == "SentencePiece":
        tokenizer = sentence_piece(tmp_path, vocab_size=360)
    else:  # an unknown character has no number of bytes
        tokenizer = plain_model(tmp_path)
    texts = [tokenizer.normalize(text) for text in [*SENTENCES, "龘龘 a龘", "北 京  大学", "é"]]
    encoded = tokenizer.encode(texts)
    starts = tokenizer.token_starts(texts, encoded)
    first, expected = 0, []
    for text, (_, spans) in zip(texts, tokenizer.encode_with_offsets(texts), strict=True):
        expected += [first + begin for begin, _ in spans]
        first += len(text)
    assert len(tokenizer.token_starts([""], [[]])) == 0
    everything = "".join(texts)
    assert len(starts) == len(expected)
    for start, begin in zip(starts.tolist(), expected, strict=True):
        # Our place may be the space before the word.
        at_space = start >= 0 and everything[start] == " "
        assert start in (-1, begin) or (at_space and begin == start + 1)


def plain_model(folder: Path) -> Tokenizer:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_prefix=str(folder / "plain"),
        vocab_size=80,
        character_coverage=1.0,
        pad_id=0,
        unk_id=1,
        bos_id=-1,
        eos_id=-1,
        pad_piece="[PAD]",
        unk_piece="[UNK]",
        control_symbols=["[CLS]", "[SEP]", "[MASK]"],
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return load_tokenizer(folder / "plain.model")


def test_han_and_kana_are_those_of_the_tokenizer() -> None:
    codes = np.array([*range(0x2E00, 0x3400), 0x4E00, 0x9FFF, 0xA000, 0x20000, 0x323AF, 0x323B0, 65, 0x1F600])
    expected = [bool(han_or_kana.match(chr(code))) for code in codes.tolist()]
    assert is_han_or_kana(codes.astype(np.uint32)).tolist() == expected


def test_bits_go_through_a_spill_file() -> None:
    tokens = np.array([0, 7, 65_535, 3], np.uint16)
    starts = np.array([True, False, True, False])
    again, bits = split_words(join_words(tokens, starts), np.uint16)
    assert (again.tolist(), bits.tolist()) == (tokens.tolist(), starts.tolist())
    assert again.dtype.itemsize == 2


# -------------------------------------------------------------------------------------------- the shards


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus and data sets: `plain`, `words`, and both by characters, `*-characters`."""
    folder = tmp_path_factory.mktemp("words")
    (folder / "input").mkdir()
    texts = [f"第{n}个人说。{SENTENCES[0]}北京大学在北京。{SENTENCES[n % 5]}" for n in range(120)]
    lines = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    (folder / "input" / "a.jsonl").write_text(lines, encoding="utf-8")
    characters = sorted({c for text in texts for c in text if not c.isspace()})
    (folder / "vocab.txt").write_text("\n".join([*PIECES, *characters]), encoding="utf-8")
    for name, words in (("plain", None), ("words", "jieba")):
        prep(config_for(folder, name, words=words))
        given = str(folder / "vocab.txt")
        prep(config_for(folder, f"{name}-characters", words=words, tokenizer=given, lowercase=False))
    return folder


def config_for(folder: Path, output: str, **changes: Any) -> PrepConfig:
    values: dict[str, Any] = {
        "input": [str(folder / "input")],
        "output": str(folder / output),
        "language": "zh",
        "split_bytes": 4000,
        "shard_bytes": 6000,
        "validation_fraction": 0.1,
        "train_tokenizer": TokenizerTraining(vocab_size=340),
        "workers": 1,
    }
    return PrepConfig(**(values | changes))


def rows(dataset: Dataset) -> dict[int, tuple[list[int], list[bool] | None]]:
    """Tokens and bits of each document."""
    result = {}
    for shard in dataset.shards:
        bits = None
        if shard.word_bits is not None:
            bits = np.unpackbits(shard.word_bits, bitorder="little").astype(bool)
        for row, document in enumerate(shard.documents.tolist()):
            part = slice(shard.token_offsets[row], shard.token_offsets[row + 1])
            result[document] = (shard.tokens[part].tolist(), None if bits is None else bits[part].tolist())
    return result


def test_shards_keep_the_words(prepared: Path) -> None:
    prep(config_for(prepared, "two", words="jieba", workers=2))
    assert bytes_of(prepared / "words") == bytes_of(prepared / "two")
    plain, words = (open_dataset(prepared / name, "train", verify=True) for name in ("plain", "words"))
    assert plain.manifest["format_version"] == FORMAT_VERSION
    assert "words" not in plain.manifest["settings"]
    assert words.manifest["format_version"] == WORDS_VERSION
    assert words.manifest["settings"]["words"] == f"rjieba {metadata.version('rjieba')}"
    # The same tokens, and words that cross no end of a sentence.
    ours, theirs = rows(plain), rows(words)
    assert {n: tokens for n, (tokens, _) in ours.items()} == {n: tokens for n, (tokens, _) in theirs.items()}
    assert all(bits is None for _, bits in ours.values())
    tokenizer = load_tokenizer(words.tokenizer_path)
    for tokens, bits in theirs.values():
        assert bits is not None
        assert bits[0]
        starts = tokenizer.starts_word[tokens]
        assert sum(bits) < starts.sum()


@pytest.mark.parametrize("unit", ["word", "span"])
def test_a_word_is_masked_whole(prepared: Path, unit: str) -> None:
    for name in ("plain", "words"):
        dataset = open_dataset(prepared / f"{name}-characters", "train")
        tokenizer = load_tokenizer(dataset.tokenizer_path)
        [university] = tokenizer.encode(["北京大学"])
        samples = SamplesConfig.model_validate(
            {"kind": "packed", "max_length": 64, "mask_unit": unit, "mask_rate": 0.3}
        )
        mixture = Mixture([dataset], [1.0], samples, global_batch=32, seed=0)
        chosen = set()
        for step in range(4):
            [batch] = Loader(mixture, tokenizer, micro_batch=32, rank=0, world=1).step(step)
            tokens = batch.tokens.numpy().copy()
            tokens[batch.target_positions] = batch.targets
            predicted = np.zeros(len(tokens), bool)
            predicted[batch.target_positions] = True
            places = np.flatnonzero(
                (np.lib.stride_tricks.sliding_window_view(tokens, 4) == university).all(axis=1)
            )
            chosen |= {tuple(predicted[place : place + 4].tolist()) for place in places}
        whole = {(True,) * 4, (False,) * 4}
        assert chosen == whole if name == "words" else chosen > whole


def test_corpora_with_and_without_words_mix(prepared: Path) -> None:
    samples = SamplesConfig.model_validate({"kind": "packed", "max_length": 64, "mask_unit": "word"})

    def batch_of(*names: str) -> Any:
        datasets = [open_dataset(prepared / name, "train") for name in names]
        tokenizer = load_tokenizer(datasets[0].tokenizer_path)
        mixture = Mixture(datasets, [1.0] * len(names), samples, global_batch=32, seed=0)
        [batch] = Loader(mixture, tokenizer, micro_batch=32, rank=0, world=1).step(0)
        return batch

    mixed, alone = batch_of("words", "plain"), batch_of("plain")
    assert len(mixed.targets) > 0
    assert mixed.target_positions.tolist() != alone.target_positions.tolist()


def test_without_the_segmenter(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(
        UserError, match=r"^words=jieba needs the package rjieba, which is not installed: pip"
    ):
        prep(config_for(prepared, "none", words="jieba"))
    assert not (prepared / "none").exists()
    # What was prepared without it needs it no more than before.
    assert prep(config_for(prepared, "plain"))["reused"]


def test_a_shard_without_a_bit_for_each_token_is_damaged(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared / "words", tmp_path / "words")
    path = tmp_path / "words" / "train-00000.arrow"
    with pa.OSFile(str(path), "rb") as file:
        batch = pa.ipc.open_file(file).get_batch(0)
    columns = list(batch.columns)
    columns[3] = pa.array([[True]] * batch.num_rows, columns[3].type)
    with pa.ipc.new_file(str(path), batch.schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=batch.schema))

    def as_long_as_it_is(manifest: dict[str, Any]) -> None:
        [entry] = [entry for entry in manifest["shards"] if entry["name"] == path.name]
        entry["bytes"] = path.stat().st_size

    change_manifest(tmp_path / "words", as_long_as_it_is)
    with pytest.raises(UserError, match=r"train-00000.arrow is damaged \(not a bit for each token\)"):
        open_dataset(tmp_path / "words", "train")
