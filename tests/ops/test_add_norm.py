"""Add and norm against the definition, and the promise that the residual stream is never rounded."""

from __future__ import annotations

import pytest
import torch

from mamba_pretrain.ops.add_norm import add_rms_norm
from tests.helpers import reference

EPS = 1e-5


@pytest.mark.parametrize(("length", "width"), [(1, 1), (2, 15), (33, 16), (100, 63)])
@pytest.mark.parametrize("first", [True, False], ids=["first block", "later block"])
def test_equals_the_definition(length: int, width: int, first: bool) -> None:
    g = torch.Generator().manual_seed(length)
    x, residual = (torch.randn(2, length, width, generator=g, dtype=torch.float64) for _ in range(2))
    inputs = [x, torch.randn(width, generator=g, dtype=torch.float64)] + ([] if first else [residual])
    ours, plain = ([t.clone().requires_grad_() for t in inputs] for _ in range(2))

    y, stream = add_rms_norm(ours[0], None if first else ours[2], ours[1], EPS)
    due_stream = plain[0] * 1 if first else plain[0] + plain[2]
    due = reference.rms_norm(due_stream, plain[1], EPS)

    torch.testing.assert_close((y, stream), (due, due_stream), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(
        reference.gradients((y, stream), ours),
        reference.gradients((due, due_stream), plain),
        rtol=1e-12,
        atol=1e-12,
    )


def test_gradcheck() -> None:
    inputs = [torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, r, w: add_rms_norm(x, r, w, EPS), (*inputs, weight))


def test_small_updates_survive_in_bf16() -> None:
    """A bf16 stream at 1.0 swallows every update below 2^-8; ours adds sixty-four of them up."""
    weight = torch.ones(8)
    _, stream = add_rms_norm(torch.ones(1, 1, 8, dtype=torch.bfloat16), None, weight, EPS)
    update = torch.full((1, 1, 8), 2**-10, dtype=torch.bfloat16)
    for _ in range(64):
        y, stream = add_rms_norm(update, stream, weight, EPS)
    assert (y.dtype, stream.dtype) == (torch.float32, torch.float32)
    assert torch.equal(stream, torch.full((1, 1, 8), 1 + 64 * 2**-10))


def test_a_row_of_zeros_stays_finite() -> None:
    x = torch.zeros(1, 2, 4, requires_grad=True)
    y, _ = add_rms_norm(x, None, torch.ones(4), EPS)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(1, 2, 4))
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
