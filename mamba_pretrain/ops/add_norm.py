"""The step between two blocks: add to the residual stream, normalise (mamba_ssm's fused add + RMSNorm)."""

from __future__ import annotations

import torch
from torch import Tensor

from mamba_pretrain.ops import dispatch
from mamba_pretrain.ops.call import Call, KernelError, expect, expect_floats


def add_rms_norm(
    x_BLD: Tensor, residual_BLD: Tensor | None, weight_D: Tensor, eps: float, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """residual' = residual + x in fp32, y = residual' / sqrt(mean(residual'^2) + eps) * weight.

    Returns y (B, L, D) in `out_dtype` (default: that of residual'), and residual' (B, L, D) in fp32 (float64 for
    float64 inputs). The stream is never rounded: in 64 blocks of bf16 sums the small updates would be lost. Where a
    matrix product takes y, `out_dtype` spares a pass over it. Raises KernelError, naming the argument, for a wrong
    shape, dtype or device.
    """
    expect(
        "add_rms_norm",
        x_BLD.device,
        residual=(residual_BLD, tuple(x_BLD.shape)),
        weight=(weight_D, (x_BLD.shape[-1],)),
    )
    expect_floats("add_rms_norm", x=x_BLD, residual=residual_BLD, weight=weight_D)
    wide = torch.promote_types(x_BLD.dtype, torch.float32)
    if residual_BLD is not None and residual_BLD.dtype != wide:
        raise KernelError(f"add_rms_norm: residual has dtype {residual_BLD.dtype}, expected {wide}")
    backend = dispatch.choose(Call.of("add_rms_norm", x_BLD, size=x_BLD.shape[-1]))
    norm = add_rms_norm_reference if backend is None else backend.add_rms_norm
    y_BLD, residual_BLD = norm(x_BLD, residual_BLD, weight_D, eps, out_dtype or wide)
    return y_BLD, residual_BLD


def add_rms_norm_reference(
    x_BLD: Tensor, residual_BLD: Tensor | None, weight_D: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """In PyTorch's own operations, on any device."""
    wide = torch.promote_types(x_BLD.dtype, torch.float32)
    residual_BLD = x_BLD.to(wide) if residual_BLD is None else residual_BLD + x_BLD.to(wide)
    scale_BL1 = torch.rsqrt(residual_BLD.square().mean(dim=-1, keepdim=True) + eps)
    return (residual_BLD * scale_BL1 * weight_D.to(wide)).to(out_dtype), residual_BLD
