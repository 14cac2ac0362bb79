"""`bertscale bench` by real processes: its table, its JSON, its refusals; batches and weights of the peer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import pretrain_config

from bertscale.bench.timed_steps import (
    PARTS,
    RandomBatches,
    Stopwatch,
    first_weights,
    padded,
    row_lengths,
    transformers_model,
)
from bertscale.config import PretrainConfig
from bertscale.model.model import PretrainingModel
from bertscale.train.parallel import Ranks

ROOT = Path(__file__).parents[1]
Command = Callable[..., subprocess.CompletedProcess[str]]
CASES = ["real tokens", "measured peak", "step", *PARTS, "communication", "peak memory"]
MODERN = {"preset": "modern", "num_hidden_layers": 3, "local_attention": 8}


@pytest.fixture
def write(tmp_path: Path, tiny_data: Path) -> Callable[..., str]:
    """`write(parallel={...})` writes a config of the tiny data, and returns its path."""

    def config(data: Path | str = tiny_data, **changes: dict[str, Any]) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(json.dumps(pretrain_config(data, tmp_path / "run", **changes).model_dump()))
        return str(path)

    return config


def measure(bertscale: Command, tmp_path: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    """What the command prints, and its JSON by case."""
    file = tmp_path / "results.json"
    result = bertscale("bench", *arguments, "--steps", "2", "--rounds", "2", "--json", str(file))
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    content = json.loads(file.read_text())
    assert set(content) == {"machine", "config", "results"}
    assert content["machine"]["measured_peak_gflops"] > 0
    rows = {row["case"]: row for row in content["results"]}
    assert list(rows) == CASES
    for row in rows.values():
        assert {"case", "ours", "peer", "unit", "ratio", "goal"} <= set(row)
        if row["ours"] is not None:
            assert row["spread"][0] <= row["ours"] <= row["spread"][1]
    assert 0 < rows["measured peak"]["ratio"] < 1
    assert sum(rows[part]["ours"] for part in PARTS) == pytest.approx(rows["step"]["ours"], rel=0.5)
    assert rows["peak memory"]["ours"] > 2**20
    return result.stdout, rows


def test_one_rank(bertscale: Command, write: Callable[..., str], tmp_path: Path) -> None:
    printed, rows = measure(bertscale, tmp_path, write())
    assert rows["real tokens"]["ours"] > 0
    assert rows["communication"]["ours"] == 0
    for words in ("real tokens/s", "MFU of the measured peak", "data wait", "backward", "there is one rank"):
        assert words in printed
    assert not (tmp_path / "run").exists()


def test_two_tensor_ranks_tell_communication_apart(
    bertscale: Command, write: Callable[..., str], tmp_path: Path
) -> None:
    config = write(parallel={"tensor": 2, "zero_stage": 3})
    printed, rows = measure(bertscale, tmp_path, config)
    assert "tensor parallel 2 x data parallel 1, ZeRO-3" in printed
    assert "of it, communication" in printed
    assert rows["communication"]["ours"] > 0
    assert not (tmp_path / "run").exists()


def test_random_ids_need_no_data(bertscale: Command, write: Callable[..., str], tmp_path: Path) -> None:
    config = write(tmp_path / "nothing", parallel={"ranks": 2}, train={"micro_tokens": 96})
    printed, _ = measure(bertscale, tmp_path, config, "--random", "train.global_batch=12")
    assert "random ids; nsp samples of 48 tokens" in printed
    assert "micro-batches of at most 96 tokens" in printed


@pytest.mark.parametrize("model", [{}, {"preset": "megatron-bert"}, MODERN], ids=lambda m: m.get("preset"))
def test_against_transformers(
    model: dict[str, Any], bertscale: Command, write: Callable[..., str], tmp_path: Path
) -> None:
    samples = {"kind": "packed"} if model is MODERN else {}
    printed, rows = measure(
        bertscale, tmp_path, write(model=model, samples=samples), "--against", "transformers"
    )
    tokens = rows["real tokens"]
    assert tokens["peer"] > 0
    assert tokens["ratio"] == pytest.approx(tokens["ours"] / tokens["peer"], rel=0.5)
    assert rows["forward"]["peer"] > 0
    assert "transformers" in printed


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "0"], "--steps must be 1 or more, not 0"),
        (["train.stops=3"], "unknown key train.stops; did you mean train.steps?"),
        (["--json", "/nowhere/a.json"], "--json /nowhere/a.json: there is no folder /nowhere"),
        (
            ["--against", "transformers", "parallel.ranks=2"],
            "--against transformers compares on one rank, but this config starts 2; add parallel.tensor=1 "
            "parallel.ranks=1",
        ),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], words: str, bertscale: Command, write: Callable[..., str]
) -> None:
    result = bertscale("bench", write(), *arguments)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [result.stderr.strip()]
    assert words in result.stderr


def test_missing_data_is_named(bertscale: Command, write: Callable[..., str], tmp_path: Path) -> None:
    result = bertscale("bench", write(tmp_path / "nothing"))
    assert (result.returncode, result.stdout) == (2, "")
    assert str(tmp_path / "nothing") in result.stderr


def test_the_config_may_be_left_out(bertscale: Command) -> None:
    result = bertscale("bench", "train.stops=3")
    assert result.returncode == 2
    assert "configs/pretrain/quickstart.yaml: unknown key train.stops" in result.stderr


# ------------------------------------------------------------------------------------- what it is made of


def ranks(rank: int = 0, world: int = 1, tensor: int = 1) -> Ranks:
    return Ranks(rank, world, tensor, torch.device("cpu"))


def random_config(**changes: Any) -> PretrainConfig:
    return pretrain_config("d", "r", **changes)


@pytest.mark.parametrize("kind", ["nsp", "document", "packed"])
def test_random_batches_have_the_loaders_form(kind: str) -> None:
    config = random_config(samples={"kind": kind}, train={"global_batch": 16})
    for _, batches in RandomBatches(config, 330, ranks()).iterate(0, 3):
        assert sum(len(batch.lengths) for batch in batches) == 16
        for batch in batches:
            total = sum(batch.lengths)
            assert total == len(batch.tokens) == len(batch.positions) == len(batch.token_types)
            assert max(batch.lengths) <= 48
            assert kind != "packed" or set(batch.lengths) == {48}
            assert batch.positions.max() < 48
            assert (batch.positions == 0).sum() == len(batch.lengths)
            assert (batch.target_positions.diff() > 0).all()
            assert len(batch.targets) == len(batch.target_positions)
            assert (batch.next_sentence_label is not None) == (kind == "nsp")
            assert batch.tokens.max() < 330


def test_random_causal_batches_predict_the_next_ids() -> None:
    config = random_config(samples={"kind": "document"}, objectives={"clm": 1})
    _, (batch, *_) = next(RandomBatches(config, 330, ranks()).iterate(0, 1))
    assert batch.causal
    assert batch.num_targets == len(batch.tokens) - len(batch.lengths)
    assert batch.targets.equal(batch.tokens[batch.target_positions + 1])
    assert (batch.positions[batch.target_positions + 1] > 0).all()  # of no other sample


@pytest.mark.parametrize("micro_tokens", [None, 100])
def test_random_batches_are_dealt_out_to_data_ranks(micro_tokens: int | None) -> None:
    config = random_config(train={"global_batch": 16, "micro_tokens": micro_tokens})
    steps = [
        next(RandomBatches(config, 330, ranks(r, 4, 2)).iterate(0, 1))[1] for r in range(4)
    ]  # two tensor ranks each
    for one, other in ((0, 1), (2, 3)):
        assert [b.tokens.tolist() for b in steps[one]] == [b.tokens.tolist() for b in steps[other]]
    assert len(steps[0]) == len(steps[2])
    assert sum(len(batch.lengths) for batch in steps[0] + steps[2]) == 16
    assert steps[0][0].tokens.tolist() != steps[2][0].tokens.tolist()


def test_the_peer_sees_the_same_tokens_and_labels() -> None:
    for kind in ("nsp", "packed"):
        config = random_config(samples={"kind": kind})
        batch = next(RandomBatches(config, 330, ranks()).iterate(0, 1))[1][0]
        values = padded(batch, row_lengths(batch, config))
        real = values["attention_mask"] == 1
        assert values["input_ids"][real].tolist() == batch.tokens.tolist()
        assert values["token_type_ids"][real].tolist() == batch.token_types.tolist()
        assert values["labels"][values["labels"] >= 0].tolist() == batch.targets.tolist()
        assert (values["labels"][~real] == -100).all()


@pytest.mark.parametrize("model", [{}, {"preset": "megatron-bert"}, MODERN], ids=lambda m: m.get("preset"))
def test_the_peer_begins_with_our_weights_and_our_loss(model: dict[str, Any]) -> None:
    kind = "document" if model is MODERN else "nsp"
    config = random_config(model=model, samples={"kind": kind})
    batch = next(RandomBatches(config, 330, ranks()).iterate(0, 1))[1][0]
    ours = PretrainingModel(config.model, 330)
    ours.load_state_dict(first_weights(config.model, 330, config.train.seed), strict=False)
    ours.eval()
    masked, relation, *_ = ours(batch)
    inputs = padded(batch, row_lengths(batch, config))
    if model is MODERN:
        del inputs["token_type_ids"]
    theirs = transformers_model(config, 330, torch.device("cpu")).eval()(**inputs).loss
    wanted = masked / len(batch.targets) + relation / len(batch.lengths)
    assert theirs.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_the_stopwatch_adds_up_parts() -> None:
    watch = Stopwatch(torch.device("cpu"))
    watch.restart()
    for part in ("forward", "backward", "forward"):
        watch.mark(part)
    seconds = watch.seconds()
    assert set(seconds) == set(PARTS)
    assert seconds["forward"] > 0
    assert seconds["optimizer"] == 0
    watch.restart()
    assert watch.seconds()["forward"] == 0


# -------------------------------------------------------------------------------------------- benchmarks


def run_benchmark(name: str, file: Path, *arguments: str) -> tuple[str, list[dict[str, Any]]]:
    command = [sys.executable, str(ROOT / f"benchmarks/{name}.py"), *arguments, "--json", str(file)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout, json.loads(file.read_text())["results"]


def test_train_step_compares_all_three(tiny_data: Path, tmp_path: Path) -> None:
    printed, rows = run_benchmark(
        "train_step",
        tmp_path / "a.json",
        *("--data", str(tiny_data), "--smoke", "--minutes", "0.01", "--rounds", "2", "--profile"),
    )
    assert [row["case"] for row in rows] == [
        f"tiny, {kind}, {what}"
        for kind in ("pairs 128", "documents 512")
        for what in ("against transformers", "against megatron-core", "of the measured peak")
    ]
    assert all(row["ratio"] > 0 and row["goal"] for row in rows if "against" in row["case"])
    assert "our step by operator" in printed


def test_gpu_runs_small_on_a_cpu(tmp_path: Path) -> None:
    printed, rows = run_benchmark("gpu", tmp_path / "a.json", "--cpu", "--rounds", "2", "--steps", "1")
    assert [row["case"] for row in rows] == [
        *(f"tiny {name} 128, of the measured peak" for name in ("BERT", "modern")),
        *(f"tiny {name} 128, against transformers" for name in ("BERT", "modern")),
    ]
    assert "our kernels of one step" in printed


def test_gpu_without_a_gpu_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = subprocess.run([sys.executable, str(ROOT / "benchmarks/gpu.py")], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "there is no GPU here; --cpu runs tiny sizes on the CPU\n"
