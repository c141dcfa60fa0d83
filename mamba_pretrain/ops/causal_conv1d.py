"""Depthwise causal convolution of a few taps, followed by SiLU (Mamba paper, figure 3; causal-conv1d's operation)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_pretrain.ops import dispatch
from mamba_pretrain.ops.call import Call, expect, expect_floats, expect_rank


def causal_conv1d(
    x_BLE: Tensor,
    weight_EK: Tensor,
    bias_E: Tensor | None,
    seq_idx_BL: Tensor | None = None,
    initial_state_BSE: Tensor | None = None,
    return_last_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """y_t = silu(bias + sum_k weight[:, k] x_{t - (K - 1) + k}), every channel on its own.

    What precedes the first step is `initial_state`, the last S = K - 1 inputs (zeros by default), which belongs to the
    document of `seq_idx[:, 0]`; the numbers never fall along a row. Inputs of another document than that of step t do
    not reach y_t. Arithmetic is fp32 (float64 for float64 inputs).

    Returns y (B, L, E) in the dtype of x, and the last K - 1 inputs (B, S, E) in fp32, those of other documents than
    the last step's set to zero, or None if they are not wanted; both are differentiable. Raises KernelError, naming the
    argument, for a wrong shape, dtype or device.
    """
    expect_rank("causal_conv1d", 3, x=x_BLE)
    expect_rank("causal_conv1d", 2, weight=weight_EK)
    batch, length, inner = x_BLE.shape
    taps = weight_EK.shape[1]
    expect(
        "causal_conv1d",
        x_BLE.device,
        weight=(weight_EK, (inner, taps)),
        bias=(bias_E, (inner,)),
        seq_idx=(seq_idx_BL, (batch, length)),
        initial_state=(initial_state_BSE, (batch, taps - 1, inner)),
    )
    expect_floats("causal_conv1d", x=x_BLE, weight=weight_EK, bias=bias_E, initial_state=initial_state_BSE)
    backend = dispatch.choose(
        Call.of(
            "causal_conv1d",
            x_BLE,
            size=taps,
            packed=seq_idx_BL is not None,
            initial_state=initial_state_BSE is not None,
            last_state=return_last_state,
            channels=inner,
            length=min(length, 2),
        )
    )
    conv = causal_conv1d_reference if backend is None else backend.causal_conv1d
    y_BLE, last_BSE = conv(x_BLE, weight_EK, bias_E, seq_idx_BL, initial_state_BSE, return_last_state)
    return y_BLE, last_BSE


def causal_conv1d_reference(
    x_BLE: Tensor,
    weight_EK: Tensor,
    bias_E: Tensor | None,
    seq_idx_BL: Tensor | None = None,
    initial_state_BSE: Tensor | None = None,
    return_last_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """One product a tap, in PyTorch's own operations, on any device."""
    wide = torch.promote_types(x_BLE.dtype, torch.float32)
    batch, length, inner = x_BLE.shape
    taps = weight_EK.shape[1]
    if length == 0:
        seq_idx_BL = None  # no step, no document: the state stays as it is
    if initial_state_BSE is None:
        initial_state_BSE = x_BLE.new_zeros(batch, taps - 1, inner, dtype=wide)
    history_BPE = torch.cat([initial_state_BSE.to(wide), x_BLE.to(wide)], dim=1)
    document_BP = None
    if seq_idx_BL is not None:
        document_BP = torch.cat([seq_idx_BL[:, :1].expand(batch, taps - 1), seq_idx_BL], dim=1)

    y_BLE = x_BLE.new_zeros(batch, length, inner, dtype=wide)
    for k in range(taps):
        tap_BLE = weight_EK[:, k].to(wide) * history_BPE[:, k : k + length]
        if document_BP is not None:
            tap_BLE = tap_BLE * torch.eq(document_BP[:, k : k + length], document_BP[:, taps - 1 :]).unsqueeze(-1)
        y_BLE = y_BLE + tap_BLE
    if bias_E is not None:
        y_BLE = y_BLE + bias_E.to(wide)

    y_BLE = F.silu(y_BLE).to(x_BLE.dtype)
    if not return_last_state:
        return y_BLE, None
    last_BSE = history_BPE[:, length:]
    if document_BP is not None:
        last_BSE = last_BSE * torch.eq(document_BP[:, length:], document_BP[:, -1:]).unsqueeze(-1)
    return y_BLE, last_BSE
