"""What thousands of ranks ask of a file system and of Slurm stays bounded; counted with few of them."""

from __future__ import annotations

import os
import resource
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sharded import write_run

from bertscale.config import UserError
from bertscale.files import partial_folder
from bertscale.run_folder import TABLE
from bertscale.train.checkpoint import Checkpoint, commit, open_checkpoint
from bertscale.train.checkpoint_table import DIGEST, read_table
from bertscale.train.engine import Engine
from bertscale.train.parallel import take_share, tensor_parallel_dimension
from launcher.nodes.step import _allow_files

TENSOR, DATA = 2, 4


@pytest.fixture(scope="module")
def checkpoint(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 2 tensor-parallel x 4 data-parallel ranks under ZeRO-3: eight files."""
    return write_run(tmp_path_factory.mktemp("run"), tiny_data, {}, (TENSOR, DATA, 3))


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the flushes of each file and folder by its name."""
    count: Counter[str] = Counter()

    def fsync(handle: int) -> None:
        count[Path(os.readlink(f"/proc/self/fd/{handle}")).name] += 1

    monkeypatch.setattr(os, "fsync", fsync)
    return count


def test_what_the_ranks_have_flushed_is_not_flushed_again(
    checkpoint: Path, tmp_path: Path, flushed: Counter[str]
) -> None:
    final = tmp_path / checkpoint.name
    partial = Path(shutil.copytree(checkpoint, partial_folder(final)))
    table = {key: value for key, value in read_table(partial).items() if key != DIGEST}
    (partial / TABLE).unlink()
    commit(partial, final, table)
    names = {file["name"] for file in table["files"]}
    assert len(names) == TENSOR * DATA
    assert not names & flushed.keys()
    assert flushed == {TABLE: 1, "tokenizer.model": 1, partial.name: 1, tmp_path.name: 1}
    open_checkpoint(final).verify()


def test_ranks_look_once_for_each_file_all_together(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: Counter[str] = Counter()
    stat = Path.stat

    def counted(path: Path, **how: Any) -> os.stat_result:
        looked[path.name] += path.suffix == ".safetensors"
        return stat(path, **how)

    monkeypatch.setattr(Path, "stat", counted)
    for rank in range(3):
        open_checkpoint(checkpoint, rank, 3)
    names = [file["name"] for file in read_table(checkpoint)["files"]]
    assert +looked == dict.fromkeys(names, 1)


def test_a_file_that_is_lost_is_found_by_the_rank_that_looks_for_it(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / checkpoint.name))
    (folder / read_table(folder)["files"][4]["name"]).unlink()
    open_checkpoint(folder, 0, 3)
    with pytest.raises(UserError, match=r"shard-t01-d00\.safetensors is damaged: missing"):
        open_checkpoint(folder, 1, 3)


def test_the_check_of_many_nodes_may_open_many_sockets() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before[1] // 2, before[1]))
        _allow_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def parts_in(checkpoint: Checkpoint, tensor: int, tensor_rank: int) -> Any:
    """How the engine of such a rank reads a checkpoint, without a model."""
    engine: Any = SimpleNamespace(
        ranks=SimpleNamespace(tensor=tensor, tensor_rank=tensor_rank),
        _global_shape=lambda name: checkpoint.parameters[name]["shape"],
    )
    engine._parts_of = lambda read: Engine._parts_of(engine, read)
    return Engine._parts_in(engine, checkpoint)


@pytest.mark.parametrize(
    ("tensor", "data", "most"), [(TENSOR, DATA, 2), (TENSOR, 2 * DATA, 4), (TENSOR, 3, 4), (1, DATA, 8)]
)
def test_a_rank_opens_the_files_that_it_needs_and_reads_what_is_its_own(
    checkpoint: Path, tensor: int, data: int, most: int
) -> None:
    """`most`: the files that a rank may open, its own and, of what is whole on every rank, tensor rank 0's;
    two of each where the cuts lie elsewhere, all where the shares are others."""
    whole = open_checkpoint(checkpoint)
    for tensor_rank in range(tensor):
        for data_rank in range(data):
            opened = open_checkpoint(checkpoint)
            read = parts_in(opened, tensor, tensor_rank)
            for name in opened.parameters:
                share = take_share(whole.tensor(name, "exp_avg"), name, tensor, tensor_rank).flatten()
                size = -(-share.numel() // data)
                expected = share[data_rank * size : (data_rank + 1) * size]
                if expected.numel():
                    got = read(name, "exp_avg", data_rank * size, expected.numel())
                    assert torch.equal(got, expected), (name, tensor_rank, data_rank)
            assert len(opened._open) <= most


def test_a_replicated_parameter_is_one_share(checkpoint: Path) -> None:
    opened = open_checkpoint(checkpoint)
    assert {opened.degree(name) for name in opened.parameters} == {1, TENSOR}
    for name in opened.parameters:
        assert opened.degree(name) == (1 if tensor_parallel_dimension(name) is None else TENSOR)
