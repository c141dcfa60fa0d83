"""The time of a step as a roofline: what must be computed, read and sent, over data-sheet peaks times efficiencies.

The efficiencies are assumptions, none is a measurement: replace them by what a profile of the run shows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mamba_pretrain.config import Config
from mamba_pretrain.model.flops import forward_flops_by_part, parameters_by_part, training_flops_per_token
from mamba_pretrain.plan.gpus import GPU
from mamba_pretrain.plan.memory import shards
from mamba_pretrain.plan.traffic import Collective, collectives, host_copies


@dataclass(frozen=True)
class Assumptions:
    """Fractions of the peaks that are reached."""

    matmul: float = 0.6  # matrix products, of the tensor cores' peak
    memory: float = 0.7  # passes over memory, of its bandwidth
    fp32: float = 0.3  # the scan's arithmetic, of the fp32 peak: a third of it is exponentials
    network: float = 0.7  # collectives, of the slowest link they cross
    overlap: float = 0.8  # of the computation, how much can hide what may be hidden
    gpus_per_node: int = 8
    cpu_bandwidth: float = 25e9  # bytes/s of host memory for each GPU's share of an offloaded optimizer


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step; they add up."""

    products: float
    scan: float
    passes: float  # norm, convolution, softmax of the loss, casts
    update: float
    exposed: float  # communication that nothing hides
    tokens_per_s: float
    mfu: float
    sent: float  # bytes by one rank
    flops: float  # of the model, by all ranks, recomputation aside

    @property
    def total(self) -> float:
        return self.products + self.scan + self.passes + self.update + self.exposed


def step_time(config: Config, world: int, gpu: GPU, assume: Assumptions) -> StepTime:
    model, train = config.model, config.train
    d, e, layers = model.need("d_model"), model.d_inner, model.need("n_layer")
    tokens = train.batch_tokens // world
    micro_batches = config.accumulation(world)
    n = 4 if train.precision == "fp32" else 2
    forward = forward_flops_by_part(model)
    again = int(train.activation_checkpointing)
    in_blocks, in_head = 3 + again, 3  # times the forward's FLOPs
    tensor_cores = gpu.fp32_flops if n == 4 else gpu.bf16_flops
    products: float = tokens * (forward["projections"] * in_blocks + forward["head"] * in_head)

    # Passes over memory of one token in one block's forward: the norm reads and writes both streams, the convolution
    # reads and writes E, documents cost a copy in the scan's layout. The backward is counted as two forwards.
    norm_conv = (8 + 2 * n) * d + (4 if config.data.reset_documents else 2) * n * e
    scan_bytes = n * 4 * e
    # Logits of a token: written, read and written by the reference's softmax in fp32 (8 passes), read by two products.
    loss_bytes = model.padded_vocab_size * (5 * n + 28)
    numel = parameters_by_part(model)
    p, blocks = sum(numel.values()), sum(numel[name] for name in ("in_proj", "x_proj", "dt_proj", "out_proj"))
    casts = (4 + n) * (blocks * (1 + again) + numel["embedding"]) if n == 2 else 0
    accumulate = 12 * p * (micro_batches - 1)
    bandwidth = gpu.memory_bandwidth * assume.memory
    passes: float = tokens * (layers * norm_conv * in_blocks + loss_bytes) + micro_batches * casts + accumulate
    scan = max(
        tokens * layers * scan_bytes * in_blocks / bandwidth,
        tokens * forward["scan"] * (in_blocks + 1) / (gpu.fp32_flops * assume.fp32),  # its backward goes forward again
    )
    s = shards(config, world)
    offloaded = (
        config.zero.offload_optimizer if train.engine == "zero" else train.engine == "fsdp" and config.fsdp.offload
    )
    if offloaded:  # gradients down, parameters up; Adam on the CPU
        update = 8 * p / s / (gpu.host_bandwidth * assume.network) + 28 * p / s / assume.cpu_bandwidth
    else:  # the norm reads; clipping reads and writes; Adam reads p, g, m, v and writes p, m, v
        update = 40 * p / s / bandwidth
    products, passes = products / (tensor_cores * assume.matmul), passes / bandwidth
    busy = products + scan + passes
    sent = collectives(config, world)
    # Where all GPUs are in one node, every group of them is.
    per_node = assume.gpus_per_node if world > assume.gpus_per_node else world
    hidden = sum(_seconds(c, gpu, assume, per_node) for c in sent if c.overlaps)
    # A shard that lies in the CPU's memory goes up for every gathering, on another link than the gathering takes.
    hidden += host_copies(config, world) / (gpu.host_bandwidth * assume.network)
    exposed = sum(_seconds(c, gpu, assume, per_node) for c in sent if not c.overlaps)
    exposed += max(0, hidden - assume.overlap * busy)
    flops = float(training_flops_per_token(model) * train.batch_tokens)
    total = busy + update + exposed
    return StepTime(
        products=products,
        scan=scan,
        passes=passes,
        update=update,
        exposed=exposed,
        tokens_per_s=train.batch_tokens / total,
        mfu=flops / total / world / gpu.bf16_flops,
        sent=sum(c.sent for c in sent),
        flops=flops,
    )


def _seconds(collective: Collective, gpu: GPU, assume: Assumptions, per_node: int) -> float:
    """On rings through all adapters of a node. Ranks are numbered node by node; a group that does not divide a node
    lies across two, somewhere."""
    span = math.gcd(per_node, collective.ranks * collective.stride)
    in_a_node = max(1, min(collective.ranks, span // collective.stride))
    bandwidth = gpu.peer_bandwidth
    if collective.ranks > in_a_node:
        bandwidth = min(bandwidth, in_a_node * gpu.network_bandwidth)
    return collective.sent / (bandwidth * assume.network)
