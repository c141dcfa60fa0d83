"""The check at start-up: silent where kernels are right, exact about which is wrong."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_pretrain.ops import dispatch
from mamba_pretrain.ops.backends import cuda, native, triton
from mamba_pretrain.ops.call import KernelError
from mamba_pretrain.ops.causal_conv1d import causal_conv1d_reference
from mamba_pretrain.ops.mamba_inner import mamba_inner
from mamba_pretrain.ops.selective_scan import selective_scan_reference
from mamba_pretrain.ops.selfcheck import TOLERANCE, self_check

OPS = {"mamba_inner", "selective_scan", "causal_conv1d", "add_rms_norm", "cross_entropy_", "decode_step"}


def backend(monkeypatch: pytest.MonkeyPatch, **ops: Any) -> None:
    module = types.SimpleNamespace(
        NAME="native", OPS=tuple(ops), missing=lambda: None, refuses=lambda call: None, **ops
    )
    monkeypatch.setattr(dispatch, "ORDER", {"cpu": (module,)})
    monkeypatch.setattr(dispatch, "_decisions", {})


def test_the_kernels_of_this_machine_are_right() -> None:
    random, precision = torch.get_rng_state(), torch.get_float32_matmul_precision()
    found = self_check("cpu")
    assert {checked.op for checked in found} == OPS
    assert all(checked.error <= TOLERANCE for checked in found)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_float32_matmul_precision() == precision


def test_every_op_of_a_backend_is_checked() -> None:
    assert {op for module in (cuda, triton, native) for op in module.OPS} == OPS


def test_a_right_backend_is_named_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def scan(*arguments: Any) -> tuple[Tensor, Tensor | None]:
        y, last = selective_scan_reference(*arguments)
        return y * (1 + 1e-5), last

    backend(monkeypatch, selective_scan=scan)
    found = {checked.op: checked for checked in self_check("cpu")}
    assert found["selective_scan"].backend == "native"
    assert 1e-6 < found["selective_scan"].error < 1e-4
    assert found["causal_conv1d"] == ("causal_conv1d", "reference", 0.0)


def wrong_values(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    y, last = causal_conv1d_reference(*arguments)
    return y * 1.001, last


def wrong_gradient(x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None]:
    return causal_conv1d_reference(x, weight, bias.detach() + 0 * bias, *rest)


def not_a_number(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    y, last = causal_conv1d_reference(*arguments)
    return y + torch.nan, last


def deaf_to_documents(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    return causal_conv1d_reference(*arguments[:3], None, *arguments[4:])


def failing(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    raise RuntimeError("no kernel image is available")


def test_a_step_that_writes_over_the_state_it_is_given_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def inner(*arguments: Any) -> Any:
        with dispatch.using("reference"):
            outputs = mamba_inner(*arguments)
        if arguments[-2] is not None:
            arguments[-2].copy_(outputs[2])
        return outputs

    backend(monkeypatch, mamba_inner=inner)
    with pytest.raises(KernelError, match="mamba_inner: .* argument 14, written in place, is off by"):
        self_check("cpu")


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (wrong_values, "wrong on this cpu: output 0 is off by .*e-04"),
        (wrong_gradient, "wrong on this cpu: gradient of argument 2 is off by 1.0e.00"),
        (not_a_number, "wrong on this cpu: output 0 is off by nan"),
        (deaf_to_documents, "wrong on this cpu with documents: output 0"),
        (failing, "fail on this cpu: no kernel image is available"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_wrong_backend_is_caught(kernel: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend(monkeypatch, causal_conv1d=kernel)
    with pytest.raises(KernelError, match=f"causal_conv1d: the native kernels (are )?{message}"):
        self_check("cpu")
