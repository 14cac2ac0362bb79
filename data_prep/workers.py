"""Worker processes that neither hang their parent nor outlive it.

with worker_pool(2) as pool:
    pool.submit(function, argument).result()
    for result in map_in_order(pool, 4, function, arguments):
        ...
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from bertscale.config import UserError

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def number_of_cores() -> int:
    """Cores that this process may use (a Slurm job or a container often has fewer than the machine)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of at most so many fresh processes (0: one for each core), no more than it has work for.

    When its block ends by an exception the workers are ended at once.

    Raises UserError if a worker died.
    """
    others = set(multiprocessing.active_children())
    # spawn: a fork of a process with threads (those of Arrow, say) can hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers or number_of_cores(), mp_context=context, initializer=_begin)
    try:
        yield pool
    except BaseException as error:
        for child in set(multiprocessing.active_children()) - others:
            child.kill()  # safe at any moment: files get their names only when they are whole
        pool.shutdown(cancel_futures=True)  # waits: the pool's thread and the interpreter's end would race
        if isinstance(error, BrokenProcessPool):
            raise UserError(
                "a prep worker was killed, most likely because memory ran out: use fewer workers or a "
                "smaller shard_bytes; the same command continues, finished work is kept"
            ) from error
        raise
    pool.shutdown()


def map_in_order(
    pool: ProcessPoolExecutor,
    ahead: int,
    function: Callable[[Argument], Result],
    arguments: Iterable[Argument],
) -> Iterator[Result]:
    """Like `map`, with up to `ahead` calls at work: `arguments` are taken, and results held, no further."""
    at_work = deque[Future[Result]]()
    for argument in arguments:
        at_work.append(pool.submit(function, argument))
        if len(at_work) == ahead:
            yield at_work.popleft().result()
    while at_work:
        yield at_work.popleft().result()


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent decides
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    """Ends this process when its parent is gone, which a pool never notices."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
