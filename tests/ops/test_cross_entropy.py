"""The chunked loss against `F.cross_entropy` on all logits, and the proof that it never holds all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mamba_pretrain.ops import cross_entropy
from mamba_pretrain.ops.cross_entropy import linear_cross_entropy


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest floating-point tensor that any operation makes, the backward's included."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]
        self.elements = max([self.elements, *made])
        return out


def draw(
    batch: int, length: int, width: int, rows: int, vocab: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(length)
    hidden = torch.randn(batch, length, width, generator=g, dtype=dtype).requires_grad_()
    weight = torch.randn(rows, width, generator=g, dtype=dtype).requires_grad_()
    labels = torch.randint(vocab, (batch, length), generator=g)
    labels[torch.rand(batch, length, generator=g) < 0.3] = -100
    return hidden, weight, labels


def on_all_logits(hidden: Tensor, weight: Tensor, labels: Tensor, vocab: int) -> Tensor:
    logits = (hidden @ weight.T)[..., :vocab]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


@pytest.mark.parametrize(("rows", "vocab"), [(16, 16), (16, 11), (1, 1)])
@pytest.mark.parametrize("length", [1, 2, 31, 63, 100])
def test_equals_the_loss_of_all_logits(monkeypatch: pytest.MonkeyPatch, length: int, rows: int, vocab: int) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * rows * 7)  # seven positions at a time, the last chunk ragged
    hidden, weight, labels = draw(2, length, 5, rows, vocab)
    found = linear_cross_entropy(hidden, weight, labels, vocab)
    due = on_all_logits(hidden, weight, labels, vocab)
    torch.testing.assert_close(found, due, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(found, (hidden, weight)), torch.autograd.grad(due, (hidden, weight)), rtol=1e-11, atol=1e-12
    )


def test_gradcheck() -> None:
    hidden, weight, labels = draw(1, 4, 3, 6, 5)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels, 5), (hidden, weight))


def test_padding_rows_get_no_probability_and_no_gradient() -> None:
    hidden, weight, labels = draw(2, 9, 5, 16, 11)
    before = linear_cross_entropy(hidden, weight, labels, 11)
    (grad,) = torch.autograd.grad(before, weight)
    assert torch.equal(grad[11:], torch.zeros(5, 5, dtype=torch.float64))
    with torch.no_grad():
        weight[11:] = 1e3  # would take all the probability
    assert torch.equal(before, linear_cross_entropy(hidden, weight, labels, 11))


def test_no_labels_no_loss_no_gradient() -> None:
    hidden, weight, labels = draw(2, 9, 5, 16, 11)
    loss = linear_cross_entropy(hidden, weight, labels.fill_(-100), 11)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert weight.grad is not None
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_a_label_beyond_the_vocabulary_is_refused() -> None:
    hidden, weight, labels = draw(1, 3, 5, 16, 11)
    labels[0, 0] = 11  # a padding row
    with pytest.raises(IndexError, match="11"):
        linear_cross_entropy(hidden, weight, labels, 11)


def test_softmax_runs_in_fp32_under_autocast() -> None:
    """The product is rounded to bf16; the sum over positions and the softmax are not."""
    hidden, weight, labels = draw(2, 60, 8, 40, 40, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(hidden, weight, labels, 40)
    logits = (hidden.bfloat16() @ weight.bfloat16().T).double()  # rounded once, as the product under autocast
    due = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), due, rtol=1e-6, atol=1e-6)
    for grad, exact in zip(
        torch.autograd.grad(found, (hidden, weight)),
        torch.autograd.grad(on_all_logits(hidden, weight, labels, 40), (hidden, weight)),
        strict=True,
    ):
        assert grad.dtype == torch.float32
        assert (grad - exact).abs().max() <= 0.02 * exact.abs().max()


def test_never_holds_all_logits() -> None:
    """At the real vocabulary, forward and backward: 2,048 positions would be 393 MiB of logits."""
    positions, vocab = 2048, 50280
    hidden, weight, labels = draw(1, positions, 4, vocab, vocab - 3, torch.float32)
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with LargestTensor() as forward, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = linear_cross_entropy(hidden, weight, labels, vocab - 3)
    with LargestTensor() as backward:
        loss.backward()
    assert forward.elements * 4 <= cross_entropy.CHUNK_BYTES < positions * vocab * 4
    assert kept == hidden.numel() + weight.numel(), "the forward keeps more than the gradients"
    assert backward.elements == weight.numel(), "the backward does more than scale the gradients"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("divisor", [3.0, 1021.0, 3001.0])
def test_dividing_the_loss_divides_the_gradients_by_just_that(dtype: torch.dtype, divisor: float) -> None:
    """The trainer divides by the number of targets, which a narrow dtype would round: by 0.3% for 1021 in bf16."""
    hidden, weight, labels = draw(2, 60, 8, 40, 40, torch.float32)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = linear_cross_entropy(hidden, weight, labels, 40)
    whole = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    for part, due in zip(torch.autograd.grad(loss / divisor, (hidden, weight)), whole, strict=True):
        ratio = (part.double() * due.double()).sum() / due.double().square().sum() * divisor
        assert abs(ratio.item() - 1) < 5e-4  # what rounding each gradient once leaves


def test_the_heads_gradient_is_summed_in_fp32_whatever_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = draw(2, 300, 8, 40, 40, torch.bfloat16)
    whole = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, 40), weight)[0]
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 2 * 40 * 3)
    parts = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, 40), weight)[0]
    assert (parts - whole).abs().max() <= 2**-7 * whole.abs().max()


def test_a_second_backward_gives_the_same_gradients() -> None:
    hidden, weight, labels = draw(2, 9, 5, 16, 11)
    loss = linear_cross_entropy(hidden, weight, labels, 11)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(2 * loss, (hidden, weight))
    torch.testing.assert_close(second, tuple(2 * g for g in first), rtol=0, atol=0)


def test_the_recorder_sees_all_logits_where_they_are() -> None:
    hidden, weight, labels = draw(1, 64, 4, 100, 100)
    with LargestTensor() as mode:
        on_all_logits(hidden, weight, labels, 100)
    assert mode.elements == 64 * 100
