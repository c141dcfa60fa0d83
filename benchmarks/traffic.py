"""What ranks tell each other: operations, bytes and seconds, counted where every caller must pass.

DeepSpeed and FSDP2 reach gloo by different functions of torch.distributed (and another torch, by others), but each of
them ends in a method of ProcessGroup and in Work.wait. Those are what a Meter replaces. DTensor alone (FSDP2's gradient
norm, one number) goes by C++ from _functional_collectives: its time is taken there.

Bytes are those of the tensors, and what a rank sends of them is a ring's part: the least that any algorithm needs where
all ranks send alike. `tcp_bytes_sent` is what the system has seen, which depends on the backend: gloo's reduce-scatter
is an all-reduce of which the rest is thrown away.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

from mamba_pretrain.config import Config
from mamba_pretrain.model.flops import parameters_by_part

# What a rank sends of an operation's whole tensor, in parts (ranks - 1) / ranks.
RING = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "broadcast": 1, "reduce": 1, "all-to-all": 1, "other": 1}
# ProcessGroup's methods: the operation, and which argument is the whole tensor (or lists of its parts).
METHODS = {
    "allreduce": ("all-reduce", 0),
    "allreduce_coalesced": ("all-reduce", 0),
    "allgather": ("all-gather", 0),
    "allgather_coalesced": ("all-gather", 0),
    "allgather_into_tensor_coalesced": ("all-gather", 0),
    "all_gather_single": ("all-gather", 0),
    "all_gather_single_coalesced": ("all-gather", 0),
    "_allgather_base": ("all-gather", 0),
    "reduce_scatter": ("reduce-scatter", 1),
    "reduce_scatter_single": ("reduce-scatter", 1),
    "reduce_scatter_single_coalesced": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced": ("reduce-scatter", 1),
    "_reduce_scatter_base": ("reduce-scatter", 1),
    "broadcast": ("broadcast", 0),
    "reduce": ("reduce", 0),
    "alltoall": ("all-to-all", 1),
    "alltoall_base": ("all-to-all", 1),
    "all_to_all_single": ("all-to-all", 1),
    "gather": ("other", 0),
    "scatter": ("other", 1),
    "send": ("other", 0),
    "recv": ("other", 0),
    "barrier": ("other", 0),
}
FUNCTIONAL = ("all_reduce", "wait_tensor")


@dataclass
class Count:
    calls: int = 0
    tensor_bytes: int = 0
    sent: float = 0.0  # by this rank, on a ring


@dataclass
class Taken:
    """Since the last `take`."""

    seconds: float = 0.0  # in which this process could do nothing else
    operations: dict[str, Count] = field(default_factory=dict)

    @property
    def sent(self) -> float:
        return sum(count.sent for count in self.operations.values())


class Meter:
    """Counts while it is entered. One at a time; not for several threads that communicate."""

    def __init__(self) -> None:
        self.taken = Taken()
        self._put_back: list[tuple[Any, str, Any]] = []
        self._inside = False

    def take(self) -> Taken:
        taken, self.taken = self.taken, Taken()
        return taken

    def __enter__(self) -> Meter:
        for name, (kind, whole) in METHODS.items():
            if hasattr(dist.ProcessGroup, name):
                self._replace(dist.ProcessGroup, name, self._counted(kind, whole))
        self._replace(dist.Work, "wait", self._timed)
        for name in FUNCTIONAL:
            self._replace(functional, name, self._timed)
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, original in self._put_back:
            setattr(owner, name, original)
        self._put_back.clear()

    def _replace(self, owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        original = getattr(owner, name)
        # What lies in the class, not what getattr makes of it: a C++ method put back bare would no longer bind.
        self._put_back.append((owner, name, vars(owner).get(name, original)))
        setattr(owner, name, wrap(original))

    def _timed(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if self._inside:
                return original(*arguments, **named)
            self._inside, began = True, time.perf_counter()
            try:
                return original(*arguments, **named)
            finally:
                self.taken.seconds += time.perf_counter() - began
                self._inside = False

        return call

    def _counted(self, kind: str, whole: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            timed = self._timed(original)

            def call(group: Any, *arguments: Any, **named: Any) -> Any:
                size = tensor_bytes(arguments[whole]) if len(arguments) > whole else 0
                count = self.taken.operations.setdefault(kind, Count())
                count.calls += 1
                count.tensor_bytes += size
                count.sent += RING[kind] * size * (group.size() - 1) / group.size()
                return timed(group, *arguments, **named)

            return call

        return wrap


def tensor_bytes(value: Any) -> int:
    """Of a tensor, or of all in nested lists; of anything else 0."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(tensor_bytes, value)) if isinstance(value, list | tuple) else 0


def minimum(config: Config, world: int) -> float:
    """The least that a rank must send in one optimizer step, by what its engine's stage keeps on a rank; fp32 values.

    Stage 1 keeps whole gradients over the micro-batches; 2 and 3 keep only a part, so each micro-batch's must travel.
    Where parameters are sharded they are gathered for the forward and for the backward; those used at the forward's end
    and the backward's beginning (embedding, head, last norm) once. FSDP2 keeps whole gradients over micro-batches.
    ZeRO-3 sends less: it keeps its last two blocks gathered, too.
    """
    parts, micro_batches = parameters_by_part(config.model), config.accumulation(world)
    whole = 4 * sum(parts.values())
    root = 4 * sum(parts.get(name, 0) for name in ("embedding", "norm_f", "lm_head"))

    def once(ranks: int) -> float:
        return (ranks - 1) / ranks

    gathered = micro_batches * (2 * whole - root)
    match config.train.engine, config.zero.stage:
        case "single", _:
            return 0.0
        case "zero", 1:
            return once(world) * 2 * whole
        case "zero", 2:
            return once(world) * (micro_batches + 1) * whole
        case "zero", _:
            return once(world) * (gathered + micro_batches * whole)
    replicas = config.fsdp.replicas
    shards = world // replicas
    return once(shards) * (gathered + whole) + 2 * once(replicas) * whole / shards


def tcp_bytes_sent() -> int:
    """By this process's open TCP connections since they were made, as Linux counts them; 0 where it does not say."""
    return sum(_sent_by(descriptor) for descriptor in _sockets())


def _sockets() -> Iterable[int]:
    try:
        descriptors = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        return
    for descriptor in descriptors:
        try:
            if os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:"):
                yield descriptor
        except OSError:  # closed meanwhile
            continue


def _sent_by(descriptor: int) -> int:
    offset = 200  # of tcpi_bytes_sent in linux/tcp.h's struct tcp_info; the next is tcpi_bytes_retrans
    try:
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
                return 0
            told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    except OSError:
        return 0
    if len(told) < offset + 16:
        return 0
    sent, again = struct.unpack_from("=QQ", told, offset)
    return int(sent - again)
