"""docs/cluster-first-day.md: its files are valid, it installs as make does, its commands run on Slurm."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from pages import ROOT, blocks
from virtual import Cluster

from bertscale.config import ClusterConfig
from bertscale.run_folder import JOB_SPEC, checkpoints, job_folder

PAGE = ROOT / "docs/cluster-first-day.md"
RECIPE = (ROOT / "slurm/bertscale.def").read_text(encoding="utf-8")
# What makes the run small enough for a test.
SMALLER = [
    *("model.num_hidden_layers=1", "model.hidden_size=32", "model.num_attention_heads=2"),
    *("model.intermediate_size=64", "samples.max_length=32", "train.eval_samples=4"),
    *("train.steps=20", "train.save_every=10", "train.global_batch=16"),
]


def recipe(section: str) -> str:
    """The lines of a section of slurm/bertscale.def."""
    [text] = re.findall(rf"^%{section}\n(.*?)(?=^%|\Z)", RECIPE, flags=re.DOTALL | re.MULTILINE)
    return str(text)


def test_every_cluster_file_is_valid() -> None:
    files = [yaml.safe_load(text) for language, text in blocks(PAGE) if language == "yaml"]
    sites = [ClusterConfig.model_validate(values) for values in files]
    assert [site.gpus_per_node for site in sites if site.partition] == [8]
    assert len(sites) == 3


def test_page_and_recipe_install_as_make_does() -> None:
    install = "python -m pip install"
    [on_page] = re.findall(rf"^{install} (.*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    [in_recipe] = re.findall(rf"{install} --no-cache-dir (.*)$", recipe("post"), flags=re.MULTILINE)
    assert on_page == in_recipe == "-c constraints.txt ."
    assert '-c constraints.txt -e ".[dev]"' in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_recipe_copies_all_that_is_installed() -> None:
    copied = [line.split() for line in recipe("files").splitlines() if line.strip()]
    assert all((ROOT / source).exists() and target == f"/opt/bertscale/{source}" for source, target in copied)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    packages = re.findall(r'"(\w+)\*"', project)
    named = {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", *packages}
    assert {source for source, _ in copied} == named
    assert len(packages) == 3


@pytest.mark.slurm
@pytest.mark.slow
def test_the_commands_run(cluster: Cluster, tiny_data: Path) -> None:
    """Steps 6 to 9 as they stand, with the virtual cluster's file as my-cluster.yaml."""
    folder = cluster.shared / "day"
    folder.mkdir()
    (folder / "configs").symlink_to(ROOT / "configs")
    shutil.copy(ROOT / "configs/cluster/virtual.yaml", folder / "my-cluster.yaml")
    shutil.copytree(tiny_data, folder / "runs/quickstart/data")
    shell = [block.replace("\\\n", " ") for language, block in blocks(PAGE) if language == ""]
    lines = [shlex.split(line) for block in shell for line in block.splitlines()]
    commands = [words for words in lines if words and words[0] == "bertscale" and "runs/first" in str(words)]
    assert [words[1] for words in commands] == ["submit", "submit", "status", "logs"]
    program = ("env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "bertscale")

    submits = [[*words[1:], *SMALLER] for words in commands[:2]]
    dry, queued = (cluster.run(*program, *words, cwd=folder).stdout for words in submits)
    assert "nothing was queued" in dry
    [job] = re.findall(r"^job (\d+) ", queued, flags=re.MULTILINE)
    cluster.wait(job, "COMPLETED", seconds=300)
    status, log = (cluster.run(*program, *words[1:], cwd=folder).stdout for words in commands[2:])
    assert "done" in status
    assert "layers of 32" in log
    run = folder / "runs/first"
    assert [path.name for path in checkpoints(run)][-1] == "step-0000020"
    there = job_folder("pretrain", run)
    assert all((there / name).exists() for name in ("script.sh", "config.yaml", "code", "events.jsonl"))
    assert (there / JOB_SPEC).exists()
    assert {path.name for path in next((there / "logs").glob("attempt-*")).iterdir()} >= {"srun.log"}
