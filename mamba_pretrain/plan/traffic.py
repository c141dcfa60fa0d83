"""Bytes that each rank sends in one optimizer step."""

from __future__ import annotations

from typing import NamedTuple

from mamba_pretrain.config import Config
from mamba_pretrain.model.flops import parameters_by_part
from mamba_pretrain.plan.memory import root_and_block, shards, zero3_keeps

RINGS = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}  # times (ranks - 1) / ranks of the tensor's bytes


class Collective(NamedTuple):
    """One tensor's bytes, moved `times` a step among `ranks`; `stride` apart in the order of ranks."""

    what: str
    kind: str
    tensor_bytes: int
    ranks: int
    stride: int
    times: int
    overlaps: bool  # with computation

    @property
    def sent(self) -> float:
        """Bytes by one rank in one step, on a ring."""
        return RINGS[self.kind] * self.tensor_bytes * (self.ranks - 1) / self.ranks * self.times


def host_copies(config: Config, world: int) -> float:
    """Bytes of offloaded parameters that a rank copies to its GPU in one step; the optimizer's are not among them."""
    p = 4 * sum(parameters_by_part(config.model).values()) / shards(config, world)
    if config.train.engine == "fsdp" and config.fsdp.offload:
        return p * config.accumulation(world) * (2 if config.fsdp.reshard_after_forward else 1)
    if config.train.engine == "zero" and config.zero.stage == 3 and config.zero.offload_parameters:
        return 2 * p * config.accumulation(world)
    return 0.0


def collectives(config: Config, world: int) -> list[Collective]:
    """What the engines exchange, all of it in fp32; norms and flags are left out."""
    micro_batches, engine, s = config.accumulation(world), config.train.engine, shards(config, world)
    p = 4 * sum(parameters_by_part(config.model).values())
    if engine == "single" or world == 1:
        return []
    if engine == "zero" and config.zero.stage < 3:
        # Each part of a bucket is reduced to its owner, which is as much as a reduce-scatter; stage 2 keeps no whole
        # gradients, so it does so for each micro-batch. Without overlap_comm, which is stage 3's default only.
        times = micro_batches if config.zero.stage == 2 else 1
        return [
            Collective("gradients", "reduce-scatter", p, world, 1, times, False),
            Collective("parameters", "all-gather", p, world, 1, 1, False),
        ]
    root, block = root_and_block(config)
    if engine == "zero":
        # The block before those that are kept is not freed either: the prefetcher, looking ahead, finds it gathered.
        kept = min(p, root + zero3_keeps(config, world) + block)
        found = [
            Collective("parameters", "all-gather", p, world, 1, micro_batches, True),
            Collective("parameters again", "all-gather", p - kept, world, 1, micro_batches, True),
            Collective("gradients", "reduce-scatter", p, world, 1, micro_batches, True),
        ]
    else:
        gathers = 2 if config.fsdp.reshard_after_forward else 1
        found = [
            Collective("embedding", "all-gather", root, s, 1, micro_batches, True),
            Collective("blocks", "all-gather", p - root, s, 1, gathers * micro_batches, True),
            Collective("gradients", "reduce-scatter", p, s, 1, 1, True),
            Collective("gradients of replicas", "all-reduce", p // s, world // s, s, 1, True),
        ]
    return [c for c in found if c.sent]
