"""The C++ scan against float64: outputs, last state, the gradient of every input, and what must not matter to them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mamba_pretrain.ops import dispatch
from mamba_pretrain.ops.backends import native, native_ops
from mamba_pretrain.ops.backends.native_ops import CHUNK, GROUP
from mamba_pretrain.ops.selective_scan import selective_scan
from tests.helpers import kernels, reference
from tests.helpers.kernels import check, deviations, judge, outcome, scan, scan_inputs

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))

TOLERANCE = 4e-6  # of the largest value of each tensor; two thousand fp32 additions come to half of it
ACTIVATIONS = ("u", "delta", "B", "C", "z")
SIZES = [  # B, L, E, N
    (1, 1, 1, 1),
    (3, 2, 15, 4),
    (1, CHUNK - 1, 8, 3),
    (1, CHUNK, 9, 8),
    (1, 63, 16, 16),
    (3, 64, 17, 17),
    (1, 65, 100, 4),
    (1, 33, 16, 64),
    (1, 40, 20, 256),
    (3, 257, GROUP + 1, 16),
    (1, 257, 300, 16),
    (1, 2049, 17, 16),
]


def layouts(batch: int, length: int) -> list[Tensor | None]:
    """None, a random layout with many short documents, and documents that begin beside the edges of a chunk."""
    found = [None, reference.layouts(batch, length, seed=length)]
    if length > CHUNK + 2:
        rest = length - CHUNK - 2
        found.append(kernels.documents(batch, CHUNK - 1, 1, 1, 1, rest))  # at 31, 32, 33 and 34
    return found


@pytest.mark.parametrize("first", [False, True], ids=["from nothing", "from a state to a state"])
@pytest.mark.parametrize(("batch", "length", "inner", "state"), SIZES)
def test_equals_the_recurrence_in_float64(batch: int, length: int, inner: int, state: int, first: bool) -> None:
    inputs = scan_inputs(batch, length, inner, state, first=first, seed=length)
    for seq_idx in layouts(batch, length):
        check(outcome(scan, inputs, "native", seq_idx, first), judge(scan, inputs, seq_idx, first), TOLERANCE)


def test_equals_the_equations_written_a_second_time() -> None:
    inputs, seq_idx = scan_inputs(2, 40, 17, 5, first=True), reference.layouts(2, 40)
    found = outcome(scan, inputs, "native", seq_idx)
    wide = kernels.leaves(inputs, torch.float64)
    *given, first = wide.values()
    y, last = reference.scan(*given, seq_idx, first)  # type: ignore[arg-type]
    outputs = {"y": y, "last": last}
    check(found, outputs | kernels.gradients(outputs, wide), TOLERANCE)


@pytest.mark.parametrize("length", [65, 2049])
def test_a_thousandth_in_any_gradient_would_be_seen(length: int) -> None:
    inputs = scan_inputs(1, length, 17, 4, first=True)
    found, due = outcome(scan, inputs, "native"), judge(scan, inputs)
    assert len(due) == 11
    for name in due:
        with pytest.raises(AssertionError, match=f"'{name}'"):
            check(found | {name: found[name] * 1.001}, due, TOLERANCE)


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_bf16_costs_one_rounding_and_no_more_than_the_reference(packed: bool) -> None:
    inputs = kernels.narrow(scan_inputs(2, 100, 40, 16, first=True), *ACTIVATIONS)
    seq_idx = reference.layouts(2, 100) if packed else None
    found, plain = (outcome(scan, inputs, name, seq_idx) for name in ("native", "reference"))
    due = judge(scan, inputs, seq_idx)
    assert {k: x.dtype for k, x in found.items()} == {k: x.dtype for k, x in plain.items()}
    kernels.check_rounded_once(found, due)
    errors, allowed = deviations(found, due), deviations(plain, due)
    for name, error in errors.items():
        if found[name].dtype == torch.bfloat16:
            assert error <= 1.1 * allowed[name], name
        else:
            assert error <= TOLERANCE, name


@pytest.mark.parametrize("dtypes", ["float16", "mixed"])
def test_other_dtypes_are_widened(dtypes: str) -> None:
    inputs = scan_inputs(2, 40, 17, 4)
    if dtypes == "float16":
        inputs = kernels.narrow(inputs, *ACTIVATIONS, dtype=torch.float16)
    else:
        inputs = kernels.narrow(kernels.narrow(inputs, "B", "z"), "C", "D", dtype=torch.float16)
    found, due = outcome(scan, inputs, "native"), judge(scan, inputs)
    for name, x in found.items():
        assert x.dtype == (torch.float32 if name == "last" else inputs[{"y": "u"}.get(name, name[1:])].dtype)
        check({name: x}, {name: due[name]}, TOLERANCE + kernels.ROUNDING[x.dtype])


def test_float64_is_the_references() -> None:
    inputs = {k: None if x is None else x.double() for k, x in scan_inputs(1, 9, 3, 2).items()}
    with dispatch.using("auto"):
        assert deviations(scan(inputs), dict(list(judge(scan, inputs).items())[:2])) == {"y": 0.0, "last": 0.0}


def strided(x: Tensor, how: str) -> Tensor:
    if how == "chunk of a projection":
        wide = torch.full((*x.shape[:-1], 3 * x.shape[-1] + 1), math.nan)
        wide[..., 1 : 1 + x.shape[-1]] = x
        return wide[..., 1 : 1 + x.shape[-1]]
    if how == "time first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if how == "channel first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "every second channel":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), math.nan)
        wide[..., ::2] = x
        return wide[..., ::2]
    raise AssertionError(how)


@pytest.mark.parametrize("how", ["chunk of a projection", "time first", "channel first", "every second channel"])
def test_strides_do_not_matter(how: str) -> None:
    inputs = scan_inputs(3, 40, 17, 5, first=True)
    views = inputs | {k: strided(x, how) for k, x in inputs.items() if k in ACTIVATIONS and x is not None}
    views |= {"A": inputs["A"].t().contiguous().t(), "initial_state": strided(inputs["initial_state"], "time first")}
    assert not views["u"].is_contiguous()
    found, due = outcome(scan, views, "native"), outcome(scan, inputs, "native")
    assert all(torch.equal(found[k], due[k]) for k in due)


def test_expanded_inputs_and_gradients() -> None:
    """One row for the whole batch, and the upstream gradient of a sum, which is one number with strides of zero."""
    inputs = scan_inputs(3, 40, 17, 5)
    totals = []
    for expand in (True, False):
        given = kernels.leaves(inputs)
        rows = {k: x[:1].expand(3, -1, -1) if k in ACTIVATIONS else x for k, x in given.items()}
        rows = rows if expand else {k: None if x is None else x.contiguous() for k, x in rows.items()}
        with dispatch.using("native"):
            y = scan(rows, None, False)["y"]
        loss = y.sum() if expand else (y * torch.ones(y.shape)).sum()
        totals.append(torch.autograd.grad(loss, [x for x in given.values() if x is not None]))
    torch.testing.assert_close(totals[0], totals[1], rtol=0, atol=0)


def test_nothing_to_do() -> None:
    for batch, length, inner, state in ((2, 0, 5, 4), (0, 7, 5, 4), (0, 0, 5, 4), (2, 7, 0, 4)):
        inputs = scan_inputs(batch, length, inner, state, first=True)
        for seq_idx in (None, torch.zeros(batch, length, dtype=torch.int32)):
            check(outcome(scan, inputs, "native", seq_idx), judge(scan, inputs, seq_idx), TOLERANCE)


def test_poisoned_buffers_change_nothing() -> None:
    for packed in (None, reference.layouts(2, 70)):
        inputs = scan_inputs(2, 70, 20, 17, first=True)
        due = outcome(scan, inputs, "native", packed)
        with kernels.poisoned_buffers():
            assert torch.empty(3).isnan().all(), "the poison does not work"
            found = outcome(scan, inputs, "native", packed)
        assert all(torch.equal(found[k], due[k]) for k in due)


def test_inputs_are_not_modified() -> None:
    inputs, seq_idx = scan_inputs(2, 70, 20, 17, first=True), reference.layouts(2, 70)
    before = {k: None if x is None else x.clone() for k, x in inputs.items()}, seq_idx.clone()
    outcome(scan, inputs, "native", seq_idx)
    assert all(x is None or torch.equal(x, inputs[k]) for k, x in before[0].items())
    assert torch.equal(seq_idx, before[1])


@pytest.mark.parametrize("delta", [-1e30, -1e4, -80.0, -20.0, 20.0, 21.0, 80.0, 1e4, 1e30])
def test_extreme_step_sizes(delta: float) -> None:
    inputs = scan_inputs(1, 40, 17, 4, first=True)
    inputs["delta"].fill_(delta)
    inputs["delta_bias"].zero_()
    if abs(delta) > 1e10:  # squared it is beyond fp32: the forward only
        inputs["D"].zero_()
        with dispatch.using("native"), torch.no_grad():
            found = scan(inputs)
        wide = {k: x.double() for k, x in inputs.items()}
        with dispatch.using("reference"):
            due = scan(wide)
    else:
        found, due = outcome(scan, inputs, "native"), judge(scan, inputs)
    for name, x in found.items():
        scale = max(due[name].abs().max().item(), 1e-3)
        torch.testing.assert_close(x.double(), due[name], rtol=1e-5, atol=2e-6 * scale, msg=lambda m, n=name: f"{n}{m}")


@pytest.mark.parametrize("value", [-math.inf, -1e30, -1e4, -90.0, 90.0, 1e4, 1e30])
def test_the_gate_is_open_or_shut_at_the_ends(value: float) -> None:
    inputs = scan_inputs(1, 5, 17, 4)
    inputs["z"].fill_(value)
    with dispatch.using("native"):
        y = scan(inputs)["y"]
    inputs["z"].fill_(0)
    with dispatch.using("reference"):
        inputs["z"].fill_(1)
        open_y = scan(inputs)["y"] / torch.nn.functional.silu(torch.ones(1))
    if value == -math.inf:
        assert y.isnan().all(), "zero times infinity, as in torch"
    else:
        torch.testing.assert_close(y, open_y * max(value, 0.0), rtol=1e-4, atol=1e-5 * max(value, 1e-5))


def test_a_nan_stays_in_its_document() -> None:
    lengths = (20, 12, 1, 30)
    inputs, seq_idx = scan_inputs(2, sum(lengths), 17, 5), kernels.documents(2, *lengths)
    due = outcome(scan, inputs, "native", seq_idx)
    for name in ACTIVATIONS:
        spoilt = inputs | {name: inputs[name].clone()}
        spoilt[name][0, 25] = math.nan  # in the second document of the first row
        found = outcome(scan, spoilt, "native", seq_idx)
        for key in ("y", "du", "ddelta", "dB", "dC", "dz"):
            for part in ((0, slice(0, 20)), (0, slice(32, None)), (1,)):
                assert torch.equal(found[key][part], due[key][part]), (name, key)
        assert found["y"][0, 25].isnan().any()
        assert torch.equal(found["last"], due["last"])


def test_packed_documents_are_the_documents_alone() -> None:
    lengths = (1, 31, 1, 1, 33, 2, 60)
    inputs = scan_inputs(2, sum(lengths), 20, 5)

    def alone(given: kernels.Inputs) -> kernels.Results:
        parts = {k: x.split(lengths, 1) if k in ACTIVATIONS else [x] * len(lengths) for k, x in given.items()}
        found = [scan({k: parts[k][i] for k in given}) for i in range(len(lengths))]
        return {"y": torch.cat([x["y"] for x in found], 1), "last": found[-1]["last"]}

    check(outcome(scan, inputs, "native", kernels.documents(2, *lengths)), outcome(alone, inputs, "native"), TOLERANCE)


@pytest.mark.parametrize("cut", [1, 31, 32, 33, 69])
def test_halves_with_the_state_handed_over_are_the_whole(cut: int) -> None:
    inputs = scan_inputs(2, 70, 20, 5, first=True)
    seq_idx = kernels.documents(2, 20, 30, 20)

    def in_parts(given: kernels.Inputs) -> kernels.Results:
        halves = [
            {k: x[:, part] if k in ACTIVATIONS else x for k, x in given.items()}
            for part in (slice(0, cut), slice(cut, None))
        ]
        begin = scan(halves[0], seq_idx[:, :cut])
        starts_new = bool(seq_idx[0, cut] != seq_idx[0, cut - 1])
        handed_over = begin["last"] * 0 if starts_new else begin["last"]
        end = scan(halves[1] | {"initial_state": handed_over}, seq_idx[:, cut:])
        return {"y": torch.cat([begin["y"], end["y"]], 1), "last": end["last"]}

    check(outcome(in_parts, inputs, "native"), outcome(scan, inputs, "native", seq_idx), TOLERANCE)


def kept(length: int, inner: int, state: int) -> list[Tensor]:
    inputs, tensors = kernels.leaves(scan_inputs(1, length, inner, state)), []
    with dispatch.using("native"), torch.autograd.graph.saved_tensors_hooks(tensors.append, lambda x: x):  # type: ignore[arg-type]
        scan(inputs, None, False)
    given = {id(x) for x in inputs.values()}
    return [
        x
        for x in tensors
        if id(x) not in given and x.data_ptr() not in {g.data_ptr() for g in inputs.values() if g is not None}
    ]


def test_backward_keeps_one_state_for_each_chunk() -> None:
    def count(*sizes: int) -> int:
        return sum(x.numel() for x in kept(*sizes))

    assert count(1024, 16, 8) == 1024 // CHUNK * 16 * 8
    assert count(2048, 48, 16) == 2048 // CHUNK * 48 * 16
    assert count(1, 16, 8) == 16 * 8


def test_without_gradients_no_state_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters require gradients also where none are computed."""
    asked = []
    results = native_ops._scan_results

    def spy(u: Tensor, A: Tensor, keep: bool, want_last: bool) -> tuple[Tensor, Tensor, Tensor]:
        asked.append(keep)
        return results(u, A, keep, want_last)

    monkeypatch.setattr(native_ops, "_scan_results", spy)
    inputs = kernels.leaves(scan_inputs(1, 40, 16, 4))
    with dispatch.using("native"):
        y = scan(inputs)["y"]
        with torch.no_grad():
            assert torch.equal(scan(inputs)["y"], y)
        with torch.inference_mode():
            assert torch.equal(scan(inputs)["y"], y)
    assert asked == [True, False, False]


def test_checkpointing_gives_the_same_gradients() -> None:
    def again(given: kernels.Inputs) -> kernels.Results:
        names = list(given)

        def part(*tensors: Tensor) -> tuple[Tensor, ...]:
            return tuple(scan(dict(zip(names, tensors, strict=True))).values())

        y, last = checkpoint(part, *given.values(), use_reentrant=False)
        return {"y": y, "last": last}

    inputs = scan_inputs(2, 70, 20, 5, first=True)
    found, due = outcome(again, inputs, "native"), outcome(scan, inputs, "native")
    assert all(torch.equal(found[k], due[k]) for k in due)


def test_autocast_changes_nothing() -> None:
    inputs = scan_inputs(2, 40, 17, 4)
    due = outcome(scan, inputs, "native")
    with torch.autocast("cpu", torch.bfloat16):
        found = outcome(scan, inputs, "native")
    assert all(torch.equal(found[k], due[k]) for k in due)


def test_one_output_without_the_others_gradient() -> None:
    """The last state alone, or y alone, is differentiated: what is missing counts as zero."""
    inputs = scan_inputs(2, 40, 17, 4, first=True)
    for name in ("y", "last"):

        def one(given: kernels.Inputs, name: str = name) -> kernels.Results:
            found = scan(given)[name]
            zero = sum((0 * x.sum() for x in given.values() if x is not None), torch.zeros(()))
            return {name: found + zero.to(found.dtype)}

        check(outcome(one, inputs, "native"), judge(one, inputs), TOLERANCE)


Change = Callable[[Tensor], Tensor]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("delta", lambda x: x[:, :-1], r"delta has shape \(2, 8, 5\), expected \(2, 9, 5\)"),
        ("A", lambda x: x[:-1], r"A has shape \(4, 3\), expected \(5, 3\)"),
        ("B", lambda x: x[..., :-1], r"B has shape \(2, 9, 2\), expected \(2, 9, 3\)"),
        ("C", lambda x: x[:1], r"C has shape \(1, 9, 3\), expected \(2, 9, 3\)"),
        ("D", lambda x: x[:, None], r"D has shape \(5, 1\), expected \(5,\)"),
        ("z", lambda x: x.to("meta"), "z is on meta, the other arguments are on cpu"),
        ("delta_bias", lambda x: x[1:], r"delta_bias has shape \(4,\), expected \(5,\)"),
        ("initial_state", lambda x: x.transpose(1, 2), r"initial_state has shape \(2, 3, 5\), expected \(2, 5, 3\)"),
        ("A", lambda x: x.long(), "A has dtype torch.int64, expected a floating-point dtype"),
        ("u", lambda x: x.long(), "u has dtype torch.int64, expected a floating-point dtype"),
    ],
)
def test_a_wrong_argument_is_named(name: str, change: Change, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = scan_inputs(2, 9, 5, 3, first=True)
    inputs[name] = change(inputs[name])  # type: ignore[arg-type]
    monkeypatch.setattr(dispatch, "choose", lambda call: pytest.fail("computed before the check"))
    with pytest.raises(dispatch.KernelError, match=f"selective_scan: {message}"):
        scan(inputs)


def test_wrong_document_numbers_are_named() -> None:
    inputs = scan_inputs(2, 9, 5, 3)
    with pytest.raises(dispatch.KernelError, match=r"seq_idx has shape \(2, 8\), expected \(2, 9\)"):
        scan(inputs, torch.zeros(2, 8, dtype=torch.int32))


def test_the_constants_are_the_librarys() -> None:
    library = native.native_build.load()
    assert (library.mamba_chunk(), library.mamba_group()) == (CHUNK, GROUP)
    assert selective_scan.__doc__
