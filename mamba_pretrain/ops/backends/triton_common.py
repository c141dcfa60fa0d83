"""What the launches of all Triton kernels need."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor

# Multiplications and additions are fused: less rounding and fewer instructions. Said here because Triton is about to
# change what happens when nothing is said.
FUSED = {"enable_fp_fusion": True}


def rows(x: Tensor) -> Tensor:
    """x itself if its last dimension is contiguous, else a copy that is."""
    return x if x.stride(-1) == 1 else x.contiguous()


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below size: Triton's tensors have no other extents."""
    return 1 << max(size - 1, 0).bit_length()


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, whatever device its arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def blocks(size: int, block: int) -> int:
    return math.ceil(size / block)
