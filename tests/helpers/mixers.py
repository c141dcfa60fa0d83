"""Arguments of `mamba_inner`, and its outputs and gradients with one backend or another."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

from mamba_pretrain.ops import dispatch
from mamba_pretrain.ops.mamba_inner import mamba_inner
from tests.helpers import reference, stubs

NAMES = (
    "hidden", "in_weight", "in_bias", "conv_weight", "conv_bias", "x_weight", "dt_weight", "dt_bias", "A", "D",
    "out_weight", "out_bias",
)  # fmt: skip


class Shape(NamedTuple):
    batch: int = 2
    length: int = 24
    inner: int = 16  # E
    state: int = 16  # N
    taps: int = 4  # K
    conv_bias: bool = True
    linear_bias: bool = False
    model: int = 8  # D
    rank: int = 3  # R


def draw(shape: Shape, seed: int = 0) -> list[Tensor | None]:
    """float64, at the scale of a trained mixer: steps from 1e-3 to 1, states that keep and states that forget."""
    g = torch.Generator().manual_seed(seed)
    D, E, N, R = shape.model, shape.inner, shape.state, shape.rank

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*size, generator=g, dtype=torch.float64)

    return [
        normal(shape.batch, shape.length, D),
        normal(2 * E, D, scale=D**-0.5),
        normal(2 * E, scale=0.3) if shape.linear_bias else None,
        normal(E, shape.taps, scale=0.5),
        normal(E, scale=0.3) if shape.conv_bias else None,
        normal(R + 2 * N, E, scale=2 * E**-0.5),
        normal(E, R, scale=R**-0.5),
        normal(E) - 3,
        -torch.arange(1, N + 1, dtype=torch.float64) * torch.exp(normal(E, 1, scale=0.5)),
        normal(E),
        normal(D, E, scale=E**-0.5),
        normal(D, scale=0.3) if shape.linear_bias else None,
    ]


class Result(NamedTuple):
    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]


def run(
    arguments: list[Tensor | None],
    kernels: str,
    seq_idx: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    last_state: bool = False,
    grad: bool = True,
    device: str = "cpu",
) -> Result:
    leaves = [None if x is None else x.detach().to(device, dtype, copy=True).requires_grad_(grad) for x in arguments]
    seq_idx = None if seq_idx is None else seq_idx.to(device)
    mode = contextlib.nullcontext() if grad else torch.no_grad()
    if device == "cpu":
        cast = stubs.autocast(autocast)
    else:
        cast = torch.autocast(device, autocast, enabled=autocast is not None)
    with dispatch.using(kernels), cast, mode:
        found = mamba_inner(*leaves, seq_idx, return_last_state=last_state)  # type: ignore[arg-type]
    outputs = {k: v.cpu() for k, v in zip(("y", "conv_state", "ssm_state"), found, strict=True) if v is not None}
    if not grad:
        return Result(outputs, {})
    names = [name for name, x in zip(NAMES, leaves, strict=True) if x is not None]
    grads = reference.gradients(tuple(outputs.values()), [x for x in leaves if x is not None])
    return Result(outputs, dict(zip(names, grads, strict=True)))


def deviations(found: Result, due: Result) -> dict[str, float]:
    """The largest difference of each output and gradient, relative to the largest value that is due."""
    assert found.outputs.keys() == due.outputs.keys()
    pairs = {**{k: (found.outputs[k], due.outputs[k]) for k in due.outputs}}
    pairs |= {f"d{k}": (found.gradients[k], due.gradients[k]) for k in due.gradients}
    for name, (a, b) in pairs.items():
        assert a.shape == b.shape, name
    wide = {k: (a.double().cpu(), b.double().cpu()) for k, (a, b) in pairs.items()}
    return {k: ((a - b).abs().max() / b.abs().max()).item() for k, (a, b) in wide.items()}
