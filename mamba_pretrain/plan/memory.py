"""Bytes on one rank at each moment of a step where memory can peak.

Read from the engines' code and from DeepSpeed 0.19.8 and FSDP2 of torch 2.13; tests hold it against traces and against
real processes. Everything that engines keep and send is fp32. P: all parameters, s: the ranks that share one copy.
"""

from __future__ import annotations

from mamba_pretrain.config import Config
from mamba_pretrain.distributed.zero import deepspeed_config
from mamba_pretrain.model.flops import parameters_by_part
from mamba_pretrain.plan.activations import MicroBatch, micro_batch

# What one moment holds, in the order of a table's columns.
PARTS = ("parameters", "gradients", "optimizer", "gathered", "buckets", "activations", "casts", "states", "loss")
Moment = dict[str, int]


def peak(config: Config, world: int, kernels: str) -> tuple[str, Moment]:
    """The moment that needs most, by name, and its parts."""
    return max(moments(config, world, kernels).items(), key=lambda item: sum(item[1].values()))


def shards(config: Config, world: int) -> int:
    """The ranks over which one copy of the optimizer's state is cut."""
    return {"single": 1, "zero": world, "fsdp": world // config.fsdp.replicas}[config.train.engine]


def moments(config: Config, world: int, kernels: str) -> dict[str, Moment]:
    """By name: the end of the last micro-batch's forward, its backward's begin, its first block, the first reduction
    within it, its end, the update."""
    held = micro_batch(config, kernels)
    engine = {"single": _single, "zero": _zero, "fsdp": _fsdp}[config.train.engine]
    resident, during = engine(config, world, held)
    saved = _saved(config, held, kernels)
    return {
        name: dict.fromkeys(PARTS, 0) | _sum(resident, _sum(engine_holds, saved.get(name, {})))
        for name, engine_holds in during.items()
    }


def _saved(config: Config, held: MicroBatch, kernels: str) -> dict[str, Moment]:
    """What autograd holds. With the weights' casts, of which under ZeRO-3 DeepSpeed's own F.linear, which replaces
    torch's, keeps none."""
    layers, zero3 = config.model.need("n_layer"), config.train.engine == "zero" and config.zero.stage == 3
    casts = 0 if zero3 and kernels != "cuda" else held.casts
    every = {"activations": layers * held.block + held.final, "states": layers * held.states, "casts": layers * casts}
    later, one = every, {"activations": held.working}
    if config.train.activation_checkpointing:
        every = later = {"activations": layers * held.boundary + held.final}
        one = {"activations": held.block + held.working, "states": held.states, "casts": casts}
    found = {
        "forward": _sum(every, {"loss": held.loss_forward}),
        "backward": _sum(later, {"loss": 2 * held.loss_kept}),
        "block": _sum(_sum(later, {"loss": held.head, "activations": -held.final}), one),
    }
    if config.train.engine == "zero":  # the first bucket is full when this part of the blocks is left
        bucket = 4 * int(deepspeed_config(config, 1)["zero_optimization"]["reduce_bucket_size"])
        left = max(0.0, 1 - bucket / (layers * root_and_block(config)[1]))
        found["reduce"] = {name: int(left * size) for name, size in later.items()} | {"loss": held.head}
    return found


def _single(config: Config, world: int, held: MicroBatch) -> tuple[Moment, dict[str, Moment]]:
    p = 4 * sum(parameters_by_part(config.model).values())
    before = p if config.accumulation(world) > 1 else 0
    tied = held.head if config.model.tie_embeddings else 0
    during = {name: {"gradients": before} for name in ("forward", "backward", "block")}
    # At the end two gradients of the embedding and their sum.
    end = {"gradients": p + 2 * tied + (held.head if before else 0)}
    return {"parameters": p, "optimizer": 2 * p}, during | {"end": end, "update": {"gradients": p}}


def _fsdp(config: Config, world: int, held: MicroBatch) -> tuple[Moment, dict[str, Moment]]:
    options, layers = config.fsdp, config.model.need("n_layer")
    p, part = 4 * sum(parameters_by_part(config.model).values()), 4 * _ceil(config, shards(config, world))
    root, block = root_and_block(config)
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
        "end": {"gradients": (p - root) * part // p + last, "gathered": root},
        "update": {"gradients": part},
    }
    if options.offload:
        return {}, during | {"update": {}, "end": {"gradients": 3 * root, "gathered": root}}
    return {"parameters": part, "optimizer": 2 * part}, during


def _zero(config: Config, world: int, held: MicroBatch) -> tuple[Moment, dict[str, Moment]]:
    """DeepSpeed keeps an fp32 copy of its part of the parameters beside them, though both are fp32. Gradients are
    moved to a bucket of fixed size, and copied once more when it is full, to be reduced. What is offloaded is left out.
    """
    p, part = 4 * sum(parameters_by_part(config.model).values()), 4 * _ceil(config, world)
    derived = deepspeed_config(config, world)["zero_optimization"]
    bucket, stage = 4 * int(derived["reduce_bucket_size"]), config.zero.stage
    mine = 0 if config.zero.offload_optimizer else part  # of one of Adam's tensors, on the device
    copied = min(bucket, p)
    tied = 2 * held.head if config.model.tie_embeddings else 0
    again = held.head if config.accumulation(world) > 1 else 0
    if stage == 3:
        root, block = root_and_block(config)
        kept = zero3_keeps(config, world)
        ahead = min(p - root - kept, 4 * int(derived["stage3_prefetch_bucket_size"]) + block)
        during = {
            "forward": {"gathered": root + kept},
            "backward": {"gathered": root + kept + ahead},
            "block": {"gathered": root + kept + ahead, "gradients": block},
            "reduce": {"gathered": root + kept + ahead, "gradients": copied},
            "end": {"gathered": root, "gradients": held.head + tied},
            "update": {"gradients": mine},
        }
        parameters = 0 if config.zero.offload_parameters else part
        return {"parameters": parameters, "optimizer": 3 * mine, "gradients": mine, "buckets": bucket}, during
    # Stage 1 reduces whole gradients after the last micro-batch, stage 2 bucket by bucket in every backward.
    # A parameter that lies in several ranks' parts has its reduced gradient whole on each: the embedding, most of all.
    reduced = part + held.head - held.head % part if mine else 0
    before = {1: p, 2: reduced}[stage] if again else 0
    during = {name: {"gradients": before} for name in ("forward", "backward")}
    during["block"] = {"gradients": before, "buckets": bucket}
    if stage == 1:
        if again:  # the bucket is made at the first gradient, and freed by the reduction
            during["forward"] = during["backward"] = during["block"]
        during["end"] = {"gradients": p + tied + again, "buckets": bucket}
        during["reduced"] = {"gradients": p + reduced, "buckets": bucket}
    else:
        during["reduce"] = {"gradients": before + reduced, "buckets": bucket + copied}
        during["end"] = {"gradients": before + reduced + held.head + tied, "buckets": bucket}
    during["update"] = {"gradients": reduced + mine}
    staging = 0 if mine else held.head  # on the way to the CPU, a buffer for the largest gradient
    return {"parameters": p, "optimizer": 3 * mine, "buckets": staging}, during


def zero3_keeps(config: Config, world: int) -> int:
    """Bytes of gathered blocks that wait for the backward: DeepSpeed keeps what is used again before so many elements
    of others are. Those of a block are all that follow it, twice."""
    derived = deepspeed_config(config, world)["zero_optimization"]
    _, block = root_and_block(config)
    reuse = 4 * int(derived.get("stage3_max_reuse_distance", 10**9))
    return min(block * config.model.need("n_layer"), reuse // 2)


def _ceil(config: Config, ranks: int) -> int:
    return -(-sum(parameters_by_part(config.model).values()) // ranks)


def root_and_block(config: Config) -> tuple[int, int]:
    """fp32 bytes of what the root of a sharded model holds, and of one block."""
    parts = parameters_by_part(config.model)
    root = sum(parts.get(name, 0) for name in ("embedding", "norm_f", "lm_head"))
    return 4 * root, 4 * (sum(parts.values()) - root) // config.model.need("n_layer")


def _sum(a: Moment, b: Moment) -> Moment:
    return {name: a.get(name, 0) + b.get(name, 0) for name in a | b}
