"""The Triton scan against the equations in float64: outputs, last state and every gradient on its own.

Without a GPU in Triton's interpreter, whose time goes by steps of the loops, hence short rows in short chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_pretrain.ops.backends import triton_scan
from mamba_pretrain.ops.backends.triton import selective_scan
from mamba_pretrain.ops.selective_scan import selective_scan_reference
from tests.helpers import reference
from tests.helpers.marks import slow_but
from tests.helpers.triton import DEVICE, assert_near, interpreted, needs_gpu  # noqa: F401

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
WITH_LENGTH = (0, 1, 3, 4, 6)


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """torch.empty gives NaN, so that nothing may be read before it is written."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_scan, "CHUNK", 8)


def draw(batch: int, length: int, inner: int, state: int, seed: int = 0) -> list[Tensor]:
    """fp32 inputs in the order of NAMES. u and z, delta, B and C are views of wider projections, as in the mixer."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(DEVICE)

    u, z = normal(batch, length, 2 * inner).chunk(2, dim=-1)
    delta, B, C = normal(batch, length, inner + 2 * state + 3).split([inner + 3, state, state], dim=-1)
    A, first = -torch.exp(normal(inner, state)), normal(batch, inner, state)
    return [u, delta[..., 3:] - 1, A, B, C, normal(inner), z, normal(inner), first]


def run(
    function: Callable[..., Any], inputs: list[Tensor], seq_idx: Tensor | None, *, autocast: bool = False
) -> dict[str, Tensor]:
    """y, the last state and the gradients of a random projection of both."""
    leaves = [x.detach().requires_grad_() for x in inputs]  # strides as given
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        y, h = function(*leaves[:8], seq_idx, leaves[8] if len(leaves) > 8 else None)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.device) for x in (y, h)]
    total = sum((x.double() * w).sum() for x, w in zip((y, h), weights, strict=True))
    grads = torch.autograd.grad(total, leaves)
    return {"y": y.detach(), "h": h.detach()} | {f"d{n}": x for n, x in zip(NAMES, grads, strict=False)}


def exact(inputs: list[Tensor], seq_idx: Tensor | None) -> dict[str, Tensor]:
    return run(reference.scan, [x.double() for x in inputs], seq_idx)


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize(
    ("length", "inner", "state"),
    slow_but(
        [(1, 1, 1), (2, 15, 4), (7, 16, 16), (8, 1, 2)],
        [(1, 1, 1), (2, 15, 4), (7, 16, 16), (8, 1, 2), (11, 17, 17), (3, 33, 64)],
    ),
)
@pytest.mark.usefixtures("short_chunks")
def test_equals_the_equations(length: int, inner: int, state: int, documents: bool) -> None:
    inputs = draw(2, length, inner, state, seed=length)
    seq_idx = reference.layouts(2, length, seed=length).to(DEVICE) if documents else None
    assert_near(run(selective_scan, inputs, seq_idx), exact(inputs, seq_idx), 3e-6)


@pytest.mark.slow
@pytest.mark.parametrize("length", [triton_scan.CHUNK, triton_scan.CHUNK + 1])
def test_equals_the_equations_around_a_whole_chunk(length: int) -> None:
    inputs, seq_idx = draw(1, length, 17, 16), reference.layouts(1, length, density=0.05).to(DEVICE)
    assert_near(run(selective_scan, inputs, seq_idx), exact(inputs, seq_idx), 3e-6)


def test_without_an_initial_state_and_without_the_last() -> None:
    inputs = draw(1, 5, 3, 4)[:8]
    assert_near(run(selective_scan, inputs, None), exact(inputs, None), 3e-6)
    leaves = [x.detach().requires_grad_() for x in inputs]
    y, h = selective_scan(*leaves, None, None, return_last_state=False)
    assert h is None
    grads = torch.autograd.grad(y.sum(), leaves)  # an expanded gradient, without strides
    due = [x.detach().double().requires_grad_() for x in inputs]
    due_grads = torch.autograd.grad(reference.scan(*due)[0].sum(), due)
    assert_near(dict(zip(NAMES, grads, strict=False)), dict(zip(NAMES, due_grads, strict=False)), 3e-6)


def test_a_gradient_that_comes_through_the_last_state_alone() -> None:
    inputs = draw(1, 5, 3, 4)
    leaves, due = ([x.detach().to(t).requires_grad_() for x in inputs] for t in (torch.float32, torch.float64))
    grads = torch.autograd.grad(selective_scan(*leaves[:8], None, leaves[8])[1].sum(), leaves)
    due_grads = torch.autograd.grad(reference.scan(*due[:8], None, due[8])[1].sum(), due, materialize_grads=True)
    assert_near(dict(zip(NAMES, grads, strict=True)), dict(zip(NAMES, due_grads, strict=True)), 3e-6)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("cut", slow_but([1], [1, 8]))
def test_scanning_in_two_parts_is_scanning_at_once(cut: int) -> None:
    def in_parts(*a: Any) -> tuple[Tensor, Tensor]:
        first = [x[:, :cut] if i in WITH_LENGTH else x for i, x in enumerate(a[:8])]
        second = [x[:, cut:] if i in WITH_LENGTH else x for i, x in enumerate(a[:8])]
        y1, h = selective_scan(*first, None, a[9])
        y2, h = selective_scan(*second, None, h)
        return torch.cat([y1, y2], dim=1), h

    inputs = draw(1, 14, 3, 4)
    assert_near(run(in_parts, inputs, None), run(selective_scan, inputs, None), 3e-6)


@pytest.mark.usefixtures("short_chunks")
def test_packed_documents_are_separate_documents() -> None:
    """A document that ends with a chunk, one that spans chunks, one of a single step."""
    lengths = [8, 3, 1, 9, 3]
    inputs = draw(1, sum(lengths), 3, 2)[:8]
    seq_idx = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))[None].int().to(DEVICE)
    y, h = selective_scan(*inputs, seq_idx)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    for start, end in zip([0, *ends], ends, strict=False):
        alone = [x[:, start:end] if i in WITH_LENGTH else x for i, x in enumerate(inputs)]
        y_alone, h_alone = selective_scan(*alone)
        torch.testing.assert_close(y[:, start:end], y_alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(h, h_alone, rtol=1e-5, atol=1e-6)


def test_no_steps_leave_the_state_as_it_was() -> None:
    inputs = draw(2, 0, 5, 4)
    found = run(selective_scan, inputs, None)
    assert found["y"].shape == (2, 0, 5)
    assert torch.equal(found["h"], inputs[8])
    assert all(torch.equal(found[f"d{n}"], torch.zeros_like(found[f"d{n}"])) for n in ("A", "D", "delta_bias"))
    assert found["dinitial_state"].abs().min() > 0


@pytest.mark.parametrize("delta", [-1e4, -80.0, -20.0, -10.0, 20.0, 21.0, 1e4])
def test_extreme_step_sizes(delta: float) -> None:
    """Softplus neither overflows nor loses its tail: a huge step forgets all, a tiny one keeps the state."""
    inputs = draw(1, 7, 3, 4)
    inputs[1] = torch.full_like(inputs[1], delta)
    inputs[7].zero_()
    found, due = run(selective_scan, inputs, None), exact(inputs, None)
    for name, tensor in found.items():
        scale = max(due[name].abs().max().item(), 1e-3)
        torch.testing.assert_close(tensor.double(), due[name].double(), rtol=1e-5, atol=2e-6 * scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_cost_one_rounding_of_the_output(dtype: torch.dtype) -> None:
    inputs = [x.to(dtype) if i in WITH_LENGTH else x for i, x in enumerate(draw(1, 12, 8, 16))]
    found, due = run(selective_scan, inputs, None), exact(inputs, None)
    assert (found["y"].dtype, found["h"].dtype) == (dtype, torch.float32)
    # Half a unit in the last place. The interpreter cuts bf16 off where a GPU rounds.
    half = torch.finfo(dtype).eps / (1 if (DEVICE, dtype) == ("cpu", torch.bfloat16) else 2)
    torch.testing.assert_close(found["y"].double(), due["y"], rtol=half * 1.001, atol=1e-5)
    torch.testing.assert_close(found["h"].double(), due["h"], rtol=1e-5, atol=1e-5)
    for i, name in enumerate(NAMES):
        assert found[f"d{name}"].dtype == inputs[i].dtype
    assert_near({k: x for k, x in found.items() if k != "y"}, {k: x for k, x in due.items() if k != "y"}, half * 1.01)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.slow
def test_the_same_every_time_and_under_autocast() -> None:
    inputs, seq_idx = draw(2, 9, 5, 4), reference.layouts(2, 9).to(DEVICE)
    once, twice, cast = (run(selective_scan, inputs, seq_idx, autocast=autocast) for autocast in (False, False, True))
    assert all(torch.equal(x, twice[name]) and torch.equal(x, cast[name]) for name, x in once.items())


def test_backward_keeps_one_state_a_chunk() -> None:
    length, inner, state = 64, 32, 16
    leaves = [x.detach().requires_grad_() for x in draw(1, length, inner, state)[:8]]
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        selective_scan(*leaves)
    inputs = sum(x.numel() for x in leaves)
    assert kept <= inputs + inner * state + inner


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 2048, 1536, 16), (1, 1000, 200, 64), (1, 300, 40, 256)])
def test_real_sizes(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    inputs = [x.to(dtype) if i in WITH_LENGTH else x for i, x in enumerate(draw(*shape))]
    seq_idx = reference.layouts(*shape[:2], density=0.01).to(DEVICE)
    found = run(selective_scan, inputs, seq_idx)
    due = run(selective_scan_reference, [x.double() for x in inputs], seq_idx)
    assert_near(found, due, 3e-5 if dtype == torch.float32 else 2**-8)
    again = run(selective_scan, inputs, seq_idx)
    assert all(torch.equal(x, again[name]) for name, x in found.items())
