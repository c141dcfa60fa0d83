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

from mamba_pretrain.config import ConfigError
from mamba_pretrain.distributed.meeting import CONNECT, SOMEONE_ELSE, meet

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
        """A block that all ranks end well, or none: where one raises, the others raise PeerError, as do those that
        raised the same as one before them, so that it is said once.

        There must be no other talk among ranks within the block.
        """
        mine: Exception | None = None
        try:
            yield
        except Exception as caught:
            mine = caught
        told = self.gather(None if mine is None else str(mine) or type(mine).__name__)
        if mine is not None and told.index(told[self.rank]) == self.rank:
            raise mine
        failed = [(rank, text) for rank, text in enumerate(told) if text is not None]
        if failed:
            raise PeerError(f"rank {failed[0][0]} of {self.world} failed: {failed[0][1]}") from mine


ALONE = Ranks()


def find_ranks(environ: Mapping[str, str] = os.environ) -> Ranks:
    """Reads what torchrun, the deepspeed CLI or srun put into the environment; without any of it, one process alone.

    Raises ConfigError for an environment that is incomplete or contradicts itself.
    """
    tasks = 1 if "RANK" in environ else _srun_tasks(environ)
    if "RANK" in environ or ("WORLD_SIZE" in environ and tasks == 1):  # torchrun, deepspeed, or set by hand
        _need(environ, "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        # torchrun's name and the deepspeed CLI's; set by hand it is mostly one host
        local_world = next((n for n in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if n in environ), "WORLD_SIZE")
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", local_world)
        rank, world, local, locals_ = (_integer(environ, name) for name in names)
        host, port = environ["MASTER_ADDR"], str(_integer(environ, "MASTER_PORT"))
    elif tasks > 1:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
        _need(environ, *names, "SLURM_NODEID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
        rank, world, local = (_integer(environ, name) for name in names[:3])
        locals_ = _tasks_on(environ[names[3]], _integer(environ, "SLURM_NODEID"))
        host = environ.get("MASTER_ADDR") or first_host(environ["SLURM_STEP_NODELIST"])
        # Jobs and steps that share a host differ in it; Linux gives ports from 32768 on to outgoing connections.
        port = str(20000 + (_integer(environ, "SLURM_JOB_ID") + 97 * _integer(environ, "SLURM_STEP_ID")) % 12000)
        port = environ.get("MASTER_PORT") or port
        if environ.get("WORLD_SIZE", str(world)) != str(world):
            raise ConfigError([f"WORLD_SIZE is {environ['WORLD_SIZE']}, and srun started {world} tasks: unset it"])
    elif "OMPI_COMM_WORLD_SIZE" in environ and _integer(environ, "OMPI_COMM_WORLD_SIZE") > 1:
        raise ConfigError(["mpirun started this: start with torchrun, deepspeed or srun, or set RANK and the like"])
    else:
        return Ranks()
    if not (0 <= rank < world and 0 <= local < locals_ <= world and local <= rank):
        said = ", ".join(f"{name}={environ.get(name)}" for name in names)
        raise ConfigError([f"the environment contradicts itself: {said}: rank {rank} of {world}, {local} of {locals_}"])
    if not 1 <= int(port) <= 65535:
        raise ConfigError([f"MASTER_PORT is {port}: ports go from 1 to 65535"])
    return Ranks(rank, world, local, locals_, f"{host}:{port}")


def _srun_tasks(environ: Mapping[str, str]) -> int:
    """Tasks of the srun that started this process; 1 where none did.

    SLURM_NTASKS is the whole job's in a batch script and in salloc's shell. Such shells may have a SLURM_STEP_ID too:
    Slurm keeps the numbers from 0xfffffff0 on for them.
    """
    if "SLURM_STEP_ID" not in environ or _integer(environ, "SLURM_STEP_ID") >= 0xFFFFFFF0:
        return 1
    return _integer(environ, "SLURM_STEP_NUM_TASKS")


@contextlib.contextmanager
def connected(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Connects the ranks (gloo for CPU tensors, NCCL for GPU tensors), and takes leave of them at the end.

    Raises ConfigError where the meeting point is taken or unreachable.
    """
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=meet(ranks.rank, ranks.world, ranks.master),
            rank=ranks.rank,
            world_size=ranks.world,
            timeout=CONNECT,
            device_id=device if device.type == "cuda" else None,
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        reason = " ".join(str(error).split())[:300]
        cure = "see that the address is right and reachable, and that every rank was started"
        if "EADDRINUSE" in reason or SOMEONE_ELSE in reason:
            cure = "another process listens there, perhaps an earlier run: end it, or choose another MASTER_PORT"
        raise ConfigError(
            [f"rank {ranks.rank} on {socket.gethostname()} cannot meet the others at {ranks.master}: {cure} ({reason})"]
        ) from error
    dist.distributed_c10d._set_pg_timeout(OPERATION)
    yield
    # Neither after an error: they would wait for ranks that wait for this one.
    ranks.sum(0)  # no rank's sockets close while another still talks
    dist.destroy_process_group()


def lost_contact(error: BaseException) -> bool:
    """Whether this is what a rank sees when another one has ended in the midst of an exchange."""
    signs = ("Connection closed by peer", "Connection reset by peer", "gloo/transport", "NCCL", "Broken pipe")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def first_host(nodelist: str) -> str:
    """The first host of Slurm's notation: gpu[07-09,12],login1 -> gpu07, rack[1-2]-ib -> rack1-ib."""
    head = re.match(r"(?:[^\[\],]|\[\d[^\[\]]*\])+", nodelist)
    if head is None:
        raise ConfigError([f"SLURM_STEP_NODELIST is {nodelist!r}: expected host names"])
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", head[0])


def _tasks_on(tasks: str, node: int) -> int:
    """Slurm's SLURM_STEP_TASKS_PER_NODE, as in 4(x2),3: tasks of node number `node`."""
    counts: list[int] = []
    for part in tasks.split(","):
        parsed = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if parsed is None:
            raise ConfigError([f"SLURM_STEP_TASKS_PER_NODE is {tasks!r}: expected numbers as in 4(x2),3"])
        counts += [int(parsed[1])] * int(parsed[2] or 1)
    if node >= len(counts):
        raise ConfigError([f"SLURM_NODEID is {node}, SLURM_STEP_TASKS_PER_NODE is {tasks}, {len(counts)} node(s)"])
    return counts[node]


def _need(environ: Mapping[str, str], *names: str) -> None:
    if missing := [name for name in names if not environ.get(name)]:
        raise ConfigError(
            [
                f"{', '.join(n for n in names if n not in missing)} are set in the environment, {', '.join(missing)} "
                "not: start with torchrun, deepspeed or srun, or set them all"
            ]
        )


def _integer(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "")
    if not value.isdecimal():
        raise ConfigError([f"{name} is {value!r} in the environment: expected a number"])
    return int(value)
