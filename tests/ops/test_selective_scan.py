"""The scan against its equations in float64: outputs, last state, and the gradient of every input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_pretrain.ops.call import KernelError
from mamba_pretrain.ops.selective_scan import CHUNK, selective_scan
from tests.helpers import reference

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
LENGTHS = [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - 1, 100]


def draw(batch: int, length: int, inner: int, state: int, seed: int = 0) -> list[Tensor]:
    """Inputs in the order of `selective_scan`, float64, then an initial state."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return [
        normal(batch, length, inner),
        normal(batch, length, inner) - 1,
        -torch.exp(normal(inner, state)),
        normal(batch, length, state),
        normal(batch, length, state),
        normal(inner),
        normal(batch, length, inner),
        normal(inner),
        normal(batch, inner, state),
    ]


def run(
    function: Any, inputs: list[Tensor], seq_idx: Tensor | None, *, autocast: bool = False
) -> tuple[Tensor, Tensor, list[Tensor]]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, h = function(*leaves[:8], seq_idx, leaves[8] if len(leaves) > 8 else None)
    return y, h, reference.gradients((y, h), leaves)


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("inner", "state"), [(1, 1), (15, 4), (16, 16)])
def test_equals_the_equations(length: int, inner: int, state: int, documents: bool) -> None:
    inputs = draw(3, length, inner, state, seed=length)
    seq_idx = reference.layouts(3, length, seed=length) if documents else None
    for given in (inputs, inputs[:8]):  # with and without an initial state
        y, h, grads = run(selective_scan, given, seq_idx)
        due_y, due_h, due_grads = run(reference.scan, given, seq_idx)
        torch.testing.assert_close(y, due_y, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(h, due_h, rtol=1e-12, atol=1e-12)
        for name, grad, due in zip((*NAMES, "initial_state"), grads, due_grads, strict=False):
            torch.testing.assert_close(grad, due, rtol=1e-11, atol=1e-11, msg=lambda m, name=name: f"d{name}: {m}")


def test_gradcheck() -> None:
    inputs = [x.requires_grad_() for x in draw(2, 4, 2, 2)]
    seq_idx = torch.tensor([[0, 0, 1, 1], [5, 5, 5, 5]])
    assert torch.autograd.gradcheck(lambda *a: selective_scan(*a[:8], seq_idx, a[8]), inputs)


@pytest.mark.parametrize("cut", [1, CHUNK - 1, CHUNK, CHUNK + 1, 69])
def test_scanning_in_two_parts_is_scanning_at_once(cut: int) -> None:
    """Values and gradients, those that flow through the handed-over state among them."""
    inputs = draw(2, 70, 5, 4)

    def in_parts(*a: Any) -> tuple[Tensor, Tensor]:
        steps = [0, 1, 3, 4, 6]  # inputs with a length
        first = [x[:, :cut] if i in steps else x for i, x in enumerate(a[:8])]
        second = [x[:, cut:] if i in steps else x for i, x in enumerate(a[:8])]
        y1, h = selective_scan(*first, None, a[9])
        y2, h = selective_scan(*second, None, h)
        return torch.cat([y1, y2], dim=1), h

    y, h, grads = run(in_parts, inputs, None)
    due_y, due_h, due_grads = run(selective_scan, inputs, None)
    torch.testing.assert_close([y, h, *grads], [due_y, due_h, *due_grads], rtol=1e-11, atol=1e-11)


def test_no_steps_leave_the_state_as_it_was() -> None:
    inputs = draw(2, 0, 5, 4)
    y, h = selective_scan(*inputs[:8], None, inputs[8])
    assert y.shape == (2, 0, 5)
    assert torch.equal(h, inputs[8])


def test_rows_do_not_see_each_other() -> None:
    inputs = draw(4, 50, 3, 2)
    seq_idx = reference.layouts(4, 50)
    y, h = selective_scan(*inputs[:8], seq_idx, inputs[8])
    for b in range(4):
        row = [x[b : b + 1] if i in (0, 1, 3, 4, 6, 8) else x for i, x in enumerate(inputs)]
        y_row, h_row = selective_scan(*row[:8], seq_idx[b : b + 1], row[8])
        torch.testing.assert_close((y[b], h[b]), (y_row[0], h_row[0]), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("delta", [-1e4, -80.0, -20.0, 20.0, 21.0, 80.0, 1e4])
def test_extreme_step_sizes(delta: float) -> None:
    """Softplus neither overflows nor loses its tail: a huge step forgets all, a tiny one keeps the state."""
    inputs = draw(1, 40, 3, 4)
    inputs[1].fill_(delta)
    inputs[7].zero_()
    single = [x.float() for x in inputs]
    y, h, grads = run(selective_scan, single, None)
    due_y, due_h, due_grads = run(reference.scan, [x.double() for x in single], None)
    for found, due in zip([y, h, *grads], [due_y, due_h, *due_grads], strict=True):
        scale = max(due.abs().max().item(), 1e-3)
        torch.testing.assert_close(found.double(), due, rtol=1e-5, atol=2e-6 * scale)


def test_bf16_inputs_cost_one_rounding_of_the_output() -> None:
    """Arithmetic and state are fp32: half a unit in bf16's last place (2^-8 relative) is all that is lost."""
    narrow = [x.bfloat16() if i in (0, 1, 3, 4, 6) else x.float() for i, x in enumerate(draw(2, 100, 8, 16))]
    y, h, grads = run(selective_scan, narrow, None)
    due_y, due_h, due_grads = run(reference.scan, [x.double() for x in narrow], None)
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(y.double(), due_y, rtol=2**-8 * 1.001, atol=1e-5)
    torch.testing.assert_close(h.double(), due_h, rtol=1e-5, atol=1e-5)
    for i, (grad, due) in enumerate(zip(grads, due_grads, strict=True)):
        assert grad.dtype == narrow[i].dtype
        error = (grad.double() - due).abs().max() / due.abs().max()
        assert error <= 2**-7, f"gradient {i}: {error}"  # that of u is the sum of two rounded parts


def test_autocast_changes_nothing() -> None:
    inputs = [x.float() for x in draw(2, 40, 4, 4)]
    plain, cast = (run(selective_scan, inputs, None, autocast=autocast) for autocast in (False, True))
    assert torch.equal(plain[0], cast[0])
    assert torch.equal(plain[1], cast[1])
    assert all(torch.equal(a, b) for a, b in zip(plain[2], cast[2], strict=True))


def test_gradients_do_not_change_the_forward() -> None:
    inputs = [x.float() for x in draw(2, 70, 4, 4)]
    with torch.no_grad():
        y, h = selective_scan(*inputs[:8], None, inputs[8])
    due = run(selective_scan, inputs, None)
    assert torch.equal(y, due[0])
    assert torch.equal(h, due[1])


def test_backward_keeps_one_state_a_chunk() -> None:
    """All states of a long sequence would be the largest thing in memory: N times the activations."""
    length, inner, state = 1024, 8, 16
    leaves = [x.requires_grad_() for x in draw(1, length, inner, state)[:8]]
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        selective_scan(*leaves)
    assert kept < length * inner * state


@pytest.mark.parametrize(("position", "name"), [(0, "u"), (2, "A")])
def test_a_wrong_number_of_dimensions_is_named(position: int, name: str) -> None:
    inputs = draw(2, 5, 3, 4)[:8]
    inputs[position] = inputs[position].flatten()
    with pytest.raises(KernelError, match=rf"selective_scan: {name} has shape \(\d+,\), expected \d dimensions"):
        selective_scan(*inputs)
