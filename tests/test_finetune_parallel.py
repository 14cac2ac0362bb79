"""Fine-tuning at TP x DP x ZeRO against one rank: losses, norms, weights; and killed against never."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from dist import run_ranks
from safetensors.torch import load_file
from test_finetune import configure, rows, world, write_encoder, write_rows  # noqa: F401  (a fixture)

from bertscale.config import FinetuneConfig, ModelConfig
from bertscale.run_folder import checkpoints, read_metrics
from bertscale.tokenizer import load_tokenizer

TOPOLOGIES = [(1, 1, 0), (1, 2, 0), (1, 2, 2), (2, 1, 3), (2, 2, 1)]
SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}


def tune_each(configs: list[dict[str, Any]]) -> None:
    """Runs on each rank: one fine-tuning for each config, whose folder is there."""
    from bertscale.finetune.finetune import train_all
    from bertscale.train.device import local_device
    from bertscale.train.parallel import leave_subgroups, start_ranks
    from bertscale.train.stop import StopSignal

    for values in configs:
        config = FinetuneConfig.model_validate(values)
        ranks = start_ranks(config.parallel.tensor, local_device())
        train_all(config, ranks, StopSignal())
        leave_subgroups(ranks)


Figures = dict[tuple[str, int, int, int], tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, Any]]]


@pytest.fixture(scope="module")
def figures(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Figures:  # noqa: F811
    """Of each preset and topology: loss and gradient norm of each step, the weights and result.json."""
    folder = tmp_path_factory.mktemp("topologies")
    for preset in ("bert", "modern"):
        shape = ModelConfig.model_validate({**SIZES, "preset": preset, "initializer_range": 0.1})
        write_encoder(folder / preset, load_tokenizer(world / "tokenizer.model"), shape=shape)
    write_rows(folder / "few.jsonl", rows(35, seed=1))  # the last batch of an epoch has three samples
    found: Figures = {}
    for size in (1, 2, 4):
        here = [(p, *t) for p in ("bert", "modern") for t in TOPOLOGIES if t[0] * t[1] == size]
        configs = []
        for preset, tensor, data, stage in here:
            output = folder / f"{preset}-{tensor}-{data}-{stage}"
            output.mkdir()
            changes = [
                *(f"encoder={folder}/{preset}", f"data.train={folder}/few.jsonl"),
                *(f"data.dev={world}/test.jsonl", "train.global_batch=8", "train.epochs=2"),
                *(f"parallel.tensor={tensor}", f"parallel.zero_stage={stage}", "train.log_every=1"),
                *("train.precision=float32", "model.hidden_dropout_prob=0.0", "train.micro_tokens=64"),
                *("optimizer.layer_decay=0.8", "optimizer.head_learning_rate=0.02", "train.eval_every=3"),
                "optimizer.gradient_clipping=0.5",
            ]
            configs.append(configure(world, output, *changes).model_dump(mode="json"))
        run_ranks(__file__, "tune_each", world=size, configs=configs)
        for key, config in zip(here, configs, strict=True):
            output = Path(config["output"])
            steps = [
                [entry["train/loss"], entry["train/gradient_norm"]]
                for entry in read_metrics(output)
                if "train/loss" in entry
            ]
            weights = load_file(output / "model" / "model.safetensors")
            result = json.loads((output / "result.json").read_text())
            found[key] = (torch.tensor(steps, dtype=torch.float64), weights, result)
    return found


@pytest.mark.parametrize("preset", ["bert", "modern"])
@pytest.mark.parametrize("topology", TOPOLOGIES[1:])
def test_losses_norms_and_weights_are_those_of_one_rank(
    figures: Figures, preset: str, topology: tuple[int, int, int]
) -> None:
    alone, weights, result = figures[(preset, *TOPOLOGIES[0])]
    steps, shared, other = figures[(preset, *topology)]
    assert alone.shape == (10, 2)
    assert alone[:, 1].max() > 0.5  # the clipping takes part
    torch.testing.assert_close(steps, alone, rtol=1e-5, atol=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(shared[name], value, rtol=1e-4, atol=1e-5)
    for which in ("dev", "test"):
        for name, figure in result["pretrained"][which].items():
            assert other["pretrained"][which][name]["mean"] == pytest.approx(figure["mean"], abs=1e-5)


def test_killed_and_resumed_is_never_killed(world: Path, tmp_path: Path) -> None:  # noqa: F811
    """With dropout, dev and two seeds: all weights, figures and predictions are the same, bit for bit."""
    changes = [
        *(f"data.dev={world}/test.jsonl", "train.epochs=9", "train.eval_every=5", "train.save_every=4"),
        *("train.seeds=[0, 1]", "train.log_every=1"),
    ]

    def command(output: Path) -> list[str]:
        values = configure(world, output, *changes).model_dump(mode="json")
        (tmp_path / f"{output.name}.yaml").write_text(json.dumps(values))
        return [sys.executable, "-m", "bertscale", "finetune", str(tmp_path / f"{output.name}.yaml")]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole), env=environment, check=True, capture_output=True)
    for seen in ({20, 24, 28}, {82, 86, 90, 94}):  # in the first run, and in the second one
        process = subprocess.Popen(
            command(killed), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        while not seen & {int(path.name.removeprefix("step-")) for path in checkpoints(killed)}:
            assert time.monotonic() < deadline
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)  # the ranks die with it
        process.wait()
    done = subprocess.run(command(killed), env=environment, check=True, capture_output=True, text=True)
    assert "seed-1: dev" in done.stdout
    assert "seed-0: dev" not in done.stdout
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (whole, killed))
    assert all(torch.equal(one[name], other[name]) for name in one)
    for name in ("predictions-dev.jsonl", "predictions-test.jsonl"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
    results = [json.loads((folder / "result.json").read_text()) for folder in (whole, killed)]
    for found in results:
        for record in found["pretrained"]["runs"]:
            for figure in ("seconds", "tokens_per_second", "mfu"):
                del record[figure]
    assert results[0]["pretrained"] == results[1]["pretrained"]
    curves = [
        [(e["step"], e["run"], e.get("train/loss")) for e in read_metrics(folder)]
        for folder in (whole, killed)
    ]
    assert curves[0] == curves[1]
