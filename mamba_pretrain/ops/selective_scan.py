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

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba_pretrain.ops import dispatch
from mamba_pretrain.ops.call import Call, expect, expect_floats, expect_rank

# Steps whose states (B, E, N) are alive at once: the backward keeps the state before each chunk and recomputes the
# others, so memory is (L / CHUNK + 4 CHUNK) x E x N and not several times L x E x N. Of 8, 16 and 32 on two CPU cores 8
# and 16 are the fastest (a chunk stays in cache), and 8 keeps twice as many states.
CHUNK = 16


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
    return_last_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Runs the recurrence above along L, from `initial_state` (zeros by default).

    Where `seq_idx`, which never falls along a row, differs from its value one step earlier a new document begins, and
    the state is zero before that step; `initial_state` belongs to the document of `seq_idx[:, 0]`. All arithmetic and
    the state are fp32 (float64 for float64 inputs), whatever the dtype of the inputs and under autocast.

    Returns y (B, L, E) in the dtype of u, and the state after the last step (B, E, N), or None if it is not wanted;
    both are differentiable, once. Raises KernelError, naming the argument, for a wrong shape, dtype or device.
    """
    expect_rank("selective_scan", 3, u=u_BLE)
    expect_rank("selective_scan", 2, A=A_EN)
    batch, length, inner = u_BLE.shape
    d_state = A_EN.shape[1]
    expect(
        "selective_scan",
        u_BLE.device,
        delta=(delta_BLE, (batch, length, inner)),
        A=(A_EN, (inner, d_state)),
        B=(B_BLN, (batch, length, d_state)),
        C=(C_BLN, (batch, length, d_state)),
        D=(D_E, (inner,)),
        z=(z_BLE, (batch, length, inner)),
        delta_bias=(delta_bias_E, (inner,)),
        seq_idx=(seq_idx_BL, (batch, length)),
        initial_state=(initial_state_BEN, (batch, inner, d_state)),
    )
    expect_floats(
        "selective_scan",
        u=u_BLE,
        delta=delta_BLE,
        A=A_EN,
        B=B_BLN,
        C=C_BLN,
        D=D_E,
        z=z_BLE,
        delta_bias=delta_bias_E,
        initial_state=initial_state_BEN,
    )
    backend = dispatch.choose(
        Call.of(
            "selective_scan",
            u_BLE,
            size=d_state,
            packed=seq_idx_BL is not None,
            initial_state=initial_state_BEN is not None,
            last_state=return_last_state,
            channels=inner,
            length=min(length, 2),
        )
    )
    scan = selective_scan_reference if backend is None else backend.selective_scan
    y_BLE, last_BEN = scan(
        u_BLE, delta_BLE, A_EN, B_BLN, C_BLN, D_E, z_BLE, delta_bias_E, seq_idx_BL, initial_state_BEN, return_last_state
    )
    return y_BLE, last_BEN


def selective_scan_reference(
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
    return_last_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence in PyTorch's own operations, on any device: what every backend is held against."""
    wide = torch.promote_types(u_BLE.dtype, torch.float32)
    with torch.autocast(u_BLE.device.type, enabled=False):
        wide_u_BLE = u_BLE.to(wide)
        step_BLE = F.softplus(delta_BLE.to(wide) + delta_bias_E.to(wide))
        y_BLE, last_BEN = _Recurrence.apply(  # type: ignore[no-untyped-call]
            step_BLE,
            step_BLE * wide_u_BLE,
            A_EN.to(wide),
            B_BLN.to(wide),
            C_BLN.to(wide),
            None if seq_idx_BL is None else _continues(seq_idx_BL, wide),
            u_BLE.new_zeros(len(u_BLE), *A_EN.shape, dtype=wide)
            if initial_state_BEN is None
            else initial_state_BEN.to(wide),
        )
        y_BLE = (y_BLE + D_E.to(wide) * wide_u_BLE) * F.silu(z_BLE.to(wide))
    return y_BLE.to(u_BLE.dtype), last_BEN if return_last_state else None


def _continues(seq_idx_BL: Tensor, dtype: torch.dtype) -> Tensor:
    """1 where a step goes on with the document of the step before it, 0 where a document begins."""
    keep_BL = torch.ones(seq_idx_BL.shape, dtype=dtype, device=seq_idx_BL.device)
    keep_BL[:, 1:] = torch.eq(seq_idx_BL[:, 1:], seq_idx_BL[:, :-1])
    return keep_BL


def _states(
    step_BTE: Tensor, drive_BTE: Tensor, A_EN: Tensor, B_BTN: Tensor, keep_BT: Tensor | None, h_BEN: Tensor
) -> tuple[Tensor, Tensor]:
    """decay_t = keep_t exp(Delta_t A) and h_t = decay_t h_{t-1} + drive_t B_t, both time first, (T, B, E, N)."""
    decay_TBEN = torch.mul(step_BTE.transpose(0, 1).unsqueeze(-1), A_EN).exp_()
    if keep_BT is not None:
        decay_TBEN *= keep_BT.t()[:, :, None, None]
    h_TBEN = drive_BTE.transpose(0, 1).unsqueeze(-1) * B_BTN.transpose(0, 1).unsqueeze(2)
    for decay_BEN, next_BEN in zip(decay_TBEN, h_TBEN, strict=True):
        h_BEN = next_BEN.addcmul_(decay_BEN, h_BEN)
    return decay_TBEN, h_TBEN


class _Recurrence(torch.autograd.Function):
    """y_t = C_t . h_t and the last h, from Delta (`step`), Delta u (`drive`), A, B, C, keep and the first h."""

    @staticmethod
    def forward(
        ctx: Any,
        step_BLE: Tensor,
        drive_BLE: Tensor,
        A_EN: Tensor,
        B_BLN: Tensor,
        C_BLN: Tensor,
        keep_BL: Tensor | None,
        h_BEN: Tensor,
    ) -> tuple[Tensor, Tensor]:
        y_BLE, first = torch.empty_like(step_BLE), []
        for T in _chunks(step_BLE):
            first.append(h_BEN)
            keep_BT = None if keep_BL is None else keep_BL[:, T]
            _, h_TBEN = _states(step_BLE[:, T], drive_BLE[:, T], A_EN, B_BLN[:, T], keep_BT, h_BEN)
            y_BLE[:, T] = (h_TBEN @ C_BLN[:, T].transpose(0, 1).unsqueeze(-1)).squeeze(-1).transpose(0, 1)
            h_BEN = h_TBEN[-1].clone()  # a view would keep the whole chunk
        ctx.save_for_backward(step_BLE, drive_BLE, A_EN, B_BLN, C_BLN, keep_BL, *first)
        return y_BLE, h_BEN if first else h_BEN.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BLE: Tensor, dh_BEN: Tensor) -> tuple[Tensor | None, ...]:
        """g_t = C_t dy_t + decay_{t+1} g_{t+1} is the gradient of h_t; every other gradient is a product with it."""
        step_BLE, drive_BLE, A_EN, B_BLN, C_BLN, keep_BL, *first = ctx.saved_tensors
        dstep_BLE, ddrive_BLE = torch.empty_like(step_BLE), torch.empty_like(drive_BLE)
        dA_EN, dB_BLN, dC_BLN = torch.zeros_like(A_EN), torch.empty_like(B_BLN), torch.empty_like(C_BLN)
        for T, h_BEN in zip(reversed(_chunks(step_BLE)), reversed(first), strict=True):
            keep_BT = None if keep_BL is None else keep_BL[:, T]
            decay_TBEN, h_TBEN = _states(step_BLE[:, T], drive_BLE[:, T], A_EN, B_BLN[:, T], keep_BT, h_BEN)
            step_TBE, drive_TBE, dy_TBE = (x[:, T].transpose(0, 1) for x in (step_BLE, drive_BLE, dy_BLE))
            B_TBN, C_TBN = B_BLN[:, T].transpose(0, 1), C_BLN[:, T].transpose(0, 1)

            g_TBEN = dy_TBE.unsqueeze(-1) * C_TBN.unsqueeze(2)
            g_TBEN[-1] += dh_BEN
            for t in range(len(g_TBEN) - 2, -1, -1):
                g_TBEN[t].addcmul_(decay_TBEN[t + 1], g_TBEN[t + 1])
            dh_BEN = decay_TBEN[0] * g_TBEN[0]

            dC_BLN[:, T] = (dy_TBE.unsqueeze(2) @ h_TBEN).squeeze(2).transpose(0, 1)
            dB_BLN[:, T] = (drive_TBE.unsqueeze(2) @ g_TBEN).squeeze(2).transpose(0, 1)
            ddrive_BLE[:, T] = (g_TBEN @ B_TBN.unsqueeze(-1)).squeeze(-1).transpose(0, 1)

            # The gradient of the exponent Delta_t A, in g's place: g_t decay_t h_{t-1}.
            g_TBEN *= decay_TBEN
            g_TBEN[1:] *= h_TBEN[:-1]
            g_TBEN[0] *= h_BEN
            dstep_BLE[:, T] = torch.mul(g_TBEN, A_EN, out=h_TBEN).sum(-1).transpose(0, 1)
            dA_EN += g_TBEN.mul_(step_TBE.unsqueeze(-1)).sum((0, 1))
        return dstep_BLE, ddrive_BLE, dA_EN, dB_BLN, dC_BLN, None, dh_BEN


def _chunks(x_BLE: Tensor) -> list[slice]:
    return [slice(start, start + CHUNK) for start in range(0, x_BLE.shape[1], CHUNK)]
