"""All of a mixer: projections, convolution, scan and gate (Mamba paper, figure 3; mamba_ssm's mamba_inner_fn)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_pretrain.ops import dispatch
from mamba_pretrain.ops.call import Call
from mamba_pretrain.ops.causal_conv1d import causal_conv1d
from mamba_pretrain.ops.selective_scan import selective_scan


def mamba_inner(
    hidden_BLD: Tensor,
    in_weight_FD: Tensor,  # F = 2 E: first the rows of x, then those of the gate z
    in_bias_F: Tensor | None,
    conv_weight_EK: Tensor,
    conv_bias_E: Tensor | None,
    x_weight_PE: Tensor,  # P = R + 2 N: the rows of delta's low-rank form, of B, of C
    dt_weight_ER: Tensor,
    dt_bias_E: Tensor,
    A_EN: Tensor,
    D_E: Tensor,
    out_weight_DE: Tensor,
    out_bias_D: Tensor | None,
    seq_idx_BL: Tensor | None = None,
    conv_state_BSE: Tensor | None = None,
    ssm_state_BEN: Tensor | None = None,
    return_last_state: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns the output (B, L, D), and the last states of convolution and scan, or None twice if they are not wanted.

    Matrix products run in the ambient autocast dtype, convolution and scan as their own pages say. dt_bias is added
    inside the scan, in fp32. A backend that has the whole mixer in one kernel, or wants other layouts between the
    products, takes all of it; otherwise it is composed here.
    """
    backend = dispatch.choose(
        Call.of(
            "mamba_inner",
            hidden_BLD,
            size=A_EN.shape[1],
            packed=seq_idx_BL is not None,
            initial_state=conv_state_BSE is not None or ssm_state_BEN is not None,
            last_state=return_last_state,
            channels=A_EN.shape[0],
            taps=conv_weight_EK.shape[1],
            length=min(hidden_BLD.shape[1], 2),
        )
    )
    if backend is not None:
        result: tuple[Tensor, Tensor | None, Tensor | None] = backend.mamba_inner(
            hidden_BLD, in_weight_FD, in_bias_F, conv_weight_EK, conv_bias_E, x_weight_PE, dt_weight_ER, dt_bias_E,
            A_EN, D_E, out_weight_DE, out_bias_D, seq_idx_BL, conv_state_BSE, ssm_state_BEN, return_last_state,
        )  # fmt: skip
        return result
    rank, d_state = dt_weight_ER.shape[1], A_EN.shape[1]
    x_BLE, z_BLE = F.linear(hidden_BLD, in_weight_FD, in_bias_F).chunk(2, dim=-1)
    x_BLE, conv_state_BSE = causal_conv1d(
        x_BLE, conv_weight_EK, conv_bias_E, seq_idx_BL, conv_state_BSE, return_last_state
    )
    delta_BLR, B_BLN, C_BLN = torch.split(F.linear(x_BLE, x_weight_PE), [rank, d_state, d_state], dim=-1)
    delta_BLE = F.linear(delta_BLR, dt_weight_ER)
    y_BLE, ssm_state_BEN = selective_scan(
        x_BLE, delta_BLE, A_EN, B_BLN, C_BLN, D_E, z_BLE, dt_bias_E, seq_idx_BL, ssm_state_BEN, return_last_state
    )
    return F.linear(y_BLE, out_weight_DE, out_bias_D), conv_state_BSE, ssm_state_BEN
