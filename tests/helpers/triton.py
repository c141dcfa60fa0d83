"""Where the Triton kernels run in tests: on a GPU if there is one, else in Triton's interpreter.

The interpreter takes over kernels when they are defined, Triton's own among them. Other packages may have loaded triton
by then, so it is loaded once more here. The variable stands only while these tests run: others ask what a machine
without it can do.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu":
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for name in [m for m in sys.modules if m.split(".")[0] == "triton" and not m.startswith("triton._C")]:
            del sys.modules[name]
        pytest.importorskip("triton")
        for name in ("triton_scan", "triton_conv", "triton_norm"):
            importlib.import_module(f"mamba_pretrain.ops.backends.{name}")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """To be imported by every module that runs kernels."""
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    yield


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
