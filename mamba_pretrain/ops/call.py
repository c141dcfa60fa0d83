"""What a backend is told about a call before it runs it, and how a wrong argument is named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class KernelError(ValueError):
    """An argument an op cannot take, or a backend that was asked for by name and cannot run."""


class Missing(NamedTuple):
    """Why a backend does not work on this machine, and the command that mends it."""

    reason: str
    mend: str


class Call(NamedTuple):
    """All that a backend may look at to say that it cannot run a call. Hashable: decisions are kept."""

    op: str
    device: str  # type: cpu, cuda
    dtype: torch.dtype  # of the activations
    size: int = 0  # N of the scan, K of the convolution, D of the norm
    packed: bool = False  # documents are numbered by seq_idx
    initial_state: bool = False
    last_state: bool = False  # the state after the last step is wanted
    grad: bool = False  # a backward may follow
    deterministic: bool = False  # torch.use_deterministic_algorithms is on
    channels: int = 0  # E
    taps: int = 0  # K, where `size` is N
    length: int = 2  # L, as far as it matters: 0, 1, or 2 for any more, so that decisions stay few

    @classmethod
    def of(cls, op: str, activations: Tensor, **facts: Any) -> Call:
        """A call on these activations, in the current modes of PyTorch."""
        modes = {"grad": torch.is_grad_enabled(), "deterministic": torch.are_deterministic_algorithms_enabled()}
        return cls(op, activations.device.type, activations.dtype, **modes, **facts)


class BlockWeights(NamedTuple):
    """Of one block, in the order in which `mamba_inner` takes them, after the norm before it."""

    norm: Tensor  # (D)
    in_weight: Tensor  # (2 E, D)
    in_bias: Tensor | None  # (2 E)
    conv_weight: Tensor  # (E, K)
    conv_bias: Tensor | None  # (E)
    x_weight: Tensor  # (R + 2 N, E)
    dt_weight: Tensor  # (E, R)
    dt_bias: Tensor  # (E)
    A: Tensor  # (E, N)
    D: Tensor  # (E)
    out_weight: Tensor  # (D, E)
    out_bias: Tensor | None  # (D)


class ModelWeights(NamedTuple):
    """Of a language model."""

    embedding: Tensor  # (V, D)
    blocks: Sequence[BlockWeights]
    norm: Tensor  # (D)
    head: Tensor  # (V, D)
    eps: float


def expect(op: str, device: torch.device, **arguments: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Raises KernelError, naming the argument, for a tensor of another shape or on another device than expected."""
    for name, (tensor, shape) in arguments.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise KernelError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.device != device:
            raise KernelError(f"{op}: {name} is on {tensor.device}, the other arguments are on {device}")


def expect_rank(op: str, rank: int, **arguments: Tensor) -> None:
    """Raises KernelError, naming the argument, for a tensor with another number of dimensions."""
    for name, tensor in arguments.items():
        if tensor.dim() != rank:
            raise KernelError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {rank} dimensions")


def expect_floats(op: str, **arguments: Tensor | None) -> None:
    """Raises KernelError, naming the argument, for a tensor that does not hold real floating-point numbers."""
    for name, tensor in arguments.items():
        if tensor is not None and not tensor.is_floating_point():
            raise KernelError(f"{op}: {name} has dtype {tensor.dtype}, expected a floating-point dtype")
