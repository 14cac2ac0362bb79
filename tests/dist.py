"""Runs a function of a test file on N gloo ranks, each a process of its own.

    results = run_ranks(__file__, "losses", world=2, folder=str(tmp_path))

calls `losses(folder=...)` with RANK, WORLD_SIZE and the rest set, and returns what each rank returned
(JSON). The first rank that fails is shown with its error and fails the test.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CHILD = """
import importlib.util, json, sys
sys.path.insert(0, {tests!r})
spec = importlib.util.spec_from_file_location("rank_module", {file!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
result = getattr(module, {function!r})(**json.loads(sys.argv[1]))
with open(sys.argv[2], "w") as out:
    json.dump(result, out)
import torch.distributed
if torch.distributed.is_initialized():  # threads of a living group abort the interpreter's end now and then
    torch.distributed.destroy_process_group()
"""


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run_ranks(file: str, function: str, *, world: int, **arguments: Any) -> list[Any]:
    code = CHILD.format(tests=str(Path(__file__).parent), file=file, function=function)
    port = free_port()
    with tempfile.TemporaryDirectory() as scratch:
        outputs = [Path(scratch) / f"{rank}.json" for rank in range(world)]
        logs = [Path(scratch) / f"{rank}.log" for rank in range(world)]
        ranks = []
        for rank in range(world):
            with logs[rank].open("w") as log:
                command = [sys.executable, "-c", code, json.dumps(arguments), str(outputs[rank])]
                environment = rank_environment(rank, world, port)
                ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        codes = [process.wait() for process in ranks]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            tails = "\n".join(f"--- rank {r}\n{logs[r].read_text()[-3000:]}" for r in failed)
            raise AssertionError(f"ranks {failed} of {world} failed:\n{tails}")
        return [json.loads(output.read_text()) for output in outputs]
