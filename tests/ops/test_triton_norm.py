"""The Triton add + norm against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mamba_pretrain.ops.backends.triton import add_rms_norm
from tests.helpers import reference
from tests.helpers.triton import DEVICE, assert_near, interpreted, needs_gpu  # noqa: F401

EPS = 1e-5
NAMES = ("x", "weight", "residual")


def draw(length: int, width: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(length)
    shapes = [(2, length, width), (width,), (2, length, width)]
    return [torch.randn(*shape, generator=g).to(DEVICE) for shape in shapes]


def compare(inputs: list[Tensor], out_dtype: torch.dtype, tolerance: float) -> None:
    """Outputs and gradients, with a residual stream if `inputs` has one."""
    ours, plain = [t.clone().requires_grad_() for t in inputs], [t.double().requires_grad_() for t in inputs]
    y, stream = add_rms_norm(ours[0], ours[2] if len(ours) > 2 else None, ours[1], EPS, out_dtype)
    due_stream = plain[0] + plain[2] if len(plain) > 2 else plain[0] * 1
    due_y = reference.rms_norm(due_stream, plain[1], EPS)
    assert (y.dtype, stream.dtype) == (out_dtype, torch.float32)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=g).to(DEVICE) for _ in range(2)]
    weights[0] = weights[0].to(out_dtype).float()  # as the gradient of y is rounded on its way back
    found = torch.autograd.grad([y, stream], ours, [weights[0].to(out_dtype), weights[1]])
    due = torch.autograd.grad([due_y, due_stream], plain, [w.double() for w in weights])
    assert [x.dtype for x in found] == [x.dtype for x in inputs]
    assert_near(dict(zip(NAMES, found, strict=False)), dict(zip(NAMES, due, strict=False)), tolerance)
    assert_near(
        {"y": y.detach(), "stream": stream.detach()}, {"y": due_y.detach(), "stream": due_stream.detach()}, tolerance
    )


@pytest.mark.parametrize(("length", "width"), [(1, 1), (2, 15), (17, 16), (33, 63), (2, 1000)])
@pytest.mark.parametrize("first", [True, False], ids=["first block", "later block"])
def test_equals_the_definition(length: int, width: int, first: bool) -> None:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # torch.empty gives NaN
    try:
        compare(draw(length, width)[: 2 if first else 3], torch.float32, 2e-6)
    finally:
        torch.use_deterministic_algorithms(before)


def test_bf16_in_and_out() -> None:
    inputs = draw(5, 40)
    inputs[0] = inputs[0].bfloat16()
    compare(inputs, torch.bfloat16, 2**-7)


def test_strides_and_one_output_unused() -> None:
    x, weight, residual = draw(3, 8)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    y, stream = add_rms_norm(turned, residual, weight, EPS, torch.float32)
    assert torch.equal(stream, x + residual)
    for output in (y, stream):
        (grad,) = torch.autograd.grad(output.sum(), turned, retain_graph=True)
        plain = x.double().requires_grad_()
        total = plain + residual.double()
        due = reference.rms_norm(total, weight.double(), EPS) if output is y else total
        torch.testing.assert_close(grad.double(), torch.autograd.grad(due.sum(), plain)[0], rtol=1e-5, atol=1e-6)


def test_no_rows() -> None:
    x = torch.zeros(2, 0, 8, device=DEVICE, requires_grad=True)
    weight = torch.ones(8, device=DEVICE, requires_grad=True)
    y, stream = add_rms_norm(x, None, weight, EPS, torch.float32)
    assert (y.shape, stream.shape) == (x.shape, x.shape)
    (grad,) = torch.autograd.grad(y.sum() + stream.sum(), weight)
    assert torch.equal(grad, torch.zeros_like(weight))


def test_a_row_of_zeros_stays_finite() -> None:
    x = torch.zeros(1, 2, 4, device=DEVICE, requires_grad=True)
    y, _ = add_rms_norm(x, None, torch.ones(4, device=DEVICE), EPS, torch.float32)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, torch.zeros_like(y))
    assert torch.isfinite(grad).all()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("width", [768, 2560, 8192])
def test_real_sizes(width: int) -> None:
    inputs = draw(2048, width)
    inputs[0] = inputs[0].bfloat16()
    compare(inputs, torch.float32, 2**-8)
