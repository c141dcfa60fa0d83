"""Makes the engine that a configuration names."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mamba_pretrain.config import Config
from mamba_pretrain.distributed.engine import Engine, Values
from mamba_pretrain.distributed.ranks import Ranks
from mamba_pretrain.distributed.single import SingleEngine
from mamba_pretrain.distributed.zero import ZeroEngine
from mamba_pretrain.model.lm import MambaLM


def make_engine(
    make_model: Callable[[], MambaLM], values: Values | None, config: Config, device: torch.device, ranks: Ranks
) -> Engine:
    """`make_model` makes the module without values, wherever and in whatever parts the engine wants it; `values` gives
    each parameter's by name (None: a checkpoint will be loaded). The model never exists whole on one rank of an engine
    that shards parameters. Raises ImportError where DeepSpeed is wanted and missing.
    """
    match config.train.engine:
        case "zero":
            return ZeroEngine(make_model, values, config, device, ranks)
        case "fsdp":
            # Here, as PyTorch's FSDP takes a second to import, which would be a fifth of the start of any command.
            from mamba_pretrain.distributed.fsdp import FsdpEngine

            return FsdpEngine(make_model, values, config, device, ranks)
    return SingleEngine(make_model, values, config, device)
