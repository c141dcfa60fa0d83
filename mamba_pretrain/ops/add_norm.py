"""The step between two blocks: add to the residual stream, normalise (mamba_ssm's fused add + RMSNorm)."""

from __future__ import annotations

import torch
from torch import Tensor


def add_rms_norm(x_BLD: Tensor, residual_BLD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """residual' = residual + x in fp32, y = residual' / sqrt(mean(residual'^2) + eps) * weight.

    Returns y and residual', both (B, L, D) fp32 (float64 for float64 inputs). The stream is never rounded: in 64
    blocks of bf16 sums the small updates would be lost. Autocast casts y where a matrix product takes it.
    """
    wide = torch.promote_types(x_BLD.dtype, torch.float32)
    residual_BLD = x_BLD.to(wide) if residual_BLD is None else residual_BLD + x_BLD.to(wide)
    scale_BL1 = torch.rsqrt(residual_BLD.square().mean(dim=-1, keepdim=True) + eps)
    return residual_BLD * scale_BL1 * weight_D.to(wide), residual_BLD
