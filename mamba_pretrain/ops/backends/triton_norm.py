"""add + RMSNorm in Triton: one pass over a row, which stays in registers.

The backward reads the residual stream and the scales of its rows, both of which exist anyway. The weight's gradient is
summed over ROWS rows in a program and over programs by torch, in a fixed order.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Triton types its kernels itself, from the arguments of a launch.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba_pretrain.ops.backends.triton_common import FUSED, blocks, on, power_of_two

# Rows that a program of the backward adds up: 512 programs for 8 x 2,048 rows, and a sixteenth of a row in fp32 more
# memory for each row.
ROWS = 32


def add_rms_norm(
    x_BLD: Tensor, residual_BLD: Tensor | None, weight_D: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    y_BLD, stream_BLD = _AddNorm.apply(  # type: ignore[no-untyped-call]
        x_BLD, residual_BLD, weight_D, eps, out_dtype
    )
    return y_BLD, stream_BLD


@triton.jit
def norm_kernel(
    X, RESIDUAL, WEIGHT, Y, STREAM, SCALE, eps, width, BLOCK_D: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    real = d < width
    stream = tl.load(X + row * width + d, mask=real, other=0.0).to(tl.float32)
    if RESIDUAL is not None:
        stream += tl.load(RESIDUAL + row * width + d, mask=real, other=0.0)
    scale = 1.0 / tl.sqrt_rn(tl.sum(stream * stream, axis=0) / width + eps)
    weight = tl.load(WEIGHT + d, mask=real, other=0.0).to(tl.float32)
    tl.store(STREAM + row * width + d, stream, mask=real)
    tl.store(Y + row * width + d, (stream * scale * weight).to(Y.dtype.element_ty), mask=real)
    tl.store(SCALE + row, scale)


@triton.jit
def norm_backward_kernel(
    STREAM, SCALE, WEIGHT, DY, DSTREAM, DX, DRESIDUAL, DWEIGHT, n_rows, width,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """With x^ = stream * scale and g = dy * weight: d stream = scale (g - x^ mean(g x^)) + what reaches it directly."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    d = tl.arange(0, BLOCK_D)
    real = d < width
    weight = tl.load(WEIGHT + d, mask=real, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_D], tl.float32)
    for row in range(first, tl.minimum(first + ROWS, n_rows)):
        scale = tl.load(SCALE + row)
        unit = tl.load(STREAM + row * width + d, mask=real, other=0.0) * scale
        dy = tl.load(DY + row * width + d, mask=real, other=0.0).to(tl.float32)
        dweight += dy * unit
        g = dy * weight
        dstream = scale * (g - unit * (tl.sum(g * unit, axis=0) / width))
        if DSTREAM is not None:
            dstream += tl.load(DSTREAM + row * width + d, mask=real, other=0.0).to(tl.float32)
        tl.store(DX + row * width + d, dstream.to(DX.dtype.element_ty), mask=real)
        if DRESIDUAL is not None:
            tl.store(DRESIDUAL + row * width + d, dstream, mask=real)
    tl.store(DWEIGHT + tl.program_id(0).to(tl.int64) * width + d, dweight, mask=real)


def _extents(width: int) -> dict[str, int]:
    """8 to 16 elements of a row in each thread, up to the 1,024 threads a program may have."""
    block = power_of_two(width)
    return {"BLOCK_D": block, "num_warps": min(max(block // 512, 1), 32)}


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = (x.dtype, weight.dtype)
        ctx.has_residual = residual is not None
        x, weight = x.contiguous(), weight.contiguous()
        residual = None if residual is None else residual.contiguous()
        y, stream = torch.empty_like(x, dtype=out_dtype), torch.empty_like(x, dtype=torch.float32)
        width = x.shape[-1]
        scale = stream.new_empty(x.shape[:-1])
        if x.numel() > 0:
            with on(x.device):
                norm_kernel[(scale.numel(),)](
                    x, residual, weight, y, stream, scale, eps, width, **_extents(width), **FUSED
                )
        ctx.save_for_backward(stream, scale, weight)
        return y, stream

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dstream: Tensor | None) -> tuple[Tensor | None, ...]:
        stream, scale, weight = ctx.saved_tensors
        x_dtype, weight_dtype = ctx.dtypes
        width, n_rows = stream.shape[-1], scale.numel()
        dy = torch.zeros_like(stream) if dy is None else dy.contiguous()
        dstream = None if dstream is None else dstream.contiguous()
        dx = torch.empty_like(stream, dtype=x_dtype)
        dresidual = torch.empty_like(stream) if ctx.has_residual and x_dtype != stream.dtype else None
        dweight = stream.new_empty(blocks(n_rows, ROWS), width)
        if stream.numel() > 0:
            with on(stream.device):
                norm_backward_kernel[(len(dweight),)](
                    stream, scale, weight, dy, dstream, dx, dresidual, dweight, n_rows, width,
                    ROWS=ROWS, **_extents(width), **FUSED,
                )  # fmt: skip
        # In fp32 the gradients of both terms of the sum are one tensor.
        of_residual = (dx if dresidual is None else dresidual) if ctx.has_residual else None
        return dx, of_residual, dweight.sum(0).to(weight_dtype), None, None
