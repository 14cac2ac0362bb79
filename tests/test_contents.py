"""What is trained on is what prep wrote: manifests and shards that were edited, and ids that no piece has."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import change_manifest, edited_bytes, edited_json
from tiny import pretrain_config

from bertscale.cli import main
from bertscale.config import UserError
from bertscale.data import contents
from bertscale.data.batches import make_loader
from bertscale.data.contents import check_contents
from bertscale.data.manifest import Split
from bertscale.data.shards import (
    MANIFEST_NAME,
    Document,
    Shard,
    ShardEntry,
    open_dataset,
    write_manifest,
    write_shard,
)
from bertscale.files import file_digest
from bertscale.tokenizer import Tokenizer, load_tokenizer

SHARDS = ("train-00000.arrow", "train-00001.arrow", "validation-00000.arrow")


def documents_of(shard: Shard) -> Iterator[Document]:
    for row, number in enumerate(shard.documents):
        tokens = shard.tokens[shard.token_offsets[row] : shard.token_offsets[row + 1]]
        lengths = shard.sentence_lengths[shard.sentence_offsets[row] : shard.sentence_offsets[row + 1]]
        yield int(number), [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])]


def counters_of(shards: list[ShardEntry]) -> dict[str, Any]:
    def sums(entries: list[ShardEntry]) -> dict[str, int]:
        names = {"documents": "rows", "sentences": "sentences", "tokens": "tokens"}
        counted = {name: sum(getattr(entry, key) for entry in entries) for name, key in names.items()}
        return {**counted, "text_bytes": 0}

    splits = {split: sums([e for e in shards if e.split == split]) for split in ("train", "validation")}
    return {"records": 1000, **sums(shards), "splits": splits}


@pytest.fixture(scope="module")
def sound(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny corpus in two shards of the same size for training, and one held out."""
    folder = tmp_path_factory.mktemp("sound")
    source = open_dataset(tiny_data)
    shutil.copy(source.tokenizer_path, folder)
    [held] = open_dataset(tiny_data, "validation").shards
    rows = list(documents_of(source.shards[0]))[:150]
    parts = [rows[:75], rows[75:], list(documents_of(held))]
    entries = [
        write_shard(folder / name, part, np.uint16, name.split("-")[0])
        for name, part in zip(SHARDS, parts, strict=True)
    ]
    write_manifest(
        folder,
        tokenizer_sha256=source.manifest["tokenizer_sha256"],
        vocab_size=source.manifest["vocab_size"],
        settings={"input": ["corpus"], "language": "en"},
        counters=counters_of(entries),
        shards=entries,
    )
    return folder


@pytest.fixture(scope="module")
def tokenizer(tiny_data: Path) -> Tokenizer:
    return load_tokenizer(open_dataset(tiny_data).tokenizer_path)


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "data", ignore=shutil.ignore_patterns(".index")))


def read(folder: Path, tokenizer: Tokenizer, verify: bool) -> list[Any]:
    """The first samples of both splits, as a training sees them at its first start on this data."""
    shutil.rmtree(folder / ".index", ignore_errors=True)
    config = pretrain_config(folder, "run", samples={"kind": "document"})
    tokens = []
    splits: tuple[Split, ...] = ("train", "validation")
    for split in splits:
        loader = make_loader(config, tokenizer, split, [open_dataset(folder, split, verify=verify)])
        tokens += [batch.tokens.tolist() for step in range(30) for batch in loader.step(step)]
    return tokens


# ------------------------------------------------------------------------------------- edits by a seed


def edit_manifest(folder: Path, draw: random.Random) -> None:
    """Of a manifest with or without a digest; or a digest that belongs to what was edited."""
    path = folder / MANIFEST_NAME
    if draw.random() < 0.3:
        path.write_bytes(edited_bytes(path.read_bytes(), draw))
    elif draw.random() < 0.3:
        path.write_bytes(json.dumps(edited_json(json.loads(path.read_bytes()), draw)).encode())
    else:

        def change(manifest: dict[str, Any]) -> None:
            edited = edited_json(manifest, draw)
            manifest.clear()
            manifest.update(edited)

        change_manifest(folder, change, signed=draw.random() < 0.3)


def edit_list(folder: Path, draw: random.Random) -> None:
    """Shards that are taken out, there twice, of another split, or in another order."""

    def change(manifest: dict[str, Any]) -> None:
        shards = manifest["shards"]
        number = draw.randrange(len(shards))
        match draw.randrange(5):
            case 0:
                del shards[number]
            case 1:
                shards.append(shards[number])
            case 2:
                shards[number]["split"] = "validation" if shards[number]["split"] == "train" else "train"
            case 3:
                draw.shuffle(shards)
            case _:
                shards[number]["name"] = draw.choice([*SHARDS, "../data/" + SHARDS[0], "other.arrow"])

    change_manifest(folder, change, signed=draw.random() < 0.5)


def edit_shard(folder: Path, draw: random.Random) -> None:
    """Bytes of a shard, cut or changed, or two shards in each other's place."""
    path = folder / draw.choice(SHARDS)
    if draw.random() < 0.15:
        other = folder / draw.choice(SHARDS)
        first, second = path.read_bytes(), other.read_bytes()
        path.write_bytes(second)
        other.write_bytes(first)
        return
    content = path.read_bytes()
    if draw.random() < 0.3:
        path.write_bytes(edited_bytes(content, draw))
        return
    # Most of a shard is tokens: as often somewhere in its heads, offsets and lengths.
    part = draw.choice([range(600), range(len(content) - 600, len(content)), range(len(content))])
    place, count = draw.choice(part), draw.choice([1, 1, 2, 8])
    path.write_bytes(content[:place] + draw.randbytes(count) + content[place + count :])


@pytest.mark.parametrize(("edit", "count"), [(edit_manifest, 60), (edit_list, 30), (edit_shard, 60)])
def test_an_edited_data_set_is_refused_in_one_line_or_gives_the_same_samples(
    edit: Any, count: int, sound: Path, folder: Path, tokenizer: Tokenizer
) -> None:
    expected, draw, refused = read(sound, tokenizer, verify=True), random.Random(edit.__name__), 0
    for number in range(count):
        edit(folder, draw)
        for verify in (False, True):
            try:
                answer = read(folder, tokenizer, verify)
            except UserError as error:
                refused += verify
                assert str(folder) in str(error), number  # noqa: PT017
                assert len(str(error).splitlines()) == 1, number  # noqa: PT017
            else:
                # An id that another one has taken the place of is seen by its shard's digest alone.
                assert answer == expected or (edit is edit_shard and not verify), number
        for name in (*SHARDS, MANIFEST_NAME):
            shutil.copyfile(sound / name, folder / name)
    assert refused > count / 2


# ------------------------------------------------------------------------------------------ manifest


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m["shards"].pop(0), "counters.splits.train.documents is not the sum of its shards"),
        (lambda m: m["shards"].append(m["shards"][0]), r"the shard train-00000\.arrow is there twice"),
        (lambda m: m["shards"].reverse(), r"train-00000\.arrow stands behind train-00001\.arrow"),
        (
            lambda m: m["shards"][2].update(split="train"),
            "00000.arrow is not of the split train",
        ),
        (lambda m: m["shards"][0].update(name="../a"), r"shards\.0\.name='\.\./a'"),
        (lambda m: m.pop("tokenizer"), "tokenizer is missing"),
        (lambda m: m["counters"].update(tokens="7"), r"counters\.tokens='7'"),
    ],
)
def test_a_manifest_without_digest_is_checked_by_its_parts(folder: Path, change: Any, reason: str) -> None:
    """Those of earlier versions; and where nothing is wrong they are read."""
    change_manifest(folder, lambda manifest: None, signed=False)
    assert open_dataset(folder).num_documents == 150
    change_manifest_again(folder, change)
    with pytest.raises(UserError, match=rf"manifest\.json is damaged: .*{reason}"):
        open_dataset(folder)


def change_manifest_again(folder: Path, change: Any) -> None:
    path = folder / MANIFEST_NAME
    manifest = json.loads(path.read_bytes())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_a_manifest_tells_its_own_digest(folder: Path) -> None:
    digest = open_dataset(folder).manifest_digest
    assert json.loads((folder / MANIFEST_NAME).read_bytes())["digest"] == digest
    change_manifest_again(folder, lambda manifest: manifest["settings"].update(language="de"))
    with pytest.raises(UserError, match=r"manifest\.json is damaged: its digest is not that of its content"):
        open_dataset(folder)


# ----------------------------------------------------------------------------------------------- ids


def put_id(folder: Path, name: str, token: int, *, told: bool = False) -> None:
    """Writes an id over the first token of a shard; `told`: the manifest has the digest of it."""
    path = folder / name
    content = path.read_bytes()
    first = open_dataset(folder, "train" if name.startswith("train") else "validation").shards[0]
    place = content.index(first.tokens[:20].tobytes())
    path.write_bytes(content[:place] + np.uint16(token).tobytes() + content[place + 2 :])

    def change(manifest: dict[str, Any]) -> None:
        [entry] = [entry for entry in manifest["shards"] if entry["name"] == name]
        entry["digest"] = file_digest(path)

    if told:
        change_manifest(folder, change)


@pytest.mark.parametrize("name", ["train-00000.arrow", "validation-00000.arrow"])
def test_an_id_outside_of_the_vocabulary_is_one_line_at_the_start(
    folder: Path, tokenizer: Tokenizer, name: str
) -> None:
    put_id(folder, name, tokenizer.vocab_size - 1)
    read(folder, tokenizer, verify=False)
    put_id(folder, name, tokenizer.vocab_size)
    with pytest.raises(UserError, match=rf"{name} is damaged: it has the id 330, and its tokenizer 330 piec"):
        read(folder, tokenizer, verify=False)


def test_inspect_names_the_shard_with_such_an_id(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_id(folder, "train-00000.arrow", 40_000, told=True)
    assert main(["inspect", str(folder)]) == 2
    assert "train-00000.arrow is damaged: it has the id 40,000" in capsys.readouterr().err


def test_a_shard_is_read_once(folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[str] = []

    def counted(shard: Shard) -> int:
        passes.append(shard.entry.name)
        return largest(shard)

    largest = contents.largest_id
    monkeypatch.setattr(contents, "largest_id", counted)
    dataset = open_dataset(folder)
    for _ in range(2):
        check_contents([dataset], tokenizer.vocab_size)
    assert passes == list(SHARDS[:2])
    with pytest.raises(UserError, match="has the id"):  # what is kept is the largest id, not a verdict
        check_contents([dataset], 10)
    assert passes == list(SHARDS[:2])
    os.utime(folder / SHARDS[1], ns=(0, 1))  # a changed file is read again, and it alone
    check_contents([dataset], tokenizer.vocab_size)
    assert passes == [*SHARDS[:2], SHARDS[1]]
    [stored] = (folder / ".index").iterdir()
    for damaged in (b"", b"[]", b'{"version": 1}', b'{"version": 1, "files": 3, "largest": 4}'):
        stored.write_bytes(damaged)
        passes.clear()
        check_contents([dataset], tokenizer.vocab_size)
        assert passes == list(SHARDS[:2])


def test_a_folder_that_cannot_be_written_is_read_each_time(
    folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(contents, "write_json", refuse)
    check_contents([open_dataset(folder)], tokenizer.vocab_size)
    assert not list((folder / ".index").iterdir())


class Ranks:
    """Two ranks, one after the other: what the second gathers is there already."""

    world = 2

    def __init__(self, rank: int, shared: dict[str, Any]) -> None:
        self.rank, self.shared = rank, shared

    def broadcast(self, value: Any) -> Any:
        return dict(self.shared.setdefault("known", dict(value)))

    def gather(self, value: Any) -> list[Any]:
        self.shared[f"found {self.rank}"] = value
        return [self.shared.get("found 0", {}), self.shared.get("found 1", {})]


def test_ranks_divide_the_shards_and_raise_alike(folder: Path, tokenizer: Tokenizer) -> None:
    dataset, shared = open_dataset(folder), dict[str, Any]()
    with pytest.raises(KeyError):  # the first rank alone has read the first shard only
        check_contents([dataset], tokenizer.vocab_size, Ranks(0, shared))
    assert list(shared["found 0"]) == [SHARDS[0]]
    check_contents([dataset], tokenizer.vocab_size, Ranks(1, shared))
    assert list(shared["found 1"]) == [SHARDS[1]]
    shared = {"found 0": UserError("one rank found it")}
    with pytest.raises(UserError, match="one rank found it"):
        check_contents([dataset], tokenizer.vocab_size, Ranks(1, {**shared, "known": {}}))


# --------------------------------------------------------------------------------------- --verify


@pytest.mark.parametrize("name", ["train-00001.arrow", "validation-00000.arrow"])
def test_verify_reads_both_splits(
    folder: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    config = tmp_path / "run.yaml"
    config.write_text(f"data: {folder}\nrun: {tmp_path}/run\ntrain: {{steps: 1}}\n")
    assert main(["pretrain", str(config), "--verify"]) == 2
    said = capsys.readouterr().err
    assert f"the shard {path} has the digest" in said
    assert not (tmp_path / "run").exists()
