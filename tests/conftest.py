"""Shared by all tests: a clean environment, and the command as a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import make_data
from virtual import _cluster_as_it_was as _cluster_as_it_was
from virtual import cluster as cluster
from virtual import pytest_terminal_summary as pytest_terminal_summary

# Started in the background of a script this process ignores Ctrl-C, and so would those that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

NICENESS = os.getpriority(os.PRIO_PROCESS, 0)


# ------------------------------------------------------------------- which worker runs which file, and when


def worker_group(file: Path) -> str:
    """Of a file with tests on a virtual cluster: "ranks" where jobs are trainings, else "cluster"."""
    text = file.read_text(encoding="utf-8")
    if "from virtual import" not in text:
        return ""
    return "ranks" if "[pytest.mark.slurm, pytest.mark.slow]" in text else "cluster"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Workers take files in this order: the groups on the cluster, then what takes long, then all others."""

    def place(file: Path) -> tuple[bool, str, bool]:
        group = worker_group(file)
        return not group, group, "pytest.mark.slow" not in file.read_text(encoding="utf-8")

    places = {file: place(file) for file in {item.path for item in items}}
    items.sort(key=lambda item: places[item.path])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For three workers on two cores: two mostly wait, each for a cluster of its own, and one computes, as
    the others do in the end. A group's tests stay together, and so do a file's."""
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return worker_group(config.rootpath / file) or file

    config.option.loadscopereorder = False
    return Scheduling(config, log)


@pytest.fixture(scope="module", autouse=True)
def _way_for_the_cluster(request: pytest.FixtureRequest) -> None:
    """Beside other workers, files that compute leave the cores to those on a cluster, whose clocks run on."""
    if "PYTEST_XDIST_WORKER" in os.environ and not worker_group(request.path):
        os.setpriority(os.PRIO_PROCESS, 0, min(19, NICENESS + 5))


Command = Callable[..., subprocess.CompletedProcess[str]]

# What srun, torchrun or `bertscale pretrain` leaves to its children: the tests may run under one of them.
LAUNCHERS = ("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "BERTSCALE_", "OMP_NUM_THREADS")


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """No test sees a launcher's variables, nor what another test put into os.environ."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(LAUNCHERS):
            del os.environ[name]
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here: it takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="session")
def bertscale() -> Command:
    """`bertscale("prep", "a.yaml")` runs the command and returns exit code, stdout and stderr."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "bertscale", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of `bertscale prep` on a small corpus; not to be changed."""
    return make_data(tmp_path_factory.mktemp("tiny"))
