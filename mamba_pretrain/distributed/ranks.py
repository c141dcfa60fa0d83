"""Which process of how many this is, found in one place for every launcher, and what the processes tell each other.

All talk here is small and on the CPU (gloo): counts, flags, names. Tensors travel through the engines.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from mamba_pretrain.config import ConfigError

CONNECT = timedelta(minutes=5)  # for all ranks to find each other
# A rank that hangs is the watchdog's to report, with everyone's stacks; this is for what it does not see.
OPERATION = timedelta(hours=2)


class PeerError(RuntimeError):
    """Another rank failed; the message says which, and why."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run. One process alone needs no connection: then everything here is a no-op."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0  # among the processes of this host
    local_world: int = 1
    master: str = ""  # HOST:PORT where they meet

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """The sums over all ranks, in double precision."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def gather(self, value: Any) -> list[Any]:
        """Everyone's value, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A block that all ranks end well, or none: where one raises, the others raise PeerError.

        There must be no other talk among ranks within the block.
        """
        mine: Exception | None = None
        try:
            yield
        except Exception as caught:
            mine = caught
        told = self.gather(None if mine is None else str(mine) or type(mine).__name__)
        if mine is not None:
            raise mine
        failed = [(rank, text) for rank, text in enumerate(told) if text is not None]
        if failed:
            raise PeerError(f"rank {failed[0][0]} of {self.world} failed: {failed[0][1]}")


ALONE = Ranks()


def find_ranks(environ: Mapping[str, str] = os.environ) -> Ranks:
    """Reads what torchrun, the deepspeed CLI or srun put into the environment; without any of it, one process alone.

    Raises ConfigError for an environment that is incomplete or contradicts itself.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:  # torchrun, deepspeed, or set by hand
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        if missing := [name for name in names if name not in environ]:
            raise ConfigError(
                [
                    f"{', '.join(n for n in names if n in environ)} are set in the environment, {', '.join(missing)} "
                    "not: start with torchrun, deepspeed or srun, or set them all"
                ]
            )
        rank, world, local = (_integer(environ, name) for name in names[:3])
        # torchrun's name and the deepspeed CLI's; set by hand it is mostly one host
        local_world = next((n for n in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if n in environ), "WORLD_SIZE")
        master = f"{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}"
        ranks = Ranks(rank, world, local, _integer(environ, local_world), master)
    elif "SLURM_STEP_ID" in environ and _integer(environ, "SLURM_NTASKS") > 1 and "SLURM_PROCID" in environ:  # srun
        tasks = environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", "1"))
        node = int(environ.get("SLURM_NODEID", "0"))
        host = environ.get("MASTER_ADDR") or first_host(environ.get("SLURM_STEP_NODELIST", environ["SLURM_NODELIST"]))
        port = environ.get("MASTER_PORT") or str(20000 + _integer(environ, "SLURM_JOB_ID") % 20000)
        ranks = Ranks(
            _integer(environ, "SLURM_PROCID"),
            _integer(environ, "SLURM_NTASKS"),
            _integer(environ, "SLURM_LOCALID"),
            _tasks_on(tasks, node),
            f"{host}:{port}",
        )
    else:
        return Ranks()
    if not 0 <= ranks.rank < ranks.world or not 0 <= ranks.local_rank < ranks.local_world:
        raise ConfigError([f"the environment says rank {ranks.rank} of {ranks.world}, local {ranks.local_rank}"])
    return ranks


@contextlib.contextmanager
def connected(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Connects the ranks (gloo for CPU tensors, NCCL for GPU tensors), and takes leave of them at the end.

    Raises ConfigError where the meeting point is taken or unreachable.
    """
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=_store(ranks),
            rank=ranks.rank,
            world_size=ranks.world,
            timeout=CONNECT,
            device_id=device if device.type == "cuda" else None,
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        reason = " ".join(str(error).split())[:300]
        cure = "see that the address is right and reachable, and that every rank was started"
        if "EADDRINUSE" in reason or "in use" in reason:
            cure = "another process listens there, perhaps an earlier run: end it, or choose another MASTER_PORT"
        raise ConfigError(
            [f"rank {ranks.rank} on {socket.gethostname()} cannot meet the others at {ranks.master}: {cure} ({reason})"]
        ) from error
    dist.distributed_c10d._set_pg_timeout(OPERATION)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _store(ranks: Ranks) -> Store:
    if ranks.world == 1:
        return HashStore()
    host, _, port = ranks.master.rpartition(":")
    # torchrun's agent serves one that outlives the ranks; elsewhere rank 0 does.
    serve = ranks.first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = TCPStore(host, int(port), ranks.world, serve, timeout=CONNECT, wait_for_workers=False)
    return PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def first_host(nodelist: str) -> str:
    """The first host of Slurm's notation: gpu[07-09,12],login1 -> gpu07."""
    head = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodelist)
    if head is None:
        raise ConfigError([f"SLURM_STEP_NODELIST is {nodelist!r}: expected host names"])
    return head[1] + (head[2] or "")


def _tasks_on(tasks: str, node: int) -> int:
    """Slurm's SLURM_STEP_TASKS_PER_NODE, as in 4(x2),3: tasks of node number `node`."""
    counts: list[int] = []
    for part in tasks.split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts[node] if node < len(counts) else counts[0]


def _integer(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "")
    if not value.isdecimal():
        raise ConfigError([f"{name} is {value!r} in the environment: expected a number"])
    return int(value)
