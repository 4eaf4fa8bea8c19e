"""Run a function in several local processes that form a gloo group, and collect what each returns."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from autopar.errors import AutoparError, RuntimeFault
from autopar.runtime.world import leave, lost

PRELOAD = ["torch", "torch.distributed.fsdp", "torch.distributed.pipelining", "autopar.runtime.engine"]


def spawn(function: Callable[..., Any], ranks: int, *args: Any, timeout: float = 120.0, threads: int = 1) -> list[Any]:
    """Call ``function(*args)`` on every rank; returns the results in rank order.

    ``function`` must be importable, arguments and results picklable. Processes are forked from a server that has torch
    loaded already, so each takes milliseconds to start. An AutoparError of a rank is raised here; anything else, a rank
    that dies, or ``timeout`` seconds passing raises RuntimeFault with the rank's traceback. No process is left behind.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        try:
            for rank in range(ranks):
                mine, theirs = context.Pipe(duplex=False)
                call = (f"{folder}/store", rank, ranks, threads, theirs, function, args)
                process = context.Process(target=_rank, args=call, daemon=True)
                process.start()
                theirs.close()
                pipes.append(mine)
                processes.append(process)
            return _collect(pipes, processes, timeout)
        finally:
            _end(processes)


def _rank(
    store: str,
    rank: int,
    ranks: int,
    threads: int,
    pipe: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(threads)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=FileStore(store, ranks), rank=rank, world_size=ranks)
    status = 1
    try:
        pipe.send_bytes(pickle.dumps(("done", function(*args))))  # plain bytes: torch would share memory
        status = 0
    except AutoparError as error:
        pipe.send_bytes(pickle.dumps(("wrong", error)))
    except BaseException:
        pipe.send_bytes(pickle.dumps(("failed", traceback.format_exc())))
    finally:
        pipe.close()
        leave(status)


def _collect(pipes: list[Connection], processes: list[ForkServerProcess], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    failure: tuple[int, str] | None = None
    while len(results) < len(pipes) and failure is None:
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RuntimeFault(f"ranks {sorted(waiting.values())} of {len(pipes)} gave no result in {timeout:.0f} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting[pipe]
            kind: str
            value: Any
            try:
                kind, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                processes[rank].join(5)
                kind, value = "failed", f"it died with exit status {processes[rank].exitcode}"
            if kind == "wrong":
                raise value
            if kind == "failed" and (failure is None or lost(failure[1])):
                failure = (rank, value)
            results[rank] = value
    if failure is not None:
        raise RuntimeFault(f"rank {failure[0]} of {len(pipes)} failed: {failure[1]}")
    return [results[rank] for rank in range(len(pipes))]


def _end(processes: list[ForkServerProcess]) -> None:
    for process in processes:
        process.join(2 if process.exitcode is None else 0)
        if process.is_alive():
            process.kill()
            process.join()
