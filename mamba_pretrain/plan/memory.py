"""Bytes on one rank at each moment of a step where memory can peak.

Read from the engines' code and from DeepSpeed 0.19.8 and FSDP2 of torch 2.13; tests hold it against traces and against
real processes. Everything that engines keep and send is fp32. P: all parameters, s: the ranks that share one copy.
"""

from __future__ import annotations

from mamba_pretrain.config import Config
from mamba_pretrain.model.flops import parameters_by_part
from mamba_pretrain.plan.activations import MicroBatch, micro_batch

# What one moment holds, in the order of a table's columns.
PARTS = ("parameters", "gradients", "optimizer", "gathered", "activations", "casts", "states", "loss")
Moment = dict[str, int]


def peak(config: Config, world: int, kernels: str) -> tuple[str, Moment]:
    """The moment that needs most, by name, and its parts."""
    return max(moments(config, world, kernels).items(), key=lambda item: sum(item[1].values()))


def shards(config: Config, world: int) -> int:
    """The ranks over which one copy of the optimizer's state is cut."""
    return {"single": 1, "zero": world, "fsdp": world // config.fsdp.replicas}[config.train.engine]


def moments(config: Config, world: int, kernels: str) -> dict[str, Moment]:
    """By name: the end of the last micro-batch's forward, its backward's begin, first block and end, the update."""
    held, layers = micro_batch(config, kernels), config.model.need("n_layer")
    saved = _saved(held, layers, config.train.activation_checkpointing)
    engine = {"single": _single, "zero": _zero, "fsdp": _fsdp}[config.train.engine]
    resident, during = engine(config, world, held)
    return {name: dict.fromkeys(PARTS, 0) | resident | _sum(during[name], saved.get(name, {})) for name in during}


def _saved(held: MicroBatch, layers: int, checkpointing: bool) -> dict[str, Moment]:
    """What autograd holds, whatever the engine. Autocast keeps its casts to the end of the forward, even those of
    blocks that are run again."""
    every = {"activations": layers * held.block + held.final, "states": layers * held.states}
    if checkpointing:
        every = {"activations": layers * held.boundary + held.final}
        one = {"activations": held.block + held.working, "states": held.states, "casts": held.casts}
    else:
        one = {"activations": held.working, "casts": layers * held.casts}
    casts = {"casts": layers * held.casts}
    return {
        "forward": every | casts | {"loss": held.loss_forward},
        "backward": every | ({} if checkpointing else casts) | {"loss": 2 * held.loss_kept},
        "block": _sum(every | {"loss": held.loss_kept}, one),
    }


def _single(config: Config, world: int, held: MicroBatch) -> tuple[Moment, dict[str, Moment]]:
    p = 4 * sum(parameters_by_part(config.model).values())
    before = p if config.accumulation(world) > 1 else 0
    tied = held.head if config.model.tie_embeddings else 0
    during = {name: {"gradients": before} for name in ("forward", "backward", "block")}
    # At the end two gradients of the embedding and their sum.
    end = {"gradients": p + 2 * tied + (held.head if before else 0)}
    return {"parameters": p, "optimizer": 2 * p}, during | {"end": end, "update": {"gradients": p}}


def _fsdp(config: Config, world: int, held: MicroBatch) -> tuple[Moment, dict[str, Moment]]:
    parts, options = parameters_by_part(config.model), config.fsdp
    p, s, layers = 4 * sum(parts.values()), shards(config, world), config.model.need("n_layer")
    root = 4 * sum(parts.get(name, 0) for name in ("embedding", "norm_f", "lm_head"))
    block = (p - root) // layers
    # Reduced only at the last micro-batch, gradients pile up whole. A block's are copied once to be reduced.
    before = p if config.accumulation(world) > 1 else 0
    tied = held.head if config.model.tie_embeddings else 0
    whole = p - root if not options.reshard_after_forward else 0
    working = whole or min(layers, 1 + options.prefetch) * block
    last = max(root + 2 * tied + (root if before else 0), 2 * root)  # of the root: summed up; copied to be reduced
    during = {
        "forward": {"gradients": before, "gathered": root + whole},
        "backward": {"gradients": before, "gathered": root + whole},
        "block": {"gradients": before + 2 * block, "gathered": root + working},
        "end": {"gradients": (p - root) // s + last, "gathered": root},
        "update": {"gradients": p // s},
    }
    if options.offload:
        return {}, during | {"update": {}, "end": {"gradients": 3 * root, "gathered": root}}
    return {"parameters": p // s, "optimizer": 2 * p // s}, during


def _zero(config: Config, world: int, held: MicroBatch) -> tuple[Moment, dict[str, Moment]]:
    parts, options = parameters_by_part(config.model), config.zero
    p, layers = 4 * sum(parts.values()), config.model.need("n_layer")
    part = p // world
    bucket = prefetch = 4 * 50_000_000  # of gradients; of parameters
    accumulates = config.accumulation(world) > 1
    tied = 2 * held.head if config.model.tie_embeddings else 0
    if options.stage == 3:
        root = 4 * sum(parts.get(name, 0) for name in ("embedding", "norm_f", "lm_head"))
        block = (p - root) // layers
        live = root + min(p - root, max(block, prefetch) + block)
        resident = {"parameters": part, "optimizer": 2 * part, "gathered": bucket}
        during = {
            "forward": {"gradients": part, "gathered": live},
            "backward": {"gradients": part, "gathered": live},
            "block": {"gradients": part + block, "gathered": live},
            "end": {"gradients": part + held.head + tied, "gathered": root},
            "update": {"gradients": 2 * part},
        }
        return resident, during
    resident = {"parameters": p, "optimizer": 3 * part}
    if options.stage == 1:
        before = p if accumulates else 0
        during = {name: {"gradients": before} for name in ("forward", "backward", "block")}
        during["end"] = {"gradients": p + tied + (held.head if accumulates else 0)}
        during["reduce"] = {"gradients": p + part, "gathered": 2 * bucket}
    else:
        before = part if accumulates else 0
        during = {name: {"gradients": before} for name in ("forward", "backward")}
        during["block"] = {"gradients": before + part, "gathered": 2 * bucket}
        during["end"] = {"gradients": before + part + held.head + tied, "gathered": bucket}
    during["update"] = {"gradients": 2 * part}
    return resident, during


def _sum(a: Moment, b: Moment) -> Moment:
    return {name: a.get(name, 0) + b.get(name, 0) for name in a | b}
