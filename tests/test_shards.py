"""Shards are read back as written, and every damage is refused by name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from bertscale.config import UserError
from bertscale.data.shards import (
    MANIFEST_NAME,
    Shard,
    open_dataset,
    token_dtype,
    write_manifest,
    write_shard,
)
from bertscale.files import json_digest

DOCUMENTS = [(7, [[5, 6, 7], [8]]), (8, [[9, 10]]), (2**40, [[11], [12, 13], [65_535]])]


def make_dataset(folder: Path) -> Path:
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(b"a tokenizer")
    sha256 = hashlib.sha256(b"a tokenizer").hexdigest()
    entry = write_shard(folder / "train-00000.arrow", DOCUMENTS, np.uint16, "train")
    write_manifest(
        folder, tokenizer_sha256=sha256, vocab_size=100, settings={"seed": 0}, counters={}, shards=[entry]
    )
    return folder


def flip_byte(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_reads_what_was_written(tmp_path: Path) -> None:
    dataset = open_dataset(make_dataset(tmp_path / "data"), "train", verify=True)
    assert (dataset.num_documents, dataset.num_tokens) == (3, 10)
    [shard] = dataset.shards
    rows = []
    for row, number in enumerate(shard.documents):
        tokens = shard.tokens[shard.token_offsets[row] : shard.token_offsets[row + 1]]
        lengths = shard.sentence_lengths[shard.sentence_offsets[row] : shard.sentence_offsets[row + 1]]
        ends = np.cumsum(lengths)
        rows.append((int(number), [part.tolist() for part in np.split(tokens, ends[:-1])]))
    assert rows == DOCUMENTS
    assert shard.tokens.dtype == np.uint16
    assert not shard.tokens.flags.owndata
    assert not shard.tokens.flags.writeable
    assert open_dataset(dataset.folder, "validation").shards == []


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    assert token_dtype(65_535) == np.uint16
    assert token_dtype(65_536) == np.uint32
    entry = write_shard(tmp_path / "s.arrow", [(0, [[70_000]])], token_dtype(70_001), "train")
    assert Shard(tmp_path / "s.arrow", entry).tokens.tolist() == [70_000]
    with pytest.raises(OverflowError):
        write_shard(tmp_path / "t.arrow", [(0, [[70_000]])], np.uint16, "train")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.arrow"]


def test_manifest_digest_depends_on_content_alone(tmp_path: Path) -> None:
    dataset = open_dataset(make_dataset(tmp_path / "data"))
    reordered = dict(reversed(json.loads(json.dumps(dataset.manifest)).items()))
    assert json_digest(reordered) == dataset.manifest_digest
    assert json_digest({**reordered, "vocab_size": 101}) != dataset.manifest_digest


def test_missing_folder_and_manifest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no data folder .*nothing; `bertscale prep` makes one"):
        open_dataset(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"prep did not finish here; run `bertscale prep` again"):
        open_dataset(tmp_path)
    (tmp_path / "b.txt").write_text("raw")
    with pytest.raises(UserError, match=r"is not a data set, it holds b\.txt; if that is raw text, prepare"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("cut", [1, 100, 10_000])
def test_a_shard_cut_short(tmp_path: Path, cut: int) -> None:
    folder = make_dataset(tmp_path / "data")
    shard = folder / "train-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-cut])
    with pytest.raises(
        UserError, match=r"train-00000\.arrow has .* bytes instead of .* run `bertscale prep`"
    ):
        open_dataset(folder)


def test_a_missing_shard_and_a_broken_footer(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "data")
    shard = folder / "train-00000.arrow"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[: size // 2] + b"\0" * (size - size // 2))
    with pytest.raises(UserError, match=r"train-00000\.arrow is damaged"):
        open_dataset(folder)
    shard.unlink()
    with pytest.raises(UserError, match=r"train-00000\.arrow is missing"):
        open_dataset(folder)


def test_a_flipped_byte_is_found_by_its_digest(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "data")
    shard = folder / "train-00000.arrow"
    content = shard.read_bytes()
    place = content.index(np.array([5, 6, 7, 8], np.uint16).tobytes())
    flip_byte(shard, place)
    assert open_dataset(folder).shards[0].tokens[0] == 4  # Arrow itself sees nothing
    with pytest.raises(UserError, match=r"train-00000\.arrow has the digest .* its bytes changed"):
        open_dataset(folder, verify=True)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "data")
    (folder / "tokenizer.model").write_bytes(b"another tokenizer")
    with pytest.raises(UserError, match=r"tokenizer\.model .* is not the one that made the shards"):
        open_dataset(folder)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.model is missing"):
        open_dataset(folder)


def test_a_damaged_or_newer_manifest(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "data")
    path = folder / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(UserError, match="format version 99"):
        open_dataset(folder)
    path.write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        open_dataset(folder)
