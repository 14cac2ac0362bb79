"""BPE in the forms of published models: the ids of AutoTokenizer, but text never writes a special piece."""

from __future__ import annotations

import functools
import inspect
import io
import json
import os
import pydoc_data.topics
import random
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Fast

from bertscale.config import PrepConfig, UserError
from bertscale.data.inspect import inspect as inspect_data
from bertscale.data.shards import open_dataset
from bertscale.export import masks
from bertscale.pretrain.fills import encode_masked
from bertscale.pretrain.vocabulary import matches
from bertscale.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from bertscale.tokenizer.byte_level import ByteLevelTokenizer
from data_prep.build import prep

DATA = os.environ.get("BERTSCALE_DATA", "")
TEXT = [line for topic in list(pydoc_data.topics.topics.values())[:12] for line in topic.split("\n")]
CODE = inspect.getsource(functools).split("\n")
HAN = ["北京是中国的首都。", "我们学习日本語とカタカナ。"]
LINES = [*TEXT, *CODE, *HAN * 40, "café naïve “quoted” — 5 €", "the 😀 👩\u200d💻 apple"]
LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
MASK = {"__type": "AddedToken", "content": "<mask>", "lstrip": True, "rstrip": False, "normalized": False}
Json = dict[str, Any]


def added(number: int, content: str, **settings: bool) -> Json:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": content, **plain, **settings}


def trained(fast: Fast, lines: list[str], size: int, first: list[str], **settings: Any) -> Json:
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=first, show_progress=False, **settings)
    fast.train_from_iterator(lines, trainer)
    values: Json = json.loads(fast.to_str())
    return values


def append(values: Json, tokens: list[Json]) -> None:
    end = len(values["model"]["vocab"])
    values["added_tokens"] += [token | {"id": end + number} for number, token in enumerate(tokens)]


def roberta(lines: list[str] = LINES, size: int = 900) -> tuple[Json, Json]:
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    values = trained(fast, lines, size, special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    append(values, [added(0, "<mask>", lstrip=True)])
    values["post_processor"] = {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0]}
    values["post_processor"] |= {"trim_offsets": True, "add_prefix_space": False}
    config = {"tokenizer_class": "RobertaTokenizer", "cls_token": "<s>", "bos_token": "<s>"}
    config |= {"sep_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return values, {**config, "mask_token": {**MASK, "single_word": False}, "add_prefix_space": False}


def modern(lines: list[str] = LINES, size: int = 900) -> tuple[Json, Json]:
    fast = Fast(models.BPE())
    fast.normalizer = normalizers.NFC()
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    first = ["|||IP_ADDRESS|||", "<|padding|>"]
    values = trained(fast, lines, size, first, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    text = {"special": False, "normalized": True}
    values["added_tokens"][0] |= text
    append(
        values,
        [
            *(added(0, " " * count, **text) for count in range(24, 1, -1)),
            *(added(0, name, **text) for name in ("|||EMAIL_ADDRESS|||", "|||PHONE_NUMBER|||")),
            *(added(0, name) for name in ("<|endoftext|>", "[UNK]", "[CLS]", "[SEP]", "[PAD]")),
            added(0, "[MASK]", lstrip=True),
            *(added(0, f"[unused{number}]", special=False, normalized=True) for number in range(3)),
        ],
    )
    fast = Fast.from_str(json.dumps(values))
    special = [(name, fast.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    fast.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=special
    )
    names = ("unk", "cls", "sep", "pad", "mask")
    config = {f"{name}_token": f"[{name.upper()}]" for name in names}
    return json.loads(fast.to_str()), {"tokenizer_class": "PreTrainedTokenizerFast", **config}


def euro(lines: list[str] = LINES, size: int = 900) -> tuple[Json, Json]:
    fast = Fast(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA), "isolated")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = pre_tokenizers.Sequence([split, in_bytes])
    fast.decoder = decoders.ByteLevel()
    values = trained(fast, lines, size, [], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|mask|>", "<|pad|>", "<|reserved_special_token_2|>"]
    append(values, [added(0, name) for name in names])
    fast = Fast.from_str(json.dumps(values))
    template = processors.TemplateProcessing(
        single="<|begin_of_text|> $A <|end_of_text|>",
        special_tokens=[(name, fast.token_to_id(name)) for name in names[:2]],
    )
    fast.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    config = {"bos_token": names[0], "eos_token": names[1], "mask_token": names[2], "pad_token": names[3]}
    return json.loads(fast.to_str()), {"tokenizer_class": "PreTrainedTokenizerFast", **config}


def gemma(lines: list[str] = LINES, size: int = 1100) -> tuple[Json, Json]:
    fast = Fast(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    fast.normalizer = normalizers.Replace(" ", "▁")
    fast.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # as SentencePiece's trainer cuts
    fuse = decoders.Fuse()
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), fuse])
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    in_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    values = trained(fast, lines, size, [*special, *in_bytes], limit_alphabet=size // 12)
    del values["added_tokens"][len(special) :]  # the bytes are plain pieces
    # Markup and runs of newlines and spaces are added tokens that are not special.
    text = {"special": False}
    append(values, [added(0, name, **text) for name in ("<table>", "\n\n", "▁▁", "▁▁▁▁")])
    fast = Fast.from_str(json.dumps(values))
    fast.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")  # never cuts: there is no space
    fast.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", pair="<bos> $A <eos> $B <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    config = {"tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>"}
    config |= {"unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"}
    return json.loads(fast.to_str()), config


FORMS: dict[str, Callable[..., tuple[Json, Json]]] = {
    "roberta": roberta,
    "modern": modern,
    "euro": euro,
    "gemma": gemma,
}


def write(folder: Path, values: Json, config: Json | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=FORMS)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp(request.param), *FORMS[request.param]())


@pytest.fixture(scope="module")
def tokenizer(published: Path) -> Tokenizer:
    return load_tokenizer(published)


def their_ids(folder: Path, texts: list[str], **settings: Any) -> list[list[int]]:
    from transformers import AutoTokenizer

    fast = AutoTokenizer.from_pretrained(folder)
    encoded = fast(texts, add_special_tokens=False, verbose=False, **settings)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


SPECIAL = [
    "[MASK]",
    "[CLS]",
    "[SEP]",
    "[PAD]",
    "[UNK]",
    "<s>",
    "</s>",
    "<pad>",
    "<unk>",
    "<mask>",
    "<bos>",
    "<eos>",
]
SPECIAL += ["<|endoftext|>", "<|padding|>", "<|mask|>", "<|begin_of_text|>", "<|reserved_special_token_2|>"]
BITS = [
    "the",
    " the",
    "The ",
    "apple",
    "don't",
    "I'LL",
    "x1",
    "2026",
    "3.14",
    "def f(x):",
    "    return x",
    "#!/",
]
BITS += [
    "北京",
    "首都。",
    "日本",
    "カ",
    "ｶﾞ",
    "가",
    "\u1112\u1161\u11ab",
    "हिन्दी",
    "ไทย",
    "עִבְרִית",
    "العربية",
    "Тёплый",
    "İß",
]
BITS += [
    "😀",
    "👩\u200d💻",
    "🇩🇪",
    "❤\ufe0f",
    "①",
    "ﬁ",
    "½",
    "Å",
    "e\u0301",
    "a\u0323\u0301",
    "\u0301",
    "…",
    "“",
    "—",
]
BITS += [
    *" \t\n\r\x0b\x0c\x1c\x85\u00a0\u1680\u2028\u3000\u2581",
    "  ",
    "   ",
    " " * 9,
    "\r\n",
    "\n\n",
    "\n\n\n",
]
BITS += [
    *"\x00\x07\x7f\u00ad\ufeff\u200b\u200d\u202e\ufffd\uffff\ue000\U000e0001\U0010ffff",
    "Ġ",
    "Ċ",
    "▁",
    "▁▁",
]
BITS += [
    "<0x41>",
    "<0xE4>",
    "##a",
    "[unused0]",
    "|||IP_ADDRESS|||",
    "|||EMAIL_ADDRESS|||",
    "<table>",
    "|||",
    "<|",
]


def nasty(count: int) -> list[str]:
    """Every bit alone, and bits in a row."""
    draw = random.Random(0)
    rows = (
        draw.choice(["", "", " "]).join(draw.choices(BITS, k=draw.randint(2, 12)))
        for _ in range(count - len(BITS) - 1)
    )
    return ["", *BITS, *rows]


def test_nasty_strings(tokenizer: Tokenizer, published: Path) -> None:
    assert isinstance(tokenizer, ByteLevelTokenizer)
    texts = nasty(400)
    theirs = their_ids(published, texts)
    assert tokenizer.encode(texts) == theirs
    assert tokenizer.encode([tokenizer.normalize(text) for text in texts]) == theirs
    assert [ids for ids, _ in tokenizer.encode_with_offsets(texts)] == theirs
    assert len({number for ids in theirs for number in ids}) > 100


def test_words_are_encoded_once(
    tokenizer: Tokenizer, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text is cut at spaces only where no rule and no piece of the tokenizer goes on over them."""
    assert isinstance(tokenizer, ByteLevelTokenizer)
    assert tokenizer._cuts_words
    monkeypatch.setattr("bertscale.tokenizer.byte_level.CACHE_BYTES", 10_000)
    again = load_tokenizer(published)
    assert isinstance(again, ByteLevelTokenizer)
    lines = [f"a{number} the man" for number in range(200)]
    assert [again.encode([line])[0] for line in lines] == tokenizer.encode(lines)
    assert 0 < len(again._known) < 60
    values = json.loads((published / "tokenizer.json").read_text(encoding="utf-8"))
    split = {"type": "Split", "pattern": {"Regex": "a b"}, "behavior": "Isolated", "invert": False}
    steps = [split, *([values["pre_tokenizer"]] if values["pre_tokenizer"]["type"] == "ByteLevel" else [])]
    if len(steps) == 2 or "gemma" in str(published):
        values["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
        config = json.loads((published / "tokenizer_config.json").read_text(encoding="utf-8"))
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        other = load_tokenizer(write(published / "other", values, config))
        assert isinstance(other, ByteLevelTokenizer)
        assert not other._cuts_words
        assert other.encode(["a b"]) == their_ids(published / "other", ["a b"])


def test_text_cannot_write_a_special_piece(tokenizer: Tokenizer, published: Path) -> None:
    draw = random.Random(1)
    rows = ["".join(draw.choices([*SPECIAL, *BITS], k=6)) for _ in range(100)]
    texts = [*SPECIAL, *(f"a {name} b{name}{name}" for name in SPECIAL), "".join(SPECIAL), *rows]
    ours = tokenizer.encode(texts)
    assert not set(tokenizer.special_ids).intersection(*[{number for ids in ours for number in ids}])
    assert [ids for ids, _ in tokenizer.encode_with_offsets(texts)] == ours
    # The same in transformers, which by itself makes special pieces of them.
    assert their_ids(published, texts, split_special_tokens=True) == ours
    assert their_ids(published, texts) != ours
    for text, ids in zip(SPECIAL, ours, strict=False):
        assert tokenizer.decode(ids) == text


def test_spans_are_places_in_the_given_text(tokenizer: Tokenizer) -> None:
    assert isinstance(tokenizer, ByteLevelTokenizer)
    texts = [
        *nasty(300),
        "a\ud800 the\udc00😀 \ud800",
        " \ud800",
        "  The apple\n re\x00d: cafe\u0301 😀東x\ufeff y. ",
    ]
    for text, (ids, spans) in zip(texts, tokenizer.encode_with_offsets(texts), strict=True):
        assert spans == sorted(spans)
        covered = {place for begin, end in spans for place in range(begin, end)}
        blank = {i for i, c in enumerate(text) if c.isspace() or c in "▁\ud800\udc00"}
        assert covered | blank == set(range(len(text)))
        for number, (begin, end) in zip(ids, spans, strict=True):
            whole = tokenizer._bytes(number).decode(errors="replace")
            place = text[begin:end]
            assert place == place.strip()
            if "\ufffd" in whole:
                assert begin < end or text[begin - 1].isspace()  # a part of a character has its place
            elif text.isascii():
                assert place == whole.strip()


def test_words(tokenizer: Tokenizer) -> None:
    for text, expected in [
        (
            "The apple isn't red, 12 of café.",
            ["The", "apple", "isn", "'t", "red", ",", "12", "of", "café", "."],
        ),
        ("the 北京是 x", ["the", "北", "京", "是", "x"]),
        ("the\tapple\nred", ["the", "apple", "red"]),
    ]:
        [(ids, spans)] = tokenizer.encode_with_offsets([text])
        starts = tokenizer.starts_word[ids].tolist()
        starts[0] = True  # a text begins with a word, as masks do it
        words: list[str] = []
        for start, (begin, end) in zip(starts, spans, strict=True):
            if start:
                words.append("")
            seen = sum(map(len, words))
            place = text[max(begin, 0) : end]
            words[-1] += place if not words[-1].endswith(place) or len(place) > 1 or place.isascii() else ""
            assert seen <= len(text)
        found = [word for word in words if word]
        if "北" in text:  # a piece may hold several of them, and each begins one
            assert "".join(found) == "".join(expected)
            assert all(tokenizer.starts_word[i] for i in ids if tokenizer.decode([i]).strip() in [*"北京是"])
        else:
            assert found == expected
    assert all(tokenizer.starts_word[list(tokenizer.special_ids)])


def test_pieces(tokenizer: Tokenizer) -> None:
    text = "The apple is red, and 東京 is far.\n 😀"
    [ids] = tokenizer.encode([text])
    assert tokenizer.decode([tokenizer.cls_id, *ids, tokenizer.mask_id, tokenizer.sep_id]) == text
    spelt = "".join(f"{' ' * space}{piece}" for piece, space in map(tokenizer.spelling, ids))
    assert spelt.startswith("The apple is red, and ")
    assert spelt.endswith(" is far.\n \ufffd\ufffd\ufffd\ufffd") or "Ġ" in "".join(map(tokenizer.piece, ids))
    in_bytes = set(tokenizer.byte_ids)
    assert in_bytes & set(tokenizer.encode(["東😀"])[0])
    assert not in_bytes & set(tokenizer.encode(["The apple"])[0])
    with pytest.raises(IndexError):
        tokenizer.piece(tokenizer.vocab_size)


def test_places_of_tokens(tokenizer: Tokenizer) -> None:
    texts = ["The 北京 😀a", "", "é red", "e\u0301 the \u2126x", "  two", "首都。"]
    encoded = tokenizer.encode(texts)
    places = tokenizer.token_starts(texts, encoded)
    assert places.dtype == np.int64
    assert len(places) == sum(map(len, encoded))
    begin, together = 0, "".join(texts)
    for text, ids in zip(texts, encoded, strict=True):
        first = sum(map(len, texts[: texts.index(text)]))
        for number, place in zip(ids, places[begin : begin + len(ids)].tolist(), strict=True):
            piece = tokenizer._bytes(number).decode(errors="ignore")  # type: ignore[attr-defined]
            if place >= 0:
                assert first <= place < first + len(text)
                if piece and "\u2126" not in text and "\u0301" not in text:
                    assert together[place:].startswith(piece[0])
            else:
                assert tokenizer._bytes(number)[0] & 0xC0 == 0x80  # type: ignore[attr-defined]
        begin += len(ids)


def test_masks_that_a_conversion_shows(tokenizer: Tokenizer) -> None:
    """Words are shown without the space that is a part of their pieces."""
    frequent = masks.between_frequent_pieces(tokenizer)
    assert frequent
    for sentence in frequent:
        assert sentence.text == " ".join(sentence.text.split())
        assert sentence.text.split()[1] == "[MASK]"
    text = " The apple is of the same kind as the other one"
    [ids] = tokenizer.encode([text])
    found = masks._mask_a_word(text, ids, tokenizer, np.random.default_rng(0))
    assert found is not None
    word = tokenizer.spelt(found.target)
    assert found.text.replace("[MASK]", word) == text.strip()


def test_a_mask_takes_the_space_before_it(tokenizer: Tokenizer) -> None:
    [before], [whole] = tokenizer.encode(["The apple is"]), tokenizer.encode(["The apple is the."])
    assert encode_masked("The apple is [MASK].", tokenizer) == [*before, tokenizer.mask_id, whole[-1]]


def test_hugging_face_form(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer.export_hugging_face(tmp_path, 64)
    assert tokenizer.agreement(tmp_path, nasty(300) + SPECIAL) == 1
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (len(theirs), theirs.model_max_length) == (tokenizer.vocab_size, 64)
    roles = (theirs.pad_token_id, theirs.unk_token_id, theirs.cls_token_id, theirs.sep_token_id)
    assert (*roles, theirs.mask_token_id) == tokenizer.special_ids[:5]
    first, second = tokenizer.encode(["The apple", " is red"])
    batch = theirs("The apple", " is red")
    assert batch["input_ids"] == [tokenizer.cls_id, *first, tokenizer.sep_id, *second, tokenizer.sep_id]
    assert batch["token_type_ids"] == [0] * (len(first) + 2) + [1] * (len(second) + 1)
    assert theirs(f"a {theirs.mask_token}")["input_ids"][-2] == tokenizer.mask_id
    # Its file says its special pieces itself, and stays what it is.
    (tmp_path / "tokenizer_config.json").unlink()
    again = load_tokenizer(tmp_path)
    assert (again.sha256, again.special_ids) == (tokenizer.sha256, tokenizer.special_ids)
    folder = tmp_path / "saved"
    folder.mkdir()
    assert tokenizer.save(folder) == find_tokenizer(folder)
    theirs.save_pretrained(tmp_path / "theirs")
    assert load_tokenizer(tmp_path / "theirs").encode(nasty(200)) == tokenizer.encode(nasty(200))


def test_special_pieces_are_found_by_their_roles(tmp_path: Path) -> None:
    def roles(values: Json, config: Json | None) -> list[str]:
        tokenizer = load_tokenizer(write(tmp_path / str(len(list(tmp_path.iterdir()))), values, config))
        t = tokenizer
        return [t.piece(number) for number in (t.pad_id, t.unk_id, t.cls_id, t.sep_id, t.mask_id)]

    values, config = roberta()
    names = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
    assert roles(values, config) == roles(values, None) == names
    other = {**config, "pad_token": "</s>", "unk_token": None}
    assert roles(values, other) == ["</s>", *names[1:]]
    values, config = euro()
    assert load_tokenizer(write(tmp_path / "euro", values, config)).special_ids[0] == 902 + 1
    assert len(set(load_tokenizer(tmp_path / "euro").special_ids)) == 5  # unknown is padding; one is reserved


def test_pieces_that_two_forms_share(tmp_path: Path) -> None:
    """For a run that goes on with another vocabulary: the same text, both after a space or both not."""
    old, new = (load_tokenizer(write(tmp_path / name, *FORMS[name]())) for name in ("gemma", "modern"))
    found = matches(old, new)
    same = {new.piece(i): old.piece(n) for i, n in enumerate(found) if n is not None}
    assert (same["Ġthe"], same["e"], same["[MASK]"]) == ("▁the", "e", "<mask>")
    assert same["[CLS]"] == "<bos>"
    assert "<|endoftext|>" not in same
    twin = matches(new, load_tokenizer(write(tmp_path / "again", *modern())))
    assert twin == list(range(new.vocab_size))


def test_tokenizers_that_will_not_do(tmp_path: Path) -> None:
    def refusal(values: Json, config: Json | None = None, **settings: Any) -> str:
        with pytest.raises(UserError) as caught:
            load_tokenizer(write(tmp_path / "refused", values, config or {}), **settings)
        message = str(caught.value)
        assert "\n" not in message
        return message

    values, config = roberta()
    part = {**values, "added_tokens": values["added_tokens"][:4]}
    assert "does not say which piece is its mask_token: name it in a tokenizer_config.json" in refusal(part)
    assert "the mask_token of the tokenizer" in refusal(part, config)
    assert "has two roles" in refusal(values, {**config, "mask_token": "<pad>"})
    text = [token | {"special": token["content"] != "<mask>"} for token in values["added_tokens"]]
    assert "the piece <mask> is ordinary text" in refusal({**values, "added_tokens": text}, config)
    model = {**values["model"], "merges": [*values["model"]["merges"]]}
    assert "neither byte-level" in refusal({**values, "pre_tokenizer": {"type": "Whitespace"}})
    assert "neither byte-level" in refusal({**values, "model": {**model, "end_of_word_suffix": "</w>"}})
    assert "at random" in refusal({**values, "model": {**model, "dropout": 0.1}})
    hole = {name: number + (number > 500) for name, number in model["vocab"].items()}
    assert "each once" in refusal({**values, "model": {**model, "vocab": hole}})
    assert "is damaged" in refusal({**values, "model": {**model, "merges": [["no", "piece"]]}})
    assert "model.vocab is missing" in refusal({**values, "model": {"type": "BPE"}})
    assert "lowercase=True is for a WordPiece vocabulary" in refusal(values, config, lowercase=True)


def test_prep_with_a_given_folder(tmp_path: Path) -> None:
    """Sentences are pieces of their document: with the space before each, as the model has read them."""
    published = write(tmp_path / "published", *modern())
    tokenizer = load_tokenizer(published)
    documents = ["The apple is red. It isn't mine.\n\nAnd 東京 is far. [MASK] <mask> <|mask|>", "One. Two!"]
    (tmp_path / "a.txt").write_text("\n\n\n".join(documents), encoding="utf-8")
    config = {"input": str(tmp_path / "a.txt"), "output": str(tmp_path / "data"), "documents": "file"}
    prep(PrepConfig.model_validate({**config, "tokenizer": str(published), "workers": 1}))
    dataset = open_dataset(tmp_path / "data", "train")
    assert dataset.manifest["tokenizer"] == "tokenizer.json"
    assert dataset.manifest["tokenizer_sha256"] == tokenizer.sha256
    [shard] = dataset.shards
    text = "\n".join(" ".join(part.split()) for part in "\n\n".join(documents).split("\n\n") if part.strip())
    stored = load_tokenizer(tmp_path / "data")
    assert stored.decode(shard.tokens.tolist()) == text
    assert not set(shard.tokens.tolist()) & set(stored.special_ids)
    begin = int(shard.sentence_lengths[0])
    assert stored.decode(shard.tokens[begin:][:3].tolist()).startswith(" It")
    inspect_data(tmp_path / "data", console := Console(record=True, width=200, file=io.StringIO()))
    shown = console.export_text()
    assert "The apple is red. It isn't mine." in shown.replace("<", "").replace(">", "").replace("=", "")


@pytest.mark.skipif(not DATA, reason="BERTSCALE_DATA names no folder of real data")
@pytest.mark.parametrize("name", FORMS)
def test_real_lines(name: str, tmp_path: Path) -> None:
    """English, Chinese, the code of Python's library, and emoji."""
    texts = {"wiki_en": 15_000, "wiki_zh": 15_000}
    lines: list[str] = []
    for corpus, count in texts.items():
        files = sorted((Path(DATA) / "corpora" / corpus).iterdir())
        lines += islice((line for f in files for line in f.read_text(encoding="utf-8").split("\n")), count)
    library = sorted(Path(os.__file__).parent.glob("*.py"))
    code = (line for f in library for line in f.read_text(encoding="utf-8", errors="replace").split("\n"))
    lines += islice(code, 19_000)
    draw = random.Random(0)
    emoji = ["\U0001f600", "\U0001f469\u200d\U0001f4bb", "\u2764\ufe0f", "\U0001f1e9\U0001f1ea", " it is"]
    emoji += [chr(draw.randrange(0x1F300, 0x1FAFF)) for _ in range(50)]
    lines += ["".join(draw.choices(emoji, k=9)) for _ in range(1000)]
    assert len(lines) == 50_000
    folder = write(tmp_path, *FORMS[name](lines[::20], 4_000))
    lines = lines if name == "modern" else lines[::10]  # all lines in each form take a minute
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode(lines) == their_ids(folder, lines)
    for line, (ids, spans) in zip(lines[::25], tokenizer.encode_with_offsets(lines[::25]), strict=True):
        assert [ids] == tokenizer.encode([line])
        assert spans == sorted(spans)
