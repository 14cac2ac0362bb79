"""Conversions onto full and read-only disks, stopped by Ctrl-C, and several at once: one line, and nothing
left behind."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from sharded import write_run
from test_convert import write_checkpoint

from bertscale import cli
from bertscale.config import UserError
from bertscale.convert.weights import open_weights
from bertscale.errors import INTERRUPTED, MISTAKE
from bertscale.export import convert as stage
from bertscale.export import onnx, sentence_transformers, tensors, topology, universal
from bertscale.export.convert import convert
from bertscale.export.options import FORMS, ConvertOptions
from bertscale.export.output import is_output_of
from bertscale.files import whole_folder
from bertscale.train.resume import remove_leftovers


@pytest.fixture
def native(tiny_data: Path, tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "native", tiny_data, {})
    return tmp_path / "native"


def refused(source: Path, output: Path, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        convert(source, output, ConvertOptions(show=False))
    assert len(str(caught.value).splitlines()) == 1
    assert list(output.parent.iterdir()) == []


def test_a_disk_that_is_full_or_read_only(native: Path, disk: Path, tmp_path: Path) -> None:
    convert(native, tmp_path / "hf", ConvertOptions(show=False))
    for source in (native, tmp_path / "hf"):
        convert(source, disk / "out", ConvertOptions(show=False))
        sizes = sorted({path.stat().st_size for path in (disk / "out").iterdir()})
        whole = sum(-(-path.stat().st_size // 4096) * 4096 for path in (disk / "out").iterdir())
        subprocess.run(["rm", "-r", str(disk / "out")], check=True)
        for size in (8192, whole - sizes[-1] // 8, whole - 4096):
            subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)
            refused(source, disk / "out", r"cannot write .*out: No space left on device")
        subprocess.run(["mount", "-o", "remount,size=100M", str(disk)], check=True)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    refused(native, disk / "out", r"cannot write .*out: Read-only file system")


# What writes each form, and how often it does before it is stopped.
WRITERS: dict[str, tuple[ModuleType, str, int]] = {
    "pretraining": (tensors, "stream_tensors", 1),
    "masked-lm": (tensors, "stream_tensors", 1),
    "encoder": (tensors, "stream_tensors", 1),
    "sentence-transformers": (sentence_transformers, "write_json", 1),
    "onnx": (onnx, "write_graph", 0),
    "onnx-masked-lm": (onnx, "write_graph", 0),
    "checkpoint": (topology, "_write_at", 5),
    "universal": (universal, "_save", 5),
}
WORDS = {
    "pretraining": ["--shard-size", "10KB"],
    "masked-lm": ["--shard-size", "10KB"],
    "encoder": ["--shard-size", "10KB"],
    "sentence-transformers": ["--pooling", "mean"],
    "checkpoint": ["--tensor-parallel", "2", "--data-parallel", "2", "--zero-stage", "3"],
}


@pytest.fixture(scope="module")
def run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("stopped") / "run", tiny_data, {"num_hidden_layers": 1})


@pytest.mark.parametrize("stop", ["full disk", "Ctrl-C"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_stopped_in_one_line(
    form: str,
    stop: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the middle of its files, and when all of them are there."""
    output = tmp_path / "place" / "out"
    arguments = ["convert", str(run), str(output), "--as", form, "--no-show", "--no-verify"]
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    error, code, said = {
        "full disk": (full, MISTAKE, f"cannot write {output}: No space left on device"),
        "Ctrl-C": (KeyboardInterrupt(), INTERRUPTED, "interrupted; run the same command again"),
    }[stop]
    module, name, before = WRITERS[form]
    for place, writer, calls in ((module, name, before), (stage, "write_record", 0)):
        done: list[str] = []
        real = getattr(place, writer)

        def stopped(*given: Any, real: Any = real, calls: int = calls, done: list[str] = done) -> Any:
            if len(done) == calls:
                assert any(path.is_file() for path in output.parent.rglob("*"))
                done.append("raised")
                raise error
            done.append("written")
            return real(*given)

        monkeypatch.setattr(place, writer, stopped)
        assert cli.main([*arguments, *WORDS.get(form, [])]) == code
        assert done[-1] == "raised"
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bertscale")]
        assert len(lines) == 1
        assert said in lines[0]
        assert list(output.parent.iterdir()) == []
        # For the second place the first one writes again; making a graph takes seconds, so none is made.
        monkeypatch.setattr(place, writer, (lambda *_: None) if place is onnx else real)


def test_a_full_disk_is_an_error_of_the_disk_for_files_of_torch() -> None:
    """torch.save says of it: RuntimeError, unexpected pos 704 vs 598."""
    with pytest.raises(OSError, match="No space left on device"):
        universal._save({"param": torch.zeros(1_000_000)}, Path("/dev/full"))


def test_two_conversions_into_one_output(native: Path, tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    output = tmp_path / "place" / "out"
    command = [sys.executable, "-m", "bertscale", "convert", str(native), str(output), "--no-show"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert is_output_of(output, open_weights(native).digest())
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_partial_folders_go_with_their_process(tmp_path: Path) -> None:
    """That of a killed process is removed by the next one, that of a live one is not."""
    code = "import sys, os, signal; from pathlib import Path; from bertscale.files import whole_folder\n"
    code += "with whole_folder(Path(sys.argv[1])) as partial:\n"
    code += "    (partial / 'half').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False)
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "other")], check=False)
    assert len(list(tmp_path.glob(".*.partial"))) == 2
    live = "import sys; from pathlib import Path; from bertscale.files import whole_folder\n"
    live += "with whole_folder(Path(sys.argv[1])) as partial: print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", live, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with whole_folder(tmp_path / "out") as partial:
            (partial / "mine").write_text("x")
        assert (tmp_path / "out" / "mine").is_file()
        left = [path.name for path in tmp_path.glob(".*.partial")]
        assert sorted(name.split(".")[1] for name in left) == ["other", "out"]
        process.communicate()
    assert process.returncode == 0
    assert [path.name for path in tmp_path.glob(".*.partial")] == [n for n in left if n.startswith(".other")]


def test_leftovers_of_a_killed_save_are_removed_at_the_next_start(tmp_path: Path) -> None:
    ours = ["checkpoints/.step-0000100.partial", "metrics.jsonl.tmp-17", "config.yaml.tmp-17"]
    theirs = [
        "checkpoints/.step-best.partial",
        "checkpoints/step-0000050",
        "notes.tmp-17",
        "result.json.tmp-x",
    ]
    for name in (*ours, *theirs):
        (tmp_path / name).mkdir(parents=True) if "step" in name else (tmp_path / name).write_text("x")
    remove_leftovers(tmp_path)
    assert not [name for name in ours if (tmp_path / name).exists()]
    assert all((tmp_path / name).exists() for name in theirs)
