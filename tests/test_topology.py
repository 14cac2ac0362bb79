"""Checkpoints for any topology, and folders of DeepSpeed, its universal ones too: each becomes another."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from dist import run_ranks
from safetensors.torch import save_file
from tiny import pair_batch, pretrain_config
from torch import Tensor

from bertscale.cli import main
from bertscale.config import ModelConfig, UserError
from bertscale.convert.model_shape import native_shapes
from bertscale.export.convert import convert
from bertscale.export.options import ConvertOptions
from bertscale.export.output import RECORD
from bertscale.tokenizer import load_tokenizer
from bertscale.train.checkpoint import Checkpoint, open_checkpoint, save_checkpoint, write_whole
from bertscale.train.checkpoint_table import STATES

VOCAB = 330
Ranks = tuple[int, int, int]  # tensor-parallel, data-parallel, ZeRO stage
TOPOLOGIES: tuple[Ranks, ...] = ((1, 1, 0), (1, 2, 2), (2, 1, 3), (2, 2, 3), (4, 1, 1))
REAL: tuple[Ranks, ...] = ((2, 2, 3), (1, 2, 2), (2, 1, 0), (2, 2, 1), (1, 2, 3))


def save(
    folder: str, data: str, tensor: int, stage: int, before: str | None, optimizer: str, universal: str | None
) -> float:
    """On each rank: two steps, or the state of another checkpoint; saved by us and by DeepSpeed."""
    from bertscale.train.engine import pretraining_engine
    from bertscale.train.parallel import start_ranks

    changes: dict[str, dict[str, Any]] = {
        "parallel": {"tensor": tensor, "zero_stage": stage},
        "optimizer": {"name": optimizer},
    }
    config = pretrain_config(data, folder, **changes)
    ranks = start_ranks(tensor, torch.device("cpu"))
    engine = pretraining_engine(config, VOCAB, ranks, torch.float32)
    if before:
        engine.resume(open_checkpoint(Path(before)))
    elif universal:
        engine.start(seed=1)
        engine.zero.engine._config.load_universal_checkpoint = True
        engine.zero.engine.load_checkpoint(universal, load_lr_scheduler_states=False)
    else:
        engine.start(seed=3)
        for _ in range(2):
            sums = engine(pair_batch())
            engine.backward(sums.mlm + sums.pairs, last=True)
            engine.step(1e-3)
    tokenizer = Path(data) / "tokenizer.model"
    facts = {"tokenizer_sha256": load_tokenizer(tokenizer).sha256, "data_digest": None}
    table = {**engine.table(), "step": 2, "samples_consumed": 16, **facts}
    save_checkpoint(Path(folder) / "ours", engine.fragments_to_save(), table, tokenizer, ranks)
    if stage:
        engine.zero.engine.save_checkpoint(folder, tag="global_step2")
    return float(next(iter(engine.optimizer.state.values()))["step"])


def real(folder: Path, data: Path, ranks: Ranks, **how: Any) -> Path:
    """What so many ranks have written."""
    tensor, replicas, stage = ranks
    arguments = {"before": None, "universal": None, "optimizer": "adamw", **how}
    folder.mkdir()
    found = run_ranks(
        __file__,
        "save",
        world=tensor * replicas,
        folder=str(folder),
        data=str(data),
        tensor=tensor,
        stage=stage,
        **arguments,
    )
    assert set(found) == {2.0}
    return folder / "ours"


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Ranks, Path]:
    """The same state, saved by ranks at each of the topologies `REAL`: the others resume from the first."""
    folder = tmp_path_factory.mktemp("ranks")
    first = real(folder / "first", tiny_data, REAL[0])
    found = {REAL[0]: first}
    for ranks in REAL[1:]:
        found[ranks] = real(folder / "-".join(map(str, ranks)), tiny_data, ranks, before=str(first))
    return found


def at(ranks: Ranks, **more: Any) -> ConvertOptions:
    tensor, replicas, stage = ranks
    return ConvertOptions(
        "checkpoint",
        show=False,
        tensor_parallel=tensor,
        data_parallel=replicas,
        zero_stage=stage,
        **more,
    )


def states(folder: Path) -> dict[tuple[str, str], Tensor]:
    checkpoint = open_checkpoint(folder)
    return {
        (name, state): checkpoint.tensor(name, state)
        for name in checkpoint.parameters
        for state in checkpoint.states(name)
    }


def same(one: dict[Any, Tensor], other: dict[Any, Tensor]) -> bool:
    return one.keys() == other.keys() and all(value.equal(other[key]) for key, value in one.items())


# ------------------------------------------------------------------------------------- beside real ranks


@pytest.mark.parametrize("ranks", REAL, ids=str)
def test_files_are_those_of_real_ranks_byte_for_byte(
    ranks: Ranks, trained: dict[Ranks, Path], tmp_path: Path
) -> None:
    source = trained[REAL[1] if ranks == REAL[0] else REAL[0]]
    convert(source, tmp_path / "out", at(ranks))
    theirs, ours = open_checkpoint(trained[ranks]), open_checkpoint(tmp_path / "out")
    for file in [*(file["name"] for file in theirs.table["files"]), "tokenizer.model"]:
        assert (ours.folder / file).read_bytes() == (theirs.folder / file).read_bytes(), file
    for key in theirs.table.keys() - {"config"}:
        assert ours.table[key] == theirs.table[key], key
    config, parallel = ours.table["config"], theirs.table["config"]["parallel"]
    assert config["parallel"] == parallel


def test_the_groups_of_muon_are_laid_out_too(tiny_data: Path, tmp_path: Path) -> None:
    source = real(tmp_path / "muon", tiny_data, (1, 2, 1), optimizer="muon")
    convert(source, tmp_path / "out", ConvertOptions("checkpoint", tensor_parallel=1))
    theirs, ours = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    assert ours.table["files"] == theirs.table["files"]
    assert ours.states("encoder.layers.0.attention.dense.weight") == STATES[:2]
    assert same(states(source), states(tmp_path / "out"))


# ----------------------------------------------------------------------------------------- round trips

PRESETS: dict[str, dict[str, Any]] = {
    "bert": {},
    "megatron-bert": {"preset": "megatron-bert"},
    "modern": {"preset": "modern", "global_attn_every_n_layers": 2},
    "bert with a generator": {"generator_size": 1.0, "sentence_head": False},
}


def written(folder: Path, data: Path, values: dict[str, Any]) -> Path:
    """A checkpoint of one rank, random weights and moments, as after 7 steps of a run."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 36}
    model = ModelConfig.model_validate({**sizes, "max_position_embeddings": 21, **values})
    draw = torch.Generator().manual_seed(0)
    shapes = native_shapes(model, VOCAB)
    tensors = {
        f"{state}:{name}": torch.randn(shape, generator=draw)
        for name, shape in shapes.items()
        for state in STATES
    }
    for key, value in tensors.items():
        if key.endswith(("word_embeddings.weight", "predictions.decoder.bias")):
            value[VOCAB:] = 0  # rows of no piece, which an export leaves out
    tokenizer = data / "tokenizer.model"
    table = {
        "model": model.model_dump(),
        "vocab_size": VOCAB,
        "step": 7,
        "samples_consumed": 56,
        "tokenizer_sha256": load_tokenizer(tokenizer).sha256,
        "data_digest": None,
        "config": None,
        "lineage": [{"folder": "elsewhere", "step": 3, "digest": "0"}],
    }
    weights = ((name, tensors[f"weight:{name}"]) for name in shapes)
    write_whole(folder / "whole", table, weights, tokenizer, shapes)
    checkpoint = open_checkpoint(folder / "whole")

    class WithMoments(Checkpoint):
        def states(self, name: str) -> tuple[str, ...]:
            return STATES

        def tensor(self, name: str, state: str = "weight") -> Tensor:
            return tensors[f"{state}:{name}"]

    from bertscale.export.checkpoint import write_checkpoint

    (folder / "start").mkdir()
    write_checkpoint(WithMoments(checkpoint.folder, checkpoint.table), folder / "start", at((1, 1, 0)))
    return folder / "start"


@pytest.mark.parametrize("preset", PRESETS)
def test_there_and_back_through_every_topology(preset: str, tiny_data: Path, tmp_path: Path) -> None:
    start = written(tmp_path, tiny_data, PRESETS[preset])
    before, source = states(start), start
    exported = [each for each in TOPOLOGIES if preset != "bert with a generator" or each == (2, 2, 3)]
    for number, ranks in enumerate(TOPOLOGIES):
        place = tmp_path / "-".join(map(str, ranks))
        convert(source, place, at(ranks))  # from the topology before: moments are kept
        found = open_checkpoint(place)
        assert found.table["topology"] == dict(zip(("tensor", "data", "zero_stage"), ranks, strict=True))
        assert len(found.table["files"]) == ranks[0] * ranks[1]
        assert (found.step, found.samples_consumed, found.has_moments) == (7, 56, True)
        assert found.lineage == open_checkpoint(start).lineage
        assert same(before, states(place))
        if ranks in exported:
            other = TOPOLOGIES[number - 1]
            convert(place, tmp_path / f"hf-{number}", ConvertOptions(show=False))
            convert(tmp_path / f"hf-{number}", tmp_path / f"back-{number}", at(other))
            back = open_checkpoint(tmp_path / f"back-{number}")
            assert back.model == found.model
            assert not back.has_moments
            assert same({key: before[key] for key in before if key[1] == "weight"}, states(back.folder))
        source = place


def test_what_no_run_has_is_refused(
    trained: dict[Ranks, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(trained[REAL[0]])
    for words, message in (
        (("--tensor-parallel", "3"), "--tensor-parallel 3: parallel.tensor=3 does not divide"),
        (("--tensor-parallel", "0"), "--tensor-parallel 0"),
        (("--data-parallel", "-1"), "--data-parallel -1"),
        (("--zero-stage", "4"), "--zero-stage 4"),
        ((), "is a checkpoint already; give another topology"),
    ):
        assert main(["convert", source, str(tmp_path / "out"), "--as", "checkpoint", *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
        assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------- from DeepSpeed's files

HEADS = ("model.num_attention_heads=4",)


def given(data: Path, ranks: Ranks = (1, 1, 0)) -> ConvertOptions:
    return at(ranks, model=HEADS, tokenizer=data)


def is_state_of(folder: Path, source: Path) -> bool:
    found = open_checkpoint(folder)
    assert (found.step, found.updates, found.has_moments) == (0, 2, True)
    return same(states(source), states(folder))


@pytest.mark.parametrize("ranks", [each for each in REAL if each[2]], ids=str)
def test_a_folder_of_deepspeed_becomes_a_checkpoint(
    ranks: Ranks, trained: dict[Ranks, Path], tiny_data: Path, tmp_path: Path
) -> None:
    """By the checkpoint's own folder, and by that above it, whose file `latest` names it."""
    above = trained[ranks].parent
    convert(above / "global_step2", tmp_path / "whole", given(tiny_data))
    assert is_state_of(tmp_path / "whole", trained[REAL[0]])
    convert(above, tmp_path / "shared", given(tiny_data, (2, 2, 1)))
    assert is_state_of(tmp_path / "shared", trained[REAL[0]])


@pytest.mark.parametrize("ranks", [(1, 2, 2), (1, 2, 3)], ids=str)
def test_what_deepspeed_makes_universal_becomes_a_checkpoint(
    ranks: Ranks,
    trained: dict[Ranks, Path],
    tiny_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import bertscale.train.zero  # noqa: F401  (DeepSpeed on a CPU, quietly)
    from deepspeed.checkpoint.ds_to_universal import main as universal  # isort: skip

    arguments = argparse.Namespace(
        input_folder=str(trained[ranks].parent / "global_step2"),
        output_folder=str(tmp_path / "theirs" / "global_step2_universal"),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    universal(arguments)
    capsys.readouterr()
    (tmp_path / "theirs" / "config.yaml").write_text("model: {num_attention_heads: 4}")
    shutil.copyfile(tiny_data / "tokenizer.model", tmp_path / "theirs" / "tokenizer.model")
    convert(tmp_path / "theirs", tmp_path / "ours", at((2, 1, 3)))
    assert is_state_of(tmp_path / "ours", trained[REAL[0]])


def test_deepspeed_loads_a_universal_checkpoint_of_ours(
    trained: dict[Ranks, Path], tiny_data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "universal"
    convert(trained[REAL[0]], output, ConvertOptions("universal", show=False))
    for ranks in ((2, 2, 1), (1, 2, 2), (1, 2, 3)):
        place = real(tmp_path / "-".join(map(str, ranks)), tiny_data, ranks, universal=str(output))
        assert same(states(trained[REAL[0]]), states(place)), ranks
    shutil.copytree(output, tmp_path / "damaged")
    (tmp_path / "damaged" / RECORD).unlink()
    (lost,) = (tmp_path / "damaged").glob("global_step2/zero/encoder.pooler.bias/exp_avg.pt")
    lost.unlink()
    refused(tmp_path / "damaged", at((1, 2, 1)), "lacks exp_avg of encoder.pooler.bias and has")
    convert(output, tmp_path / "back", at((1, 2, 1)))  # it has shape and tokenizer beside it
    assert is_state_of(tmp_path / "back", trained[REAL[0]])
    assert open_checkpoint(tmp_path / "back").model == open_checkpoint(trained[REAL[0]]).model


def refused(source: Path, options: ConvertOptions, *words: str) -> None:
    with pytest.raises(UserError) as error:
        convert(source, source.parent / "out", options)
    (line,) = str(error.value).splitlines()
    for word in words:
        assert word in line
    assert not (source.parent / "out").exists()


def test_a_folder_of_deepspeed_that_is_not_whole_is_refused(
    trained: dict[Ranks, Path], tiny_data: Path, tmp_path: Path
) -> None:
    source, options = tmp_path / "global_step2", given(tiny_data)
    shutil.copytree(trained[REAL[0]].parent / "global_step2", source)
    refused(source, ConvertOptions(tokenizer=tiny_data), "do not tell model.num_attention_heads; give")
    refused(source, ConvertOptions(model=HEADS), "no tokenizer.model", "--tokenizer")
    wrong = ConvertOptions(model=(*HEADS, "model.hidden_size=64"), tokenizer=tiny_data)
    refused(source, wrong, "model.hidden_size=64 (command line), and by its tensors", "has 32")
    refused(source, ConvertOptions(model=("train.steps=1",), tokenizer=tiny_data), "train: only model.KEY")
    lost = source / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = lost.read_bytes()
    lost.unlink()
    refused(source, options, f"lacks the file {lost.name}")
    lost.write_bytes(content[: len(content) // 2])
    refused(source, options, str(lost), "it is not a whole file of torch.save")
    other = trained[(1, 2, 3)].parent / "global_step2" / lost.name  # of a run without tensor ranks
    lost.write_bytes(other.read_bytes())
    refused(source, options, "is damaged")
    at_half = len(content) // 2  # within the values of a tensor
    lost.write_bytes(content[:at_half] + bytes([content[at_half] ^ 1]) + content[at_half + 1 :])
    refused(source, options, f"{lost} is damaged: the checksum of ")
    torch.save({"optimizer_state_dict": {"zero_stage": 3}}, lost)
    refused(source, options, str(lost), "its content is not what DeepSpeed")

    class Code:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"optimizer_state_dict": Code()}, lost)
    refused(source, options, str(lost), "code in a file of weights is never run")
    assert not (tmp_path / "made").exists()
    lost.write_bytes(content)
    convert(source, tmp_path / "out", options)


# --------------------------------------------------------------------------------------- from a state dict


def test_a_file_of_tensors_becomes_a_checkpoint(tiny_data: Path, tmp_path: Path) -> None:
    start = open_checkpoint(written(tmp_path, tiny_data, PRESETS["modern"]))
    tensors = {name: start.tensor(name) for name in start.parameters}
    keys = ("num_attention_heads=4", "max_position_embeddings=21", "global_attn_every_n_layers=2")
    options = ConvertOptions(model=tuple(f"model.{key}" for key in keys), tokenizer=tiny_data)
    torch.save(tensors, tmp_path / "weights.pt")
    save_file(tensors, tmp_path / "weights.safetensors")
    for name in ("weights.pt", "weights.safetensors"):
        convert(tmp_path / name, tmp_path / f"of {name}", options)
        found = open_checkpoint(tmp_path / f"of {name}")
        assert found.model == start.model
        assert not found.has_moments
        assert all(found.tensor(each).equal(value) for each, value in tensors.items())
    lacking = ConvertOptions(model=options.model[:1], tokenizer=tiny_data)
    refused(tmp_path / "weights.pt", lacking, "do not tell model.max_position_embeddings; give")
    del tensors["encoder.layers.1.attention.dense.weight"]
    torch.save(tensors, tmp_path / "weights.pt")
    refused(tmp_path / "weights.pt", options, "lacks the parameter encoder.layers.1.attention.dense.weight")
    torch.save({"weight": torch.ones(1)}, tmp_path / "weights.pt")
    refused(tmp_path / "weights.pt", options, "its tensors must have our names, or those of transformers")


def test_a_file_with_the_names_of_transformers_needs_its_config(tiny_data: Path, tmp_path: Path) -> None:
    start = written(tmp_path, tiny_data, PRESETS["bert"])
    convert(start, tmp_path / "hf", ConvertOptions(show=False))
    file = (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "best.safetensors")
    convert(file, tmp_path / "back", ConvertOptions())
    found = states(tmp_path / "back")
    assert same({key: value for key, value in states(start).items() if key[1] == "weight"}, found)
