"""Averages of weights: means and TIES against sums by hand, who reads the result, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bertscale.cli import main
from bertscale.config import InitConfig, ModelConfig, UserError
from bertscale.convert.model_shape import native_shapes
from bertscale.convert.weights import load_model
from bertscale.export.average import Options, average, threshold
from bertscale.export.convert import convert
from bertscale.export.options import ConvertOptions
from bertscale.files import file_digest
from bertscale.pretrain.init import open_source
from bertscale.run_folder import TABLE
from bertscale.tokenizer import load_tokenizer
from bertscale.train.checkpoint import open_checkpoint, write_whole

SIZES: dict[str, Any] = {
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
}
PART = "encoder.embeddings.LayerNorm.bias"  # eight values, where the sources of TIES differ
BASE = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
DIFFERENCES = {  # of each, the three largest are kept
    "a": [4.0, -3.0, 2.0, 1.0, 0.5, 0.0, 0.0, 0.0],
    "b": [-1.0, -5.0, 3.0, -6.0, 0.25, 0.0, 0.0, 0.0],
    "c": [-5.0, 0.0, -1.0, 7.0, 0.125, 0.0, 0.0, 0.0],
}


def values(name: str, shape: torch.Size) -> Tensor:
    """Eighths, other ones in each tensor: sums and halves of them are exact."""
    value = torch.arange(shape.numel()).remainder(31 + len(name)).view(shape) / 8 - 1
    if name.endswith(("word_embeddings.weight", "decoder.bias")):
        value[330:] = 0  # rows that no piece belongs to: an export leaves them out
    return value


Make = Callable[..., Path]


@pytest.fixture
def make(tiny_data: Path, tmp_path: Path) -> Make:
    """Writes a checkpoint of tensors `value(name, shape)`, with changes of its model and table."""

    def written(
        name: str, value: Callable[[str, torch.Size], Tensor], sizes: Any = None, **table: Any
    ) -> Path:
        model = ModelConfig.model_validate({**SIZES, **(sizes or {})})
        tokenizer = tiny_data / "tokenizer.model"
        facts = {
            "model": model.model_dump(),
            "vocab_size": 330,
            "tokenizer_sha256": load_tokenizer(tokenizer).sha256,
            "data_digest": None,
            "config": None,
            **table,
        }
        shapes = native_shapes(model, facts["vocab_size"])
        pairs = ((each, value(each, shape)) for each, shape in shapes.items())
        write_whole(tmp_path / name, facts, pairs, tokenizer)
        return tmp_path / name

    return written


@pytest.fixture
def three(make: Make) -> list[Path]:
    """The same values times 1, 2 and 9."""
    return [make(f"times-{n}", lambda *of, n=n: n * values(*of)) for n in (1, 2, 9)]


def is_times(folder: Path, factor: float) -> bool:
    found = open_checkpoint(folder)
    assert found.step == 0
    assert not found.has_moments
    shapes = native_shapes(found.model, found.vocab_size)
    return all(
        torch.equal(found.tensor(name), factor * values(name, shape)) for name, shape in shapes.items()
    )


def test_the_mean(three: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["average", *map(str, three), "--output", str(tmp_path / "out")]) == 0
    assert is_times(tmp_path / "out", 4.0)
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"0.3333    {three[2]} ({file_digest(three[2] / TABLE)[:12]})"
    table = open_checkpoint(tmp_path / "out").table
    assert table["average"] == {"method": "mean"}
    assert [(each["folder"], each["digest"], each["averaged"]) for each in table["lineage"]] == [
        (str(folder), file_digest(folder / TABLE), 1.0) for folder in three
    ]


def test_the_weighted_mean(three: list[Path], tmp_path: Path) -> None:
    average(three, tmp_path / "out", Options(weights=[2.0, 1.0, 1.0]))
    assert is_times(tmp_path / "out", 3.25)
    average(three, tmp_path / "first", Options(weights=[0.5, 0.0, 0.0]))
    assert is_times(tmp_path / "first", 1.0)


def test_ties_is_the_paper_s(make: Make, tmp_path: Path) -> None:
    """Trim: 4 -3 2 . | . -5 3 -6 | -5 . -1 7. Signs: -1, -8, 4, 1. Means of that sign: -5, -4, 2.5, 7."""

    def value(difference: list[float]) -> Callable[[str, torch.Size], Tensor]:
        return lambda name, shape: (
            torch.tensor(BASE) + torch.tensor(difference) if name == PART else values(name, shape)
        )

    base = make("base", value([0.0] * 8))
    sources = [make(name, value(each)) for name, each in DIFFERENCES.items()]
    shapes = native_shapes(ModelConfig.model_validate(SIZES), 330)
    density = 3 / sum(shape.numel() for shape in shapes.values())
    for name, weights, scale, expected in (
        ("plain", [], None, [-5.0, -4.0, 2.5, 7.0]),
        ("twice", [], 2.0, [-10.0, -8.0, 5.0, 14.0]),
        ("weighted", [2.0, 1.0, 1.0], 1.0, [4.0, -11 / 3, 7 / 3, 7.0]),
    ):
        average(sources, tmp_path / name, Options(weights, "ties", base, density, scale))
        found = open_checkpoint(tmp_path / name)
        torch.testing.assert_close(
            found.tensor(PART), torch.tensor(BASE) + torch.tensor([*expected, 0, 0, 0, 0])
        )
        for other in shapes.keys() - {PART}:
            assert torch.equal(found.tensor(other), values(other, shapes[other]))
    assert [each.get("base", False) for each in found.lineage] == [False, False, False, True]


@pytest.mark.parametrize("keep", [1, 2, 9, 500, 1000])
def test_the_threshold_is_the_largest_magnitude_but_so_many(keep: int) -> None:
    draw = torch.Generator().manual_seed(keep)
    parts = [torch.randn(size, generator=draw) * 10.0**-size for size in (1, 7, 2)]
    parts += [torch.randn(989, generator=draw), torch.zeros(1)]
    magnitudes = torch.cat(parts).abs().sort(descending=True).values
    assert threshold(lambda: iter(parts), keep) == magnitudes[keep - 1]


def test_hugging_face_folders_runs_and_what_reads_the_result(three: list[Path], tmp_path: Path) -> None:
    convert(three[1], tmp_path / "hf", ConvertOptions(show=False))
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copytree(three[0], run / "checkpoints" / "step-0000004")
    shutil.copytree(three[2], run / "checkpoints" / "step-0000010")
    output = tmp_path / "out"
    average([run, tmp_path / "hf"], output, Options(weights=[1.0, 3.0]))
    assert is_times(output, 3.75)
    loaded = dict(load_model(output).named_parameters())
    assert torch.equal(loaded[PART], 3.75 * values(PART, torch.Size([8])))
    convert(output, tmp_path / "exported", ConvertOptions(show=False))
    average([output, three[0]], tmp_path / "again", Options())
    ancestors = open_checkpoint(tmp_path / "again").lineage
    assert [len(each["lineage"]) for each in ancestors] == [2, 0]


class OneRank:
    rank, world = 0, 1

    def gather(self, value: Any) -> list[Any]:
        return [value]


def test_a_run_starts_from_it(three: list[Path], tmp_path: Path) -> None:
    average(three, tmp_path / "out", Options())
    init = InitConfig.model_validate({"from": str(tmp_path / "out")})
    source = open_source(init, tmp_path / "run", OneRank())  # type: ignore[arg-type]
    assert source.digest == file_digest(tmp_path / "out" / TABLE)
    assert source.checkpoint is not None
    assert len(source.checkpoint.lineage) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": [1.0, 2.0]}, "--weights are 2, the folders 3; give one for each"),
        ({"weights": [0.0, 0.0, 0.0]}, "--weights 0 0 0: their sum is 0"),
        ({"weights": [1.0, -1.0, 1.0]}, "--weights 1 -1 1: each must be a number of 0 or more"),
        ({"weights": [1.0, float("nan"), 1.0]}, "--weights 1 nan 1: each must be a number of 0 or more"),
        ({"density": 0.2, "scale": 1.0}, "--density and --scale go with --method ties, not with mean"),
        ({"method": "ties"}, "--method ties needs --base FOLDER, what the folders were trained from"),
        (
            {"method": "ties", "base": Path("x"), "density": 0.0},
            "--density must be more than 0 and at most 1",
        ),
        ({"method": "ties", "base": Path("x"), "scale": 0.0}, "--scale must be more than 0, not 0"),
    ],
)
def test_options_that_are_none(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    refused([tmp_path] * 3, tmp_path / "out", words, **options)


def refused(sources: list[Path], output: Path, words: str, **options: Any) -> None:
    before = sorted(output.parent.rglob("*"))
    with pytest.raises(UserError) as caught:
        average(sources, output, Options(**options))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(output.parent.rglob("*")) == before


def test_sources_that_do_not_belong_together(three: list[Path], make: Make, tmp_path: Path) -> None:
    first, output = three[0], tmp_path / "out"
    wide = make("wide", values, {"intermediate_size": 16})
    refused([first, wide], output, "has model.intermediate_size=12, ")
    other = make("other", values, {"preset": "megatron-bert"})
    refused([first, other], output, "has model.preset=bert, ")
    words = make("words", values, vocab_size=331)
    refused([first, words], output, "has a vocabulary of 330, ")
    drop = make("drop", values, {"hidden_dropout_prob": 0.4})
    average([first, drop], tmp_path / "dropped", Options())
    assert is_times(tmp_path / "dropped", 1.0)
    refused([first], output, "one folder has no average; give two or more")
    refused([first, three[1]], three[2], "is there already; choose another output, or remove it")
    refused([first, tmp_path / "none"], output, "there is no folder")
    refused([first, three[1]], tmp_path / "run/checkpoints/step-0000001", "holds a run's checkpoints")


def test_another_tokenizer(three: list[Path], make: Make, tmp_path: Path) -> None:
    folder = make("copied", values)
    (folder / "tokenizer.model").unlink()
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    refused([three[0], folder], tmp_path / "out", "have different tokenizers: only weights of one vocabulary")


def test_a_head_that_one_lacks(three: list[Path], tmp_path: Path) -> None:
    from transformers import BertForMaskedLM

    convert(three[1], tmp_path / "hf", ConvertOptions(show=False))
    BertForMaskedLM.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "hf")
    words = "hf lacks encoder.pooler.bias, which"
    refused([three[0], tmp_path / "hf"], tmp_path / "out", words)


def test_damaged_sources(three: list[Path], make: Make, tmp_path: Path) -> None:
    shard = three[1] / "shard-t00-d00.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    refused(three, tmp_path / "out", f"the checkpoint file {shard} is damaged")
    infinite = make("infinite", lambda *of: values(*of) * float("inf"))
    words = "has values that are not finite; use another checkpoint"
    refused([three[0], infinite], tmp_path / "out", words)
    table = three[2] / TABLE
    table.write_text(json.dumps({**json.loads(table.read_text()), "vocab_size": 329}))
    refused([three[0], three[2]], tmp_path / "out", "its digest is not that of its content")
