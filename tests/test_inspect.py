"""`bertscale inspect` tells what a prepared folder holds, and refuses a damaged one."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
from rich.console import Console

from bertscale import cli
from bertscale.config import UserError
from bertscale.data.inspect import inspect, samples
from bertscale.data.report import percentile
from bertscale.data.shards import open_dataset
from bertscale.tokenizer import load_tokenizer


def shown(folder: Path, color: bool = False) -> str:
    file = io.StringIO()
    inspect(
        folder,
        Console(
            file=file,
            force_terminal=color,
            color_system="standard" if color else None,
            highlight=False,
            width=100,
        ),
    )
    return file.getvalue()


def test_counts_and_lengths_are_those_of_the_shards(tiny_data: Path) -> None:
    text = shown(tiny_data)
    counters = open_dataset(tiny_data).manifest["counters"]
    for some in (*counters["splits"].values(), counters):
        for name in ("documents", "sentences", "tokens", "text_bytes"):
            assert f" {some[name]:,}" in text
    assert "records read: 300" in text
    for split in ("train", "validation"):
        shards = open_dataset(tiny_data, split).shards
        lengths = np.concatenate([np.diff(shard.token_offsets) for shard in shards])
        half = int(np.percentile(lengths, 50, method="inverted_cdf"))
        part = text[text.index(f"{split} documents, lengths in tokens") :]
        assert f" 50 %: {half:,}," in part.splitlines()[1]
        assert f"longest: {lengths.max():,}" in part.splitlines()[1]
        assert f"{split} pieces: 0.000% unknown" in text
    assert "digests: 2 shards and the tokenizer are what the manifest says" in text


def test_percentiles() -> None:
    draw = np.random.default_rng(0)
    for size in (1, 2, 10, 1001):
        lengths = draw.integers(0, 50, size)
        for percent in (1, 25, 50, 99, 100):
            expected = np.percentile(lengths, percent, method="inverted_cdf")
            assert percentile(np.bincount(lengths), percent) == expected


def test_samples_are_shown_as_the_model_sees_them(tiny_data: Path) -> None:
    dataset = open_dataset(tiny_data)
    tokenizer = load_tokenizer(dataset.tokenizer_path)
    pairs = [sample.plain for sample in samples(dataset, tokenizer, "nsp", 20)]
    assert len(pairs) == 20
    for plain in pairs:
        assert plain.count("[CLS]") == 1
        assert plain.count("[SEP]") == 2
        assert "[MASK]" not in plain  # the piece that it hides is shown
    assert sum(plain.startswith("B is of another document: ") for plain in pairs) == 10
    styles = {
        str(span.style) for sample in samples(dataset, tokenizer, "packed", 20) for span in sample.spans
    }
    assert styles >= {"cyan", "magenta", "green", "dim"}
    colored = shown(tiny_data, color=True)
    assert "\x1b[36m<" in colored
    assert "samples of kind packed" in shown(tiny_data)


def test_damage_is_found(tiny_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(tiny_data, folder)
    shard = folder / "train-00000.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="its bytes changed since it was written"):
        shown(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="prep did not finish here"):
        shown(folder)


def test_the_command(
    tiny_data: Path, bertscale: Callable[..., CompletedProcess[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    done = bertscale("inspect", str(tiny_data))
    assert done.returncode == 0, done.stderr
    assert "train documents, lengths in tokens" in done.stdout
    assert cli.main(["inspect", "nothing-here"]) == 2
    assert "there is no folder nothing-here" in capsys.readouterr().err
    for former in (["--inspect", str(tiny_data)], ["config.yaml", f"--inspect={tiny_data}"]):
        assert cli.main(["prep", *former]) == 2
        assert capsys.readouterr().err == (
            "bertscale prep: error: --inspect is now a command of its own: bertscale inspect FOLDER\n"
        )
