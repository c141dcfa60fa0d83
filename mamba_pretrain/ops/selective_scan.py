"""The selective scan (S6): the recurrence at the heart of Mamba.

Symbols, after "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752), section 3 and
Algorithm 2:

    u      input of the state space model, after convolution and SiLU          x_t in the paper
    delta  step size, here before bias and softplus                            Delta_t
    A      state matrix, diagonal and negative; the parameter is log(-A)       A
    B, C   input and output projection of the state, functions of the input    B_t, C_t
    D      skip connection                                                     D
    z      gate                                                                (figure 3, right branch)

    Delta_t = softplus(delta_t + delta_bias)
    h_t     = exp(Delta_t A) h_{t-1} + Delta_t B_t u_t        zero-order hold for A, Euler for B (as released)
    y_t     = (C_t . h_t + D u_t) * silu(z_t)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# The backward keeps one state per chunk and recomputes the rest: memory falls from L x E x N to
# (L / CHUNK + CHUNK) x E x N, for one more forward.
CHUNK = 32


def selective_scan(
    u_BLE: Tensor,
    delta_BLE: Tensor,
    A_EN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_E: Tensor,
    z_BLE: Tensor,
    delta_bias_E: Tensor,
    seq_idx_BL: Tensor | None = None,
    initial_state_BEN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs the recurrence above along L, from `initial_state` (zeros by default).

    Where `seq_idx` differs from its value one step earlier a new document begins, and the state is zero before that
    step; `initial_state` belongs to the document of `seq_idx[:, 0]`. All arithmetic and the state are fp32 (float64
    for float64 inputs), whatever the dtype of the inputs and under autocast.

    Returns y (B, L, E) in the dtype of u, and the state after the last step (B, E, N); both are differentiable.
    """
    wide = torch.promote_types(u_BLE.dtype, torch.float32)
    batch, length, inner = u_BLE.shape
    with torch.autocast(u_BLE.device.type, enabled=False):
        A_EN = A_EN.to(wide)
        keep_BL = None
        if seq_idx_BL is not None:
            keep_BL = torch.ones(batch, length, dtype=wide, device=u_BLE.device)
            keep_BL[:, 1:] = seq_idx_BL[:, 1:] == seq_idx_BL[:, :-1]
        h_BEN = initial_state_BEN
        h_BEN = u_BLE.new_zeros(batch, inner, A_EN.shape[1], dtype=wide) if h_BEN is None else h_BEN.to(wide)
        ys_BTE = []
        for start in range(0, length, CHUNK):
            part = slice(start, start + CHUNK)
            inputs = (u_BLE[:, part], delta_BLE[:, part], A_EN, B_BLN[:, part], C_BLN[:, part], delta_bias_E.to(wide))
            keep_BT = None if keep_BL is None else keep_BL[:, part]
            if torch.is_grad_enabled():
                y_BTE, h_BEN = checkpoint(
                    _chunk, *inputs, keep_BT, h_BEN, use_reentrant=False, preserve_rng_state=False
                )
            else:
                y_BTE, h_BEN = _chunk(*inputs, keep_BT, h_BEN)
            ys_BTE.append(y_BTE)
        y_BLE = torch.cat(ys_BTE, dim=1) if ys_BTE else u_BLE.to(wide)
        y_BLE = (y_BLE + D_E.to(wide) * u_BLE.to(wide)) * F.silu(z_BLE.to(wide))
    return y_BLE.to(u_BLE.dtype), h_BEN


def _chunk(
    u_BTE: Tensor,
    delta_BTE: Tensor,
    A_EN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    delta_bias_E: Tensor,
    keep_BT: Tensor | None,
    h_BEN: Tensor,
) -> tuple[Tensor, Tensor]:
    wide = A_EN.dtype
    delta_BTE = F.softplus(delta_BTE.to(wide) + delta_bias_E)
    decay_BTEN = torch.exp(delta_BTE.unsqueeze(-1) * A_EN)
    if keep_BT is not None:
        decay_BTEN = decay_BTEN * keep_BT[:, :, None, None]
    drive_BTEN = (delta_BTE * u_BTE.to(wide)).unsqueeze(-1) * B_BTN.to(wide).unsqueeze(2)
    states = []
    for decay_BEN, drive_BEN in zip(decay_BTEN.unbind(1), drive_BTEN.unbind(1), strict=True):
        h_BEN = torch.addcmul(drive_BEN, decay_BEN, h_BEN)
        states.append(h_BEN)
    y_BTE = torch.matmul(torch.stack(states, dim=1), C_BTN.to(wide).unsqueeze(-1)).squeeze(-1)
    return y_BTE, h_BEN
