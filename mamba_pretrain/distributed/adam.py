"""What the engines share: AdamW whose state lies in shards, the loss scale, and the pieces that a checkpoint holds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mamba_pretrain.config import Config
from mamba_pretrain.distributed.engine import MODEL, OPTIMIZER, OPTIONAL, StepResult, Values
from mamba_pretrain.distributed.ranks import Ranks
from mamba_pretrain.model.lm import MambaLM
from mamba_pretrain.optim import AdamW, padding_rows
from mamba_pretrain.pieces import Piece, Pieces

MOMENTS = ("exp_avg", "exp_avg_sq")
SCALARS = ("step", *OPTIONAL)


class Shard(NamedTuple):
    """This rank's part of one parameter and its moments: one-dimensional views of equal length."""

    name: str
    shape: tuple[int, ...]  # of the whole parameter
    start: int  # in the flattened parameter
    parameter: Tensor
    moments: tuple[Tensor, Tensor]
    copy: tuple[int, int]  # (i, n): n ranks hold this part


class LossScale:
    """fp16's loss scale: halved by a step that overflows, doubled after 2,000 in a row that do not. Else 1.

    All ranks see the same global norm, so their scales stay equal. Powers of two, so that scaling rounds nothing.
    """

    INITIAL, PATIENCE = 2.0**16, 2000

    def __init__(self, enabled: bool) -> None:
        self.enabled, self.value, self.finite_steps = enabled, self.INITIAL if enabled else 1.0, 0

    def update(self, finite: bool) -> None:
        if not self.enabled:
            return
        self.finite_steps = self.finite_steps + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.finite_steps == self.PATIENCE:
            self.value, self.finite_steps = self.value * 2, 0


class AdamEngine(ABC):
    """An engine whose optimizer is `optim.AdamW`, whatever tensors it works on."""

    module: MambaLM
    optimizer: AdamW

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.scale = LossScale(config.train.precision == "fp16")

    @abstractmethod
    def shards(self) -> Iterator[Shard]:
        """This rank's parts of the parameters."""

    @abstractmethod
    def parameters_changed(self) -> None:
        """Called after the shards were written to from outside."""

    @abstractmethod
    def step(self, lr: float) -> StepResult: ...

    def ready(self, values: Values | None) -> None:
        """Gives every parameter its value (None: a checkpoint will) and Adam its moments. At the end of __init__."""
        for shard in self.shards():
            if values is not None:
                whole = values(shard.name).view(-1)
                shard.parameter.copy_(whole[shard.start : shard.start + shard.parameter.numel()])
            rows = padding_rows(shard.name, shard.shape, shard.start, shard.parameter, self.config.model)
            self.optimizer.frozen += [rows] if rows.numel() else []
        if values is not None:
            self.parameters_changed()

    @property
    def decay_of(self) -> dict[str, float]:
        return {name: group["weight_decay"] for group in self.optimizer.param_groups for name in group["names"]}

    def guarded(self, loss: Tensor, factor: float) -> Tensor:
        """factor x loss; one that is not finite makes every gradient NaN: then the global norm tells all ranks."""
        return loss * torch.where(torch.isfinite(loss.detach()), factor, torch.nan)

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def state(self) -> dict[str, list[Piece]]:
        everywhere = (self.ranks.rank, self.ranks.world)
        model, optimizer = [], []
        for name, shape, start, parameter, moments, copy in self.shards():
            model.append(Piece(name, shape, start, parameter, copy))
            optimizer += [
                Piece(f"{kind}.{name}", shape, start, moment, copy)
                for kind, moment in zip(MOMENTS, moments, strict=True)
            ]
        scalars = (self._adam_steps(), self.scale.value, float(self.scale.finite_steps))
        for name, value in zip(SCALARS[: 3 if self.scale.enabled else 1], scalars, strict=False):
            optimizer.append(Piece(name, (), 0, torch.tensor([value]), everywhere))
        return {MODEL: model, OPTIMIZER: optimizer}

    @torch.no_grad()
    def load(self, parts: dict[str, Pieces]) -> None:
        for part, pieces in self.state().items():
            for piece in pieces:
                if piece.name not in SCALARS:
                    piece.data.copy_(parts[part].read(piece.name, piece.start, piece.stop))
        steps = parts[OPTIMIZER].tensor("step")
        for state in self.optimizer.state.values():
            state["step"].fill_(steps.item())
        if self.scale.enabled and "loss_scale" in parts[OPTIMIZER]:
            self.scale.value = parts[OPTIMIZER].tensor("loss_scale").item()
            self.scale.finite_steps = int(parts[OPTIMIZER].tensor("finite_steps").item())
        self.parameters_changed()

    def _adam_steps(self) -> float:
        return next((float(state["step"]) for state in self.optimizer.state.values()), 0.0)


class GradientEngine(AdamEngine):
    """An engine whose parameters have their gradients in `.grad` when it steps: whole, or FSDP2's shards."""

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.module.named_parameters():
            yield name, parameter.detach()

    def parameters_changed(self) -> None:
        pass  # the model computes with the very tensors

    def step(self, lr: float) -> StepResult:
        self.set_lr(lr)
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = self.total_norm(gradients) / self.scale.value
        finite = bool(torch.isfinite(norm))
        result = StepResult(float(norm), not finite, self.scale.value)
        if finite:
            clip = self.config.optim.clip_norm
            factor = min(1.0, clip / (float(norm) + 1e-6)) if clip else 1.0
            if factor != self.scale.value:
                torch._foreach_mul_(gradients, factor / self.scale.value)
            self.optimizer.step()
        self.scale.update(finite)
        self.optimizer.zero_grad(set_to_none=True)
        return result

    def total_norm(self, gradients: list[Tensor]) -> Tensor:
        return torch.nn.utils.get_total_norm(gradients)

    def make_moments(self) -> None:
        """Adam makes them at its first step; a checkpoint may come before."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                self.optimizer.state[parameter] = new_moments(parameter)


def new_moments(parameter: Tensor) -> dict[str, Tensor]:
    """The state of torch's fused AdamW before its first step."""
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return {"step": step, **{kind: torch.zeros_like(parameter.detach()) for kind in MOMENTS}}
