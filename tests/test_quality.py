"""Doubts about language and tokenizer come where the counters speak against them, and only there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import change_manifest

from bertscale.config import PretrainConfig, check_config
from bertscale.data.inspect import _what_was_read
from bertscale.data.loader import Loader
from bertscale.data.mixture import Mixture
from bertscale.data.quality import LANGUAGES_OF, count_pieces, doubts, facts
from bertscale.data.shards import open_dataset, token_dtype
from bertscale.pretrain.banner import data_lines
from bertscale.tokenizer import load_tokenizer
from bertscale.train.schedule import TrainingSchedule


def manifest(language: str = "en", letters: dict[str, int] | None = None, **counters: int) -> dict[str, Any]:
    """As prep writes it of 1,000 sentences of 25 tokens."""
    counts = {"sentences": 1000, "tokens": 25_000, "unknown": 0, "single_bytes": 0} | counters
    return {
        "settings": {"language": language, "tokenizer": None},
        "counters": counts | {"letters": letters or {"latin": 100_000}},
    }


@pytest.mark.parametrize(
    ("language", "letters", "right"),
    [
        ("en", {"han": 93, "latin": 7}, "zh"),
        ("en", {"han": 40, "kana": 45, "latin": 15}, "ja"),
        ("en", {"hangul": 80, "latin": 20}, "ko"),
        ("de", {"thai": 80, "latin": 20}, "th"),
        ("en", {"cyrillic": 90}, "ru or its own"),
        ("en", {"arabic": 90}, "ar or its own"),
        ("en", {"greek": 90}, "el"),
        ("zh", {"latin": 90, "han": 10}, "en or its own"),
        ("ja", {"latin": 90}, "en or its own"),
    ],
)
def test_the_script_tells_the_language(language: str, letters: dict[str, int], right: str) -> None:
    [doubt] = doubts(manifest(language, letters))
    assert f"but language={language}, " in doubt
    assert f": set language={right} and run prep again" in doubt


@pytest.mark.parametrize(
    ("language", "letters"),
    [
        ("en", {"latin": 100}),
        ("fr", {"latin": 100}),
        ("vi", {"latin": 100}),
        ("pt-BR", {"latin": 100}),
        ("zh", {"han": 55, "latin": 45}),
        ("zh-Hant", {"han": 100}),
        ("ja", {"han": 45, "kana": 50}),
        ("ja", {"han": 100}),
        ("sr", {"latin": 100}),
        ("sr", {"cyrillic": 100}),
        ("lines", {"han": 100}),
        ("ta", {"other": 100}),
        ("en", {"other": 60, "latin": 40}),
        ("en", {"latin": 50, "han": 50}),  # of two languages
    ],
)
def test_a_right_language_is_not_doubted(language: str, letters: dict[str, int]) -> None:
    assert doubts(manifest(language, letters)) == []


def test_every_language_fits_its_script() -> None:
    for script, languages in LANGUAGES_OF.items():
        for language in languages.split():
            assert doubts(manifest(language, {script: 100})) == []


def test_lengths_and_shares() -> None:
    assert doubts(manifest()) == []
    assert doubts(manifest(unknown=500, single_bytes=500, sentences=500)) == []
    [doubt] = doubts(manifest(sentences=200))
    assert doubt.startswith("a sentence has 125 tokens on average, where 20 to 40 are usual")
    [doubt] = doubts(manifest(unknown=10_500))
    assert doubt.startswith(
        "42% of the tokens are unknown pieces, so the tokenizer does not fit this text: raise"
    )
    [doubt] = doubts(manifest(single_bytes=5_000, sentences=200))
    assert doubt.startswith("20% of the tokens are single bytes of characters without a piece")
    assert facts(manifest(unknown=500)) == (
        "2.00% of the tokens are unknown pieces, 0.00% single bytes of characters without a piece; a "
        "sentence has 25.0 tokens on average"
    )


def test_an_older_manifest_says_nothing() -> None:
    older = {"settings": {}, "counters": {"sentences": 10, "tokens": 1000}}
    assert (facts(older), doubts(older)) == ("", [])


def test_pieces_are_counted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bertscale.data.quality.TOKENS_AT_ONCE", 7)
    tokens = np.random.default_rng(0).integers(0, 50, 100).astype(token_dtype(50))
    assert count_pieces(tokens, 60).tolist() == np.bincount(tokens, minlength=60).tolist()
    assert count_pieces(tokens[:0], 60).sum() == 0


def test_pretraining_and_inspect_repeat_the_doubt(tiny_data: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_data, tmp_path / "data")
    change_manifest(tmp_path / "data", lambda manifest: manifest["settings"].update(language="zh"))
    dataset = open_dataset(tmp_path / "data")
    values = {"data": str(tmp_path / "data"), "run": "run", "train": {"steps": 1, "global_batch": 2}}
    config = check_config(PretrainConfig, values, "test")
    mixture = Mixture([dataset], [1.0], config.samples, global_batch=2, seed=0)
    tokenizer = load_tokenizer(dataset.tokenizer_path)
    loader = Loader(mixture, tokenizer, micro_batch=2, rank=0, world=1)
    lines = data_lines(config, [dataset], loader, 0, TrainingSchedule(config, mixture.batches))
    [warning] = [line for line in lines if line.startswith("warning")]
    assert "of the letters are Latin, but language=zh" in warning
    assert any(line.startswith("warning: ") for line in _what_was_read(dataset, tokenizer))
