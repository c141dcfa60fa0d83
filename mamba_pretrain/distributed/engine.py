"""The contract between the trainer and whatever holds parameters, gradients and optimizer state."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

from torch import Tensor

from mamba_pretrain.model.lm import MambaLM

# What `save` writes and `load` reads. DeepSpeed, FSDP or one process: the same names and shapes.
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"


class StepResult(NamedTuple):
    grad_norm: float  # global L2 norm before clipping
    skipped: bool  # the loss or a gradient was not finite, and the parameters were left alone
    loss_scale: float  # 1 unless fp16


class Engine(Protocol):
    """What a trainer may ask.

    The caller hands over losses that are sums divided by the GLOBAL number of target tokens; the engine SUMS gradients
    over ranks. It keeps no schedule: the learning rate comes with each step.
    """

    module: MambaLM

    @property
    def decay_of(self) -> dict[str, float]:
        """The weight decay that the optimizer, as it stands, applies to each parameter it knows."""

    def backward(self, loss: Tensor, *, last_micro_batch: bool) -> None:
        """Accumulates gradients. Ranks communicate no earlier than the step's last micro-batch."""

    def step(self, lr: float) -> StepResult:
        """Clips, updates the parameters (or skips, where something is not finite) and clears the gradients."""

    def save(self, directory: Path) -> None:
        """Writes model.safetensors and optimizer.safetensors, names and values independent of the engine."""

    def load(self, directory: Path) -> None:
        """Restores what `save` wrote, to the bit."""

    def full_state_dict(self) -> dict[str, Tensor]:
        """All parameters by name, whole, fp32, on the CPU."""
