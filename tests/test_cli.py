"""The command line: help that loads nothing heavy, and mistakes that are one line."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bertscale import cli
from bertscale.config import FinetuneConfig, PrepConfig, PretrainConfig, Section, describe_fields

Command = Callable[..., subprocess.CompletedProcess[str]]

HEAVY = ("torch", "pyarrow", "numpy", "transformers", "deepspeed", "megatron", "tokenizers", "sklearn")

PRETRAIN = """
run: {0}/run
data: {0}/data
model: {{num_hidden_layers: 2, hidden_size: 16, num_attention_heads: 4, intermediate_size: 32}}
train: {{steps: 2, global_batch: 8, micro_batch: 4}}
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "pretrain.yaml"
    path.write_text(PRETRAIN.format(tmp_path))
    return str(path)


# ---------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in cli.COMMANDS)])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom bertscale.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        f"finally:\n    print([name for name in {HEAVY} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"usage: bertscale {'' if len(arguments) == 1 else arguments[0]}")
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("command", "section"), [("prep", PrepConfig), ("pretrain", PretrainConfig), ("finetune", FinetuneConfig)]
)
def test_help_lists_every_key(
    command: str, section: type[Section], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    words = capsys.readouterr().out.split()
    for key, text in describe_fields(section):
        assert key in words
        assert text.split("(")[0].split()[0] in words


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == "bertscale 0.1.0\n"


# ------------------------------------------------------------------------------------------- mistakes


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrian"]) == 2
    assert (
        capsys.readouterr().err
        == "bertscale: error: there is no command 'pretrian'; did you mean pretrain?\n"
    )
    assert cli.main(["xyz"]) == 2
    assert f"the commands are {', '.join(cli.COMMANDS)}" in capsys.readouterr().err


def test_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "prep" in capsys.readouterr().out


def test_a_mistake_is_one_line(bertscale: Command, tmp_path: Path) -> None:
    result = bertscale("prep", str(tmp_path / "none.yaml"))
    assert result.returncode == 2
    assert result.stderr == (
        f"bertscale prep: error: cannot read the config {tmp_path}/none.yaml: No such file or directory\n"
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.step=3"], "unknown key train.step; did you mean train.steps?"),
        (["parallel.tensor=3"], "parallel.tensor=3 does not divide model.num_attention_heads=4"),
        (["parallel.tensor=2", "parallel.ranks=3"], "3 ranks cannot be grouped by parallel.tensor=2"),
        (["parallel.ranks=3"], "train.global_batch=8 is not a multiple of"),
        ([], "there is no data folder"),
        (["--verify", "train.steps=3"], "there is no data folder"),
    ],
)
def test_pretrain_checks_before_it_starts(
    config: str, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["pretrain", config, *overrides]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bertscale pretrain: error: ")
    assert message in line
    assert not (tmp_path / "run").exists()


def test_verify_without_data(bertscale: Command, tmp_path: Path) -> None:
    path = tmp_path / "prep.yaml"
    path.write_text(f"input: [{tmp_path}/raw]\noutput: {tmp_path}/data\n")
    result = bertscale("prep", str(path), "--verify")
    assert result.returncode == 2
    assert result.stderr.startswith("bertscale prep: error: there is no data folder")
    assert "Traceback" not in result.stderr


def put_stage(monkeypatch: pytest.MonkeyPatch, stage: Callable[[Any], Any]) -> None:
    """Puts `stage` in the place of prep."""
    module = ModuleType("data_prep.build")
    module.prep = stage  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "data_prep.build", module)
    monkeypatch.setattr("data_prep.build", module, raising=False)


@pytest.fixture
def prep_config(tmp_path: Path) -> str:
    path = tmp_path / "prep.yaml"
    path.write_text(f"input: [a]\noutput: {tmp_path}\n")
    return str(path)


def test_full_disk(
    prep_config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(*_: Any) -> None:
        with open("/dev/full", "wb", buffering=0) as file:
            try:
                file.write(b"x")
            except OSError as error:
                raise OSError(error.errno, error.strerror, "train-00000.arrow") from error

    put_stage(monkeypatch, fill)
    assert cli.main(["prep", prep_config]) == 2
    assert capsys.readouterr().err == (
        f"bertscale prep: error: {os.strerror(errno.ENOSPC)} while writing train-00000.arrow; "
        "free some space and run the same command again\n"
    )


def test_ctrl_c(
    prep_config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    put_stage(monkeypatch, interrupt)
    assert cli.main(["prep", prep_config]) == 130
    assert capsys.readouterr().err.startswith("\nbertscale prep: interrupted")


def test_a_fault_keeps_its_traceback(prep_config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("boom")

    put_stage(monkeypatch, fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["prep", prep_config])


def test_a_missing_config_alone_is_named(bertscale: Command) -> None:
    for command in ("prep", "pretrain", "finetune"):
        said = bertscale(command)
        assert said.returncode == 2
        assert said.stderr.endswith("error: the following arguments are required: CONFIG\n")


def test_convert_takes_the_shape_behind_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr("bertscale.export.convert.convert", lambda *words: given.extend(words))
    words = ["theirs/global_step600", "out", "--tokenizer", "vocab.txt", "model.num_attention_heads=12"]
    assert cli.main(["convert", *words]) == 0
    source, output, options = given
    assert (source, output, options.tokenizer) == (Path(words[0]), Path("out"), Path("vocab.txt"))
    assert options.model == ("model.num_attention_heads=12",)
