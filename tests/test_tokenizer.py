"""SentencePiece: text never writes a special piece, offsets are the text's, the Hugging Face form agrees."""

from __future__ import annotations

import io
import pydoc_data.topics
import subprocess
import sys
import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from bertscale.config import UserError
from bertscale.tokenizer import Tokenizer, find_tokenizer, load_tokenizer, normalize
from bertscale.tokenizer.base import normalize_with_offsets
from data_prep.train_tokenizer import train_tokenizer

SENTENCES = [
    sentence
    for topic in pydoc_data.topics.topics.values()
    for line in topic.split("\n\n")
    if len(sentence := normalize(line)) > 40
]
HAN = ["北京 是 中国 的 首都", "东京是日本的首都。", "我们学习日本語とカタカナ。"] * 150
MODELS: list[tuple[Literal["unigram", "bpe"], Literal["nfkc", "identity"]]] = [
    ("unigram", "identity"),
    ("bpe", "identity"),
    ("unigram", "nfkc"),
]
Forms = Literal["NFC", "NFKC"]

# Dropped, zero-width and white characters, marks, symbols, scripts of all kinds, and spelt special pieces.
NASTY = [*"\x00\x07\x7f\x84\u00ad\ufeff", *" \t\n\x1c\x85\u00a0\u1680\u2028\u3000\u2581"]
NASTY += [*"\u200b\u200c\u200d\u200e\u202e\u2060\u061c\u180e\ufff9\ufffd\uffff\ue000\U000e0001"]
NASTY += [*"\u0301\u0323\u0338\u0344\u3099\u20dd\ufe0f\u0e33\u0f73\u0bcb", "e\u0301", "a\u0323\u0301"]
NASTY += ["😀", "👩\u200d💻", "🇩🇪", "❤\ufe0f", "①", "ﬁ", "㍿", "½", "ß", "İ", "Å", "´"]
NASTY += [
    "北京",
    "日本",
    "東",
    "カ",
    "ｶﾞ",
    "가",
    "\u1112\u1161\u11ab",
    "the",
    " apple",
    "The ",
    "[MASK]",
    "<0x41>",
]


@pytest.fixture(scope="module", params=MODELS, ids=" ".join)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    model, rule = request.param
    folder = tmp_path_factory.mktemp("tokenizer")
    lines = [*SENTENCES, *HAN, "The apple is red."]
    (folder / "sentences.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    train_tokenizer([folder / "sentences.txt"], folder / "tokenizer.model", model, 1500, rule=rule)
    return load_tokenizer(find_tokenizer(folder))


@pytest.fixture(scope="module")
def exported(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hugging-face")
    tokenizer.export_hugging_face(folder, max_length=128)
    return folder


def test_ids_and_attributes(tokenizer: Tokenizer) -> None:
    assert tokenizer.special_ids == (0, 1, 2, 3, 4)
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.mask_id) == (0, 1, 4)
    assert tokenizer.vocab_size == 1500
    assert tokenizer.piece(tokenizer.mask_id) == "[MASK]"
    text = "The apple is red, and 東京 is far."
    ids = tokenizer.encode([text])[0]
    assert tokenizer.decode([tokenizer.cls_id, *ids, tokenizer.sep_id]) == text


@pytest.mark.parametrize(
    "text", ["[MASK]", "a [CLS] b [SEP] c [PAD]", "[UNK]", "<s> </s> <unk> <pad>", "<0x41>", "東 😀 \ue000"]
)
def test_text_cannot_write_a_special_piece(tokenizer: Tokenizer, exported: Path, text: str) -> None:
    [ids] = tokenizer.encode([text])
    assert ids
    assert not set(ids) & set(tokenizer.special_ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.agreement(exported, [text]) == 1


def test_normalize(tokenizer: Tokenizer) -> None:
    assert normalize("  a \t\n b\u00a0\u3000c\r\n") == "a b c"
    assert normalize("e\u0301") == "é"
    assert normalize("a\x00b\x07c\u00add\ufeffe\ud800") == "abcde"
    assert normalize("\x1c \u2028 \x85") == ""
    assert normalize(normalize("x\u0301 \u200d 👩\u200d💻")) == normalize("x\u0301 \u200d 👩\u200d💻")
    assert normalize("①\u00a8ﬁ", "NFKC") == "1 \u0308fi"

    # The model itself knows by which rule it was trained.
    compatible = "NFKC" in str(tokenizer)
    assert tokenizer.normalize("ﬁrst\n") == ("first" if compatible else "ﬁrst")
    ours = tokenizer.encode(["first"])
    assert (tokenizer.encode(["ﬁrst"]) == ours) is compatible


@pytest.mark.parametrize("form", ["NFC", "NFKC"])
@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("abc", "a b c"),
        ("  a \n b ", "a| \n |b"),
        ("e\u0301\u0323x", "e\u0301\u0323|e\u0301\u0323|x"),  # two characters, of three
        ("e\x00\u0301 y", "e\x00\u0301| |y"),
        ("\ufeffa\ud800b", "a|b"),
        ("\ufeff😀\u20dd\u0338x", "😀|\u20dd|\u0338|x"),  # no form changes them: each has its own place
        ("\u1112\u1161\u11ab글", "\u1112\u1161\u11ab|글"),
        ("カ\u3099ゝ\u3099", "カ\u3099|ゝ\u3099"),
        ("", ""),
    ],
)
def test_places_of_normalised_characters(text: str, spans: str, form: Forms) -> None:
    clean, places = normalize_with_offsets(text, form)
    assert clean == normalize(text, form)
    expected = spans.split("|") if "|" in spans else spans.split()
    assert [text[begin:end] for begin, end in places] == expected


def test_offsets_are_places_in_the_given_text(tokenizer: Tokenizer) -> None:
    text = "  The\u00a0apple is\n re\x00d: cafe\u0301 😀東x\ufeff y. "
    [(ids, spans)] = tokenizer.encode_with_offsets([text])
    assert [ids] == tokenizer.encode([tokenizer.normalize(text)])
    found = [(tokenizer.piece(i), text[begin:end]) for i, (begin, end) in zip(ids, spans, strict=True)]
    assert [place for piece, place in found if piece.startswith("<0x")].count("😀") == 4
    # What the pieces cover is the whole text but white space and what `normalize` drops, in order.
    covered = sorted({place for begin, end in spans for place in range(begin, end)})
    assert normalize("".join(text[i] for i in covered)) == normalize(text).replace(" ", "")
    assert spans == sorted(spans)
    for piece, place in found:
        assert place == place.strip()
        if not piece.startswith("<0x"):
            assert piece.replace("▁", "") == normalize(place)
    assert tokenizer.encode_with_offsets(["", " \n"]) == [([], []), ([], [])]


def test_a_character_that_becomes_many(tmp_path: Path) -> None:
    (tmp_path / "s.txt").write_text("株式会社 の 名 first name\n" * 50, encoding="utf-8")
    train_tokenizer([tmp_path / "s.txt"], tmp_path / "tokenizer.model", "bpe", 300, rule="nfkc")
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    [(ids, spans)] = tokenizer.encode_with_offsets(["ﬁrst ㍿ 名"])
    assert tokenizer.decode(ids) == "first 株式会社 名"
    for i, (begin, end) in zip(ids, spans, strict=True):
        if set(tokenizer.piece(i)) & set("株式会社"):
            assert (begin, end) == (5, 6)


def test_which_pieces_start_words(tokenizer: Tokenizer) -> None:
    starts = {tokenizer.piece(i): bool(start) for i, start in enumerate(tokenizer.starts_word)}
    assert tokenizer.starts_word.shape == (tokenizer.vocab_size,)
    assert all(starts[name] for name in ("[PAD]", "[MASK]", "▁", ".", "日", "カ", "<0xE4>", "<0xF0>"))
    assert not any(starts[name] for name in ("e", "7", "<0x80>", "<0xBF>", "<0x41>", "<0xC3>"))
    for piece, start in starts.items():
        if piece.startswith("▁"):
            assert start
        elif piece.isascii() and piece.isalnum():
            assert not start


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the tokenizer .*tokenizer\.model: No such file"):
        load_tokenizer(find_tokenizer(tmp_path))
    for content in (b"", b"text, not a model"):
        (tmp_path / "x.model").write_bytes(content)
        with pytest.raises(UserError, match=r"x\.model is not a SentencePiece model"):
            load_tokenizer(tmp_path / "x.model")


def train_plainly(path: Path, **settings: Any) -> Tokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES[:500]), model_writer=model, vocab_size=400, minloglevel=2, **settings
    )
    path.write_bytes(model.getvalue())
    return load_tokenizer(path)


def test_given_models(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no .* piece; leave `tokenizer` out"):
        train_plainly(tmp_path / "llama.model")
    names: dict[str, Any] = {"pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": -1}
    ours = names | {"pad_piece": "[PAD]", "unk_piece": "[UNK]"}
    with pytest.raises(UserError, match=r"the piece \[CLS\] is ordinary text"):
        train_plainly(tmp_path / "user.model", **ours, user_defined_symbols=["[CLS]", "[SEP]", "[MASK]"])

    # As ALBERT's: other names, a rule of its own with lower case, no bytes.
    albert = train_plainly(
        tmp_path / "albert.model",
        **names,
        control_symbols=["[CLS]", "[SEP]", "[MASK]"],
        normalization_rule_name="nmt_nfkc_cf",
    )
    assert [albert.piece(i) for i in albert.special_ids] == ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
    assert albert.encode(["THE STATEMENT"]) == albert.encode(["the statement"])
    albert.export_hugging_face(tmp_path / "albert", 128)
    assert albert.agreement(tmp_path / "albert", ["<pad> THE 東京 ①", *SENTENCES[500:600]]) >= 0.98
    # Its own rule drops a space such as \x1c, and \u200b becomes a space.
    odd = [
        "\ufeffTHE",
        "THE\x1cEND",
        "\x1cTHE",
        "\u2581\u0301",
        "\u200bTHE",
        "THE\u200b \u200bEND",
        "\u00b4 \u00b4",
    ]
    assert albert.agreement(tmp_path / "albert", odd) == 1


def test_hugging_face_gives_the_same_ids(tokenizer: Tokenizer, exported: Path) -> None:
    # The two break ties between segmentations of equal score their own way: runs of one character, mostly.
    plain = [sentence for sentence in SENTENCES if not set("*-=.#xX_") & set(sentence)]
    assert tokenizer.agreement(exported, plain) >= 0.995
    assert tokenizer.agreement(exported, SENTENCES) >= 0.98
    odd = [
        "  two  spaces ",
        "",
        " ",
        "a\u00a0b\x00c",
        "e\u0301",
        "東京 😀",
        "[MASK] and [CLS]",
        "▁low ▁",
        "①ﬁ㍿",
    ]
    assert tokenizer.agreement(exported, [*odd, "①ﬁ㍿"]) == 1.0


def same_in_all_versions(character: str) -> bool:
    """Whether a library with older tables of Unicode than Python's knows the character too."""
    return unicodedata.ucd_3_2_0.category(character) != "Cn"


# Not of ASCII, of which pieces are long: runs of one letter have several segmentations of the same score.
characters = st.characters(min_codepoint=0x80, exclude_categories=["Cs"]).filter(same_in_all_versions)
nasty_texts = st.lists(st.sampled_from(NASTY) | characters, max_size=8).map("".join)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=nasty_texts)
def test_hugging_face_gives_the_same_ids_for_nasty_texts(
    tokenizer: Tokenizer, exported: Path, text: str
) -> None:
    [ids] = tokenizer.encode([tokenizer.normalize(text)])
    theirs = fast_tokenizer(exported).encode(text, add_special_tokens=False)
    assert theirs.ids == ids
    [(others, spans)] = tokenizer.encode_with_offsets([text])
    assert others == ids
    for i, ours, span in zip(ids, spans, theirs.offsets, strict=True):
        if tokenizer.piece(i).startswith("<0x"):  # the bytes of a character have its place, here and there
            assert ours[0] <= span[0] < span[1] <= ours[1]


@pytest.mark.parametrize("dropped", ["\ufeff", "\u00ad", "\x00", "\x7f", "\ufeff\u00ad", "\ufeff \x07"])
def test_a_dropped_character_at_the_start_changes_no_piece(
    tokenizer: Tokenizer, exported: Path, dropped: str
) -> None:
    for rest in ["The apple", "apple", "東京", "😀", "\u0301", " the", "[MASK]", ""]:
        theirs = fast_tokenizer(exported).encode(dropped + rest, add_special_tokens=False)
        assert tokenizer.encode([tokenizer.normalize(dropped + rest)]) == [theirs.ids]
        assert tokenizer.encode([tokenizer.normalize(rest)]) == [theirs.ids]


def test_bytes_have_the_place_of_their_own_character(tokenizer: Tokenizer, exported: Path) -> None:
    text = "a😀\ue000東\u20dd😀b"
    theirs = fast_tokenizer(exported).encode(text, add_special_tokens=False)
    [(ids, spans)] = tokenizer.encode_with_offsets([text])
    for found in (spans, theirs.offsets):
        places = [
            text[begin:end]
            for i, (begin, end) in zip(ids, found, strict=True)
            if tokenizer.piece(i).startswith("<0x")
        ]
        assert "".join(places) == "😀😀😀😀\ue000\ue000\ue000東東東\u20dd\u20dd\u20dd😀😀😀😀"


@lru_cache
def fast_tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer as Fast

    fast = Fast.from_file(str(folder / "tokenizer.json"))
    fast.encode_special_tokens = True  # a literal "[MASK]" is text
    return fast


def test_transformers_loads_the_export(tokenizer: Tokenizer, exported: Path) -> None:
    from transformers import AutoTokenizer

    fast = AutoTokenizer.from_pretrained(exported)
    assert (len(fast), fast.model_max_length) == (tokenizer.vocab_size, 128)
    assert (fast.pad_token_id, fast.unk_token_id, fast.cls_token_id) == (0, 1, 2)
    first, second = tokenizer.encode(["The apple is red.", "It is."])
    batch = fast("The apple is red.", "It is.")
    assert batch["input_ids"] == [2, *first, 3, *second, 3]
    assert batch["token_type_ids"] == [0] * (len(first) + 2) + [1] * (len(second) + 1)
    assert batch["attention_mask"] == [1] * len(batch["input_ids"])
    assert fast.decode(first) == "The apple is red."

    # The mask takes the space before it: no stray "▁" piece, and the next word keeps its own.
    pieces = fast.convert_ids_to_tokens(fast("The [MASK] is red.")["input_ids"])
    assert pieces[:4] == ["[CLS]", "▁The", "[MASK]", "▁is"]


def test_words_given_apart(tokenizer: Tokenizer, exported: Path) -> None:
    """`is_split_into_words` gives the ids of the words with spaces between them: each is a text to it."""
    from transformers import AutoTokenizer

    fast = AutoTokenizer.from_pretrained(exported)
    for words in (["The", "apple", "isn't", "red", "."], ["東京", "is", "far"]):
        encoding = fast(words, is_split_into_words=True, add_special_tokens=False)
        assert [encoding["input_ids"]] == tokenizer.encode([" ".join(words)])
    # In text without spaces that is not what the model was trained on.
    words = ["我们", "学习", "日本語"]
    assert [fast(words, is_split_into_words=True)["input_ids"][1:-1]] != tokenizer.encode(["".join(words)])


def test_without_a_space_before_the_text(tmp_path: Path) -> None:
    """As prep trains it for languages without spaces: words apart are pieces of running text."""
    from transformers import AutoTokenizer

    (tmp_path / "a.txt").write_text("\n".join([*SENTENCES[:500], *HAN]), encoding="utf-8")
    train_tokenizer([tmp_path / "a.txt"], tmp_path / "a.model", "bpe", 700, space_before_text=False)
    tokenizer = load_tokenizer(tmp_path / "a.model")
    tokenizer.export_hugging_face(tmp_path / "exported", max_length=128)
    odd = ["  two  spaces ", "", " ", "\u3000我们 学习", "東京 😀", "[MASK] and [CLS]", "▁low ▁"]
    assert tokenizer.agreement(tmp_path / "exported", [*odd, *HAN[:3]]) == 1.0
    fast = AutoTokenizer.from_pretrained(tmp_path / "exported")
    words = ["我们", "学习", "日本語", "と", "カタカナ"]
    encoding = fast(words, is_split_into_words=True, add_special_tokens=False)
    assert encoding["input_ids"] == [i for ids in tokenizer.encode(words) for i in ids]
    assert "▁" not in "".join(fast.convert_ids_to_tokens(encoding["input_ids"]))
    assert sorted(set(encoding.word_ids())) == [0, 1, 2, 3, 4]
    text = "学习 the language。"
    [(ids, spans)] = tokenizer.encode_with_offsets([text])
    parts = [text[begin:end] for begin, end in spans]
    assert "".join(parts) == "学习thelanguage。"
    assert spans[0][0] == 0
    assert tokenizer.decode(ids) == text
    assert fast.decode(ids) == text


def test_importing_loads_no_heavy_library() -> None:
    heavy = ["torch", "transformers", "tokenizers", "sentencepiece"]
    code = "import sys, bertscale.tokenizer, bertscale.data.shards; "
    code += f"print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
