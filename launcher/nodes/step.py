"""One Slurm step of the start-up check: launcher.nodes.measure on every node, and what comes of it.

faults = asyncio.run(Check(spec, nodes, folder, end).run())   # called by launcher.nodes.check
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import resource
import secrets
import socket
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bertscale.run_folder import SRUN_LOG
from launcher import slurm
from launcher.job import JobSpec

TRIES = 6  # exchanges that a node may fail before it is left out, and with nodes that are proven:
TRIES_PROVEN = 2
LINK_SECONDS = 10.0  # of one exchange; with GPUs, where torch may first have to be loaded, four times as long
SLOW_GPU = 0.5  # a GPU below this share of the median rate is left out
GPU_FREE = 0.8  # a GPU of whose memory less is free at the start is left out
END_SECONDS = 3.0  # that the step gets to end without a signal
TICK_SECONDS = 1.0  # between looks at what srun says
# Reasons that, where all nodes give the same, are the job's own: its python, its container, its packages.
# Of what srun says only a wrong option is: it may have met a controller that is busy.
NOT_BEGUN = "its check did not begin: "
OF_JOB = re.compile(
    NOT_BEGUN + r"(?!srun: (?!unrecognized option|invalid option))|its check died at: "
    r"|the matrix product failed: |\d+ of \d+ GPUs are visible"
)


@dataclass
class Node:
    """What is known of one node."""

    name: str
    writer: asyncio.StreamWriter | None = None  # the connection to it
    hello: dict[str, Any] = field(default_factory=dict)
    doing: str = ""  # the part of the check that it is at
    report: dict[str, Any] | None = None
    # Exchanges by partner: {"mb_per_second": ...}, {"fault": ...} or both.
    links: dict[str, dict[str, Any]] = field(default_factory=dict)
    answers: asyncio.Queue[dict[str, Any]] = field(default_factory=asyncio.Queue)
    busy: bool = False
    proven: bool = False  # it exchanged data with another node as it should
    gone: bool = False  # its connection ended
    fault: str | None = None

    @property
    def ready(self) -> bool:
        return self.report is not None and not (self.fault or self.busy or self.gone)


class Check:
    """One srun step; `run` returns {node: reason}, None as the reason of a node that must go again."""

    def __init__(self, spec: JobSpec, names: Sequence[str], folder: Path, end: float) -> None:
        self.spec, self.folder, self.end = spec, folder, end
        self.nodes = {name: Node(name) for name in names}
        self.token = secrets.token_hex(16)
        self.log = folder / SRUN_LOG
        self.said = ""  # what stands in it
        self.pairs: set[asyncio.Task[None]] = set()

    async def run(self) -> dict[str, str | None]:
        self.changed = asyncio.Event()
        _allow_files()
        listener = _listen()
        server = await asyncio.start_server(self._serve, sock=listener)
        step = await self._start(listener.getsockname()[1])
        ended = asyncio.create_task(step.wait())
        ended.add_done_callback(lambda _: self.changed.set())
        try:
            while not ended.done() and not self._settled() and time.monotonic() < self.end:
                self._match()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.changed.wait(), TICK_SECONDS)
                self.changed.clear()
                self.said = self.log.read_text(errors="replace")
            self._judge_rates()
            aborted = self._aborted(ended.done())
            self.blamed = any(map(self._said, self.nodes))
            faults = {node.name: self._verdict(node, aborted) for node in self.nodes.values()}
        finally:
            for task in self.pairs:
                task.cancel()
            server.close()
            await self._stop(step, ended)
        for node in self.nodes.values():
            self._keep(node, faults[node.name])
        return faults

    async def _start(self, port: int) -> asyncio.subprocess.Process:
        spec, names = self.spec, list(self.nodes)
        asked = {"token": self.token, "port": port, "gpus": spec.gpus_per_node, "seconds": spec.check_seconds}
        command = [
            "srun",
            f"--nodes={len(names)}",
            f"--ntasks={len(names)}",
            "--ntasks-per-node=1",
            f"--cpus-per-task={spec.cpus_per_task * spec.tasks_per_node}",
            *([f"--gpus-per-node={spec.gpus_per_node}"] if spec.gpus_per_node else []),
            f"--nodelist={','.join(names)}",
            "--job-name=check",
            "--overlap",  # what is left of it must not keep the ranks' step waiting
            "--no-kill",  # a node that dies is no reason to end the check of the others
            "--export=ALL",
            *spec.srun,
            *spec.container,
            *(spec.python, "-m", "launcher.nodes.measure"),
        ]
        environment = {**os.environ, "BERTSCALE_CHECK": json.dumps(asked)}
        with open(self.log, "ab") as log:
            return await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the supervisor
            )

    async def _stop(self, step: asyncio.subprocess.Process, ended: asyncio.Task[int]) -> None:
        for node in self.nodes.values():
            if node.writer is not None:
                node.writer.close()  # it takes that for the end
        await asyncio.wait([ended], timeout=END_SECONDS)
        if ended.done():
            return
        for kill in (step.terminate, step.kill):
            with contextlib.suppress(ProcessLookupError):
                kill()
            await asyncio.wait([ended], timeout=1)
        job = os.environ.get("SLURM_JOB_ID")
        number = next((node.hello["step"] for node in self.nodes.values() if node.hello), None)
        if job and number is not None:  # a step whose srun was killed stays where a node does not answer
            command = ["scancel", "--signal=KILL", f"{job}.{number}"]
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                subprocess.run(command, capture_output=True, timeout=END_SECONDS)

    # ------------------------------------------------------------------------------------- talking

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Reads what one node says: a hello, parts of the check as they begin, a report, answers."""
        node = None
        with contextlib.suppress(OSError, ValueError, asyncio.LimitOverrunError):
            while line := await reader.readline():
                message = json.loads(line)
                if node is None:
                    node = self.nodes.get(message.get("node", ""))
                    if node is None or not secrets.compare_digest(str(message.get("token")), self.token):
                        break
                    node.hello, node.writer = message, writer
                    del node.hello["token"]
                elif "doing" in message:
                    node.doing = message["doing"]
                elif "report" in message:
                    node.report, node.doing = message["report"], ""
                    node.fault = judge(message["report"], self.spec)
                    self.changed.set()
                else:
                    node.answers.put_nowait(message)
        if node is not None:
            node.gone = True
            node.answers.put_nowait({"gone": True})
            self.changed.set()
        writer.close()

    def _match(self) -> None:
        """Starts exchanges for all nodes that want one and find a partner."""
        for node in self.nodes.values():
            if self._wants(node) and (partners := self._partners(node)):
                # Best another one that has not been tried, then a proven one, last one that failed itself.
                partner = min(partners, key=lambda p: 1 if p.proven else 2 * bool(p.links))
                node.busy = partner.busy = True
                task = asyncio.create_task(self._exchange(node, partner))
                self.pairs.add(task)
                task.add_done_callback(self.pairs.discard)

    def _wants(self, node: Node) -> bool:
        conclusive = sum(self.nodes[name].proven for name in node.links)
        return node.ready and not node.proven and len(node.links) < TRIES and conclusive < TRIES_PROVEN

    def _partners(self, node: Node) -> list[Node]:
        """Who could be tried with `node` now; one that has failed waits for a proven node if there is any."""
        others = [p for p in self.nodes.values() if p is not node and p.name not in node.links and not p.gone]
        if node.links and any(p.proven for p in others):
            others = [p for p in others if p.proven]
        return [p for p in others if p.ready]

    async def _exchange(self, first: Node, second: Node) -> None:
        gpus = self.spec.gpus_per_node
        pair = {
            "exchange": secrets.token_hex(8),
            "seconds": LINK_SECONDS * (4 if gpus else 1),
            "address": first.hello["address"],
            "port": first.hello["store_port" if gpus else "port"],
        }
        orders = ({**pair, "side": 0}, {**pair, "side": 1})
        answers = await asyncio.gather(*map(_ask, (first, second), orders))
        floor = self.spec.min_bandwidth_mb
        for answer in answers:
            if (rate := answer.get("mb_per_second")) is not None and rate < floor:
                answer["fault"] = f"{rate:,.1f} MB/s, less than {floor:,g}"
        # A connection that broke last: it may be the echo of a fault of the other side, which then says more.
        by_weight = sorted(answers, key=lambda answer: bool(answer.get("broken")))
        words = [answer["fault"] for answer in by_weight if "fault" in answer]
        for node, partner, answer in zip((first, second), (second, first), answers, strict=True):
            node.links[partner.name] = {**answer, "fault": words[0]} if words else answer
            node.busy, node.proven = False, node.proven or not words
        self.changed.set()

    # ------------------------------------------------------------------------------------- judging

    def _settled(self) -> bool:
        """Whether nothing more can be learnt."""
        if any(node.busy or (self._wants(node) and self._partners(node)) for node in self.nodes.values()):
            return False
        waiting = [node.name for node in self.nodes.values() if node.report is None and not node.gone]
        return not waiting or all(self._said(name) for name in waiting)

    def _said(self, name: str) -> str:
        """What srun said of a node that could not be reached, or whose task ended; "" if it said nothing."""
        pattern = rf"failed on node {name}: (.*)|(Node failure) on {name}\b|error: {name}: task \d+: (.*)"
        complaint = re.search(pattern, self.said)
        return next(filter(None, complaint.groups())) if complaint else ""

    def _aborted(self, ended: bool) -> bool:
        """Whether srun or Slurm has ended the step before the check was through."""
        words = re.search(r"step aborted|launch failed|CANCELLED", self.said, re.IGNORECASE)
        return words is not None or (ended and time.monotonic() < self.end)

    def _verdict(self, node: Node, aborted: bool) -> str | None:
        """Why to leave this node out; "" if it is sound, None if the step ended before that was known."""
        if node.fault:
            return node.fault
        within = f"within {self.spec.check_seconds:g} s"
        if node.report is None:
            said = self._said(node.name)
            if said and not (said.startswith("Exited") and not node.hello):
                return f"its check could not be run: {said} ({self.log})"
            if aborted and self.blamed and not said:
                return None  # for what happened to another one
            if not node.hello and (aborted or said):
                return f"{NOT_BEGUN}{slurm.task_error(self.said)}"
            if not node.hello:
                return f"no answer {within}"
            if aborted:
                return None
            verb = "died" if node.gone else f"was not finished {within}, it stood"
            return f"its check {verb} at: {node.doing}"
        if node.proven or len(self.nodes) == 1:
            return ""
        if aborted and (
            node.busy or node.gone or not node.links or (self._wants(node) and self._partners(node))
        ):
            return None
        if node.busy:
            return f"its all-reduce with another node did not end {within}"
        if not node.links:
            return ""  # nobody was left to try it with
        words = [f"with {partner}: {link['fault']}" for partner, link in node.links.items()]
        unsure = "; whose fault it is a third node would tell" if len(self.nodes) == 2 else ""
        return f"all-reduce {'; '.join(words)}{unsure}"

    def _judge_rates(self) -> None:
        """Names the nodes with a GPU that is much slower than those of the others."""
        reports = {n.name: n.report for n in self.nodes.values() if n.report and not n.fault}
        gpus = {name: report["gpus"] for name, report in reports.items() if report["gpus"]}
        rates = {name: min(gpu["tflops"] for gpu in of_node) for name, of_node in gpus.items()}
        middle = statistics.median(rates.values()) if len(rates) > 2 else 0.0
        for name, rate in rates.items():
            if rate < SLOW_GPU * middle:
                fault = f"a GPU computes {rate:.0f} TFLOP/s, those of the other nodes {middle:.0f}"
                self.nodes[name].fault = fault

    def _keep(self, node: Node, fault: str | None) -> None:
        facts = {"node": node.name, "fault": fault or None, "stood_at": node.doing, **node.hello}
        facts |= {"report": node.report, "all_reduce": node.links}
        text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
        (self.folder / f"{node.name}.json").write_text(text, encoding="utf-8")


def _allow_files() -> None:
    """Raises the limit of open files as far as this process may: each node takes a socket, and many hosts
    begin with a limit of 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _listen() -> socket.socket:
    """A port of every address of this host."""
    try:
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    except (OSError, ValueError):
        return socket.create_server(("", 0))


async def _ask(node: Node, order: dict[str, Any]) -> dict[str, Any]:
    """The node's answer to `order`; {"fault": ...} if none comes in time."""
    assert node.writer is not None
    node.writer.write(json.dumps(order).encode() + b"\n")
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(order["seconds"] + 2):
            while not (answer := await node.answers.get()).get("gone"):
                if answer.pop("exchange") == order["exchange"]:
                    return answer
            return {"fault": f"{node.name} went away"}
    return {"fault": f"{node.name} did not answer within {order['seconds']:g} s"}


def judge(report: dict[str, Any], spec: JobSpec) -> str | None:
    """What in a node's report of itself is a reason to leave it out, in words; None if nothing is."""
    gb = 1e9
    if report.get("error"):
        return str(report["error"])
    if report["gpu_count"] < spec.gpus_per_node:
        return f"{report['gpu_count']} of {spec.gpus_per_node} GPUs are visible"
    for product in [*report["gpus"], *([report["cpu"]] if report["cpu"] else [])]:
        if not product["right"]:
            return f"{product['name']}: a matrix product came out wrong"
        if product.get("free_bytes", 1) < GPU_FREE * product.get("total_bytes", 1):
            free, total = (product[key] / gb for key in ("free_bytes", "total_bytes"))
            return f"{product['name']}: {free:.0f} of {total:.0f} GB are free, something else is using it"
    if report["free_memory"] < spec.min_free_memory_gb * gb:
        free = f"{report['free_memory'] / gb:.1f} GB"
        return f"{free} of memory are free, {spec.min_free_memory_gb:g} are needed"
    if report["free_disk"] < spec.min_free_disk_gb * gb:
        free = f"{report['free_disk'] / gb:.1f} GB"
        return f"{free} are free in {report['folder']}, {spec.min_free_disk_gb:g} are needed"
    return None
