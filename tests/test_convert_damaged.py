"""Damaged sources of `bertscale convert`: one line that names what is damaged, or the right output, whole.

A draw with a seed makes each case: a checkpoint of some topology or a folder of transformers, and one thing
in it that a disk, an editor, a copy or a link has changed. 60 cases are quick, the rest of 300 is slow.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import edited_bytes, edited_table
from safetensors.torch import load_file
from sharded import write_run
from transformers import BertForMaskedLM, ModernBertForMaskedLM, RobertaForMaskedLM

from bertscale.config import UserError
from bertscale.export.convert import convert
from bertscale.export.options import ConvertOptions
from bertscale.inspect.diff import diff
from bertscale.inspect.sources import open_any

QUICK, ALL = 60, 300
WEIGHTS = (".safetensors", ".bin", ".pt")
MODERN: dict[str, Any] = {"preset": "modern", "local_attention": 8, "num_hidden_layers": 2}
SMALL: dict[str, Any] = {"num_hidden_layers": 1}
# Run -> its model, topology and seed; the last two are others of the shape of the first two.
CHECKPOINTS: dict[str, tuple[dict[str, Any], tuple[int, int, int], int]] = {
    "dense": (SMALL, (1, 1, 0), 1),
    "ranks": (SMALL, (2, 2, 3), 1),
    "modern": (MODERN, (1, 3, 1), 1),
    "other dense": (SMALL, (1, 1, 0), 2),
    "other ranks": (SMALL, (2, 2, 3), 2),
}
FOLDERS = ("exported", "shards", "pickle", "roberta", "modernbert", "universal")
# What becomes of a checkpoint; all else becomes one.
FORMS: tuple[dict[str, Any], ...] = (
    {},
    {"as_": "checkpoint", "tensor_parallel": 2, "zero_stage": 2},
    {"as_": "checkpoint", "data_parallel": 5, "zero_stage": 3},
    {"as_": "universal"},
    {"as_": "encoder"},
)


@pytest.fixture(scope="module")
def sound(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders to be damaged: in `runs` each with one checkpoint, in `models` those of transformers."""
    place = tmp_path_factory.mktemp("sound")
    for name, (values, topology, seed) in CHECKPOINTS.items():
        write_run(place / "runs" / name, tiny_data, values, topology, seed=seed)
    quiet = ConvertOptions(show=False)
    convert(place / "runs" / "dense", place / "models" / "exported", quiet)
    convert(place / "runs" / "modern", place / "models" / "modernbert", quiet)
    convert(place / "runs" / "other dense", place / "models" / "other", quiet)
    models = place / "models"
    convert(place / "runs" / "ranks", models / "universal", ConvertOptions(show=False, as_="universal"))
    for name in ("modernbert", "universal"):  # as those that other programs have saved
        (models / name / "bertscale-convert.json").unlink()
    model = BertForMaskedLM.from_pretrained(models / "exported")
    model.save_pretrained(models / "shards", max_shard_size="20KB")
    model.save_pretrained(models / "pickle")
    state = load_file(models / "pickle" / "model.safetensors")
    torch.save(state, models / "pickle" / "pytorch_model.bin")
    (models / "pickle" / "model.safetensors").unlink()
    config = RobertaForMaskedLM.config_class(
        vocab_size=330,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=40,
        type_vocab_size=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    RobertaForMaskedLM(config).save_pretrained(models / "roberta")
    for name in ("shards", "pickle", "roberta"):
        for file in (models / "exported").glob("*token*"):
            shutil.copy(file, models / name)
    assert ModernBertForMaskedLM.from_pretrained(models / "modernbert").num_parameters()
    return place


# ------------------------------------------------------------------------------------------- damages


def flipped(path: Path, draw: random.Random, place: Path) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 1, 8])):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def cut(path: Path, draw: random.Random, place: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(
        draw.choice([b"", content[:-1], content[: draw.randrange(len(content))], content + b"\0"])
    )


def scribbled(path: Path, draw: random.Random, place: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(edited_bytes(content, draw))


def swapped(path: Path, draw: random.Random, place: Path) -> None:
    """In place of the file another of its folder, or one of another folder, of a name like it if there is."""
    others = [file for file in path.parent.iterdir() if file != path and file.is_file()]
    others += [file for file in place.rglob(path.name) if file.read_bytes() != path.read_bytes()]
    shutil.copy(draw.choice(sorted(others)), path)


def gone(path: Path, draw: random.Random, place: Path) -> None:
    path.unlink()
    if draw.random() < 0.5:
        path.mkdir()


def linked(path: Path, draw: random.Random, place: Path) -> None:
    """A link that leads nowhere, to itself, to its folder, or to the file of that name of another folder."""
    path.unlink()
    others = sorted(str(file) for file in place.rglob(path.name) if file.is_file())
    path.symlink_to(draw.choice(["nowhere", path.name, str(path.parent), "/dev/null", *others]))


def edited(path: Path, draw: random.Random, place: Path) -> None:
    """JSON as an editor may leave it; of what is no JSON a byte or more."""
    if path.suffix != ".json":
        return scribbled(path, draw, place)
    values = json.loads(path.read_text())
    if "digest" in values and draw.random() < 0.5:
        del values["digest"]  # as in the first checkpoints: then all else is checked by what it says
    if "weight_map" in values and draw.random() < 0.3:
        key = draw.choice(sorted(values["weight_map"]))
        values["weight_map"][key] = draw.choice(["../exported/model.safetensors", "/etc/passwd", "..", ""])
        path.write_text(json.dumps(values))
        return None
    path.write_bytes(edited_table(values, draw))
    return None


DAMAGES: tuple[Callable[[Path, random.Random, Path], None], ...] = (
    *(flipped, flipped, cut, scribbled, swapped, swapped, gone, linked, linked),
    *(edited, edited, edited, edited),
)


# --------------------------------------------------------------------------------------------- cases


def damaged_copy(number: int, sound: Path, folder: Path) -> tuple[Path, Path, ConvertOptions, str]:
    """A copy of a sound folder in `folder`, damaged: where it was, where it is, what it is to become, and
    what was done."""
    draw = random.Random(f"convert {number}")
    form: dict[str, Any] = {}
    if number % 2:
        origin = next((sound / "runs" / draw.choice(list(CHECKPOINTS)[:3])).glob("checkpoints/*"))
        place, form = sound / "runs", draw.choice(FORMS)
    else:
        origin, place = sound / "models" / draw.choice(FOLDERS), sound / "models"
    copy = folder / "source"
    shutil.copytree(origin, copy)
    files = sorted(path for path in copy.rglob("*") if path.is_file() and is_read(path))
    # Tables and weights are what matters most.
    tables = [path for path in files if path.name in ("bertscale.json", "config.json")]
    weights = [path for path in files if path.suffix in WEIGHTS]
    path = draw.choice(draw.choice([files, tables or files, weights or files]))
    damage = draw.choice(DAMAGES)
    damage(path, draw, place)
    what = f"{number}: {damage.__name__} {origin.parent.parent.name}/{origin.name}/{path.relative_to(copy)}"
    return origin, copy, ConvertOptions(show=False, **form), f"{what} {form}"


def check(number: int, sound: Path, folder: Path) -> bool:
    """Converts a damaged copy; returns whether it was refused."""
    origin, source, options, what = damaged_copy(number, sound, folder)
    output = folder / "output"
    was = set(folder.iterdir())
    try:
        convert(source, output, options)
    except UserError as error:
        assert str(source) in str(error), f"{what}: {error}"  # noqa: PT017
        assert len(str(error).splitlines()) == 1, f"{what}: {error}"  # noqa: PT017
        assert set(folder.iterdir()) == was, what
        return True
    except Exception as error:
        raise AssertionError(what) from error
    assert set(folder.iterdir()) == {*was, output}, what
    found = diff(source, output)
    assert not found["parameters"], f"{what}: {found['parameters'][:3]}"
    if not source_weights_changed(origin, source):
        before, after = open_any(origin), open_any(output)
        for name in before.weights.names:
            if name in after.weights.names:
                assert before.tensor(name).equal(after.tensor(name)), f"{what}: {name}"
    return False


def is_read(path: Path) -> bool:
    """Whether a conversion reads the file: no model card, nor what other programs are compared by."""
    return path.name != "README.md" and "reference" not in path.parts


def source_weights_changed(origin: Path, source: Path) -> bool:
    """Whether a file with weights has other bytes: transformers keeps no digest that would tell."""
    files = (path for path in origin.rglob("*") if path.suffix in WEIGHTS and is_read(path))
    names = [path.relative_to(origin) for path in files]
    return any((origin / name).read_bytes() != (source / name).read_bytes() for name in names)


def many(numbers: range, sound: Path, tmp_path: Path) -> float:
    """The share of cases that were refused."""
    refused = 0
    for number in numbers:
        folder = tmp_path / str(number)
        folder.mkdir()
        refused += check(number, sound, folder)
        shutil.rmtree(folder)
    return refused / len(numbers)


@pytest.mark.parametrize("part", range(4))
def test_damaged_sources(part: int, sound: Path, tmp_path: Path) -> None:
    assert many(range(part * QUICK // 4, (part + 1) * QUICK // 4), sound, tmp_path) > 0.4


@pytest.mark.slow
def test_many_damaged_sources(sound: Path, tmp_path: Path) -> None:
    assert many(range(QUICK, ALL), sound, tmp_path) > 0.5


def test_links_that_lead_to_the_right_files_are_followed(sound: Path, tmp_path: Path) -> None:
    """As those of a cache of the Hub, or of a run whose checkpoints lie on another disk."""
    for origin in (sound / "models" / "shards", next((sound / "runs" / "ranks").glob("checkpoints/*"))):
        source, output = tmp_path / origin.parent.name, tmp_path / f"{origin.parent.name}-out"
        source.mkdir()
        for path in origin.iterdir():
            os.symlink(path, source / path.name)
        convert(source, output, ConvertOptions(show=False))
        assert diff(origin, output)["equal"] or not diff(origin, output)["parameters"]
