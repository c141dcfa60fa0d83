"""What a configuration means, before it costs anything: sizes, FLOPs, memory, schedule, parameter laws."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from mamba_pretrain.config import Config
from mamba_pretrain.model.flops import forward_flops_by_part, parameters_by_part, training_flops_per_token
from mamba_pretrain.model.law import decays, summary
from mamba_pretrain.model.lm import MambaLM

GIB = 2**30


def describe(config: Config, memory: dict[str, int]) -> str:
    """The resolved run as text, for one process; `memory`: its bytes by part (see plan.memory).

    Raises ConfigError where the vocabulary is not known.
    """
    model = config.model
    parameters = parameters_by_part(model)
    total = sum(parameters.values())
    forward = forward_flops_by_part(model)
    flops, tokens = training_flops_per_token(model), config.steps * config.train.batch_tokens
    warmup = config.optim.warmup_steps(config.steps)
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
            ((name, f"{n / GIB:.3f} GiB", f"{n / sum(memory.values()):.1%}") for name, n in memory.items() if n),
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


def law_table(model: MambaLM, decay_of: dict[str, float]) -> str:
    """dtype, weight decay (`decay_of` each name) and initial values of every kind of parameter, as text."""
    rows = summary(model.named_parameters(), model.config, decay_of)
    return _table("Parameter kinds: dtype, weight decay, initial values", rows)


def _table(title: str, rows: Iterable[tuple[str, str, str]], total: str | None = None) -> str:
    rows = list(rows)
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    lines = [f"  {a:<{widths[0]}}  {b:>{widths[1]}}  {c}".rstrip() for a, b, c in rows]
    return "\n".join([title, *lines, *([f"  total: {total}"] if total else [])])
