"""The convolution against its equation in float64: outputs, last inputs, and the gradient of every input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_pretrain.ops.call import KernelError
from mamba_pretrain.ops.causal_conv1d import causal_conv1d
from tests.helpers import reference


def draw(batch: int, length: int, inner: int, taps: int, seed: int = 0) -> list[Tensor]:
    """x, weight, bias and an initial state, float64."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, inner), (inner, taps), (inner,), (batch, taps - 1, inner)]
    return [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes]


def run(function: Any, inputs: list[Tensor], seq_idx: Tensor | None) -> tuple[Tensor, Tensor, list[Tensor]]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y, state = function(*leaves[:3], seq_idx, leaves[3] if len(leaves) > 3 else None)
    used = [x for i, x in enumerate(leaves) if i < 3 or y.shape[1] > 0]
    return y, state, reference.gradients((y, state), used)


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 31, 33, 100])
@pytest.mark.parametrize(("inner", "taps"), [(1, 4), (15, 2), (16, 3), (16, 4)])
def test_equals_the_equation(length: int, inner: int, taps: int, documents: bool) -> None:
    inputs = draw(3, length, inner, taps, seed=length)
    seq_idx = reference.layouts(3, length, seed=length, density=0.4) if documents else None
    for given in (inputs, inputs[:3]):  # with and without an initial state
        y, state, grads = run(causal_conv1d, given, seq_idx)
        due_y, due_state, due_grads = run(reference.conv, given, seq_idx)
        torch.testing.assert_close([y, state, *grads], [due_y, due_state, *due_grads], rtol=1e-12, atol=1e-12)


def test_without_a_bias() -> None:
    x, weight, _, state = draw(2, 9, 3, 4)
    torch.testing.assert_close(
        causal_conv1d(x, weight, None, None, state),
        reference.conv(x, weight, None, None, state),
        rtol=1e-13,
        atol=1e-13,
    )


def test_gradcheck() -> None:
    inputs = [x.requires_grad_() for x in draw(2, 5, 2, 4)]
    seq_idx = torch.tensor([[0, 0, 1, 2, 2], [5, 5, 5, 5, 5]])
    assert torch.autograd.gradcheck(lambda x, w, b, s: causal_conv1d(x, w, b, seq_idx, s), inputs)


@pytest.mark.parametrize("cut", [1, 2, 3, 5, 9])
def test_in_two_parts_as_at_once(cut: int) -> None:
    """Parts shorter than the kernel hand on inputs of the part before."""

    def in_parts(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None, state: Tensor) -> Any:
        y1, state = causal_conv1d(x[:, :cut], weight, bias, seq_idx, state)
        y2, state = causal_conv1d(x[:, cut:], weight, bias, seq_idx, state)
        return torch.cat([y1, y2], dim=1), state

    inputs = draw(2, 10, 3, 4)
    y, state, grads = run(in_parts, inputs, None)
    due_y, due_state, due_grads = run(causal_conv1d, inputs, None)
    torch.testing.assert_close([y, state, *grads], [due_y, due_state, *due_grads], rtol=1e-13, atol=1e-13)


def test_no_steps_leave_the_state_as_it_was() -> None:
    x, weight, bias, state = draw(2, 0, 3, 4)
    y, last = causal_conv1d(x, weight, bias, None, state)
    assert y.shape == (2, 0, 3)
    assert torch.equal(last, state)


def test_bf16_inputs_cost_one_rounding_of_the_output() -> None:
    x, weight, bias, state = draw(2, 60, 8, 4)
    x, weight, bias, state = x.bfloat16(), weight.float(), bias.float(), state.float()
    y, last = causal_conv1d(x, weight, bias, None, state)
    due_y, due_last = reference.conv(x.double(), weight.double(), bias.double(), None, state.double())
    assert (y.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(y.double(), due_y, rtol=2**-8 * 1.001, atol=1e-6)
    assert torch.equal(last.double(), due_last)


@pytest.mark.parametrize(("position", "name"), [(0, "x"), (1, "weight")])
def test_a_wrong_number_of_dimensions_is_named(position: int, name: str) -> None:
    inputs = draw(2, 5, 3, 4)[:3]
    inputs[position] = inputs[position].flatten()
    with pytest.raises(KernelError, match=rf"causal_conv1d: {name} has shape \(\d+,\), expected \d dimensions"):
        causal_conv1d(*inputs)
