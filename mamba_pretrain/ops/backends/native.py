"""Kernels in C++ for CPUs: the ops' arguments, checked and laid out for `ops/csrc`, and their gradients.

Activations are fp32 or bf16, with fp32 arithmetic and state; other dtypes, or a mixture, are widened to fp32 first.
Nothing is copied whose last dimension is contiguous. The forward of the scan keeps the state before every chunk of
steps, and the backward recomputes the rest. Sums have a fixed order: results do not depend on the number of threads.

The kernels are ops of torch.library (`torch.ops.mamba_pretrain`), so that fake tensors and torch.compile know them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba_pretrain.compiled import BuildError
from mamba_pretrain.ops.backends import native_build, native_ops  # noqa: F401  native_ops registers the ops
from mamba_pretrain.ops.backends.native_decode import DecodeStep
from mamba_pretrain.ops.call import Call, Missing, ModelWeights

NAME = "native"
OPS = ("selective_scan", "causal_conv1d", "add_rms_norm", "cross_entropy_", "decode_step")

_kernels = torch.ops.mamba_pretrain


@cache
def missing() -> Missing | None:
    try:
        native_build.load()
    except BuildError as error:
        return Missing(str(error), error.mend)
    return None


def refuses(call: Call) -> str | None:
    if call.dtype == torch.float64:
        return "computes in fp32, the inputs are float64"
    if call.op == "decode_step" and call.dtype not in (torch.float32, torch.bfloat16):
        return f"takes matrices in fp32 and bf16, these are {call.dtype}"
    return None


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
    activations = _one_dtype(u_BLE, delta_BLE, B_BLN, C_BLN, z_BLE)
    y_BLE, last_BEN = _Scan.apply(  # type: ignore[no-untyped-call]
        *activations,
        A_EN.float(),
        D_E.float(),
        delta_bias_E.float(),
        None if initial_state_BEN is None else initial_state_BEN.float(),
        _starts(seq_idx_BL),
        return_last_state,
        torch.is_grad_enabled(),
    )
    return y_BLE.to(u_BLE.dtype), last_BEN


def causal_conv1d(
    x_BLE: Tensor,
    weight_EK: Tensor,
    bias_E: Tensor | None,
    seq_idx_BL: Tensor | None = None,
    initial_state_BSE: Tensor | None = None,
    return_last_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    (activation,) = _one_dtype(x_BLE)
    y_BLE, last_BSE = _Conv.apply(  # type: ignore[no-untyped-call]
        activation,
        weight_EK.float(),
        None if bias_E is None else bias_E.float(),
        None if initial_state_BSE is None else initial_state_BSE.float(),
        _starts(seq_idx_BL),
        return_last_state,
    )
    return y_BLE.to(x_BLE.dtype), last_BSE


def add_rms_norm(
    x_BLD: Tensor, residual_BLD: Tensor | None, weight_D: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    (activation,) = _one_dtype(x_BLD)
    narrow = out_dtype == torch.bfloat16
    y_BLD, stream_BLD = _AddNorm.apply(  # type: ignore[no-untyped-call]
        activation, None if residual_BLD is None else residual_BLD.float(), weight_D.float(), eps, narrow
    )
    return y_BLD.to(out_dtype), stream_BLD


def cross_entropy_(logits_TV: Tensor, labels_T: Tensor, vocab_size: int, gradient: bool) -> Tensor:
    (kernel_TV,) = _one_dtype(logits_TV)
    kernel_TV = kernel_TV.contiguous()
    loss_T: Tensor = _kernels.cross_entropy_(kernel_TV, labels_T, vocab_size, gradient)
    if gradient and kernel_TV is not logits_TV:
        logits_TV.copy_(kernel_TV)
    return loss_T


def decode_step(weights: ModelWeights) -> DecodeStep:
    return DecodeStep(weights)


def _one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = tensors[0].dtype
    if dtype in (torch.float32, torch.bfloat16) and all(t.dtype == dtype for t in tensors):
        return tensors
    return tuple(t.float() for t in tensors)


def _starts(seq_idx_BL: Tensor | None) -> Tensor | None:
    """True where a document begins, the row's first step apart: what is before it belongs to its document."""
    if seq_idx_BL is None:
        return None
    starts_BL = torch.zeros(seq_idx_BL.shape, dtype=torch.bool, device=seq_idx_BL.device)
    torch.ne(seq_idx_BL[:, 1:], seq_idx_BL[:, :-1], out=starts_BL[:, 1:])
    return starts_BL


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        delta: Tensor,
        B: Tensor,
        C: Tensor,
        z: Tensor,
        A: Tensor,
        D: Tensor,
        bias: Tensor,
        first: Tensor | None,
        starts: Tensor | None,
        return_last_state: bool,
        grad_enabled: bool,  # parameters ask for gradients even where none can be wanted
    ) -> tuple[Tensor, Tensor | None]:
        keep = grad_enabled and any(ctx.needs_input_grad)
        y, last, kept = _kernels.scan_forward(u, delta, B, C, z, A, D, bias, first, starts, keep, return_last_state)
        if keep:
            ctx.save_for_backward(u, delta, B, C, z, A, D, bias, first, starts, kept)
            ctx.set_materialize_grads(False)
        return y, last if return_last_state else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, first, starts, kept = ctx.saved_tensors
        dy = torch.zeros_like(inputs[0]) if dy is None else dy
        du, ddelta, dB, dC, dz, dA, dD, dbias, dfirst = _kernels.scan_backward(
            dy, dlast, *inputs, starts, kept, first is not None
        )
        return du, ddelta, dB, dC, dz, dA, dD, dbias, dfirst if first is not None else None, None, None, None


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        first: Tensor | None,
        starts: Tensor | None,
        return_last_state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(x, weight, bias, first, starts)
        ctx.set_materialize_grads(False)
        y = _kernels.conv_forward(x, weight, bias, first, starts)
        return y, _last_inputs(x, weight.shape[1] - 1, first, starts) if return_last_state else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, first, starts = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else dy
        dx, dweight, dbias, dfirst = _kernels.conv_backward(dy, dlast, x, weight, bias, first, starts)
        return dx, dweight, None if bias is None else dbias, None if first is None else dfirst, None, None


def _last_inputs(x_BLE: Tensor, size: int, first_BSE: Tensor | None, starts_BL: Tensor | None) -> Tensor:
    """The last inputs (B, size, E) fp32, those of other documents than the last step's zero."""
    batch, length, inner = x_BLE.shape
    before_BSE = x_BLE.new_zeros(batch, size, inner, dtype=torch.float32) if first_BSE is None else first_BSE
    last_BSE = torch.cat([before_BSE[:, length:], x_BLE[:, max(length - size, 0) :].float()], dim=1)
    if starts_BL is not None and length > 1:
        # The state counts as the steps before the first; a document that begins after a step cuts it off.
        begins_BS = torch.cat([starts_BL.new_zeros(batch, size), starts_BL], dim=1)[:, length:].int()
        last_BSE.masked_fill_((begins_BS.flip(1).cumsum(1).flip(1) > begins_BS).unsqueeze(-1), 0)
    return last_BSE


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, narrow: bool
    ) -> tuple[Tensor, Tensor]:
        y, stream, scale = _kernels.norm_forward(x, residual, weight, eps, narrow)
        ctx.save_for_backward(weight, stream, scale)
        ctx.set_materialize_grads(False)
        ctx.dtype, ctx.first, ctx.narrow = x.dtype, residual is None, narrow
        return y, stream

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dstream: Tensor | None) -> tuple[Tensor | None, ...]:
        weight, stream, scale = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(stream, dtype=torch.bfloat16 if ctx.narrow else torch.float32)
        dx, dresidual, dweight = _kernels.norm_backward(dy, dstream, weight, stream, scale, ctx.dtype, not ctx.first)
        return dx, None if ctx.first else dresidual, dweight, None, None
