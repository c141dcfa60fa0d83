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


def param_groups(named: Iterable[tuple[str, nn.Parameter]], model: ModelConfig, decay: float) -> list[dict[str, Any]]:
    """Two AdamW groups, split by the decay law of the names; each keeps its parameters' names under "names"."""
    groups = [
        {"params": [], "names": [], "weight_decay": decay},
        {"params": [], "names": [], "weight_decay": 0.0},
    ]
    for name, parameter in named:
        group = groups[0] if decays(name, model) else groups[1]
        group["params"].append(parameter)  # type: ignore[attr-defined]
        group["names"].append(name)  # type: ignore[attr-defined]
    return groups


class AdamW(torch.optim.AdamW):
    """torch's AdamW, except that the vocabulary's padding rows keep their values.

    Those rows are no tokens and their gradient is always zero (see ops.cross_entropy), so Adam leaves them alone;
    only the decoupled decay would move them.
    """

    def __init__(self, groups: list[dict[str, Any]], model: ModelConfig, config: OptimConfig) -> None:
        super().__init__(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
        self._padding: list[Tensor] = []
        if model.padded_vocab_size != model.vocab_size:
            self._padding = [
                parameter.detach()[model.need("vocab_size") :]
                for group in groups
                for name, parameter in zip(group["names"], group["params"], strict=True)
                if name.endswith(("embedding.weight", "lm_head.weight"))
            ]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        before = [rows.clone() for rows in self._padding]
        result = super().step(closure)
        for rows, kept in zip(self._padding, before, strict=True):
            rows.copy_(kept)
        return result
