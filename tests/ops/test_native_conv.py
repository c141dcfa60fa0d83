"""The C++ convolution against float64: outputs, last state, the gradient of every input."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mamba_pretrain.ops import dispatch
from mamba_pretrain.ops.backends import native
from mamba_pretrain.ops.backends.native_ops import GROUP
from tests.helpers import kernels, reference
from tests.helpers.kernels import check, conv, conv_inputs, deviations, judge, outcome

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))

TOLERANCE = 3e-6  # of the largest value of each tensor
SIZES = [  # B, L, E
    (1, 1, 1),
    (3, 2, 15),
    (1, 3, 16),
    (1, 63, 16),
    (3, 64, 17),
    (1, 65, 100),
    (3, 257, GROUP + 1),
    (1, 257, 300),
    (1, 2049, 17),
]


def layouts(batch: int, length: int, taps: int) -> list[Tensor | None]:
    found = [None, reference.layouts(batch, length, seed=length), reference.layouts(batch, length, density=0.7)]
    if length > 40:
        found.append(kernels.documents(batch, 31, 1, 1, taps, length - 33 - taps))
    return found


@pytest.mark.parametrize("taps", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("batch", "length", "inner"), SIZES)
def test_equals_the_sum_in_float64(batch: int, length: int, inner: int, taps: int) -> None:
    for first in (False, True):
        inputs = conv_inputs(batch, length, inner, taps, bias=not first, first=first, seed=length)
        for seq_idx in layouts(batch, length, taps):
            check(outcome(conv, inputs, "native", seq_idx, first), judge(conv, inputs, seq_idx, first), TOLERANCE)


def test_equals_the_equations_written_a_second_time() -> None:
    inputs, seq_idx = conv_inputs(2, 40, 17, 4, first=True), reference.layouts(2, 40)
    found = outcome(conv, inputs, "native", seq_idx)
    wide = kernels.leaves(inputs, torch.float64)
    *given, first = wide.values()
    y, last = reference.conv(*given, seq_idx, first)  # type: ignore[arg-type]
    outputs = {"y": y, "last": last}
    check(found, outputs | kernels.gradients(outputs, wide), TOLERANCE)


@pytest.mark.parametrize("length", [65, 2049])
def test_a_thousandth_in_any_gradient_would_be_seen(length: int) -> None:
    inputs = conv_inputs(1, length, 17, 4, first=True)
    found, due = outcome(conv, inputs, "native"), judge(conv, inputs)
    assert len(due) == 6
    for name in due:
        with pytest.raises(AssertionError, match=f"'{name}'"):
            check(found | {name: found[name] * 1.001}, due, TOLERANCE)


@pytest.mark.parametrize("taps", [1, 2, 3, 4, 5])
def test_bf16_costs_one_rounding_and_no_more_than_the_reference(taps: int) -> None:
    inputs = kernels.narrow(conv_inputs(2, 100, 40, taps, first=True), "x")
    for seq_idx in (None, reference.layouts(2, 100)):
        found, plain = (outcome(conv, inputs, name, seq_idx) for name in ("native", "reference"))
        due = judge(conv, inputs, seq_idx)
        assert {k: x.dtype for k, x in found.items()} == {k: x.dtype for k, x in plain.items()}
        kernels.check_rounded_once(found, due)
        errors, allowed = deviations(found, due), deviations(plain, due)
        for name, error in errors.items():
            rounded = found[name].dtype == torch.bfloat16
            assert error <= (1.1 * allowed[name] if rounded else TOLERANCE), name


@pytest.mark.parametrize("names", [("x",), ("weight", "bias"), ("x", "weight", "bias", "initial_state")])
def test_other_dtypes_are_widened(names: tuple[str, ...]) -> None:
    inputs = kernels.narrow(conv_inputs(2, 40, 17, 4, first=True), *names, dtype=torch.float16)
    found, due = outcome(conv, inputs, "native"), judge(conv, inputs)
    for name, x in found.items():
        assert x.dtype == (torch.float32 if name == "last" else inputs[{"y": "x"}.get(name, name[1:])].dtype)
        check({name: x}, {name: due[name]}, TOLERANCE + kernels.ROUNDING[x.dtype])


def test_strides_do_not_matter() -> None:
    inputs = conv_inputs(3, 40, 17, 4, first=True)
    due = outcome(conv, inputs, "native")
    x = inputs["x"]
    wide = torch.full((3, 40, 35), math.nan)
    wide[..., 18:] = x
    thin = torch.full((3, 40, 34), math.nan)
    thin[..., ::2] = x
    views = {
        "second half of a projection": wide[..., 18:],
        "every second channel": thin[..., ::2],
        "time first": x.transpose(0, 1).contiguous().transpose(0, 1),
        "channel first": x.transpose(1, 2).contiguous().transpose(1, 2),
    }
    weight = inputs["weight"].t().contiguous().t()
    for name, view in views.items():
        assert not view.is_contiguous()
        found = outcome(conv, inputs | {"x": view, "weight": weight}, "native")
        assert all(torch.equal(found[k], due[k]) for k in due), name


def test_expanded_inputs_and_gradients() -> None:
    inputs = conv_inputs(3, 40, 17, 4)
    totals = []
    for expand in (True, False):
        given = kernels.leaves(inputs)
        x = given["x"][:1].expand(3, -1, -1)
        with dispatch.using("native"):
            y = conv(given | {"x": x if expand else x.contiguous()}, None, False)["y"]
        loss = y.sum() if expand else (y * torch.ones(y.shape)).sum()
        totals.append(torch.autograd.grad(loss, [x for x in given.values() if x is not None]))
    torch.testing.assert_close(totals[0], totals[1], rtol=0, atol=0)


@pytest.mark.parametrize("taps", [1, 4])
def test_nothing_to_do(taps: int) -> None:
    for batch, length, inner in ((2, 0, 5), (0, 7, 5), (0, 0, 5), (2, 7, 0)):
        inputs = conv_inputs(batch, length, inner, taps, first=True)
        for seq_idx in (None, torch.zeros(batch, length, dtype=torch.int32)):
            check(outcome(conv, inputs, "native", seq_idx), judge(conv, inputs, seq_idx), TOLERANCE)


@pytest.mark.parametrize("length", [1, 2, 3, 70])
def test_poisoned_buffers_change_nothing(length: int) -> None:
    for packed in (None, reference.layouts(2, length)):
        inputs = conv_inputs(2, length, 20, 4, first=True)
        due = outcome(conv, inputs, "native", packed)
        with kernels.poisoned_buffers():
            assert torch.empty(3).isnan().all(), "the poison does not work"
            found = outcome(conv, inputs, "native", packed)
        assert all(torch.equal(found[k], due[k]) for k in due)


def test_inputs_are_not_modified() -> None:
    inputs, seq_idx = conv_inputs(2, 70, 20, 4, first=True), reference.layouts(2, 70)
    before = {k: None if x is None else x.clone() for k, x in inputs.items()}, seq_idx.clone()
    outcome(conv, inputs, "native", seq_idx)
    assert all(x is None or torch.equal(x, inputs[k]) for k, x in before[0].items())
    assert torch.equal(seq_idx, before[1])


@pytest.mark.parametrize("value", [-1e30, -1e4, -90.0, 90.0, 1e4, 1e30])
def test_silu_at_the_ends(value: float) -> None:
    inputs = conv_inputs(1, 20, 17, 1, bias=False)
    inputs["weight"].fill_(1)
    inputs["x"].fill_(value)
    with dispatch.using("native"):
        y = conv(inputs)["y"]
    torch.testing.assert_close(y, torch.full_like(y, max(value, 0.0)), rtol=1e-6, atol=1e-30)


def test_a_nan_stays_in_its_document() -> None:
    lengths = (20, 12, 1, 30)
    inputs, seq_idx = conv_inputs(2, sum(lengths), 17, 4), kernels.documents(2, *lengths)
    due = outcome(conv, inputs, "native", seq_idx)
    for step in (20, 31, 32):
        spoilt = inputs | {"x": inputs["x"].clone()}
        spoilt["x"][0, step] = math.nan
        found = outcome(conv, spoilt, "native", seq_idx)
        own = seq_idx[0] == seq_idx[0, step]
        for key in ("y", "dx"):
            assert found[key][0, own].isnan().any()
            assert torch.equal(found[key][0, ~own], due[key][0, ~own])
            assert torch.equal(found[key][1], due[key][1])
        assert torch.equal(found["last"], due["last"])


@pytest.mark.parametrize("taps", [1, 2, 4, 5])
def test_packed_documents_are_the_documents_alone(taps: int) -> None:
    lengths = (1, 31, 1, 1, 33, 2, 60, 1)
    inputs = conv_inputs(2, sum(lengths), 20, taps)

    def alone(given: kernels.Inputs) -> kernels.Results:
        found = [conv(given | {"x": x}) for x in given["x"].split(lengths, 1)]
        return {"y": torch.cat([x["y"] for x in found], 1), "last": found[-1]["last"]}

    check(outcome(conv, inputs, "native", kernels.documents(2, *lengths)), outcome(alone, inputs, "native"), TOLERANCE)


@pytest.mark.parametrize("cut", [1, 2, 3, 31, 32, 33, 69])
def test_halves_with_the_state_handed_over_are_the_whole(cut: int) -> None:
    inputs = conv_inputs(2, 70, 20, 4, first=True)

    def in_parts(given: kernels.Inputs) -> kernels.Results:
        begin = conv(given | {"x": given["x"][:, :cut]})
        end = conv(given | {"x": given["x"][:, cut:], "initial_state": begin["last"]})
        return {"y": torch.cat([begin["y"], end["y"]], 1), "last": end["last"]}

    check(outcome(in_parts, inputs, "native"), outcome(conv, inputs, "native"), TOLERANCE)


Change = Callable[[Tensor], Tensor]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("weight", lambda x: x[1:], r"weight has shape \(4, 4\), expected \(5, 4\)"),
        ("weight", lambda x: x[:, None], r"weight has shape \(5, 1, 4\), expected 2 dimensions"),
        ("bias", lambda x: x[1:], r"bias has shape \(4,\), expected \(5,\)"),
        ("bias", lambda x: x.to("meta"), "bias is on meta, the other arguments are on cpu"),
        ("initial_state", lambda x: x[:, 1:], r"initial_state has shape \(2, 2, 5\), expected \(2, 3, 5\)"),
        ("initial_state", lambda x: x.long(), "initial_state has dtype torch.int64, expected a floating-point dtype"),
        ("x", lambda x: x.long(), "x has dtype torch.int64, expected a floating-point dtype"),
    ],
)
def test_a_wrong_argument_is_named(name: str, change: Change, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = conv_inputs(2, 9, 5, 4, first=True)
    inputs[name] = change(inputs[name])  # type: ignore[arg-type]
    monkeypatch.setattr(dispatch, "choose", lambda call: pytest.fail("computed before the check"))
    with pytest.raises(dispatch.KernelError, match=f"causal_conv1d: {message}"):
        conv(inputs)
