"""Checkpoints: any topology resumes from any other's, damage is named, a full disk loses nothing."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from damage import edited_table
from dist import run_ranks
from pages import ROOT, run_python
from tiny import pretrain_config

from bertscale.config import UserError
from bertscale.run_folder import TABLE, checkpoints
from bertscale.train.checkpoint import open_checkpoint
from bertscale.train.checkpoint_table import STATES
from bertscale.train.parallel import Ranks
from bertscale.train.resume import newest_sound

pytestmark = pytest.mark.slow

STRETCHES = [(2, 3), (4, 1), (1, 2), (2, 1)]  # (tensor, stage) on four ranks, three steps each


class StopAfter:
    """Asks the loop to stop after `steps` steps, as a signal would."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    @property
    def asked(self) -> bool:
        self.left -= 1
        return self.left < 0


def train_in_stretches(data: str, folder: str, stretches: list[list[int]]) -> list[float]:
    """Runs on each rank: three steps in each topology, each from the checkpoint of the one before."""
    from bertscale.pretrain.pretrain import train
    from bertscale.run_folder import read_metrics
    from bertscale.train.device import local_device
    from bertscale.train.parallel import leave_subgroups, start_ranks

    for number, (tensor, stage) in enumerate(stretches):
        config = pretrain_config(
            data,
            folder,
            train={"steps": 12, "save_every": 3, "keep_checkpoints": 9, "eval_every": 12},
            parallel={"tensor": tensor, "zero_stage": stage},
        )
        ranks = start_ranks(tensor, local_device())
        code = train(config, ranks, StopAfter(99 if number == 3 else 3))  # type: ignore[arg-type]
        assert code == (0 if number == 3 else 75)
        leave_subgroups(ranks)
    return [e["train/loss"] for e in read_metrics(Path(folder)) if "train/loss" in e]


@pytest.fixture(scope="module")
def runs(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[float]]]:
    """The same 12 steps: on one rank, and on four in another topology every three steps."""
    found: dict[str, tuple[Path, list[float]]] = {}
    for name, world, stretches in (("dense", 1, [(1, 0)] * 4), ("elastic", 4, STRETCHES)):
        folder = tmp_path_factory.mktemp(name)
        arguments = {"data": str(tiny_data), "folder": str(folder), "stretches": stretches}
        found[name] = folder, run_ranks(__file__, "train_in_stretches", world=world, **arguments)[0]
    return found


def test_a_run_that_changes_topology_at_every_stop_is_the_dense_run(
    runs: dict[str, tuple[Path, list[float]]],
) -> None:
    (dense, dense_losses), (elastic, elastic_losses) = runs["dense"], runs["elastic"]
    assert len(dense_losses) == 12
    torch.testing.assert_close(elastic_losses, dense_losses, rtol=1e-5, atol=1e-5)
    folders = list(zip(checkpoints(dense), checkpoints(elastic), strict=True))
    assert len(folders) == 4
    for one, other in folders:
        ours, theirs = open_checkpoint(one), open_checkpoint(other)
        assert ours.samples_consumed == theirs.samples_consumed == ours.step * 8
        for name in ours.parameters:
            for state in STATES:
                a, b = ours.tensor(name, state), theirs.tensor(name, state)
                assert a.shape == b.shape
                # AdamW divides by the root of the second moment: where a gradient is rounding alone
                # (key biases: softmax does not see them) so is the step. Weights move by 0.003 a step.
                tolerance = 1e-5 if state != "weight" or "query_key_value.bias" not in name else 0.1
                torch.testing.assert_close(a, b, rtol=1e-3, atol=tolerance, msg=name)


@pytest.fixture
def checkpoint(runs: dict[str, tuple[Path, list[float]]], tmp_path: Path) -> Path:
    """A copy of a (TP 2 x DP 2 x ZeRO-3) checkpoint, to be damaged."""
    folder = checkpoints(runs["elastic"][0])[0]
    return Path(shutil.copytree(folder, tmp_path / folder.name))


def test_the_page_reads_one(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/checkpoints.md, in a folder as `make quickstart` leaves it."""
    run = tmp_path / "runs/quickstart/pretrain/checkpoints"
    run.mkdir(parents=True)
    checkpoint.rename(run / checkpoint.name)
    monkeypatch.chdir(tmp_path)
    opened = run_python(ROOT / "docs/checkpoints.md")["checkpoint"]
    assert opened.folder == Path("runs/quickstart/pretrain/checkpoints") / checkpoint.name


def test_a_file_cut_short_is_named(checkpoint: Path) -> None:
    shard = checkpoint / "shard-t01-d00.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(UserError, match=r"shard-t01-d00\.safetensors is damaged: [\d,]+ bytes instead of"):
        open_checkpoint(checkpoint)


def test_a_missing_file_is_named(checkpoint: Path) -> None:
    (checkpoint / "shard-t00-d01.safetensors").unlink()
    with pytest.raises(UserError, match=r"shard-t00-d01\.safetensors is damaged: missing"):
        open_checkpoint(checkpoint)


def test_a_flipped_byte_is_found_by_its_digest(checkpoint: Path) -> None:
    shard = checkpoint / "shard-t01-d01.safetensors"
    content = bytearray(shard.read_bytes())
    content[-7] ^= 1
    shard.write_bytes(content)
    opened = open_checkpoint(checkpoint)  # the size is right
    with pytest.raises(UserError, match=r"shard-t01-d01\.safetensors is damaged: its digest differs"):
        opened.verify()


def test_a_folder_that_was_never_committed_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / TABLE).unlink()
    with pytest.raises(UserError, match="is not a finished checkpoint"):
        open_checkpoint(checkpoint)
    with pytest.raises(UserError, match="no such folder"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    checkpoint.rename(tmp_path / "run" / "checkpoints" / checkpoint.name)
    with pytest.raises(UserError, match="has no finished checkpoint yet"):
        open_checkpoint(tmp_path / "run")


def test_reading_runs_no_code_and_needs_no_deepspeed(checkpoint: Path) -> None:
    assert {path.suffix for path in checkpoint.iterdir()} == {".json", ".safetensors", ".model"}
    code = (
        "import sys, pathlib; from bertscale.train.checkpoint import open_checkpoint;"
        f"c = open_checkpoint(pathlib.Path({str(checkpoint)!r}));"
        "c.tensor('encoder.pooler.weight');"
        "assert not {'deepspeed', 'megatron', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_disk_that_fills_up_leaves_the_checkpoint_before_it(
    tiny_data: Path, tmp_path: Path, runs: dict[str, tuple[Path, list[float]]]
) -> None:
    """A run resumes from step 3 on a file system with room for one checkpoint and a half."""
    disk = tmp_path / "disk"
    disk.mkdir()
    source = checkpoints(runs["dense"][0])[0]
    size = sum(path.stat().st_size for path in source.iterdir())
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size * 3 // 2}", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here: it takes root")
    try:
        shutil.copytree(source, disk / "run" / "checkpoints" / source.name)
        config = pretrain_config(tiny_data, disk / "run", train={"steps": 12, "save_every": 3})
        (tmp_path / "config.json").write_text(json.dumps(config.model_dump()))  # JSON is YAML
        command = [sys.executable, "-m", "bertscale", "pretrain", str(tmp_path / "config.json")]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 2
        last = result.stderr.strip().splitlines()
        message = next(line for line in last if "cannot write the checkpoint" in line)
        assert "step-0000006: No space left on device; earlier checkpoints are intact" in message
        assert "Traceback" not in result.stderr
        assert [p.name for p in (disk / "run" / "checkpoints").iterdir()] == [source.name]
        open_checkpoint(disk / "run").verify()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ---------------------------------------------------------------------------------- edits of the table


@pytest.mark.parametrize("digest", [True, False], ids=["digest", "no digest"])
def test_an_edited_table_is_one_line_or_does_no_harm(checkpoint: Path, digest: bool) -> None:
    """`digest`: without one, as the first checkpoints, there is nothing but what the table says."""
    table = json.loads((checkpoint / TABLE).read_text())
    if not digest:
        del table["digest"]
    expected = {name: open_checkpoint(checkpoint).tensor(name) for name in table["parameters"]}
    draw, refused = random.Random(0), 0
    for number in range(300):
        text = edited_table(table, draw)
        (checkpoint / TABLE).write_bytes(text)
        try:
            opened = open_checkpoint(checkpoint)
            opened.digest()
            values = {name: opened.tensor(name) for name in opened.parameters}
        except UserError as error:
            assert str(checkpoint) in str(error), (number, text)  # noqa: PT017
            refused += 1
            continue
        assert all(values[name].equal(value) for name, value in expected.items() if name in values)
        if "digest" in json.loads(text):
            assert json.loads(text) == table
    assert refused > (250 if digest else 100)


def test_an_edited_count_of_skipped_steps_is_noticed(checkpoint: Path) -> None:
    text = (checkpoint / TABLE).read_text()
    (checkpoint / TABLE).write_text(text.replace('"skipped_steps": 0', '"skipped_steps": 2'))
    with pytest.raises(UserError, match="its digest is not that of its content"):
        open_checkpoint(checkpoint)


def test_a_resume_takes_the_checkpoint_before_one_whose_table_is_damaged(
    runs: dict[str, tuple[Path, list[float]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs["dense"][0], tmp_path / "run")
    *_, before, newest = checkpoints(tmp_path / "run")
    table = json.loads((newest / TABLE).read_text())
    for damaged in ("{", "[]", "null", json.dumps({**table, "step": "x"}), json.dumps({"format": 1})):
        (newest / TABLE).write_text(damaged)
        found = newest_sound(tmp_path / "run", Ranks(0, 1, 1, torch.device("cpu")))
        assert found is not None
        assert found.folder == before
        assert str(newest) in capsys.readouterr().out
