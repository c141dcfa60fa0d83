"""The selective scan in Triton: chunks of time run in parallel, and so do blocks of channels.

Forward: every chunk is scanned from zeros; a short pass over the chunk ends gives the state that comes into each chunk
(a chunk's total decay is exp(A sum Delta)); every chunk is scanned from that state and writes its outputs. Each
exponential is taken twice, which buys L / CHUNK times the programs: rows times channels alone are too few to fill a
GPU. Backward: the same twice more, forwards in time for what needs the states, backwards for what needs their
gradients.

Kept for the backward: the state at each chunk boundary, fp32. Made in the backward and freed there: the states before
every PART steps, and the parts of the gradients that are sums over channels (B, C) or over rows and chunks (A, D,
delta_bias). torch adds the parts up in a fixed order: nothing is added atomically, results are the same on every run.
At N = 16 in bytes for each (step, channel), where an input in bf16 has 2: kept 1, freed 16 for the states, 2 each for B
and C, 1 for A.

Written without a GPU at hand: compiled for sm_80 and sm_90, run in Triton's interpreter. Block sizes come from the
compiler's register counts and have not been timed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba_pretrain.ops.backends import triton_scan_kernels as kernels
from mamba_pretrain.ops.backends.triton_common import FUSED, blocks, on, power_of_two, rows

# 32 channels: one for each thread of a warp. 64 steps: 1,536 programs for one row of 2,048 steps and 1,536 channels,
# enough for a large GPU at batch size 1, while the states between chunks stay half the size of an input in bf16.
BLOCK_E = 32
CHUNK = 64
# Steps whose states the backward holds in registers: 4 x 16 of a thread's 255. With 8 it would read half as many from
# memory, and spill hundreds of bytes.
PART = 4


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
    y_BLE, last_BEN = _Scan.apply(  # type: ignore[no-untyped-call]
        u_BLE,
        delta_BLE,
        A_EN,
        B_BLN,
        C_BLN,
        D_E,
        z_BLE,
        delta_bias_E,
        seq_idx_BL,
        initial_state_BEN,
        return_last_state,
    )
    return y_BLE, last_BEN


def _extents(d_state: int) -> dict[str, int]:
    """What all launches share. A thread holds 16 states of one channel, however many there are."""
    block_n = power_of_two(d_state)
    return {"N": d_state, "BLOCK_N": block_n, "BLOCK_E": BLOCK_E, "CHUNK": CHUNK, "num_warps": max(1, block_n // 16)}


def _tiles(x_EN: Tensor) -> Tensor:
    """(blocks, BLOCK_N, BLOCK_E), padded with zeros."""
    inner, d_state = x_EN.shape
    padded = F.pad(x_EN, (0, power_of_two(d_state) - d_state, 0, -inner % BLOCK_E))
    return padded.view(-1, BLOCK_E, padded.shape[1]).transpose(1, 2).contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u_BLE: Tensor,
        delta_BLE: Tensor,
        A_EN: Tensor,
        B_BLN: Tensor,
        C_BLN: Tensor,
        D_E: Tensor,
        z_BLE: Tensor,
        bias_E: Tensor,
        seq_idx_BL: Tensor | None,
        initial_BEN: Tensor | None,
        return_last_state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        (batch, length, inner), d_state = u_BLE.shape, A_EN.shape[1]
        ctx.set_materialize_grads(False)
        ctx.dtypes = [x.dtype for x in (u_BLE, delta_BLE, A_EN, B_BLN, C_BLN, D_E, z_BLE, bias_E)]
        ctx.initial_dtype = None if initial_BEN is None else initial_BEN.dtype
        u_BLE, delta_BLE, B_BLN, C_BLN, z_BLE = (rows(x) for x in (u_BLE, delta_BLE, B_BLN, C_BLN, z_BLE))
        A_XNE = _tiles(A_EN.float() * math.log2(math.e))
        D_E, bias_E = D_E.float().contiguous(), bias_E.float().contiguous()
        seq_idx_BL = None if seq_idx_BL is None else seq_idx_BL.contiguous()
        initial_BEN = None if initial_BEN is None else initial_BEN.contiguous()

        y_BLE = u_BLE.new_empty(batch, length, inner)
        last_BEN = u_BLE.new_empty(batch, inner, d_state, dtype=torch.float32) if return_last_state else None
        n_chunks, n_blocks = blocks(length, CHUNK), blocks(inner, BLOCK_E)
        state_BGXNE = u_BLE.new_empty(batch, n_chunks, *A_XNE.shape, dtype=torch.float32)
        total_BGE = u_BLE.new_empty(batch, n_chunks, inner, dtype=torch.float32)
        if y_BLE.numel() > 0:
            extents, grid = _extents(d_state), (n_blocks, n_chunks, batch)
            with on(u_BLE.device):
                kernels.ends_kernel[grid](
                    u_BLE, delta_BLE, A_XNE, B_BLN, bias_E, seq_idx_BL, state_BGXNE, total_BGE, length, inner,
                    *_strides(u_BLE, delta_BLE, B_BLN), **extents, **FUSED,
                )  # fmt: skip
                kernels.carry_kernel[(n_blocks, batch)](
                    state_BGXNE, total_BGE, A_XNE, seq_idx_BL, initial_BEN, last_BEN, n_chunks, length, inner,
                    REVERSE=False, **extents, **FUSED,
                )  # fmt: skip
                kernels.outputs_kernel[grid](
                    u_BLE, delta_BLE, A_XNE, B_BLN, C_BLN, D_E, z_BLE, bias_E, seq_idx_BL, state_BGXNE, y_BLE, length,
                    inner, *_strides(u_BLE, delta_BLE, B_BLN, C_BLN, z_BLE), **extents, **FUSED,
                )  # fmt: skip
        elif last_BEN is not None:
            last_BEN.zero_() if initial_BEN is None else last_BEN.copy_(initial_BEN)
        ctx.save_for_backward(
            u_BLE, delta_BLE, A_XNE, B_BLN, C_BLN, D_E, z_BLE, bias_E, seq_idx_BL, state_BGXNE, total_BGE
        )
        return y_BLE, last_BEN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BLE: Tensor | None, dlast_BEN: Tensor | None) -> tuple[Tensor | None, ...]:
        u_BLE, delta_BLE, A_XNE, B_BLN, C_BLN, D_E, z_BLE, bias_E, seq_idx_BL, state_BGXNE, total_BGE = (
            ctx.saved_tensors
        )
        (batch, length, inner), d_state = u_BLE.shape, B_BLN.shape[2]
        n_chunks, n_blocks = total_BGE.shape[1], blocks(inner, BLOCK_E)
        dy_BLE = torch.zeros_like(u_BLE) if dy_BLE is None else rows(dy_BLE)
        dlast_BEN = None if dlast_BEN is None else dlast_BEN.contiguous()

        def part(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=u_BLE.device)

        dfirst_BEN = None if ctx.initial_dtype is None else part(batch, inner, d_state)
        du_BLE, ddelta_BLE, dz_BLE = (x.new_empty(batch, length, inner) for x in (u_BLE, delta_BLE, z_BLE))
        dA_BGXNE, dD_BGE, dbias_BGE = (
            torch.empty_like(state_BGXNE),
            torch.empty_like(total_BGE),
            torch.empty_like(total_BGE),
        )
        dB_XBLN, dC_XBLN = (part(n_blocks, batch, length, d_state) for _ in range(2))  # X: blocks of channels
        if u_BLE.numel() > 0:
            extents, grid = _extents(d_state), (n_blocks, n_chunks, batch)
            strides = _strides(u_BLE, delta_BLE, B_BLN, C_BLN, z_BLE, dy_BLE)
            within = part(batch, n_chunks, *A_XNE.shape[:1], CHUNK // PART, *A_XNE.shape[1:])
            g_BGXNE = torch.empty_like(state_BGXNE)
            inputs = (u_BLE, delta_BLE, A_XNE, B_BLN, C_BLN, D_E, z_BLE, bias_E, seq_idx_BL)
            with on(u_BLE.device):
                kernels.forward_again_kernel[grid](
                    *inputs, state_BGXNE, dy_BLE, dz_BLE, dC_XBLN, dD_BGE, within, g_BGXNE, length, inner, *strides,
                    PART=PART, **extents, **FUSED,
                )  # fmt: skip
                kernels.carry_kernel[(n_blocks, batch)](
                    g_BGXNE, total_BGE, A_XNE, seq_idx_BL, dlast_BEN, dfirst_BEN, n_chunks, length, inner,
                    REVERSE=True, **extents, **FUSED,
                )  # fmt: skip
                kernels.backward_kernel[grid](
                    *inputs, within, g_BGXNE, dy_BLE, du_BLE, ddelta_BLE, dA_BGXNE, dB_XBLN, dbias_BGE, length, inner,
                    *strides, PART=PART, **extents, **FUSED,
                )  # fmt: skip
        elif dfirst_BEN is not None:
            dfirst_BEN.zero_() if dlast_BEN is None else dfirst_BEN.copy_(dlast_BEN)
        found = (
            du_BLE,
            ddelta_BLE,
            dA_BGXNE.sum((0, 1)).transpose(1, 2).flatten(0, 1)[:inner, :d_state],
            dB_XBLN.sum(0),
            dC_XBLN.sum(0),
            dD_BGE.sum((0, 1)),
            dz_BLE,
            dbias_BGE.sum((0, 1)),
        )
        wanted = (x.to(dtype) for x, dtype in zip(found, ctx.dtypes, strict=True))
        return *wanted, None, None if dfirst_BEN is None else dfirst_BEN.to(ctx.initial_dtype), None
