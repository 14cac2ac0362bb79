"""What sbatch says of a job that it has taken: its id, and on some sites much more."""

from __future__ import annotations

import subprocess

import pytest

from bertscale.errors import UserError
from launcher import slurm
from launcher.enqueue import job_id

BANNER = "*** Welcome to the cluster: 12 nodes are down today ***"


@pytest.mark.parametrize(
    "said",
    [
        "17\n",
        "17;cluster\n",
        f"{BANNER}\n17\n",
        f"17;cluster-1.example\n{BANNER}\n",
        f"2026\n{BANNER}\n17\n",
        "sbatch: lua: your account has 300 hours left\nSubmitted batch job 17\n",
    ],
)
def test_the_id_is_found_among_greetings(said: str) -> None:
    assert job_id(said) == "17"


def test_without_an_id_nothing_is_made_up() -> None:
    with pytest.raises(UserError, match=r"told no job id .*Welcome.*`squeue --me` shows it"):
        job_id(f"{BANNER}\n")


def test_greetings_of_the_other_commands_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*command: str, **_: object) -> subprocess.CompletedProcess[str]:
        said = {
            "job": "JobId=17 JobState=RUNNING",
            "partition": "PartitionName=a State=UP",
            "hostnames": "n1\nn2",
        }
        return subprocess.CompletedProcess(command, 0, f"{BANNER}\n{said[command[2]]}\n", "")

    monkeypatch.setattr(slurm, "ask", ask)
    slurm.partitions.cache_clear()
    assert slurm.show_job("17") == {"JobId": "17", "JobState": "RUNNING"}
    assert list(slurm.partitions()) == ["a"]
    slurm.partitions.cache_clear()
    assert slurm.hosts("n[1-2]") == ["n1", "n2"]
