"""Kernels of our own in Triton for NVIDIA GPUs: every feature of the ops, and the same results on every run.

Tested in Triton's interpreter and through its compiler, not on a GPU. TRITON_INTERPRET=1 runs them on any device, far
too slowly for anything but tests. The modules that need triton are loaded when they are used.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from mamba_pretrain.ops.call import Call, Missing

NAME = "triton"
OPS: tuple[str, ...] = ("selective_scan", "causal_conv1d", "add_rms_norm")

MAX_STATE = 256  # 16 warps; twice as many states would leave 32 registers for each
MAX_TAPS = 16  # taps are unrolled
MAX_WIDTH = 65536  # of a row that is normalised: it is held in registers


@functools.cache
def missing() -> Missing | None:
    try:
        import triton.language  # noqa: F401
    except ImportError as error:
        return Missing(f"triton cannot be imported ({error})", "pip install triton")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return Missing("there is no CUDA device", "nvidia-smi  # must list a GPU, and torch must be a CUDA build")
    return None


def refuses(call: Call) -> str | None:
    if call.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"computes in float32, {call.dtype} was given"
    limits = {"selective_scan": ("states", MAX_STATE), "causal_conv1d": ("taps", MAX_TAPS)}
    what, limit = limits.get(call.op, ("channels in a row", MAX_WIDTH))
    if not 1 <= call.size <= limit:
        return f"takes 1 to {limit} {what}, {call.size} were given"
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
    from mamba_pretrain.ops.backends import triton_scan

    return triton_scan.selective_scan(
        u_BLE, delta_BLE, A_EN, B_BLN, C_BLN, D_E, z_BLE, delta_bias_E, seq_idx_BL, initial_state_BEN, return_last_state
    )


def causal_conv1d(
    x_BLE: Tensor,
    weight_EK: Tensor,
    bias_E: Tensor | None,
    seq_idx_BL: Tensor | None = None,
    initial_state_BSE: Tensor | None = None,
    return_last_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    from mamba_pretrain.ops.backends import triton_conv

    return triton_conv.causal_conv1d(x_BLE, weight_EK, bias_E, seq_idx_BL, initial_state_BSE, return_last_state)


def add_rms_norm(
    x_BLD: Tensor, residual_BLD: Tensor | None, weight_D: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    from mamba_pretrain.ops.backends import triton_norm

    return triton_norm.add_rms_norm(x_BLD, residual_BLD, weight_D, eps, out_dtype)
