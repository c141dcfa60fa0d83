"""Real ranks for tests: processes forked from this one, which has paid for the imports already, over gloo."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - it imports torch._inductor, in every rank otherwise
import torch
import torch.distributed.fsdp

from mamba_pretrain.distributed.ranks import connected, find_ranks

torch.set_num_threads(1)  # a parent with threads must not fork


class RankError(AssertionError):
    """A rank raised, died or did not end."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun would set on one host."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def on_ranks(world: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 120) -> list[Any]:
    """`function(ranks, *arguments)` on `world` connected ranks; its results by rank. RankError has a traceback."""

    def connected_call(*values: Any) -> Any:
        ranks = find_ranks()
        with connected(ranks, torch.device("cpu")):
            return function(ranks, *values)

    return in_processes(world, connected_call, *arguments, timeout_s=timeout_s)


def exit_codes(world: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 60) -> list[int | None]:
    """How `world` forked processes ended that called `function(*arguments)`: 1 an exception, -9 killed, None not yet.

    Their environment is a launcher's, as in `in_processes`; those that have not ended by then are killed.
    """
    context, port = multiprocessing.get_context("fork"), free_port()

    def work(rank: int) -> None:
        os.environ.update(environment(rank, world, port))
        sys.exit(function(*arguments))

    processes = [context.Process(target=work, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def in_processes(world: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 120) -> list[Any]:
    """`function(*arguments)` in `world` forked processes with a launcher's environment, not connected yet."""
    context = multiprocessing.get_context("fork")
    queue: Any = context.SimpleQueue()
    port = free_port()

    def work(rank: int) -> None:
        os.environ.update(environment(rank, world, port))
        try:
            queue.put((rank, True, pickle.dumps(function(*arguments))))  # not torch's own, which shares memory
        except BaseException:
            queue.put((rank, False, traceback.format_exc()))

    processes = [context.Process(target=work, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    try:
        while len(results) < world:
            if not queue.empty():
                rank, well, value = queue.get()
                if not well:
                    raise RankError(f"rank {rank}:\n{value}")
                results[rank] = pickle.loads(value)
            elif time.monotonic() > deadline:
                raise RankError(f"after {timeout_s} s only ranks {sorted(results)} of {world} have ended")
            elif any(p.exitcode not in (None, 0) for p in processes) and queue.empty():
                raise RankError(f"exit codes {[p.exitcode for p in processes]}")
            else:
                time.sleep(0.01)
        for process in processes:
            process.join(10)
    finally:
        for process in processes:
            process.kill()
    return [results[rank] for rank in range(world)]
