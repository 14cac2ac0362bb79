"""Runs a function of a test file on N gloo ranks, each a process of its own.

    results = run_ranks(__file__, "losses", world=2, folder=str(tmp_path))

calls `losses(folder=...)` with RANK, WORLD_SIZE and the rest set, and returns what each rank returned
(JSON). The first rank that fails is shown with its error and fails the test.

The ranks are forked by a server that has imported torch, DeepSpeed and megatron-core once, which takes a new
interpreter eight seconds of a core.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import multiprocessing
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from launcher.ranks import free_port

TESTS = str(Path(__file__).parent)
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        *("bertscale.pretrain.pretrain", "bertscale.model.tensor_parallel", "data_prep.build"),
        # What torch and DeepSpeed load when an optimizer is made, and TensorBoard at the first log.
        *("torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer", "torch.utils.tensorboard"),
    ]
)


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


def run_ranks(file: str, function: str, *, world: int, **arguments: Any) -> list[Any]:
    os.environ["OMP_NUM_THREADS"] = "1"  # the server counts its threads once
    port = free_port()
    with tempfile.TemporaryDirectory() as scratch:
        outputs = [Path(scratch) / f"{rank}.json" for rank in range(world)]
        logs = [Path(scratch) / f"{rank}.log" for rank in range(world)]
        ranks = []
        for rank in range(world):
            environment = rank_environment(rank, world, port)
            call = (file, function, json.dumps(arguments), environment, str(outputs[rank]), str(logs[rank]))
            ranks.append(FORKS.Process(target=_be_rank, args=call))
            ranks[-1].start()
        for process in ranks:
            process.join()
        failed = [rank for rank, process in enumerate(ranks) if process.exitcode]
        if failed:
            tails = "\n".join(f"--- rank {r}\n{logs[r].read_text()[-3000:]}" for r in failed)
            raise AssertionError(f"ranks {failed} of {world} failed:\n{tails}")
        return [json.loads(output.read_text()) for output in outputs]


def run_command(*words: str, world: int) -> tuple[int, str]:
    """`bertscale WORDS` as so many ranks, without the supervisor that it has on a command line.

    Returns the exit code, which all ranks agree on, and what rank 0 said.
    """
    found = run_ranks(__file__, "_command", world=world, words=words)
    assert len({code for code, _ in found}) == 1, found
    return found[0][0], found[0][1]


def _command(words: list[str]) -> tuple[int, str]:
    from bertscale.cli import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = main(words)
        except SystemExit as end:
            code = int(end.code or 0)
    return code, said.getvalue()


def _be_rank(
    file: str, function: str, arguments: str, environment: dict[str, str], output: str, log: str
) -> None:
    with open(log, "w") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    sys.path.insert(0, TESTS)
    try:
        spec = importlib.util.spec_from_file_location("rank_module", file)
        assert spec is not None and spec.loader is not None  # noqa: PT018
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        result = getattr(module, function)(**json.loads(arguments))
        Path(output).write_text(json.dumps(result))
        import torch.distributed

        if torch.distributed.is_initialized():  # threads of a living group abort a process's end now and then
            torch.distributed.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
