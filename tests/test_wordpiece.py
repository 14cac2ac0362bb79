"""WordPiece gives the ids of transformers' BertTokenizer, whatever the text, but never a special one."""

from __future__ import annotations

import json
import os
import random
from itertools import islice
from pathlib import Path

import pytest

from bertscale.config import UserError
from bertscale.tokenizer import Tokenizer, find_tokenizer, load_tokenizer, normalize
from bertscale.tokenizer.wordpiece import WordPieceTokenizer

DATA = os.environ.get("BERTSCALE_DATA", "")
SPECIAL = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["the", "un", "aff", "able", "man", "mask", "pad", "cls", "sep", "ca", "e", "fe", "5", "1"]
WORDS += ["\u2028", *"中文か株.,[]#-'²ßος"]
LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)]
PIECES = [*SPECIAL, *WORDS, *(c for c in LETTERS if c not in WORDS)]
PIECES += [f"##{piece}" for piece in [*LETTERS, "able", "ing", "1", "な", "中", "\u0301", "ς"]]
CASED = [*PIECES, "The", "É", "é", "##é", *(c.upper() for c in LETTERS), *(f"##{c.upper()}" for c in LETTERS)]

NASTY = [
    "The unaffable man.",
    "THE CAFÉ, the cafe\u0301 and the CAFE\u0301S",
    "naïve Ünïcode ǅ İstanbul ẞ ß ΟΔΟΣ οδος \u1e9b\u0323",
    "中文 the中文man 株式会社㍿ かな カタカナ ｶﾞ \uf900 \U00020000 \U0002b821",
    "a\x00b \x07c\u00add \ufeffe\u200bf\u200d g\ufffdh \x1c \x1f \x7f \x85 i",
    "tabs\tand\nnew\r\nlines\x0b\x0c\u00a0\u3000\u2028\u2029\u1680end",
    "x" * 100 + " " + "y" * 101 + " " + "the" * 50 + " " + "é" * 101,
    "😀 the👩\u200d💻man 🇩🇪 \u2764\ufe0f",
    "[MASK] a[MASK]b [CLS] [SEP] [PAD] [UNK] [unused0] [mask]",
    "##a ##able # ## #### un##able",
    "don't stop-it!!! (a) \u201cb\u201d \u2018c\u2019 …—–¿¡ $5.1% ^_`{|}~ \u00ab\u00bb ≠ \u0338",
    "\u0301 \u0301\u0301a 中\u0301文 '\u0301a a\u0323\u0301 e\u0301\u0301\u0323",
    "हिन्दी 한국어 \u1112\u1161\u11ab ไทย العربية עִבְרִית Тёплый",
    "\ue000 \U000e0001 \U0001f9ff \U0001fae0 \u0378",
    "   ",
    "",
]


def write_vocabulary(path: Path, pieces: list[str]) -> Path:
    path.write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8", newline="\n")
    return path


@pytest.fixture(params=["lower", "cased"])
def vocabulary(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_vocabulary(tmp_path / "vocab.txt", PIECES if request.param == "lower" else CASED)


def their_ids(vocabulary: Path, lowercase: bool, texts: list[str]) -> list[list[int]]:
    """Of transformers' BertTokenizer, to which "[MASK]" is text too."""
    from transformers import BertTokenizer

    pieces = vocabulary.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    theirs = BertTokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)}, do_lower_case=lowercase
    )
    encoded = theirs(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def test_nasty_lines(vocabulary: Path) -> None:
    tokenizer = load_tokenizer(vocabulary)
    assert isinstance(tokenizer, WordPieceTokenizer)
    theirs = their_ids(vocabulary, tokenizer.lowercase, NASTY)
    assert tokenizer.encode(NASTY) == theirs
    assert tokenizer.encode(NASTY) == theirs  # from memory
    assert tokenizer.encode([tokenizer.normalize(text) for text in NASTY]) == theirs
    assert [ids for ids, _ in tokenizer.encode_with_offsets(NASTY)] == theirs
    assert any(len(ids) > 5 for ids in theirs)


def test_random_lines(vocabulary: Path) -> None:
    generator = random.Random(0)
    alphabet = "".join(NASTY) + " the un able" * 20
    lines = ["".join(generator.choices(alphabet, k=generator.randrange(1, 30))) for _ in range(3000)]
    tokenizer = load_tokenizer(vocabulary)
    assert isinstance(tokenizer, WordPieceTokenizer)
    assert tokenizer.encode(lines) == their_ids(vocabulary, tokenizer.lowercase, lines)


def test_memory_is_bounded(vocabulary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bertscale.tokenizer.wordpiece.CACHE_BYTES", 10_000)
    tokenizer = load_tokenizer(vocabulary)
    assert isinstance(tokenizer, WordPieceTokenizer)
    lines = [f"a{number} the man" for number in range(200)]
    expected = load_tokenizer(vocabulary).encode(lines)
    assert [tokenizer.encode([line])[0] for line in lines] == expected
    assert 0 < len(tokenizer._known) < 60


def test_text_cannot_write_a_special_piece(vocabulary: Path) -> None:
    tokenizer = load_tokenizer(vocabulary)
    text = "[MASK][PAD] [CLS] a [SEP]"
    [ids] = tokenizer.encode([text])
    [(others, _)] = tokenizer.encode_with_offsets([text])
    assert ids == others
    assert not set(ids) & (set(tokenizer.special_ids) - {tokenizer.unk_id})


def test_attributes(vocabulary: Path) -> None:
    tokenizer = load_tokenizer(vocabulary)
    assert tokenizer.special_ids == (0, 2, 3, 4, 5)
    assert tokenizer.vocab_size == len(PIECES if tokenizer.vocab_size == len(PIECES) else CASED)
    assert [tokenizer.piece(i) for i in (0, 5, 6)] == ["[PAD]", "[MASK]", "the"]
    starts = {tokenizer.piece(i): bool(start) for i, start in enumerate(tokenizer.starts_word)}
    assert all(starts[piece] for piece in ("[MASK]", "the", "中", "##中", "##な", ".", "#"))
    assert not any(starts[piece] for piece in ("##able", "##a", "##1"))
    ids = tokenizer.encode(["the unable man"])[0]
    assert tokenizer.decode([tokenizer.cls_id, *ids, tokenizer.sep_id]) == "the unable man"


def test_offsets(vocabulary: Path) -> None:
    tokenizer = load_tokenizer(vocabulary)
    text = " The\t\ud800 unable, \x00e\u0301中文 😀 man\ud800ing"
    [(ids, spans)] = tokenizer.encode_with_offsets([text])
    found = [(tokenizer.piece(i), text[begin:end]) for i, (begin, end) in zip(ids, spans, strict=True)]
    assert found[0][1] == "The"
    assert found[1:4] == [("un", "un"), ("##able", "able"), (",", ",")]
    assert "".join(place for _, place in found[4:-5]) in ("e", "e\u0301")  # the accent is a piece or none
    assert found[-5:] == [("中", "中"), ("文", "文"), ("[UNK]", "😀"), ("man", "man"), ("##ing", "ing")]


def test_case_follows_the_vocabulary(tmp_path: Path) -> None:
    def rules(pieces: list[str], lowercase: bool | None = None) -> tuple[bool, bool]:
        tokenizer = load_tokenizer(write_vocabulary(tmp_path / "vocab.txt", pieces), lowercase)
        assert isinstance(tokenizer, WordPieceTokenizer)
        return tokenizer.lowercase, tokenizer.strips_accents

    assert rules(PIECES) == (True, True)
    assert rules([*PIECES, "<S>", "[UNUSED]", "ℝ"]) == (True, True)  # no text in lower case is without them
    assert rules([*PIECES, "über"]) == (True, False)
    assert rules([*PIECES, "Ab"]) == (False, False)
    assert rules([*PIECES, "Ab"], True) == (True, True)
    assert rules(PIECES, False) == (False, False)


@pytest.mark.parametrize("strip_accents", [None, True, False])
@pytest.mark.parametrize("do_lower_case", [None, True, False])
def test_the_rules_of_a_model_are_those_of_its_config(
    vocabulary: Path, do_lower_case: bool | None, strip_accents: bool | None
) -> None:
    """A published model of vocab.txt and tokenizer_config.json: the pieces alone do not tell its rules."""
    from transformers import AutoTokenizer

    settings = {"do_lower_case": do_lower_case, "strip_accents": strip_accents}
    settings = {key: value for key, value in settings.items() if value is not None}
    path = vocabulary.with_name("tokenizer_config.json")
    path.write_text(json.dumps({"tokenizer_class": "BertTokenizer", **settings}))
    ours = load_tokenizer(vocabulary)
    if do_lower_case is None:  # transformers takes true then, whatever the pieces
        assert isinstance(ours, WordPieceTokenizer)
        assert ours.strips_accents == (ours.lowercase if strip_accents is None else strip_accents)
        return
    theirs = AutoTokenizer.from_pretrained(vocabulary.parent)
    texts = [text for text in NASTY if "[" not in text]
    expected = [theirs(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert ours.encode([ours.normalize(text) for text in texts]) == expected


def test_rules_that_are_not_ours_are_refused(vocabulary: Path) -> None:
    path = vocabulary.with_name("tokenizer_config.json")
    for content, words in [
        (
            '{"tokenize_chinese_chars": false}',
            "tokenize_chinese_chars=false, but this version always cuts there",
        ),
        ('{"do_lower_case": "yes"}', "do_lower_case='yes': input should be a valid boolean"),
        ("[]", "is not a mapping of keys to values"),
        ("{", "is damaged"),
    ]:
        path.write_text(content)
        with pytest.raises(UserError, match=words) as caught:
            load_tokenizer(vocabulary)
        assert str(path) in str(caught.value)


def test_one_file_holds_it_all(vocabulary: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(vocabulary)
    folder = tmp_path / "data"
    folder.mkdir()
    stored = tokenizer.save(folder)
    assert (stored, stored.name) == (find_tokenizer(folder), "tokenizer.json")
    again = load_tokenizer(stored)
    assert (again.sha256, again.encode(NASTY)) == (tokenizer.sha256, tokenizer.encode(NASTY))
    other = load_tokenizer(stored, lowercase="lower case" not in str(again))
    assert other.encode(["THE"]) != again.encode(["THE"])
    assert find_tokenizer(tmp_path).name == "vocab.txt"


def test_hugging_face_form(vocabulary: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertTokenizer

    tokenizer = load_tokenizer(vocabulary)
    tokenizer.export_hugging_face(tmp_path / "export", 64)
    assert tokenizer.agreement(tmp_path / "export", NASTY) == 1
    theirs = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert isinstance(theirs, BertTokenizer)
    assert (len(theirs), theirs.model_max_length) == (tokenizer.vocab_size, 64)
    first, second = tokenizer.encode(["THE unable", "é man"])
    batch = theirs("THE unable", "é man")
    assert batch["input_ids"] == [tokenizer.cls_id, *first, tokenizer.sep_id, *second, tokenizer.sep_id]
    assert batch["token_type_ids"] == [0] * (len(first) + 2) + [1] * (len(second) + 1)
    assert theirs("the [MASK]")["input_ids"][2] == tokenizer.mask_id
    assert load_tokenizer(find_tokenizer(tmp_path / "export")).sha256 == tokenizer.sha256
    # A folder as transformers writes it is read too.
    theirs.save_pretrained(tmp_path / "theirs")
    assert load_tokenizer(find_tokenizer(tmp_path / "theirs")).encode(NASTY) == tokenizer.encode(NASTY)


def test_vocabularies_that_will_not_do(tmp_path: Path) -> None:
    def refusal(pieces: list[str]) -> str:
        with pytest.raises(UserError) as caught:
            load_tokenizer(write_vocabulary(tmp_path / "vocab.txt", pieces))
        return str(caught.value)

    assert "it has no [MASK]; there must be a line" in refusal([p for p in PIECES if p != "[MASK]"])
    assert "the piece 'the' in line 7 and again in line" in refusal([*PIECES, "the"])
    marked = write_vocabulary(tmp_path / "vocab.txt", ["\ufeff" + PIECES[0], *PIECES[1:]])
    assert load_tokenizer(marked).pad_id == 0  # a byte order mark is no part of the first piece
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe[\x00")
    with pytest.raises(UserError, match="no UTF-8 text"):
        load_tokenizer(tmp_path / "vocab.txt")


def damaged(tokenizer: Tokenizer, **changes: object) -> bytes:
    return json.dumps(json.loads(tokenizer.content) | changes).encode()


def test_files_that_are_no_wordpiece_tokenizer(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_vocabulary(tmp_path / "vocab.txt", PIECES))
    token = {"id": 6, "content": "the", "single_word": False, "lstrip": False, "rstrip": False}
    added = [token | {"normalized": False, "special": False}]
    for content, message in [
        (tokenizer.content[:-20], "is damaged"),
        (b"[]", "is not a mapping of keys to values"),
        (b"{}", "is not the tokenizer of a BERT"),
        (damaged(tokenizer, model={"type": "Unigram"}), r"put that model beside it as tokenizer\.model"),
        (damaged(tokenizer, normalizer=None), "is not the tokenizer of a BERT"),
        (damaged(tokenizer, added_tokens=added), "the added token 'the'"),
        (damaged(tokenizer, model={"type": "WordPiece", "vocab": {}}), r"has no piece \[PAD\]"),
    ]:
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.skipif(not DATA, reason="BERTSCALE_DATA names no folder of real data")
@pytest.mark.parametrize(
    ("name", "corpus", "lowercase"),
    [("uncased", "wiki_en", True), ("cased", "wiki_en", False), ("chinese", "wiki_zh", True)],
)
def test_published_vocabularies_on_real_lines(name: str, corpus: str, lowercase: bool) -> None:
    data = Path(DATA)
    files = sorted((data / "corpora" / corpus).iterdir())
    every = (line for f in files for line in f.read_text(encoding="utf-8").split("\n") if line.strip())
    lines = list(islice(every, 50_000))
    assert len(lines) == 50_000
    vocabulary = data / "vocab" / f"bert-base-{name}-vocab.txt"
    theirs = their_ids(vocabulary, lowercase, lines)
    tokenizer = load_tokenizer(vocabulary)
    assert isinstance(tokenizer, WordPieceTokenizer)
    assert tokenizer.lowercase is lowercase
    assert tokenizer.encode(lines) == theirs
    assert tokenizer.encode([normalize(line) for line in lines]) == theirs  # as prep cleans them
