"""Where the Triton kernels run in tests: on a GPU if there is one, else in Triton's interpreter.

To be imported before anything that imports triton: the interpreter takes over when kernels are defined.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def assert_near(found: dict[str, Tensor], due: dict[str, Tensor], tolerance: float) -> None:
    """Each tensor on its own within `tolerance` of its largest due value."""
    assert found.keys() == due.keys()
    for name, tensor in found.items():
        assert tensor.shape == due[name].shape, name
        if tensor.numel() == 0:
            continue
        assert torch.isfinite(tensor).all(), f"{name} is not finite"
        error = (tensor.double() - due[name].double()).abs().max().item()
        scale = due[name].abs().max().item()
        assert error <= tolerance * scale + 1e-30, f"{name}: error {error:.2e}, largest value {scale:.2e}"
