"""What a conversion shows of masks: held-out sentences of the model's own language, counted honestly."""

from __future__ import annotations

import io
import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damage import change_manifest
from test_convert import SIZES, padding_is_zero
from tiny import OBJECTS, SUBJECTS, VERBS, prep_config, pretrain_config
from transformers import pipeline

from bertscale.config import PrepConfig
from bertscale.convert.model_shape import native_shapes
from bertscale.convert.weights import native_model
from bertscale.data.mixture import data_digest
from bertscale.data.shards import MANIFEST_NAME, open_dataset
from bertscale.export import masks
from bertscale.export.convert import convert
from bertscale.export.options import ConvertOptions
from bertscale.model.model import initial_value
from bertscale.tokenizer import load_tokenizer
from bertscale.train.checkpoint import open_checkpoint, write_whole
from data_prep.build import prep

WORDS = {word for phrase in (*SUBJECTS, *VERBS, *OBJECTS, "at") for word in phrase.split()}
CHINESE = (
    ["小猫", "老师", "火车", "我的朋友"],
    ["看见", "喜欢", "记得", "走过"],
    ["花园", "红色的船", "长路", "图书馆"],
)


def write_run(folder: Path, data: Path, causal: bool = False, **changes: Any) -> Path:
    """The checkpoint of a run on `data` (the manifest's digest, the config), with drawn weights."""
    config = pretrain_config(data, folder, **{"model": {**SIZES, **changes.pop("model", {})}, **changes})
    dataset = open_dataset(data)
    size = dataset.manifest["vocab_size"]
    draw = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randn(shape, generator=draw) * 0.3
        if name.endswith("bias") or "LayerNorm" in name
        else initial_value(name, shape, config.model, size, 1)
        for name, shape in native_shapes(config.model, size).items()
    }
    if size == 330:
        tensors = {name: padding_is_zero(name, value) for name, value in tensors.items()}
    table = {
        "model": config.model.model_dump(),
        "vocab_size": size,
        "tokenizer_sha256": dataset.manifest["tokenizer_sha256"],
        "data_digest": data_digest([dataset], config.corpora),
        "config": config.model_dump(mode="json"),
        "causal": causal,
    }
    write_whole(folder, table, tensors.items(), dataset.tokenizer_path)
    return folder


def shown(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines from that on masks on."""
    lines = capsys.readouterr().out.splitlines()
    first = next((n for n, line in enumerate(lines) if line.startswith("masks ")), len(lines))
    return lines[first:]


def sentences_of(data: Path) -> set[str]:
    dataset = open_dataset(data, "validation")
    tokenizer = load_tokenizer(data)
    return {
        tokenizer.decode(ids.tolist())
        for shard in dataset.shards
        for ids in np.split(shard.tokens, np.cumsum(shard.sentence_lengths)[:-1])
    }


# ------------------------------------------------------------------------------------ held-out sentences


def test_a_conversion_fills_masks_in_held_out_sentences_as_the_pipeline_does(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(write_run(tmp_path / "run", tiny_data), tmp_path / "hf", ConvertOptions(show=True))
    first, baseline, surest, *answers = shown(capsys)
    count = int(first.removeprefix("masks     the masked word of ").split()[0])
    assert count >= 40
    assert first.startswith(f"masks     the masked word of {count} held-out sentences: right in ")
    assert baseline.startswith("          (the most frequent of these words, always: right in ")
    assert surest == "          the surest of its first choices, no word twice:"
    fill = pipeline("fill-mask", model=str(tmp_path / "hf"), tokenizer=str(tmp_path / "hf"), device="cpu")
    heldout = sentences_of(tiny_data)
    assert len(answers) % 2 == 0
    assert 2 <= len(answers) <= 6
    for text, choices in zip(answers[::2], answers[1::2], strict=True):
        before, after = text.strip().split("[MASK]")
        assert any(f"{before}{word}{after}" in heldout for word in WORDS)
        best = fill(text.strip())[0]
        word, share = choices.split("   ")[2].strip().removesuffix(" (right)").removesuffix(" %").rsplit(" ")
        assert word == best["token_str"].strip()
        assert share == f"{100 * best['score']:.0f}"
    convert(tmp_path / "run", tmp_path / "hf", ConvertOptions(show=True))  # again: already converted
    assert shown(capsys) == [first, baseline, surest, *answers]


def test_the_share_and_the_surest_are_what_the_probabilities_say(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(model: Any, masked: list[masks.Masked], tokenizer: Any) -> torch.Tensor:
        """Right in the first fourth, surely; elsewhere the piece `wrong`, less surely."""
        logits = torch.zeros(len(masked), 330)
        for number, sentence in enumerate(masked):
            right = number < len(masked) // 4
            logits[number, sentence.target if right else wrong] = 9.0 - number / len(masked) - 3 * (not right)
        return logits.softmax(1)

    tokenizer = load_tokenizer(tiny_data)
    checkpoint = open_checkpoint(write_run(tmp_path / "run", tiny_data))
    masked = masks.held_out(checkpoint.table, tokenizer, 24)
    assert len({sentence.text.replace("[MASK]", "") for sentence in masked}) == len(masked) >= 40
    wrong = max(sentence.target for sentence in masked)
    monkeypatch.setattr(masks, "fill", fill)
    masks.show_masks(native_model(checkpoint), checkpoint.table, tokenizer)
    first, baseline, _, *answers = shown(capsys)
    fourth, targets = len(masked) // 4, [sentence.target for sentence in masked]
    right = fourth + sum(target == wrong for target in targets[fourth:])
    assert first.endswith(f"of {len(masked)} held-out sentences: right in {100 * right / len(masked):.0f} %")
    most = max(targets.count(target) for target in targets)
    assert baseline.endswith(f"right in {100 * most / len(masked):.0f} %)")
    assert answers[0] == f"  {masked[0].text}"
    assert answers[1].split("   ")[2] == f"{tokenizer.decode([targets[0]])} 96 % (right)"
    first_choices = [answer.split()[0] for answer in answers[1::2]]
    assert len(set(first_choices)) == len(first_choices)


def test_the_masked_are_whole_words_of_held_out_sentences(tiny_data: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_run(tmp_path / "run", tiny_data))
    tokenizer = load_tokenizer(tiny_data)
    heldout = sentences_of(tiny_data)
    for sentence in masks.held_out(checkpoint.table, tokenizer, 24):
        word = tokenizer.decode([sentence.target])
        assert word in WORDS
        assert sentence.text.replace("[MASK]", word) in heldout
        ids = [*sentence.ids[: sentence.place], sentence.target, *sentence.ids[sentence.place + 1 :]]
        assert tokenizer.encode([sentence.text.replace("[MASK]", word)]) == [ids]
        assert sentence.ids.count(tokenizer.mask_id) == 1
    lengths = [len(sentence.ids) for sentence in masks.held_out(checkpoint.table, tokenizer, 20)]
    assert max(lengths) <= 20  # the longest that the model has positions for


def test_chinese_is_shown_in_chinese(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(0)
    with (tmp_path / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(300):
            text = "".join("".join(draw.choice(words) for words in CHINESE) + "。" for _ in range(4))
            file.write(json.dumps({"text": text}) + "\n")
    changes = {"language": "zh", "train_tokenizer": {"vocab_size": 300, "sample_documents": 300}}
    prep(PrepConfig.model_validate(prep_config(tmp_path, **changes)))
    checkpoint = open_checkpoint(write_run(tmp_path / "run", tmp_path / "data"))
    capsys.readouterr()
    tokenizer = load_tokenizer(tmp_path / "data")
    masks.show_masks(native_model(checkpoint), checkpoint.table, tokenizer)
    first, _, _, *answers = shown(capsys)
    assert " held-out sentences: right in " in first
    masked = masks.held_out(checkpoint.table, tokenizer, 24)
    heldout = sentences_of(tmp_path / "data")
    for sentence in masked:
        piece = tokenizer.decode([sentence.target])
        assert sentence.text.replace("[MASK]", piece) in heldout
        assert piece in "".join("".join(words) for words in CHINESE)
    assert {text.strip() for text in answers[::2]} <= {sentence.text for sentence in masked}
    between = masks.between_frequent_pieces(tokenizer)
    assert len(between) == 3
    assert all(len(text.split()) == 1 for text, *_ in between)
    assert not any(letter.isascii() for text, *_ in between for letter in text.replace("[MASK]", ""))


def test_the_generator_fills_the_masks(tiny_data: Path, tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run",
        tiny_data,
        model={"generator_size": 1 / 3},
        samples={"mask_token_rate": 1.0, "random_token_rate": 0.0},
    )
    checkpoint, tokenizer = open_checkpoint(run), load_tokenizer(tiny_data)
    convert(run, tmp_path / "hf", ConvertOptions(show=False))
    masked = masks.held_out(checkpoint.table, tokenizer, 24)[:3]
    ours = masks.fill(native_model(checkpoint), masked, tokenizer)
    folder = str(tmp_path / "hf" / "generator")
    fill = pipeline("fill-mask", model=folder, tokenizer=folder, device="cpu")
    for sentence, probabilities in zip(masked, ours, strict=True):
        best = fill(sentence.text)[0]
        assert int(probabilities.argmax()) == best["token"]
        assert float(probabilities.max()) == pytest.approx(best["score"], rel=1e-4)


def test_a_model_that_never_filled_masks_shows_none(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", tiny_data, objectives={"mlm": 0}, samples={"kind": "nsp"})
    convert(run, tmp_path / "hf", ConvertOptions(show=True))
    assert shown(capsys) == []


def test_a_terminal_without_the_letters_gets_question_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", write_through=True)
    monkeypatch.setattr(sys, "stdout", screen)
    masks._print("六[MASK]白米 é")
    assert screen.buffer.getvalue().decode("latin-1").rstrip() == "?[MASK]?? é"


# ------------------------------------------------------------------------------- data absent or damaged


def delete_all(data: Path) -> None:
    shutil.rmtree(data)


def shard(data: Path) -> Path:
    return next(data.glob("validation-*.arrow"))


def cut_a_shard(data: Path) -> None:
    shard(data).write_bytes(shard(data).read_bytes()[:-40])


def flip_a_bit(data: Path) -> None:
    content = bytearray(shard(data).read_bytes())
    content[len(content) // 2] ^= 4
    shard(data).write_bytes(content)


def folder_for_a_shard(data: Path) -> None:
    path = shard(data)
    path.unlink()
    path.mkdir()


def delete_tokenizer(data: Path) -> None:
    (data / "tokenizer.model").unlink()


def list_for_manifest(data: Path) -> None:
    (data / MANIFEST_NAME).write_text("[]")


def manifest_of_nothing(data: Path) -> None:
    (data / MANIFEST_NAME).write_text('{"format_version": 2}')


def other_data(data: Path) -> None:
    """Prepared anew: what was held out may have been trained on."""
    change_manifest(data, lambda manifest: manifest["settings"].update(seed=17))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (delete_all, "there is no data folder"),
        (cut_a_shard, "it was truncated or replaced"),
        (flip_a_bit, "its bytes changed since it was written"),
        (folder_for_a_shard, "it was truncated or replaced"),
        (delete_tokenizer, "is missing"),
        (list_for_manifest, "is damaged"),
        (manifest_of_nothing, "is damaged: tokenizer is missing"),
        (other_data, "is not the data that the model was trained on"),
    ],
)
def test_without_sound_data_a_conversion_succeeds_and_says_why(
    damage: Callable[[Path], None],
    reason: str,
    tiny_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = shutil.copytree(tiny_data, tmp_path / "data")
    run = write_run(tmp_path / "run", data)
    damage(data)
    checkpoint = open_checkpoint(run)
    masks.show_masks(native_model(checkpoint), checkpoint.table, load_tokenizer(run))
    first, second, *answers = shown(capsys)
    assert first.startswith("masks     not tried in held-out sentences: ")
    assert reason in first
    assert second == "          what it expects between frequent pieces of the vocabulary:"
    assert len(answers) == 6
    for text in answers[::2]:  # of the tokenizer's own language
        for piece in text.strip().split(" [MASK] "):
            assert any(piece in word for word in WORDS), piece
    assert "(right" not in "".join(answers)


def test_data_without_validation_documents_is_no_error(
    tmp_path: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(tiny_data.parent / "corpus.jsonl", tmp_path)
    prep(PrepConfig.model_validate(prep_config(tmp_path, validation_fraction=0.0)))
    convert(write_run(tmp_path / "run", tmp_path / "data"), tmp_path / "hf", ConvertOptions(show=True))
    first, *_ = shown(capsys)
    assert first.startswith("masks     not tried in held-out sentences: the validation data of ")


def test_an_imported_model_goes_out_again_without_data(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(write_run(tmp_path / "run", tiny_data), tmp_path / "hf", ConvertOptions(show=False))
    convert(tmp_path / "hf", tmp_path / "imported", ConvertOptions(show=True))
    assert shown(capsys) == []
    convert(tmp_path / "imported", tmp_path / "again", ConvertOptions(show=True))
    first, *_ = shown(capsys)
    assert first == (
        "masks     not tried in held-out sentences: the checkpoint was imported, so that no data is known"
    )
