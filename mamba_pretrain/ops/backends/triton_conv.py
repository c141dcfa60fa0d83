"""The causal convolution in Triton: tiles of steps x channels, any number of taps, documents and states together.

The backward computes the sums before SiLU again instead of reading them: K^2 products for each element, and only x, dy
and dx pass through memory. The gradients of weight and bias are summed over a tile's steps in the kernel, and over
tiles by torch in a fixed order.
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

from mamba_pretrain.ops.backends.triton_common import FUSED, blocks, on, rows

# 64 channels are 128 bytes of bf16, 16 for each of eight threads. With 32 steps and 4 warps a thread has 16 elements of
# every operand, and the gradients of the weights are an eighth of an input in bf16 for every two taps.
BLOCK_T = 32
BLOCK_E = 64
TILE = {"BLOCK_T": BLOCK_T, "BLOCK_E": BLOCK_E, "num_warps": 4}


def causal_conv1d(
    x_BLE: Tensor,
    weight_EK: Tensor,
    bias_E: Tensor | None,
    seq_idx_BL: Tensor | None = None,
    initial_state_BSE: Tensor | None = None,
    return_last_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    y_BLE, last_BSE = _Conv.apply(  # type: ignore[no-untyped-call]
        x_BLE, weight_EK, bias_E, seq_idx_BL, initial_state_BSE, return_last_state
    )
    return y_BLE, last_BSE


@triton.jit
def _documents(SEQ, t, L):
    """The document of each step; what precedes the first step is of its document, what follows the last of its own."""
    return tl.load(SEQ + tl.minimum(tl.maximum(t, 0), L - 1))


@triton.jit
def _tap(X, STATE, SEQ, t, lag, here, e, real_e, x_l, L, E, K: tl.constexpr):
    """Inputs [BLOCK_T, BLOCK_E] as steps t see them `lag` steps later: zero in another document than theirs.

    Before the first step lies STATE (K - 1, E). `here`: which of the steps t are steps of the row.
    """
    source = t - lag
    inside = here & (source >= 0)
    x = tl.load(
        X + source.to(tl.int64)[:, None] * x_l + e[None, :], mask=inside[:, None] & real_e[None, :], other=0.0
    ).to(tl.float32)
    if STATE is not None:
        before = here & (source < 0)
        x += tl.load(
            STATE + (source + (K - 1))[:, None] * E + e[None, :], mask=before[:, None] & real_e[None, :], other=0.0
        ).to(tl.float32)
    if SEQ is not None:
        same = _documents(SEQ, source, L) == _documents(SEQ, t, L)
        x = tl.where(same[:, None], x, 0.0)
    return x


@triton.jit
def _sum_of_taps(X, STATE, SEQ, WEIGHT, bias, t, here, e, real_e, x_l, L, E, K: tl.constexpr):
    total = tl.zeros([t.shape[0], e.shape[0]], tl.float32) + bias[None, :]
    for k in tl.static_range(K):
        weight = tl.load(WEIGHT + k * E + e, mask=real_e, other=0.0)
        total += weight[None, :] * _tap(X, STATE, SEQ, t, K - 1 - k, here, e, real_e, x_l, L, E, K)
    return total


@triton.jit
def conv_kernel(
    X, STATE, SEQ, WEIGHT, BIAS, Y, L, E, x_b, x_l,
    K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2).to(tl.int64)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    here, real_e = t < L, e < E
    X += row * x_b
    if STATE is not None:
        STATE += row * (K - 1) * E
    if SEQ is not None:
        SEQ += row * L
    bias = tl.zeros([BLOCK_E], tl.float32)
    if BIAS is not None:
        bias = tl.load(BIAS + e, mask=real_e, other=0.0)
    total = _sum_of_taps(X, STATE, SEQ, WEIGHT, bias, t, here, e, real_e, x_l, L, E, K)
    place = (row * L + t.to(tl.int64))[:, None] * E + e[None, :]
    tl.store(Y + place, (total * tl.sigmoid(total)).to(Y.dtype.element_ty), mask=here[:, None] & real_e[None, :])


@triton.jit
def conv_backward_kernel(
    X, STATE, SEQ, WEIGHT, BIAS, DY, DLAST, DX, DSTATE, DWEIGHT, DBIAS, L, E, x_b, x_l, dy_b, dy_l,
    K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A tile lies over the history: the K - 1 inputs of the state, at steps -(K - 1) to -1, then those of the row.

    DX (B, L, E); DSTATE (B, K - 1, E); DWEIGHT (B, tiles, K, E) and DBIAS (B, tiles, E), to be summed.
    """
    row = tl.program_id(2).to(tl.int64)
    place = row * tl.num_programs(1) + tl.program_id(1)
    s = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T) - (K - 1)
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    real_e = e < E
    X += row * x_b
    DY += row * dy_b
    if STATE is not None:
        STATE += row * (K - 1) * E
    if SEQ is not None:
        SEQ += row * L
    bias = tl.zeros([BLOCK_E], tl.float32)
    if BIAS is not None:
        bias = tl.load(BIAS + e, mask=real_e, other=0.0)

    dx = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for lag in tl.static_range(K):  # input s reaches step t = s + lag
        t = s + lag
        here = (t >= 0) & (t < L)
        total = _sum_of_taps(X, STATE, SEQ, WEIGHT, bias, t, here, e, real_e, x_l, L, E, K)
        gate = tl.sigmoid(total)
        dy = tl.load(
            DY + t.to(tl.int64)[:, None] * dy_l + e[None, :], mask=here[:, None] & real_e[None, :], other=0.0
        ).to(tl.float32)
        dtotal = dy * gate * (1.0 + total * (1.0 - gate))
        if lag == 0:
            for k in tl.static_range(K):
                x = _tap(X, STATE, SEQ, t, K - 1 - k, here, e, real_e, x_l, L, E, K)
                tl.store(DWEIGHT + (place * K + k) * E + e, tl.sum(dtotal * x, axis=0), mask=real_e)
            tl.store(DBIAS + place * E + e, tl.sum(dtotal, axis=0), mask=real_e)
        reached = tl.load(WEIGHT + (K - 1 - lag) * E + e, mask=real_e, other=0.0)[None, :] * dtotal
        if SEQ is not None:
            same = _documents(SEQ, s, L) == _documents(SEQ, t, L)
            reached = tl.where(same[:, None], reached, 0.0)
        dx += reached

    if DLAST is not None:  # (B, K - 1, E): the last state is the last K - 1 inputs of the history
        in_last = s - (L - (K - 1))
        kept = (in_last >= 0) & (s < L)
        if SEQ is not None:
            kept = kept & (_documents(SEQ, s, L) == _documents(SEQ, s * 0 + L, L))
        dx += tl.load(
            DLAST + (row * (K - 1) + in_last)[:, None] * E + e[None, :], mask=kept[:, None] & real_e[None, :], other=0.0
        )
    tl.store(
        DX + (row * L + s.to(tl.int64))[:, None] * E + e[None, :],
        dx.to(DX.dtype.element_ty),
        mask=((s >= 0) & (s < L))[:, None] & real_e[None, :],
    )
    if DSTATE is not None:
        of_state = s < 0
        tl.store(
            DSTATE + (row * (K - 1) + s + (K - 1))[:, None] * E + e[None, :],
            dx,
            mask=of_state[:, None] & real_e[None, :],
        )


def _last_state(x_BLE: Tensor, state_BSE: Tensor | None, seq_idx_BL: Tensor | None, taps: int) -> Tensor:
    """The last K - 1 inputs, fp32: so few that torch's own operations do."""
    batch, length, inner = x_BLE.shape
    size = taps - 1
    new = min(size, length)
    last_BSE = x_BLE.new_zeros(batch, size, inner, dtype=torch.float32)
    last_BSE[:, size - new :] = x_BLE[:, length - new :]
    if state_BSE is not None:
        last_BSE[:, : size - new] = state_BSE[:, new:]
    if seq_idx_BL is not None and length > 0:
        document_BS = seq_idx_BL[:, :1].repeat(1, size)
        document_BS[:, size - new :] = seq_idx_BL[:, length - new :]
        last_BSE *= torch.eq(document_BS, seq_idx_BL[:, -1:]).unsqueeze(-1)
    return last_BSE


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BLE: Tensor,
        weight_EK: Tensor,
        bias_E: Tensor | None,
        seq_idx_BL: Tensor | None,
        state_BSE: Tensor | None,
        return_last_state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        (batch, length, inner), taps = x_BLE.shape, weight_EK.shape[1]
        ctx.set_materialize_grads(False)
        ctx.dtypes = [None if x is None else x.dtype for x in (x_BLE, weight_EK, bias_E, state_BSE)]
        x_BLE, weight_KE = rows(x_BLE), weight_EK.float().t().contiguous()
        bias_E = None if bias_E is None else bias_E.float().contiguous()
        seq_idx_BL = None if seq_idx_BL is None else seq_idx_BL.contiguous()
        state_BSE = None if state_BSE is None else state_BSE.contiguous()

        y_BLE = x_BLE.new_empty(batch, length, inner)
        if y_BLE.numel() > 0:
            with on(x_BLE.device):
                conv_kernel[(blocks(inner, BLOCK_E), blocks(length, BLOCK_T), batch)](
                    x_BLE, state_BSE, seq_idx_BL, weight_KE, bias_E, y_BLE, length, inner, *x_BLE.stride()[:2],
                    K=taps, **TILE, **FUSED,
                )  # fmt: skip
        ctx.save_for_backward(x_BLE, weight_KE, bias_E, seq_idx_BL, state_BSE)
        return y_BLE, _last_state(x_BLE, state_BSE, seq_idx_BL, taps) if return_last_state else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BLE: Tensor | None, dlast_BSE: Tensor | None) -> tuple[Tensor | None, ...]:
        x_BLE, weight_KE, bias_E, seq_idx_BL, state_BSE = ctx.saved_tensors
        (batch, length, inner), taps = x_BLE.shape, len(weight_KE)
        dy_BLE = torch.zeros_like(x_BLE) if dy_BLE is None else rows(dy_BLE)
        dlast_BSE = None if dlast_BSE is None else dlast_BSE.contiguous()
        dx_BLE = x_BLE.new_empty(batch, length, inner)
        dstate_BSE = None if state_BSE is None else x_BLE.new_empty(batch, taps - 1, inner, dtype=torch.float32)
        tiles = blocks(length + taps - 1, BLOCK_T)
        dweight_BTKE = x_BLE.new_empty(batch, tiles, taps, inner, dtype=torch.float32)
        dbias_BTE = x_BLE.new_empty(batch, tiles, inner, dtype=torch.float32)
        if x_BLE.numel() > 0:
            with on(x_BLE.device):
                conv_backward_kernel[(blocks(inner, BLOCK_E), tiles, batch)](
                    x_BLE, state_BSE, seq_idx_BL, weight_KE, bias_E, dy_BLE, dlast_BSE, dx_BLE, dstate_BSE,
                    dweight_BTKE, dbias_BTE, length, inner, *x_BLE.stride()[:2], *dy_BLE.stride()[:2],
                    K=taps, **TILE, **FUSED,
                )  # fmt: skip
        else:
            dweight_BTKE.zero_(), dbias_BTE.zero_()
            if dstate_BSE is not None:
                dstate_BSE.zero_() if dlast_BSE is None else dstate_BSE.copy_(dlast_BSE)
        found = (dx_BLE, dweight_BTKE.sum((0, 1)).t(), dbias_BTE.sum((0, 1)), dstate_BSE)
        dx, dweight, dbias, dstate = (
            None if x is None or dtype is None else x.to(dtype) for x, dtype in zip(found, ctx.dtypes, strict=True)
        )
        return dx, dweight, dbias, None, dstate, None
