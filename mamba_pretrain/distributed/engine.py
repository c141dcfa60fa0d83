"""The contract between the trainer and whatever holds parameters, gradients and optimizer state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from torch import Tensor

from mamba_pretrain.model.lm import MambaLM
from mamba_pretrain.pieces import Piece, Pieces

# The parts of a checkpoint: parameters by name; Adam's moments as "exp_avg.NAME" and "exp_avg_sq.NAME", and scalars.
MODEL, OPTIMIZER = "model", "optimizer"
OPTIONAL = ("loss_scale", "finite_steps")  # scalars that only fp16 has


class StepResult(NamedTuple):
    grad_norm: float  # global L2 norm before clipping
    skipped: bool  # a loss or a gradient on some rank was not finite, and the parameters were left alone
    loss_scale: float  # 1 unless fp16


class Engine(Protocol):
    """What a trainer may ask. On several ranks, all of them call each method, in the same order.

    The caller hands over losses that are sums divided by the GLOBAL number of target tokens; the engine SUMS gradients
    over ranks. It keeps no schedule: the learning rate comes with each step. It writes no files: all engines give
    their state in the same pieces, which is why what one has saved, any other can load.
    """

    module: MambaLM  # or what must be called in its place

    @property
    def decay_of(self) -> dict[str, float]:
        """The weight decay that the optimizer, as it stands, applies to each parameter it knows."""

    def backward(self, loss: Tensor, *, last_micro_batch: bool) -> None:
        """Accumulates gradients. (ZeRO-2 and 3 also exchange them, other engines only at the last micro-batch.)"""

    def step(self, lr: float) -> StepResult:
        """Clips, updates the parameters (or skips, where something is not finite) and clears the gradients."""

    def state(self) -> dict[str, list[Piece]]:
        """This rank's pieces of MODEL and OPTIMIZER: views of what training works on. No communication."""

    def load(self, parts: dict[str, Pieces]) -> None:
        """Restores what `state` gave, of any engine on any number of ranks; to the bit."""

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter by name, whole, one at a time, on the device. All ranks must take all of them."""


Values = Callable[[str], Tensor]  # a parameter's value by its name: whole, fp32, on the CPU
