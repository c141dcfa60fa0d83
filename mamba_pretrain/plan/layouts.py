"""The ways to lay a run out on N GPUs, what each needs, and the cheapest that fits."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mamba_pretrain.config import Config, ConfigError, validate
from mamba_pretrain.plan.gpus import GPU
from mamba_pretrain.plan.memory import PARTS, Moment, peak
from mamba_pretrain.plan.roofline import Assumptions, StepTime, step_time

# What the model of memory leaves out: CUDA's context, NCCL's and cuBLAS's buffers; and the allocator's fragments and
# the model's own error, as a part of the peak. Assumed.
RESERVED_BYTES = 2 * 2**30
MARGIN = 0.1
MICRO_BATCHES = 64  # rows; larger ones are not tried
NOT_OFFLOADED = {"zero.offload_optimizer": False, "zero.offload_parameters": False, "fsdp.offload": False}


@dataclass(frozen=True)
class Layout:
    """One way, with everything it costs."""

    options: dict[str, Any]  # dotted names, as on the command line
    moment: str  # when memory peaks
    memory: Moment
    time: StepTime
    fits: bool
    days: float
    gpu_hours: float

    @property
    def bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def words(self) -> str:
        unsaid = (name for name, value in NOT_OFFLOADED.items() if self.options.get(name) == value)
        shown = {name: self.options[name] for name in self.options.keys() - set(unsaid)}
        return " ".join(f"{name}={str(shown[name]).lower()}" for name in self.options if name in shown)

    def to_json(self) -> dict[str, Any]:
        time = {**vars(self.time), "total": self.time.total}
        memory = {name: self.memory[name] for name in PARTS} | {"total": self.bytes}
        return {
            "options": self.options,
            "fits": self.fits,
            "peak_at": self.moment,
            "memory_bytes": memory,
            "step": time,
            "days": self.days,
            "gpu_hours": self.gpu_hours,
        }


def divided(config: Config, world: int) -> Config:
    """With the largest micro-batch, up to the configuration's own, that divides the batch on `world` GPUs, if any."""
    engine = {"train.engine": "single" if world == 1 else "zero"}
    for rows in reversed(_divisors(config.sequences_per_step // world) if config.sequences_per_step >= world else []):
        fitting = _with(config, {"train.micro_batch_size": rows})
        if rows <= config.train.micro_batch_size and not validate(_with(fitting, engine), world):
            return fitting
    return config


def compare(config: Config, world: int, gpu: GPU, assume: Assumptions) -> list[Layout]:
    """Every engine and stage, with and without checkpointing, at the configuration's micro-batch.

    Raises ConfigError where the batch cannot be divided so: `divided` makes it.
    """
    problems = validate(_with(config, {"train.engine": "single" if world == 1 else "zero"}), world)
    if problems:
        if config.sequences_per_step % world:
            problems.append(
                f"{config.sequences_per_step} sequences a step cannot be divided over {world} GPUs, whatever the "
                "micro-batch: change train.batch_tokens or --gpus"
            )
        raise ConfigError(problems)
    rows = {"train.micro_batch_size": config.train.micro_batch_size}
    return [
        _layout(config, engine | {"train.activation_checkpointing": again} | rows, world, gpu, assume)
        for engine in (_offloaded(config, engine) for engine in _engines(world, assume.gpus_per_node))
        for again in (False, True)
    ]


def cheapest(config: Config, world: int, gpu: GPU, assume: Assumptions) -> Layout | None:
    """The fastest layout that fits, over all engines, group sizes and micro-batches; None if none does."""
    sequences = config.sequences_per_step // world
    ways = [
        {**NOT_OFFLOADED, **engine, "train.activation_checkpointing": again, "train.micro_batch_size": micro_batch}
        for engine in (*_engines(world, assume.gpus_per_node), *_rarer_engines(world))
        for again in (False, True)
        for micro_batch in _divisors(sequences)
        if micro_batch <= MICRO_BATCHES
    ]
    found = [_layout(config, way, world, gpu, assume) for way in ways if not validate(_with(config, way), world)]
    return min(
        (layout for layout in found if layout.fits), key=lambda layout: (layout.time.total, layout.bytes), default=None
    )


def kernels_of(config: Config) -> str:
    """What the memory is computed for: `auto` takes cuda first."""
    return "cuda" if config.train.kernels == "auto" else config.train.kernels


def _engines(world: int, gpus_per_node: int) -> Iterator[dict[str, Any]]:
    if world == 1:
        yield {"train.engine": "single"}
        return
    for stage in (1, 2, 3):
        yield {"train.engine": "zero", "zero.stage": stage}
    yield {"train.engine": "fsdp", "fsdp.replicas": 1}
    if world > gpus_per_node and world % gpus_per_node == 0:
        yield {"train.engine": "fsdp", "fsdp.replicas": world // gpus_per_node}


def _offloaded(config: Config, engine: dict[str, Any]) -> dict[str, Any]:
    """With the configuration's offloading, as far as this engine and stage have it."""
    names = {"fsdp": ["fsdp.offload"], "zero": ["zero.offload_optimizer"]}.get(engine["train.engine"], [])
    names += ["zero.offload_parameters"] if engine.get("zero.stage") == 3 else []
    wanted = {name: True for name in names if getattr(getattr(config, name.split(".")[0]), name.split(".")[1])}
    return {**NOT_OFFLOADED, **engine, **wanted}


def _rarer_engines(world: int) -> Iterator[dict[str, Any]]:
    if world == 1:
        yield {"train.engine": "zero", "zero.stage": 2, "zero.offload_optimizer": True}
        return
    for replicas in _divisors(world):
        yield {"train.engine": "fsdp", "fsdp.replicas": replicas, "fsdp.reshard_after_forward": True}
        yield {"train.engine": "fsdp", "fsdp.replicas": replicas, "fsdp.reshard_after_forward": False}
    for stage in (2, 3):
        yield {"train.engine": "zero", "zero.stage": stage, "zero.offload_optimizer": True}
    yield {"train.engine": "fsdp", "fsdp.replicas": 1, "fsdp.offload": True}


def _layout(config: Config, options: dict[str, Any], world: int, gpu: GPU, assume: Assumptions) -> Layout:
    this = _with(config, options)
    moment, memory = peak(this, world, kernels_of(config))
    time = step_time(this, world, gpu, assume)
    seconds = time.total * this.steps
    fits = sum(memory.values()) * (1 + MARGIN) + RESERVED_BYTES <= gpu.memory
    return Layout(options, moment, memory, time, fits, seconds / 86400, seconds / 3600 * world)


def _with(config: Config, options: dict[str, Any]) -> Config:
    changed = copy.deepcopy(config)
    for name, value in options.items():
        section, field = name.split(".")
        setattr(getattr(changed, section), field, value)
    return changed


def _divisors(number: int) -> list[int]:
    small = [i for i in range(1, math.isqrt(number) + 1) if number % i == 0]
    return sorted({*small, *(number // i for i in small)})
