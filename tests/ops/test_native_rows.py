"""Add + norm and the cross entropy in C++ against float64, and what their kernels must refuse."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_pretrain.ops import cross_entropy, dispatch
from mamba_pretrain.ops.add_norm import add_rms_norm
from mamba_pretrain.ops.backends import native
from mamba_pretrain.ops.cross_entropy import cross_entropy_, linear_cross_entropy
from tests.helpers import kernels
from tests.helpers.kernels import check, deviations, judge, norm, outcome

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))

TOLERANCE = 2e-6  # of the largest value of each tensor


def norm_inputs(batch: int, length: int, width: int, first: bool) -> kernels.Inputs:
    g = torch.Generator().manual_seed(length)
    return {
        "x": torch.randn(batch, length, width, generator=g),
        "residual": None if first else 3 * torch.randn(batch, length, width, generator=g),
        "weight": torch.randn(width, generator=g),
    }


@pytest.mark.parametrize("first", [True, False], ids=["first block", "later block"])
@pytest.mark.parametrize(
    ("batch", "length", "width"),
    [(1, 1, 1), (2, 1, 15), (3, 33, 16), (1, 63, 17), (2, 64, 100), (1, 257, 129), (1, 2049, 8), (1, 3, 2049)],
)
def test_norm_equals_float64(batch: int, length: int, width: int, first: bool) -> None:
    inputs = norm_inputs(batch, length, width, first)
    check(outcome(norm, inputs, "native"), judge(norm, inputs), TOLERANCE)


def test_a_thousandth_in_any_gradient_of_the_norm_would_be_seen() -> None:
    inputs = norm_inputs(2, 64, 100, False)
    found, due = outcome(norm, inputs, "native"), judge(norm, inputs)
    assert len(due) == 5
    for name in due:
        with pytest.raises(AssertionError, match=f"'{name}'"):
            check(found | {name: found[name] * 1.001}, due, TOLERANCE)


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_rounds_once(given: torch.dtype, out: torch.dtype) -> None:
    inputs = kernels.narrow(norm_inputs(2, 40, 100, False), "x", dtype=given)
    found, plain = (outcome(norm, inputs, name, out) for name in ("native", "reference"))
    due = judge(norm, inputs)
    assert {k: x.dtype for k, x in found.items()} == {k: x.dtype for k, x in plain.items()}
    errors, allowed = deviations(found, due), deviations(plain, due)
    for name, error in errors.items():
        # y arrives in bf16, whose gradient is exact; in fp32 native's error and the reference's are both noise.
        assert error <= max(1.1 * allowed[name], TOLERANCE), name
    kernels.check_rounded_once({k: x for k, x in found.items() if k in ("y", "dx")}, due)


def test_norm_takes_strides_sums_and_nothing() -> None:
    inputs = norm_inputs(3, 40, 17, False)
    due = outcome(norm, inputs, "native")
    views = {k: x.transpose(0, -1).contiguous().transpose(0, -1) for k, x in inputs.items() if x is not None}
    found = outcome(norm, views, "native")
    assert all(torch.equal(found[k], due[k]) for k in due)
    given = kernels.leaves(inputs)
    with dispatch.using("native"):
        y = norm(given)["y"]
    grads = [
        torch.autograd.grad(loss, given["x"], retain_graph=True)[0] for loss in (y.sum(), (y * torch.ones(17)).sum())
    ]
    assert torch.equal(*grads)
    for batch, length in ((0, 5), (2, 0)):
        empty = norm_inputs(batch, length, 17, False)
        check(outcome(norm, empty, "native"), judge(norm, empty), TOLERANCE)


def test_norm_with_poisoned_buffers_and_either_output_alone() -> None:
    for first in (True, False):
        inputs = norm_inputs(2, 70, 20, first)
        due = outcome(norm, inputs, "native")
        with kernels.poisoned_buffers():
            assert torch.empty(3).isnan().all(), "the poison does not work"
            found = outcome(norm, inputs, "native")
        assert all(torch.equal(found[k], due[k]) for k in due)
        for name in ("y", "last"):

            def one(given: kernels.Inputs, name: str = name) -> kernels.Results:
                return {name: norm(given)[name] + 0 * sum(x.sum() for x in given.values() if x is not None)}

            check(outcome(one, inputs, "native"), judge(one, inputs), TOLERANCE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": torch.zeros(2, 8, 5)}, r"residual has shape \(2, 8, 5\), expected \(2, 9, 5\)"),
        ({"weight": torch.zeros(4)}, r"weight has shape \(4,\), expected \(5,\)"),
        ({"weight": torch.zeros(5, device="meta")}, "weight is on meta, the other arguments are on cpu"),
        ({"weight": torch.zeros(5).long()}, "weight has dtype torch.int64, expected a floating-point"),
        ({"residual": torch.zeros(2, 9, 5).half()}, "residual has dtype torch.float16, expected torch.float32"),
    ],
)
def test_a_wrong_argument_of_the_norm_is_named(change: kernels.Inputs, message: str) -> None:
    inputs = norm_inputs(2, 9, 5, False) | change
    with pytest.raises(dispatch.KernelError, match=f"add_rms_norm: {message}"):
        add_rms_norm(*inputs.values(), 1e-5)  # type: ignore[arg-type]


def logits(rows: int, columns: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(columns)
    labels = torch.randint(vocabulary, (rows,), generator=g)
    labels[::4] = -100
    labels[1 % rows] = vocabulary - 1
    return 5 * torch.randn(rows, columns, generator=g), labels


def loss(
    logits_TV: Tensor, labels_T: Tensor, vocabulary: int, kernels: str, gradient: bool = True
) -> dict[str, Tensor]:
    copy_TV = logits_TV.clone()
    with dispatch.using(kernels):
        return {"loss": cross_entropy_(copy_TV, labels_T, vocabulary, gradient), "logits": copy_TV}


@pytest.mark.parametrize(
    ("rows", "columns", "vocabulary"),
    [(1, 1, 1), (5, 15, 15), (6, 16, 13), (7, 17, 17), (9, 100, 97), (33, 257, 250), (4, 50280, 50277)],
)
def test_cross_entropy_equals_float64(rows: int, columns: int, vocabulary: int) -> None:
    logits_TV, labels_T = logits(rows, columns, vocabulary)
    due = loss(logits_TV.double(), labels_T, vocabulary, "reference")
    found = loss(logits_TV, labels_T, vocabulary, "native")
    check(found, due, TOLERANCE)
    assert not found["logits"][:, vocabulary:].any()
    assert not found["logits"][labels_T == -100].any()
    unchanged = loss(logits_TV, labels_T, vocabulary, "native", gradient=False)
    assert torch.equal(unchanged["logits"], logits_TV)
    assert torch.equal(unchanged["loss"], found["loss"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cross_entropy_of_narrow_logits_rounds_once(dtype: torch.dtype) -> None:
    logits_TV, labels_T = logits(33, 257, 250)
    logits_TV = logits_TV.to(dtype)
    due = loss(logits_TV.double(), labels_T, 250, "reference")
    found = loss(logits_TV, labels_T, 250, "native")
    assert found["logits"].dtype == dtype
    torch.testing.assert_close(found["loss"].double(), due["loss"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["logits"].double(), due["logits"], rtol=1.001 * kernels.ROUNDING[dtype], atol=1e-7)


def test_logits_that_are_not_contiguous_are_changed_in_place() -> None:
    logits_TV, labels_T = logits(6, 16, 13)
    due = loss(logits_TV, labels_T, 13, "native")
    columns_first = logits_TV.t().contiguous().t()
    with dispatch.using("native"):
        cross_entropy_(columns_first, labels_T.repeat_interleave(2)[::2], 13, True)
    assert torch.equal(columns_first, due["logits"])


@pytest.mark.parametrize("column", [0, 15, 16, 36])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_logit_that_is_no_number_makes_a_loss_that_is_none(value: float, column: int) -> None:
    """A diverged model must not look healthy."""
    logits_TV, labels_T = logits(4, 40, 37)
    logits_TV[1, column] = value
    for label in (column, 5):
        labels_T[1] = label
        found, due = (loss(logits_TV, labels_T, 37, name) for name in ("native", "reference"))
        assert due["loss"][1].isnan()
        assert found["loss"][1].isnan()
        assert found["logits"][1, :37].isnan().any()
        assert torch.equal(found["loss"].isnan(), due["loss"].isnan()), "another row has caught it"


def test_all_logits_nan_or_minus_infinity() -> None:
    for value in (math.nan, -math.inf):
        found = loss(torch.full((2, 37), value), torch.tensor([3, -100]), 37, "native")
        assert found["loss"][0].isnan()
        assert found["loss"][1] == 0


@pytest.mark.parametrize("far", [-math.inf, -1e30, -1e5])
def test_a_logit_far_below_has_no_probability(far: float) -> None:
    logits_TV, labels_T = logits(4, 40, 37)
    logits_TV[:, 3:29] = far
    logits_TV[:, 33] = far
    labels_T = torch.tensor([0, 1, 30, -100])
    due = loss(logits_TV.double(), labels_T, 37, "reference")
    check(loss(logits_TV, labels_T, 37, "native"), due, TOLERANCE)


@pytest.mark.parametrize("label", [11, 12, 16, 10**9, -1, -99, -101, -(2**62)])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_label_out_of_range_is_refused(label: int, autocast: bool) -> None:
    """Read as an index it would be an address outside of the row."""
    hidden, weight = torch.randn(1, 3, 5, requires_grad=True), torch.randn(16, 5, requires_grad=True)
    labels = torch.tensor([[0, label, -100]])
    message = f"linear_cross_entropy: label {label}, expected 0 to 10 or -100"
    cast = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with dispatch.using("native"), cast, pytest.raises(IndexError, match=message):
        linear_cross_entropy(hidden, weight, labels, 11)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_the_loss_of_a_head_and_its_gradients(autocast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * 40 * 7)  # a few positions at a time, the last chunk ragged
    g = torch.Generator().manual_seed(0)
    inputs: kernels.Inputs = {"hidden": torch.randn(2, 31, 24, generator=g), "weight": torch.randn(40, 24, generator=g)}
    labels = torch.randint(37, (2, 31), generator=g)
    labels[:, ::5] = -100

    def head(given: kernels.Inputs) -> kernels.Results:
        hidden, weight = given.values()
        cast = autocast is not None and hidden.dtype == torch.float32
        with torch.autocast("cpu", autocast, enabled=cast):
            return {"loss": linear_cross_entropy(hidden, weight, labels, 37)}  # type: ignore[arg-type]

    found, plain = (outcome(head, inputs, name) for name in ("native", "reference"))
    due = judge(head, inputs)
    allowed = deviations(plain, due)
    for name, error in deviations(found, due).items():
        assert error <= max(1.1 * allowed[name], TOLERANCE), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(16, 4)}, r"weight has shape \(16, 4\), expected \(16, 5\)"),
        ({"labels": torch.zeros(3, 1).long()}, r"labels has shape \(3, 1\), expected \(1, 3\)"),
        ({"labels": torch.zeros(1, 3).long().to("meta")}, "labels is on meta, the other arguments are on cpu"),
        ({"labels": torch.zeros(1, 3).int()}, "labels have dtype torch.int32, expected torch.int64"),
        ({"hidden": torch.zeros(1, 3, 5).long()}, "hidden has dtype torch.int64, expected a floating-point"),
        ({"vocab_size": 17}, "vocab_size is 17, weight has 16 rows"),
        ({"vocab_size": 0}, "vocab_size is 0, weight has 16 rows"),
    ],
)
def test_a_wrong_argument_of_the_loss_is_named(change: dict[str, Tensor | int], message: str) -> None:
    given = {"hidden": torch.zeros(1, 3, 5), "weight": torch.zeros(16, 5), "labels": torch.zeros(1, 3).long()}
    given |= {"vocab_size": 11} | change  # type: ignore[dict-item,operator]
    with pytest.raises(dispatch.KernelError, match=f"linear_cross_entropy: {message}"):
        linear_cross_entropy(*given.values())  # type: ignore[arg-type]


def test_cross_entropy_agrees_with_torch() -> None:
    logits_TV, labels_T = logits(33, 257, 257)
    due = F.cross_entropy(logits_TV.double(), labels_T, ignore_index=-100, reduction="none")
    torch.testing.assert_close(loss(logits_TV, labels_T, 257, "native")["loss"].double(), due, rtol=2e-6, atol=2e-6)
