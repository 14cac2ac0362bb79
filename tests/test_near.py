"""Near-duplicates: who is found, that estimates are those of the sets, and equal bytes for any workers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import prep_config

from bertscale.config import PrepConfig
from bertscale.data.shards import open_dataset, read_manifest
from data_prep.build import prep
from data_prep.filters import near
from data_prep.filters.near import bands_of, near_duplicates, row_type, signature


def words(draw: random.Random, count: int) -> list[str]:
    return [f"w{draw.randrange(5000)}" for _ in range(count)]


def changed(text: list[str], draw: random.Random, count: int) -> list[str]:
    """With `count` other words."""
    text = list(text)
    for place in draw.sample(range(len(text)), count):
        text[place] = f"x{draw.randrange(5000)}"
    return text


def shingles(text: list[str]) -> set[tuple[str, ...]]:
    return {tuple(text[place : place + 5]) for place in range(len(text) - 4)}


def similarity(one: list[str], other: list[str]) -> float:
    first, second = shingles(one), shingles(other)
    return len(first & second) / len(first | second)


def write(path: Path, texts: list[str], first: int = 0, hashes: int = bands_of(0.8).hashes) -> Path:
    rows = np.zeros(len(texts), row_type(hashes))
    rows["document"] = np.arange(first, first + len(texts))
    for number, text in enumerate(texts):
        rows["hashes"][number] = signature(text, True, hashes)
    path.write_bytes(rows.tobytes())
    return path


def test_equal_hashes_are_the_similarity_of_the_sets() -> None:
    draw = random.Random(0)
    errors = []
    for count in (0, 2, 5, 10, 30) * 6:
        one = words(draw, 200)
        other = changed(one, draw, count)
        pair = [signature(" ".join(text), True, 128) for text in (one, other)]
        errors.append((pair[0] == pair[1]).mean() - similarity(one, other))
    assert abs(np.mean(errors)) < 0.02
    assert np.std(errors) < 0.05  # sqrt(s (1 - s) / 128) is 0.044 at most


def test_long_and_short_and_unspaced_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(words(random.Random(1), 300))
    whole = signature(text, True, 40)
    monkeypatch.setattr(near, "SHINGLES_AT_ONCE", 7)
    assert (signature(text, True, 40) == whole).all()
    assert (signature(text.upper(), True, 40) == whole).all()
    assert (signature("one two", True, 8) != signature("one three", True, 8)).any()
    chinese = "他走了很远的路，然后回家去看他的母亲。" * 3
    pair = [signature(t, False, 128) for t in (chinese, chinese + "完了")]
    assert 0.7 < (pair[0] == pair[1]).mean() < 1
    assert len(signature("", True, 8)) == len(signature("", False, 8)) == 8


@pytest.mark.parametrize("asked", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_find_what_is_as_similar(asked: float) -> None:
    number, rows = bands_of(asked)
    assert number * rows <= 128
    assert 1 - (1 - asked**rows) ** number >= 0.95


def test_the_first_of_each_group_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(2)
    texts = [words(draw, 150) for _ in range(60)]
    near_ones = {60 + n: 7 * n for n in range(8)}  # of documents in the first file, too
    texts += [changed(texts[of], draw, 2) for of in near_ones.values()]
    far = [changed(texts[of], draw, 40) for of in range(5)]
    joined = [" ".join(text) for text in [*texts, *far]]
    parts = {"a": joined[:40], "b": [], "c": joined[40:]}
    files = [write(tmp_path / name, part, 40 * (name > "a")) for name, part in parts.items()]
    found = near_duplicates(files, 0.8)
    assert found.tolist() == sorted(near_ones)
    monkeypatch.setattr(near, "PAIRS_AT_ONCE", 3)
    assert near_duplicates(files, 0.8).tolist() == found.tolist()
    one = write(tmp_path / "all", joined)
    assert near_duplicates([one], 0.8).tolist() == found.tolist()
    assert near_duplicates([], 0.8).tolist() == near_duplicates([files[1]], 0.8).tolist() == []


def test_a_chain_is_one_group(tmp_path: Path) -> None:
    """The second is similar to the first, the third to the second, and so on."""
    draw = random.Random(3)
    chain = [words(draw, 200)]
    for _ in range(6):
        chain.append(changed(chain[-1], draw, 2))
    assert similarity(chain[0], chain[-1]) < 0.8
    order = [3, 0, 5, 1, 6, 2, 4]
    path = write(tmp_path / "a", [" ".join(chain[number]) for number in order])
    assert near_duplicates([path], 0.8).tolist() == [1, 2, 3, 4, 5, 6]


def test_prep_drops_them_with_the_same_bytes_for_any_workers(tiny_data: Path, tmp_path: Path) -> None:
    draw = random.Random(4)
    texts = [words(draw, 80) for _ in range(120)]
    texts += [changed(texts[of], draw, 1) for of in range(0, 100, 10)]
    texts += [texts[5], texts[121]]  # the same as another one, and as a near-duplicate
    lines = [json.dumps({"text": " ".join(text)}) for text in texts]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))

    def prepared(name: str, **changes: Any) -> dict[str, bytes]:
        given = {"tokenizer": str(open_dataset(tiny_data).tokenizer_path), "split_bytes": 20_000}
        values = prep_config(tmp_path, output=str(tmp_path / name), near_duplicates=0.8, **given, **changes)
        del values["train_tokenizer"]
        prep(PrepConfig.model_validate(values))
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.is_file()}

    assert prepared("2", workers=2) == prepared("1")
    counters = read_manifest(tmp_path / "1")["counters"]
    assert counters["dropped"] == {"duplicate": 2, "near-duplicate": 10}
    assert counters["documents"] == 120
    splits = [open_dataset(tmp_path / "1", split) for split in ("train", "validation")]
    assert sum(len(set(shard.documents.tolist())) for data in splits for shard in data.shards) == 120
    left = [path.name for path in (tmp_path / "1" / ".prep").iterdir()]
    assert not [name for name in left if "signatures" in name or "near" in name]
