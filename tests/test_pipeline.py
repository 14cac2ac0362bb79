"""One command on the virtual cluster: text -> shards -> pretraining -> Hugging Face folder -> classifier."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import prep_config, pretrain_config, write_corpus
from virtual import Cluster

from bertscale.data.shards import open_dataset
from bertscale.run_folder import checkpoints, read_events
from bertscale.train.checkpoint import open_checkpoint

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def write_configs(folder: Path) -> Path:
    """A pipeline of four stages on four nodes of two tasks, and all that it names; returns its file."""
    write_corpus(folder / "corpus.jsonl", 600)
    pretrain = pretrain_config(
        folder / "data", folder / "run", parallel={"tensor": 2, "zero_stage": 3}, train={"micro_batch": 2}
    ).model_dump()
    examples = [
        {"text": f"{who} {what}", "label": who}
        for who in ("The cat", "A small dog")
        for what in ("watches the garden", "finds some bread", "carries an answer", "likes the long road")
    ]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    finetune = {
        "encoder": str(folder / "hf"),
        "output": str(folder / "classifier"),
        "data": {split: str(folder / f"{split}.jsonl") for split in ("train", "test")},
        "samples": {"max_length": 48},
        "train": {"epochs": 2, "global_batch": 4},
    }
    cluster = {
        "tasks_per_node": 2,
        "sbatch": ["--exclusive"],  # else all tasks of an array are put on one node
        "environment": {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"},
        "node_check": False,
    }
    pipeline = {
        "name": "tiny",
        "cluster": str(folder / "cluster.yaml"),
        "stages": [
            {"prep": str(folder / "prep.yaml"), "array": 4},
            {"pretrain": str(folder / "pretrain.yaml"), "nodes": 4},
            {"convert": [str(folder / "run"), str(folder / "hf")]},
            {"finetune": str(folder / "finetune.yaml")},
        ],
    }
    configs = {
        "prep": prep_config(folder, split_bytes=20_000),
        "pretrain": pretrain,
        "finetune": finetune,
        "cluster": cluster,
        "pipeline": pipeline,
    }
    for name, values in configs.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return folder / "pipeline.yaml"


def story(folder: Path) -> str:
    texts = []
    for events in sorted(folder.rglob("events.jsonl")):
        texts += [f"== {events}", *map(json.dumps, read_events(events))]
    for log in sorted([*folder.rglob("slurm-*.out"), *folder.rglob("rank-0000.log")]):
        texts.append(f"== {log}\n{log.read_text(errors='replace')[-3000:]}")
    return "\n".join(texts)


def test_one_command_takes_text_to_a_classifier(cluster: Cluster, tmp_path: Path, bertscale: Any) -> None:
    pipeline = write_configs(tmp_path)
    cluster.run(sys.executable, "-m", "bertscale", "submit", "pipeline", str(pipeline))
    last = tmp_path / "classifier.job"
    deadline = time.monotonic() + 400
    while not (last / "done.json").exists():
        assert time.monotonic() < deadline, story(tmp_path)
        assert cluster.run("squeue", "-h").stdout.strip() or (last / "done.json").exists(), story(tmp_path)
        time.sleep(0.5)

    # The array has made what one process makes.
    alone = yaml.safe_load((tmp_path / "prep.yaml").read_text()) | {"output": str(tmp_path / "alone")}
    (tmp_path / "alone.yaml").write_text(yaml.safe_dump(alone))
    assert bertscale("prep", str(tmp_path / "alone.yaml")).returncode == 0
    assert open_dataset(tmp_path / "data", "train", verify=True).num_documents > 0
    for file in (tmp_path / "alone").glob("*.arrow"):
        assert file.read_bytes() == (tmp_path / "data" / file.name).read_bytes(), file.name

    # Eight ranks of TP 2 x DP 4 x ZeRO-3 over four nodes have trained what one rank trains.
    dense = bertscale(
        *("pretrain", str(tmp_path / "pretrain.yaml"), f"run={tmp_path / 'dense'}"),
        *("parallel.tensor=1", "parallel.zero_stage=0", "parallel.ranks=1"),
    )
    assert dense.returncode == 0, dense.stderr
    jobs, one = (open_checkpoint(checkpoints(tmp_path / run)[-1]) for run in ("run", "dense"))
    assert jobs.table["topology"] == {"tensor": 2, "data": 4, "zero_stage": 3}
    for name in one.parameters:
        torch.testing.assert_close(jobs.tensor(name, "weight"), one.tensor(name, "weight"), rtol=0, atol=1e-5)

    assert (tmp_path / "hf/model.safetensors").is_file()
    result = json.loads((tmp_path / "classifier/result.json").read_text())
    assert result["pretrained"]["test"]["accuracy"]["mean"] > 0
    nodes = {
        event["nodes"][0] for event in read_events(tmp_path / "data.job/events.jsonl") if "nodes" in event
    }
    assert len(nodes) == 4, story(tmp_path)


def test_a_failed_link_cancels_the_rest_and_says_so(cluster: Cluster, tmp_path: Path) -> None:
    pipeline = write_configs(tmp_path)
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("{broken\n" * 500)
    cluster.run(sys.executable, "-m", "bertscale", "submit", "pipeline", str(pipeline))
    deadline = time.monotonic() + 120
    while cluster.run("squeue", "-h").stdout.strip():
        assert time.monotonic() < deadline, story(tmp_path)
        time.sleep(0.5)
    for folder in ("run/job", "hf.job", "classifier.job"):
        kinds = [event["event"] for event in read_events(tmp_path / folder / "events.jsonl")]
        assert kinds[0] == "queued", kinds
        assert kinds[-1] == "cancelled", kinds
    assert not (tmp_path / "run/checkpoints").exists()
    written = "".join(log.read_text() for log in tmp_path.rglob("slurm-*.out"))
    assert "corpus.jsonl" in written
    assert "cancelled" in written
