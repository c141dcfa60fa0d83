"""The optimizer's parameter groups, AdamW, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mamba_pretrain.config import ModelConfig, OptimConfig
from mamba_pretrain.model.law import decays


def lr_at(step: int, total_steps: int, config: OptimConfig) -> float:
    """Learning rate of update `step` (0 is the first) out of `total_steps`.

    Linear warm-up that reaches the peak at its last step; then cosine to `min_lr` at the last step of all, or, for
    "wsd", the peak until the decay begins and a straight line to `min_lr` at the last step. (Where at most one step is
    left after the warm-up, or the decay has no steps, the run ends at the peak.)
    """
    warmup = config.warmup_steps(total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    last = total_steps - 1
    if config.schedule == "cosine":
        progress = (step - warmup) / max(1, last - warmup)
        return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    decay = round(total_steps * config.decay_fraction)
    progress = (step - (last - decay)) / max(1, decay)
    return config.lr + (config.min_lr - config.lr) * min(1.0, max(0.0, progress))


def param_groups(
    named: Iterable[tuple[str, nn.Parameter]], model: ModelConfig, config: OptimConfig
) -> list[dict[str, Any]]:
    """Two AdamW groups, split by the decay law of the names; each keeps its parameters' names under "names".

    The law goes by name, because a sharded parameter has neither its shape nor its attributes any more. What takes no
    gradient is in neither group.
    """
    groups = [
        {"params": [], "names": [], "weight_decay": config.weight_decay},
        {"params": [], "names": [], "weight_decay": 0.0},
    ]
    for name, parameter in named:
        if parameter.requires_grad:
            group = groups[0] if decays(name, model) else groups[1]
            group["params"].append(parameter)  # type: ignore[attr-defined]
            group["names"].append(name)  # type: ignore[attr-defined]
    return groups


def padding_rows(name: str, shape: tuple[int, ...], start: int, flat: Tensor, model: ModelConfig) -> Tensor:
    """The part of `flat` (elements of the flattened parameter from `start` on) that is the vocabulary's padding."""
    if not name.endswith(("embedding.weight", "lm_head.weight")):
        return flat[:0]
    first = model.need("vocab_size") * shape[1]
    return flat[max(0, first - start) :]


class AdamW(torch.optim.AdamW):
    """torch's AdamW, except that the tensors in `frozen` keep their values.

    Those are the vocabulary's padding rows. They are no tokens and their gradient is always zero (see
    ops.cross_entropy), so Adam leaves them alone; only the decoupled decay would move them.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig) -> None:
        super().__init__(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
        self.frozen: list[Tensor] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        before = [rows.clone() for rows in self.frozen]
        result = super().step(closure)
        for rows, kept in zip(self.frozen, before, strict=True):
            rows.copy_(kept)
        return result
