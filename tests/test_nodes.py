"""Unfit nodes are named before ranks start on them: with a stand-in for srun, and on the virtual cluster."""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import socket
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from virtual import Cluster

from launcher.job import JobSpec
from launcher.nodes.check import bad_nodes, check_nodes, node_states, nodes_alive, remember_bad
from launcher.nodes.measure import EXCHANGED, Gpu, _exchange_gpus, ask_all, cpu_product, exchange
from launcher.nodes.step import OF_JOB, judge

ROOT = Path(__file__).parents[1]


def spec_for(**changes: Any) -> JobSpec:
    values: dict[str, Any] = {
        "stage": "pretrain",
        "name": "job",
        "folder": "/run/job",
        "target": "/run",
        "logs": "/run/job/logs",
        "command": ("-m", "bertscale"),
        "python": sys.executable,
        "batch_python": sys.executable,
        "version": "0",
        "min_free_memory_gb": 0.1,
        "min_free_disk_gb": 0.1,
    }
    return JobSpec(**(values | changes))


# ------------------------------------------------------------------------------------- the list of the bad


def test_bad_nodes_expire(tmp_path: Path) -> None:
    path = tmp_path / "lists" / "bad.jsonl"
    assert bad_nodes(path, 24) == {}
    remember_bad(path, "node1", "slow")
    remember_bad(path, "node2", "no answer")
    remember_bad(path, "node1", "2 of 4 GPUs are visible – ⚠")
    assert bad_nodes(path, 24) == {"node1": "2 of 4 GPUs are visible – ⚠", "node2": "no answer"}
    old = {"time": time.time() - 25 * 3600, "node": "node3", "reason": "old"}
    with open(path, "a") as file:
        file.write(json.dumps(old) + "\n")
    assert "node3" not in bad_nodes(path, 24)
    assert bad_nodes(path, 26)["node3"] == "old"


def test_damaged_lines_of_the_list_cost_only_themselves(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'[1]\n"text"\n{"time": "now"}\n\xff\xfe\n{"node": "node9"}\n{"time": 1, "node": "no')
    remember_bad(path, "node1", "slow")
    assert bad_nodes(path, 1) == {"node1": "slow"}


def _remember_many(path: Path, name: str) -> None:
    for number in range(200):
        remember_bad(path, f"{name}{number}", "x" * 300)


def test_jobs_append_to_the_list_at_the_same_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    jobs = [context.Process(target=_remember_many, args=(tmp_path / "bad", name)) for name in "ab"]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert len(bad_nodes(tmp_path / "bad", 1)) == 400


# ------------------------------------------------------------------------------------- one node's report


REPORT = {
    "free_memory": 8e9,
    "free_disk": 9e9,
    "folder": "/tmp",
    "cpu": None,
    "gpus": [{"name": f"GPU {i}", "right": True, "visible": 2, "tflops": 400.0} for i in range(2)],
    "gpu_count": 2,
}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"gpu_count": 1}, "1 of 2 GPUs are visible"),
        ({"gpus": [{"name": "GPU 1", "right": False}]}, "GPU 1: a matrix product came out wrong"),
        (
            {"gpus": [{"name": "GPU 1", "right": True, "free_bytes": 2e9, "total_bytes": 80e9}]},
            "GPU 1: 2 of 80 GB are free, something else is using it",
        ),
        ({"free_memory": 1.5e9}, "1.5 GB of memory are free, 4 are needed"),
        ({"free_disk": 0}, "0.0 GB are free in /tmp, 2.5 are needed"),
        ({"error": "the temporary folder /tmp cannot be used"}, "the temporary folder /tmp cannot be used"),
    ],
)
def test_judgement_of_a_report(changes: dict[str, Any], reason: str | None) -> None:
    spec = spec_for(gpus_per_node=2, min_free_memory_gb=4.0, min_free_disk_gb=2.5)
    assert judge(REPORT | changes, spec) == reason


def test_the_matrix_product_of_this_machine_is_right() -> None:
    assert cpu_product()["right"]


# ------------------------------------------------------------------------------------- exchanges over TCP


def listen() -> tuple[socket.socket, dict[str, Any]]:
    listener = socket.create_server(("127.0.0.1", 0))
    order = {"exchange": "0123456789abcdef", "seconds": 30.0, "address": "127.0.0.1"}
    return listener, {**order, "port": listener.getsockname()[1], "side": 0}


def test_two_sound_nodes_exchange(tmp_path: Path) -> None:
    listener, order = listen()
    with listener:
        late = socket.create_connection(("127.0.0.1", order["port"]))  # of an exchange that was given up
        late.sendall(b"f" * 16)
        answers: list[dict[str, Any]] = []
        other = threading.Thread(target=lambda: answers.append(exchange(listener, {**order, "side": 1})))
        other.start()
        answers.append(exchange(listener, order))
        other.join()
        late.close()
    assert all(answer["mb_per_second"] > 0 and "fault" not in answer for answer in answers)


@pytest.mark.parametrize(
    ("sent", "fault"),
    [
        (None, "no connection within 0.5 s"),
        (b".", f"0.0 of {EXCHANGED / 1e6:.0f} MB came within 0.5 s"),
        (b"." + bytes(EXCHANGED), "other bytes arrived than were sent"),
    ],
)
def test_a_partner_that_fails(sent: bytes | None, fault: str) -> None:
    listener, order = listen()
    order["seconds"] = 0.5 if sent is None or len(sent) == 1 else 30.0
    with listener, socket.socket() as partner:
        if sent is not None:
            partner.connect(("127.0.0.1", order["port"]))
            threading.Thread(target=_send_and_read, args=(partner, order["exchange"].encode() + sent)).start()
        assert exchange(listener, order)["fault"] == fault


def _send_and_read(partner: socket.socket, content: bytes) -> None:
    threading.Thread(target=lambda: iter(lambda: partner.recv(2**20), b"") and None, daemon=True).start()
    try:
        partner.sendall(content)
        while partner.recv(2**20):
            pass
    except OSError:
        pass


# ------------------------------------------------------------------------------------- processes of GPUs


def test_the_processes_of_gpus_compute_and_reduce() -> None:
    """On gloo, as this machine may have no GPU: two nodes of one process each."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    nodes = [[Gpu(0)], [Gpu(0)]]
    try:
        (product,) = ask_all(nodes[0], {"product": 64}, 300)
        assert product["right"]
        assert product["tflops"] > 0
        order = {"exchange": "x", "address": "127.0.0.1", "port": port, "seconds": 300.0}
        answers: list[dict[str, Any]] = []
        other = threading.Thread(
            target=lambda: answers.append(_exchange_gpus(nodes[1], {**order, "side": 1}))
        )
        other.start()
        answers.append(_exchange_gpus(nodes[0], {**order, "side": 0}))
        other.join()
        assert all(answer.get("mb_per_second", 0) > 0 for answer in answers), answers
        # A partner that does not come: named, the process is killed and a new one serves the next order.
        fault = _exchange_gpus(nodes[0], {**order, "side": 0, "seconds": 1.0})["fault"]
        assert fault.startswith("GPU 0: ")
        assert ask_all(nodes[0], {"product": 64}, 300)[0]["right"]
    finally:
        for (gpu,) in nodes:
            gpu.end()


# ------------------------------------------------------------------------------------ a stand-in for srun

SRUN = """#!/bin/bash
# Starts the program once for each node of --nodelist on this machine.
for word; do case $word in --nodelist=*) nodes=${{word#*=}};; -*) shift;; *) break;; esac; done
while [[ $1 == -* ]]; do shift; done
export SLURM_LAUNCH_NODE_IPADDR=127.0.0.1 SLURM_STEP_ID=0
for node in ${{nodes//,/ }}; do
    [[ $node == silent* ]] || SLURMD_NODENAME=$node {program} &
done
{after}
wait
"""

AGENT = """
# A node with a made-up network: `slow` in its name makes all its exchanges slow, `dies` ends it in the first.
import json, os, socket
asked, name = json.loads(os.environ["BERTSCALE_CHECK"]), os.environ["SLURMD_NODENAME"]
link = socket.create_connection(("127.0.0.1", asked["port"]))
def say(**facts):
    link.sendall(json.dumps(facts).encode() + b"\\n")
say(token=asked["token"], node=name, step="0", address="127.0.0.1", port=1, store_port=2)
say(doing="matrix product")
gpu = {"name": "GPU 0", "right": True, "visible": 1, "tflops": 100 if "lame" in name else 400}
gpus = [gpu] * asked["gpus"]
report = dict(free_memory=1e12, free_disk=1e12, folder="/tmp", cpu=None, gpus=gpus, gpu_count=len(gpus))
if "stuck" not in name:
    say(report=report)
for line in link.makefile():
    if "dies" in name:
        break
    say(exchange=json.loads(line)["exchange"], mb_per_second=1.0 if "slow" in name else 1000.0)
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in front of the PATH, with an sinfo that knows of no node."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    put(folder / "sinfo", "#!/bin/sh\nexit 1\n")
    return folder


def put(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def put_srun(path: Path, agent: bool = True, after: str = "") -> None:
    (path / "agent.py").write_text(AGENT)
    program = shlex.join([sys.executable, str(path / "agent.py")]) if agent else '"$@"'
    put(path / "srun", SRUN.format(program=program, after=after))


def test_nodes_that_slurm_calls_dead(path: Path, tmp_path: Path) -> None:
    names = [f"n{number}" for number in range(7)]
    assert nodes_alive(names) == names  # sinfo fails: nothing is known
    lines = ["n0 mixed", "n0 mixed", "n1 down*", "n2 allocated*", "n3 draining", "n4 down", "n5 idle"]
    put(path / "sinfo", "#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    assert node_states(names)["n2"] == "allocated*"
    assert nodes_alive(names) == ["n0", "n3", "n5", "n6"]
    put_srun(path)
    found = check_nodes(spec_for(), ["n0", "n1", "n2"], tmp_path)
    assert found == {"n1": "Slurm calls it down*", "n2": "Slurm calls it allocated*"}


def test_the_real_check_on_this_machine(path: Path, tmp_path: Path) -> None:
    put_srun(path, agent=False)
    for folder in ("check", "check-2"):
        assert check_nodes(spec_for(), ["node1", "node2", "node3"], tmp_path) == {}
        facts = json.loads((tmp_path / folder / "node3.json").read_text())
        assert facts["fault"] is None
        assert facts["report"]["cpu"]["right"]
        assert facts["report"]["free_memory"] > 0
        assert [link["mb_per_second"] > 0 for link in facts["all_reduce"].values()] == [True]


@pytest.mark.parametrize(
    "names",
    [
        ["a1", "slow1", "a2", "slow2"],
        ["slow1", "slow2", "a1", "a2", "a3"],
        ["a1", "slow1", "slow2", "slow3", "a2", "a3"],
        ["slow1", "a1", "a2"],
        ["a1", "dies1", "a2", "a3"],
        ["a1"],
    ],
)
def test_sound_nodes_do_not_pay_for_their_neighbours(path: Path, tmp_path: Path, names: list[str]) -> None:
    put_srun(path)
    found = check_nodes(spec_for(min_bandwidth_mb=100.0), names, tmp_path)
    assert sorted(found) == sorted(name for name in names if name[:-1] in ("slow", "dies"))
    assert all("1.0 MB/s, less than 100" in why or "went away" in why for why in found.values())


def test_of_two_nodes_neither_is_believed(path: Path, tmp_path: Path) -> None:
    put_srun(path)
    found = check_nodes(spec_for(min_bandwidth_mb=100.0), ["a1", "slow1"], tmp_path)
    assert list(found) == ["a1", "slow1"]
    assert found["a1"] == (
        "all-reduce with slow1: 1.0 MB/s, less than 100; whose fault it is a third node would tell"
    )


def test_nodes_that_do_not_answer_and_slow_gpus(path: Path, tmp_path: Path) -> None:
    put_srun(path)
    began = time.monotonic()
    names = ["a1", "silent1", "a2", "lame1", "stuck1"]
    found = check_nodes(spec_for(check_seconds=9.0, gpus_per_node=1), names, tmp_path)
    assert time.monotonic() - began > 4
    assert found == {
        "silent1": "no answer within 9 s",
        "lame1": "a GPU computes 100 TFLOP/s, those of the other nodes 400",
        "stuck1": "its check was not finished within 9 s, it stood at: matrix product",
    }


def test_a_step_that_srun_gives_up(path: Path, tmp_path: Path) -> None:
    """srun ends the whole step for one node that it cannot reach: the others are checked again without it."""
    after = """if [[ $nodes == *silent* ]]; then
    echo 'srun: error: Task launch for StepId=1.0 failed on node silent1: Socket timed out' >&2
    echo 'srun: Job step aborted: Waiting up to 7 seconds for job step to finish.' >&2
    kill %1; exit 1
fi"""
    put_srun(path, agent=False, after=after)
    found = check_nodes(spec_for(), ["node1", "silent1", "node2"], tmp_path)
    assert list(found) == ["silent1"]
    assert "Socket timed out" in found["silent1"]
    put(path / "srun", "#!/bin/sh\necho 'srun: error: Invalid account' >&2\nexit 1\n")
    found = check_nodes(spec_for(), ["node1", "node2"], tmp_path)
    assert set(found) == {"node1", "node2"}
    assert "srun: error: Invalid account" in found["node1"]


def test_what_never_began_tells_the_last_line_of_its_error(path: Path, tmp_path: Path) -> None:
    """A container that drops the environment, a python that is not there, a container plug-in that is not."""
    said = "for node in ${nodes//,/ }; do echo srun: error: $node: task 0: Exited with exit code 1 >&2; done"
    put_srun(path, agent=False, after=f"wait; {said}; exit 1")
    dropped = spec_for(container=("env", "-u", "BERTSCALE_CHECK"))
    reason = "its check did not begin: the environment of the job does not arrive here"
    assert check_nodes(dropped, ["node1", "node2"], tmp_path) == {"node1": reason, "node2": reason}

    gone = "slurmstepd-node1: error: execve(): /no/python: No such file or directory"
    ends = "srun: error: node[1-2]: tasks 0-1: Exited with exit code 2"
    put(path / "srun", f"#!/bin/sh\necho '{gone}' >&2\necho '{ends}' >&2\nexit 2\n")
    found = check_nodes(spec_for(), ["node1", "node2"], tmp_path)
    assert set(found.values()) == {"its check did not begin: execve(): /no/python: No such file or directory"}

    wrong = "srun: unrecognized option '--container-image=a'"
    put(path / "srun", f'#!/bin/sh\necho "{wrong}\nTry \\"srun --help\\" for more" >&2\nexit 1\n')
    [reason] = set(check_nodes(spec_for(), ["node1", "node2"], tmp_path).values())
    assert reason == f"its check did not begin: {wrong}"
    assert OF_JOB.match(reason)
    assert not OF_JOB.match("its check did not begin: srun: error: Unable to create step for job 7: busy")


# ------------------------------------------------------------------------------------- on the virtual cluster

CHECK = """#!/bin/bash
export PYTHONPATH={root}
exec {python} - <<'END'
import json, time
from pathlib import Path
from launcher.job import JobSpec
from launcher.nodes.check import check_nodes, nodes_alive
folder = Path({folder!r})
(folder / "runs").touch()
while not (folder / "goes").exists():
    time.sleep(0.01)
found = check_nodes(JobSpec.from_json({spec!r}), {nodes!r}, folder)
(folder / "found.json").write_text(json.dumps(found))
END
"""


class Checking:
    """A job on all nodes that checks them, once `found` is called."""

    def __init__(self, cluster: Cluster, name: str, **changes: Any) -> None:
        self.cluster, self.folder = cluster, cluster.shared / name
        self.folder.mkdir()
        script = CHECK.format(
            root=ROOT,
            python=sys.executable,
            folder=str(self.folder),
            nodes=cluster.nodes,
            spec=spec_for(**changes).to_json(),
        )
        self.job = cluster.sbatch(script, f"--nodes={len(cluster.nodes)}", "--no-kill")
        while not (self.folder / "runs").exists():
            cluster.wait(self.job, "PENDING CONFIGURING RUNNING")
            time.sleep(0.05)

    def found(self) -> dict[str, str]:
        (self.folder / "goes").touch()
        self.cluster.wait(self.job, "COMPLETED", 120)
        found: dict[str, str] = json.loads((self.folder / "found.json").read_text())
        return found


def test_a_sound_cluster(cluster: Cluster) -> None:
    assert Checking(cluster, "sound").found() == {}
    facts = json.loads((cluster.shared / "sound" / "check" / "node2.json").read_text())
    assert facts["address"] == "10.77.0.12"  # not the loopback: the way that the ranks take


def test_nodes_without_disk_or_memory(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch, meminfo = cluster.shared / "scratch", cluster.shared / "meminfo"
    scratch.mkdir()
    meminfo.write_text("MemTotal: 1000000 kB\nMemAvailable: 40000 kB\n")
    monkeypatch.setenv("TMPDIR", str(scratch))  # sbatch passes it on
    with ExitStack() as stack:
        cluster.run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", scratch, host="node2")
        stack.callback(cluster.run, "umount", scratch, host="node2")
        cluster.run("mount", "--bind", meminfo, "/proc/meminfo", host="node3")
        stack.callback(cluster.run, "umount", "/proc/meminfo", host="node3")
        found = Checking(cluster, "poor").found()
    assert found == {
        "node2": f"0.0 GB are free in {scratch}, 0.1 are needed",
        "node3": "0.0 GB of memory are free, 0.1 are needed",
    }


def test_a_node_with_a_slow_link(cluster: Cluster) -> None:
    shape = ("tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "160mbit", "burst", "64kb")
    if cluster.run(*shape, "latency", "400ms", check=False, host="node3").returncode != 0:
        pytest.skip("this kernel cannot slow a network down")
    try:
        found = Checking(cluster, "slow", min_bandwidth_mb=40.0).found()
    finally:
        cluster.run("tc", "qdisc", "del", "dev", "eth0", "root", host="node3")
    assert list(found) == ["node3"]
    assert "MB/s, less than 40" in found["node3"]


@pytest.mark.parametrize("fault", ["cut", "freeze", "crash"])
def test_a_node_that_slurm_still_believes_in(cluster: Cluster, fault: str) -> None:
    """The fault comes a moment before the check, so that Slurm does not know of it yet."""
    check = Checking(cluster, fault)
    cluster.fault(fault, "node3")
    assert list(check.found()) == ["node3"]
