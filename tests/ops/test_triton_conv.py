"""The Triton convolution against its equation in float64: outputs, last inputs and every gradient on its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_pretrain.ops.backends.triton import causal_conv1d
from mamba_pretrain.ops.causal_conv1d import causal_conv1d_reference
from tests.helpers import reference
from tests.helpers.marks import slow_but
from tests.helpers.triton import DEVICE, assert_near, interpreted, needs_gpu  # noqa: F401

NAMES = ("x", "weight", "bias", "initial_state")


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """torch.empty gives NaN, so that nothing may be read before it is written."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def draw(batch: int, length: int, inner: int, taps: int, seed: int = 0) -> list[Tensor]:
    """x, a view of a wider projection as in the mixer, weight, bias and an initial state, fp32."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, 2 * inner), (inner, taps), (inner,), (batch, taps - 1, inner)]
    x, *others = (torch.randn(*shape, generator=g).to(DEVICE) for shape in shapes)
    return [x[..., :inner], *others]


def run(function: Callable[..., Any], inputs: list[Tensor], seq_idx: Tensor | None) -> dict[str, Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]  # strides as given
    y, state = function(*leaves[:3], seq_idx, leaves[3] if len(leaves) > 3 else None)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.device) for x in (y, state)]
    total = sum((x.double() * w).sum() for x, w in zip((y, state), weights, strict=True))
    grads = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return {"y": y.detach(), "state": state.detach()} | {f"d{n}": x for n, x in zip(NAMES, grads, strict=False)}


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize(
    ("length", "inner", "taps"),
    slow_but(
        [(1, 1, 4), (2, 15, 3), (64, 16, 2), (5, 3, 1)],
        [(1, 1, 4), (2, 15, 3), (3, 16, 8), (33, 65, 4), (64, 16, 2), (5, 3, 1)],
    ),
)
def test_equals_the_equation(length: int, inner: int, taps: int, documents: bool) -> None:
    inputs = draw(2, length, inner, taps, seed=length)
    seq_idx = reference.layouts(2, length, seed=length, density=0.4).to(DEVICE) if documents else None
    # The second implementation has no state of no inputs.
    exact = reference.conv if taps > 1 else causal_conv1d_reference
    for given in (inputs, inputs[:3]):  # with and without an initial state
        assert_near(run(causal_conv1d, given, seq_idx), run(exact, [x.double() for x in given], seq_idx), 2e-6)


def test_without_a_bias_and_without_the_last_state() -> None:
    x, weight, _, state = draw(2, 9, 3, 4)
    leaves = [t.detach().requires_grad_() for t in (x, weight, state)]
    y, last = causal_conv1d(leaves[0], leaves[1], None, None, leaves[2], return_last_state=False)
    assert last is None
    due = [t.detach().double().requires_grad_() for t in (x, weight, state)]
    due_y, _ = reference.conv(due[0], due[1], None, None, due[2])
    grads, due_grads = torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(due_y.sum(), due)
    names = ("x", "weight", "initial_state")
    assert_near(dict(zip(names, grads, strict=True)), dict(zip(names, due_grads, strict=True)), 2e-6)


@pytest.mark.parametrize("cut", slow_but([2], [1, 2, 5, 9]))
def test_in_two_parts_as_at_once(cut: int) -> None:
    """Parts shorter than the kernel hand on inputs of the part before."""

    def in_parts(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None, state: Tensor) -> Any:
        y1, state = causal_conv1d(x[:, :cut], weight, bias, seq_idx, state)
        y2, state = causal_conv1d(x[:, cut:], weight, bias, seq_idx, state)
        return torch.cat([y1, y2], dim=1), state

    inputs = draw(2, 10, 3, 4)
    assert_near(run(in_parts, inputs, None), run(causal_conv1d, inputs, None), 1e-6)


def test_no_steps_leave_the_state_as_it_was() -> None:
    inputs = draw(2, 0, 3, 4)
    found = run(causal_conv1d, inputs, None)
    assert found["y"].shape == (2, 0, 3)
    assert torch.equal(found["state"], inputs[3])
    assert torch.equal(found["dweight"], torch.zeros_like(inputs[1]))
    assert found["dinitial_state"].abs().min() > 0


@pytest.mark.slow
def test_the_same_every_time() -> None:
    inputs, seq_idx = draw(2, 40, 17, 4), reference.layouts(2, 40).to(DEVICE)
    once, twice = (run(causal_conv1d, inputs, seq_idx) for _ in range(2))
    assert all(torch.equal(x, twice[name]) for name, x in once.items())


def test_bf16_inputs_cost_one_rounding_of_the_output() -> None:
    inputs = draw(2, 20, 8, 4)
    inputs[0] = inputs[0].bfloat16()
    found, due = run(causal_conv1d, inputs, None), run(reference.conv, [x.double() for x in inputs], None)
    assert (found["y"].dtype, found["state"].dtype, found["dx"].dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.bfloat16,
    )
    unit = 2**-7 if DEVICE == "cpu" else 2**-8  # the interpreter cuts bf16 off where a GPU rounds
    torch.testing.assert_close(found["y"].double(), due["y"], rtol=unit * 1.001, atol=1e-6)
    assert torch.equal(found["state"].double(), due["state"])
    assert_near(found, due, unit * 1.01)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_sizes(dtype: torch.dtype) -> None:
    inputs, seq_idx = draw(2, 2048, 1536, 4), reference.layouts(2, 2048, density=0.01).to(DEVICE)
    inputs[0] = inputs[0].to(dtype)
    found = run(causal_conv1d, inputs, seq_idx)
    due = run(causal_conv1d_reference, [x.double() for x in inputs], seq_idx)
    assert_near(found, due, 1e-5 if dtype == torch.float32 else 2**-8)
