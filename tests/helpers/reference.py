"""Mamba-1 a second time, straight from the paper's equations: loops over rows and steps, nothing of the package.

Slow on purpose and differentiable: its gradients judge the package's. Shape suffixes as in `mamba_pretrain.ops`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mamba_pretrain.config import ModelConfig


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def scan(
    u_BLE: Tensor,
    delta_BLE: Tensor,
    A_EN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_E: Tensor,
    z_BLE: Tensor,
    bias_E: Tensor,
    seq_idx_BL: Tensor | None = None,
    h_BEN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    rows, states = [], []
    for b in range(u_BLE.shape[0]):
        h_EN = torch.zeros_like(A_EN) if h_BEN is None else h_BEN[b]
        steps = []
        for t in range(u_BLE.shape[1]):
            if seq_idx_BL is not None and t > 0 and seq_idx_BL[b, t] != seq_idx_BL[b, t - 1]:
                h_EN = torch.zeros_like(A_EN)
            delta_E1 = torch.logaddexp(delta_BLE[b, t] + bias_E, torch.zeros_like(bias_E))[:, None]  # softplus
            h_EN = torch.exp(delta_E1 * A_EN) * h_EN + delta_E1 * B_BLN[b, t] * u_BLE[b, t][:, None]
            steps.append(((C_BLN[b, t] * h_EN).sum(1) + D_E * u_BLE[b, t]) * silu(z_BLE[b, t]))
        rows.append(torch.stack(steps))
        states.append(h_EN)
    return torch.stack(rows), torch.stack(states)


def conv(
    x_BLE: Tensor,
    weight_EK: Tensor,
    bias_E: Tensor | None,
    seq_idx_BL: Tensor | None = None,
    state_BSE: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, length, inner = x_BLE.shape
    taps = weight_EK.shape[1]
    nothing_E = x_BLE.new_zeros(inner)
    rows, states = [], []
    for b in range(batch):

        def past(t: int, now: int, b: int = b) -> Tensor:
            """Input t as step `now` sees it: before the first step lies the state, of the first step's document."""
            if seq_idx_BL is not None and seq_idx_BL[b, max(t, 0)] != seq_idx_BL[b, now]:
                return nothing_E
            if t >= 0:
                return x_BLE[b, t]
            return nothing_E if state_BSE is None else state_BSE[b, taps - 1 + t]

        steps = []
        for t in range(length):
            y_E = nothing_E if bias_E is None else bias_E
            for k in range(taps):
                y_E = y_E + weight_EK[:, k] * past(t - (taps - 1 - k), t)
            steps.append(silu(y_E))
        rows.append(torch.stack(steps))
        states.append(torch.stack([past(t, length - 1) for t in range(length - taps + 1, length)]))
    return torch.stack(rows), torch.stack(states)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def logits(p: Mapping[str, Tensor], config: ModelConfig, ids_BL: Tensor) -> Tensor:
    """A language model's logits (B, L, padded V) from its parameters under mamba_ssm's names."""
    residual_BLD = p["backbone.embedding.weight"][ids_BL]
    rank, state, inner = config.rank, config.d_state, config.d_inner
    for i in range(config.need("n_layer")):
        block = {name.split(f"layers.{i}.")[1]: value for name, value in p.items() if f".layers.{i}." in name}
        m = {name.removeprefix("mixer."): value for name, value in block.items()}
        xz = rms_norm(residual_BLD, block["norm.weight"], config.norm_eps) @ m["in_proj.weight"].T
        x, z = xz[..., :inner], xz[..., inner:]
        x, _ = conv(x, m["conv1d.weight"][:, 0], m["conv1d.bias"])
        projected = x @ m["x_proj.weight"].T
        delta = projected[..., :rank] @ m["dt_proj.weight"].T
        B, C = projected[..., rank : rank + state], projected[..., rank + state :]
        y, _ = scan(x, delta, -torch.exp(m["A_log"]), B, C, m["D"], z, m["dt_proj.bias"])
        residual_BLD = residual_BLD + y @ m["out_proj.weight"].T
    hidden = rms_norm(residual_BLD, p["backbone.norm_f.weight"], config.norm_eps)
    return hidden @ p["backbone.embedding.weight"].T


def layouts(batch: int, length: int, seed: int = 0, density: float = 0.2) -> Tensor:
    """Document numbers (B, L) int32 that differ from row to row, with documents of every short length among them."""
    generator = torch.Generator().manual_seed(seed)
    starts_BL = torch.rand(batch, length, generator=generator) < density
    return (starts_BL.cumsum(1) + 3).to(torch.int32)


def gradients(outputs: tuple[Tensor, ...], inputs: list[Tensor], seed: int = 1) -> list[Tensor]:
    """Gradients of a random projection of all outputs, the same for outputs of the same shapes."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros((), dtype=torch.float64)
    for output in outputs:
        weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        total = total + (output.double() * weights).sum() / math.sqrt(output.numel())
    return list(torch.autograd.grad(total, inputs))
