"""The tokenizer never lets text write a special piece, and its Hugging Face form gives the same ids."""

from __future__ import annotations

import io
import pydoc_data.topics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from bertscale.config import UserError
from bertscale.tokenizer import Tokenizer, normalize
from data_prep.train_tokenizer import train_tokenizer

SENTENCES = [
    sentence
    for topic in pydoc_data.topics.topics.values()
    for line in topic.split("\n\n")
    if len(sentence := normalize(line)) > 40
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    lines = [*SENTENCES, "The apple is red."]
    (folder / "sentences.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    train_tokenizer([folder / "sentences.txt"], 1500, folder / "tokenizer.model")
    return Tokenizer.load(folder / "tokenizer.model")


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
    assert tokenizer.decode(tokenizer.encode([text])[0]) == text


@pytest.mark.parametrize(
    "text", ["[MASK]", "a [CLS] b [SEP] c [PAD]", "[UNK]", "<s> </s> <unk> <pad>", "<0x41>", "東 😀 \ue000"]
)
def test_text_cannot_write_a_special_piece(tokenizer: Tokenizer, text: str) -> None:
    [ids] = tokenizer.encode([text])
    assert ids
    assert not set(ids) & set(tokenizer.special_ids)
    assert tokenizer.decode(ids) == text


def test_normalize() -> None:
    assert normalize("  a \t\n b\u00a0\u3000c\r\n") == "a b c"
    assert normalize("e\u0301") == "é"
    assert normalize("a\x00b\x07c\u00add\ufeffe\ud800") == "abcde"
    assert normalize("\x1c \u2028 \x85") == ""
    assert normalize(normalize("x\u0301 \u200d 👩\u200d💻")) == normalize("x\u0301 \u200d 👩\u200d💻")


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the tokenizer .*nothing\.model: No such file"):
        Tokenizer.load(tmp_path / "nothing.model")
    for content in (b"", b"text, not a model"):
        (tmp_path / "x.model").write_bytes(content)
        with pytest.raises(UserError, match=r"x\.model is not a SentencePiece model"):
            Tokenizer.load(tmp_path / "x.model")


def test_models_without_control_symbols(tmp_path: Path) -> None:
    user: dict[str, Any] = {"pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": -1}
    user |= {"pad_piece": "[PAD]", "unk_piece": "[UNK]"}
    user |= {"user_defined_symbols": ["[CLS]", "[SEP]", "[MASK]"]}
    for extra, message in [({}, "has no .* piece"), (user, r"the piece \[CLS\] is ordinary text")]:
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES[:500]),
            model_writer=model,
            vocab_size=400,
            minloglevel=2,
            **extra,
        )
        (tmp_path / "model").write_bytes(model.getvalue())
        with pytest.raises(UserError, match=message):
            Tokenizer.load(tmp_path / "model")


def test_training_is_deterministic_and_says_what_fits(tokenizer: Tokenizer, tmp_path: Path) -> None:
    train_tokenizer([tokenizer.path.parent / "sentences.txt"], 1500, tmp_path / "again.model")
    assert Tokenizer.load(tmp_path / "again.model").sha256 == tokenizer.sha256
    (tmp_path / "few.txt").write_text("one two three\nfour five six\n")
    with pytest.raises(UserError, match=r"vocab_size=5000 is too large .* largest that fits is \d+"):
        train_tokenizer([tmp_path / "few.txt"], 5000, tmp_path / "few.model")
    assert not (tmp_path / "few.model").exists()


def test_hugging_face_gives_the_same_ids(tokenizer: Tokenizer, exported: Path) -> None:
    # The two break ties between segmentations of equal score their own way: runs of one character, mostly.
    plain = [sentence for sentence in SENTENCES if not set("*-=.#xX_") & set(sentence)]
    assert tokenizer.agreement(exported, plain) >= 0.995
    assert tokenizer.agreement(exported, SENTENCES) >= 0.98
    odd = ["  two  spaces ", "", " ", "a\u00a0b\x00c", "e\u0301", "東京 😀", "[MASK] and [CLS]", "▁low ▁"]
    assert tokenizer.agreement(exported, odd) == 1.0


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


def test_importing_loads_no_heavy_library() -> None:
    heavy = ["torch", "transformers", "tokenizers"]
    code = (
        f"import sys, bertscale.tokenizer, bertscale.shards; print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
