"""What a configuration means, before it costs anything: sizes, FLOPs, memory, schedule, parameter laws."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mamba_pretrain.config import Config, ModelConfig
from mamba_pretrain.model.block import Block
from mamba_pretrain.model.flops import forward_flops_by_part, parameters_by_part, training_flops_per_token
from mamba_pretrain.model.law import decays, summary
from mamba_pretrain.model.lm import MambaLM
from mamba_pretrain.ops.cross_entropy import CHUNK_BYTES

GIB = 2**30


def describe(config: Config) -> str:
    """The resolved run as text, for one process. Raises ConfigError where the vocabulary is not known."""
    model = config.model
    parameters = parameters_by_part(model)
    total = sum(parameters.values())
    forward = forward_flops_by_part(model)
    flops, tokens = training_flops_per_token(model), config.steps * config.train.batch_tokens
    warmup = config.optim.warmup_steps(config.steps)
    memory = memory_by_part(config)
    with torch.device("meta"):
        shapes = MambaLM(model)
    decay_of = {
        name: config.optim.weight_decay if decays(name, model) else 0.0 for name, _ in shapes.named_parameters()
    }
    sections = [
        f"Mamba-1, {model.n_layer} blocks of d_model {model.d_model} (E {model.d_inner}, N {model.d_state}, "
        f"K {model.d_conv}, R {model.rank}), vocabulary {model.vocab_size} padded to {model.padded_vocab_size}",
        _table("Parameters", ((name, f"{n:,}", f"{n / total:.1%}") for name, n in parameters.items()), f"{total:,}"),
        _table(
            "Training FLOPs a token (forward x 3)",
            ((name, f"{3 * n / 1e9:.4f} G", f"{3 * n / flops:.1%}") for name, n in forward.items()),
            f"{flops / 1e9:.3f} G",
        ),
        _table(
            f"Memory of one process, micro-batch {config.train.micro_batch_size} x {config.data.seq_len}",
            ((name, f"{n / GIB:.3f} GiB", f"{n / sum(memory.values()):.1%}") for name, n in memory.items()),
            f"{sum(memory.values()) / GIB:.3f} GiB, and what the framework and the allocator add",
        ),
        _table(
            "Run",
            [
                ("steps", f"{config.steps:,}", ""),
                ("tokens", f"{tokens:,}", f"{tokens / total:.1f} a parameter"),
                ("FLOPs", f"{flops * tokens:.3e}", ""),
                (
                    "batch",
                    f"{config.train.batch_tokens:,} tokens",
                    f"{config.sequences_per_step} x {config.data.seq_len}",
                ),
                ("accumulation", str(config.accumulation(world=1)), "micro-batches a step on one process"),
                (
                    "learning rate",
                    f"{config.optim.lr:g}",
                    f"{config.optim.schedule}, {warmup:,} steps of warm-up, to {config.optim.min_lr:g}",
                ),
                ("precision", config.train.precision, "matrix products; parameters, optimizer, scan state in fp32"),
            ],
        ),
        law_table(shapes, decay_of),
    ]
    return "\n\n".join(sections)


def memory_by_part(config: Config) -> dict[str, int]:
    """Bytes that one process holds at the peak of a step, with fp32 parameters, gradients and two moments.

    Activations are what autograd saves of one block, measured on fake tensors, times the blocks.
    """
    model, train = config.model, config.train
    parameters = 4 * sum(parameters_by_part(model).values())
    positions = train.micro_batch_size * config.data.seq_len
    block = _saved_by_block(model, train.micro_batch_size, config.data.seq_len, train.precision)
    blocks, rows = model.need("n_layer"), model.padded_vocab_size
    narrow = 4 if train.precision == "fp32" else 2
    if train.activation_checkpointing:
        activations = blocks * positions * model.need("d_model") * (4 + narrow) + block
    else:
        activations = blocks * block
    return {
        "parameters": parameters,
        "gradients": parameters,
        "Adam's moments": 2 * parameters,
        "activations": activations,
        # logits of one chunk, the head's gradient, and what the chunk adds to it
        "loss": min(CHUNK_BYTES, narrow * positions * rows) + rows * model.need("d_model") * (4 + narrow),
    }


def _saved_by_block(model: ModelConfig, batch: int, length: int, precision: str) -> int:
    """Bytes that autograd keeps between forward and backward of one block, its parameters aside."""
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[id(storage)] = storage
        return tensor

    with FakeTensorMode():
        block = Block(model)
        hidden_BLD = torch.empty(batch, length, model.need("d_model"), requires_grad=True)
        seq_idx_BL = torch.zeros(batch, length, dtype=torch.int32)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"),
        ):
            block(hidden_BLD, hidden_BLD, seq_idx_BL, return_state=False)
        own = {id(p.untyped_storage()) for p in block.parameters()}
        return sum(s.nbytes() for key, s in storages.items() if key not in own)


def law_table(model: MambaLM, decay_of: dict[str, float]) -> str:
    """dtype, weight decay (`decay_of` each name) and initial values of every kind of parameter, as text."""
    rows = summary(model.named_parameters(), model.config, decay_of)
    return _table("Parameter kinds: dtype, weight decay, initial values", rows)


def _table(title: str, rows: Iterable[tuple[str, str, str]], total: str | None = None) -> str:
    rows = list(rows)
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    lines = [f"  {a:<{widths[0]}}  {b:>{widths[1]}}  {c}".rstrip() for a, b, c in rows]
    return "\n".join([title, *lines, *([f"  total: {total}"] if total else [])])
