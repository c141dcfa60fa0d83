"""The C++ kernels in a whole training step, on several threads, for every instruction set, and as ops of torch."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader

from mamba_pretrain.config import ModelConfig
from mamba_pretrain.model.lm import MambaLM
from mamba_pretrain.ops import dispatch
from mamba_pretrain.ops.backends import native, native_build
from mamba_pretrain.ops.backends.native_ops import SMALL
from mamba_pretrain.ops.call import KernelError
from tests.helpers import kernels, reference
from tests.helpers.kernels import conv, conv_inputs, norm, outcome, scan, scan_inputs

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))


def training_step(kernels: str, dtype: torch.dtype, *, seed: int = 0, checkpointing: bool = False) -> dict[str, Tensor]:
    """Loss and gradients of a small model on packed documents; float64 without autocast, fp32 under bf16."""
    model = MambaLM(ModelConfig(d_model=64, n_layer=3, vocab_size=97, d_state=16), seed=seed).to(dtype)
    model.backbone.activation_checkpointing = checkpointing
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(97, (4, 130), generator=g)
    labels = ids.roll(-1, 1).masked_fill(torch.rand(4, 130, generator=g) < 0.1, -100)
    with dispatch.using(kernels), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        loss = model(ids, labels, reference.layouts(4, 130, density=0.05), return_state=False).loss_sum
        loss.backward()
    return {"loss": loss.detach()} | {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


def errors_by_kind(pairs: Iterable[tuple[dict[str, Tensor], dict[str, Tensor]]]) -> dict[str, float]:
    """The relative L2 error of all gradients of one kind, over all blocks of all pairs of found and due."""
    wrong: dict[str, float] = defaultdict(float)
    size: dict[str, float] = defaultdict(float)
    for found, due in pairs:
        for name, expected in due.items():
            kind = re.sub(r"layers\.\d+\.", "", name)
            wrong[kind] += (found[name].double() - expected).square().sum().item()
            size[kind] += expected.square().sum().item()
    return {kind: math.sqrt(wrong[kind] / size[kind]) for kind in wrong}


def test_a_training_step_in_bf16_is_as_exact_as_with_the_reference() -> None:
    seeds = (0, 1, 2)  # over one the roundings of a small matrix are luck
    due = [training_step("reference", torch.float64, seed=seed) for seed in seeds]
    errors, allowed = (
        errors_by_kind(zip([training_step(name, torch.float32, seed=seed) for seed in seeds], due, strict=True))
        for name in ("native", "reference")
    )
    assert errors.keys() == allowed.keys()
    assert len(errors) == 13, "a kind of parameter has no gradient"
    for kind, error in errors.items():
        if kind == "loss":  # one number, whose error happens to be near zero or not
            assert error <= 1e-3
        else:
            assert error <= 1.1 * allowed[kind], kind


def test_checkpointing_blocks_gives_the_same_gradients() -> None:
    plain, again = (training_step("native", torch.float32, checkpointing=c) for c in (False, True))
    assert all(torch.equal(plain[k], again[k]) for k in plain)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    """Bit for bit, above the size from which threads are used."""
    cases = []
    for seq_idx in (None, reference.layouts(3, 100)):
        inputs = kernels.narrow(scan_inputs(3, 100, 300, 8, first=True), "u", "delta", "B", "C", "z", dtype=dtype)
        cases.append((scan, inputs, (seq_idx,)))
        cases.append((conv, kernels.narrow(conv_inputs(3, 100, 300, 4, first=True), "x", dtype=dtype), (seq_idx,)))
    g = torch.Generator().manual_seed(0)
    normed = {
        "x": torch.randn(3, 100, 300, generator=g).to(dtype),
        "residual": torch.randn(3, 100, 300, generator=g),
        "weight": torch.randn(300, generator=g),
    }
    cases.append((norm, normed, (dtype,)))
    assert SMALL < 3 * 100 * 300
    logits, labels = torch.randn(100, 500, generator=g).to(dtype), torch.randint(500, (100,), generator=g)
    results = []
    for count in (1, 2, 3, 4):
        torch.set_num_threads(count)
        found = {f"{i} {k}": x for i, c in enumerate(cases) for k, x in outcome(c[0], c[1], "native", *c[2]).items()}
        changed = logits.clone()
        found["loss"] = native.cross_entropy_(changed, labels, 500, True)
        results.append(found | {"logits": changed})
    for count, found in enumerate(results[1:], 2):
        for name, x in found.items():
            assert torch.equal(x, results[0][name]), f"{name} differs between 1 and {count} threads"


class AfterThreads(torch.utils.data.Dataset[Tensor]):
    """Runs kernels in a worker process, forked after this process has used OpenMP."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        return outcome(scan, scan_inputs(2, 64, 300, 4), "native")["du"]


@pytest.mark.usefixtures("threads")
def test_forked_workers_can_use_the_kernels() -> None:
    torch.set_num_threads(2)
    due = AfterThreads()[0]
    for found in DataLoader(AfterThreads(), num_workers=1, batch_size=None, timeout=30):
        assert torch.equal(found, due)


CORE = """
import json
from mamba_pretrain.ops import dispatch
from mamba_pretrain.ops.backends import native, native_build
from mamba_pretrain.ops.selfcheck import self_check
from tests.helpers import kernels, reference
from tests.helpers.kernels import *
assert native.missing() is None, native.missing()
dispatch.select("native")
worst = {check.op: check.error for check in self_check("cpu")}
for length, inner, state in ((1, 1, 1), (65, 100, 17), (257, 129, 16), (40, 15, 64)):
    for seq_idx in (None, reference.layouts(2, length)):
        for op, inputs in (
            (scan, scan_inputs(2, length, inner, state, first=True)),
            (conv, conv_inputs(2, length, inner, 1 + state % 5, first=True)),
        ):
            for dtype in (torch.float32, torch.bfloat16):
                given = narrow(inputs, "u", "delta", "B", "C", "z", "x", dtype=dtype)
                found, due = outcome(op, given, "native", seq_idx), judge(op, given, seq_idx)
                check_rounded_once(found, due)
                errors = deviations({k: x for k, x in found.items() if x.dtype == torch.float32},
                                    {k: x for k, x in due.items() if found[k].dtype == torch.float32})
                worst[op.__name__] = max(worst.get(op.__name__, 0), *errors.values())
for far in (-1e30, -1e4, 1e4, 1e30):
    inputs = conv_inputs(1, 5, 17, 1, bias=False)
    inputs["weight"].fill_(1), inputs["x"].fill_(far)
    y = conv(inputs)["y"]
    assert torch.allclose(y, torch.full_like(y, max(far, 0.0)), rtol=1e-6, atol=1e-30), far
row = torch.tensor([[0.0, -float("inf"), 1.0] * 7, [float("nan"), 1.0, 2.0] * 7])
loss = native.cross_entropy_(row, torch.tensor([2, 0]), 20, True)
assert loss[0].isfinite() and row[0].isfinite().all() and loss[1].isnan(), (loss, row)
print(json.dumps([native_build.isa(), worst]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("instructions", list(native_build.ISA_FLAGS))
def test_every_instruction_set_is_right(instructions: str) -> None:
    known = list(native_build.ISA_FLAGS)
    if known.index(instructions) < known.index(native_build.isa()):
        pytest.skip(f"this CPU has no {instructions}")
    found, worst = kernels.said(kernels.python(CORE, MAMBA_PRETRAIN_ISA=instructions))
    assert found == instructions
    assert {op: error for op, error in worst.items() if error > 1e-5} == {}


def test_an_instruction_set_that_this_cpu_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAMBA_PRETRAIN_ISA", "avx1024")
    with pytest.raises(KernelError, match="MAMBA_PRETRAIN_ISA is 'avx1024': this CPU runs .*portable"):
        native_build.isa()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setenv("MAMBA_PRETRAIN_ISA", "avx2")
    with pytest.raises(KernelError, match="this CPU runs portable"):
        native_build.isa()
    monkeypatch.delenv("MAMBA_PRETRAIN_ISA")
    assert native_build.isa() == "portable"


def calls() -> Iterator[tuple[str, tuple[object, ...]]]:
    """Arguments of each op of torch.library, with and without those that may be missing."""
    for full in (True, False):
        s = scan_inputs(2, 40, 17, 5, first=True)
        starts = native._starts(reference.layouts(2, 40)) if full else None
        first = s["initial_state"] if full else None
        given = [s[k] for k in ("u", "delta", "B", "C", "z", "A", "D", "delta_bias")]
        given[5] = given[5].t().contiguous().t()
        yield "scan_forward", (*given, first, starts, full, full)
        kept = torch.ops.mamba_pretrain.scan_forward(*given, first, starts, True, False)[2]
        yield "scan_backward", (s["z"], first, *given, starts, kept, full)
        c = conv_inputs(2, 40, 17, 4, bias=full, first=full)
        weight = c["weight"].t().contiguous().t()
        yield "conv_forward", (c["x"], weight, c["bias"], c["initial_state"], starts)
        yield "conv_backward", (s["z"], c["initial_state"], c["x"], weight, c["bias"], c["initial_state"], starts)
        x, residual, width = s["u"], s["z"] if full else None, torch.randn(17)
        yield "norm_forward", (x, residual, width, 1e-5, full)
        y, stream, scale = torch.ops.mamba_pretrain.norm_forward(x, residual, width, 1e-5, full)
        dtype = torch.bfloat16 if full else torch.float32
        yield "norm_backward", (y, residual, width, stream, scale, dtype, full)
        yield "cross_entropy_", (torch.randn(6, 16), torch.tensor([0, 12, -100, 3, 4, 5]), 13, full)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_ops_are_what_they_declare() -> None:
    """Schema and fake results; gradients are made outside of the ops, and have tests of their own."""
    names = set()
    for name, given in calls():
        op = getattr(torch.ops.mamba_pretrain, name).default
        torch.library.opcheck(op, given, test_utils=("test_schema", "test_faketensor"))
        names.add(f"mamba_pretrain::{name}")
    here = [s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("mamba_pretrain::")]
    assert names >= set(here), "an op without a check"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fake_tensors_get_the_right_shapes_and_dtypes(dtype: torch.dtype) -> None:
    names = ("u", "delta", "B", "C", "z", "x")
    for op, inputs in (
        (scan, kernels.narrow(scan_inputs(2, 40, 17, 5, first=True), *names, dtype=dtype)),
        (conv, kernels.narrow(conv_inputs(2, 40, 17, 4, first=True), *names, dtype=dtype)),
    ):
        seq_idx = reference.layouts(2, 40)
        due = outcome(op, inputs, "native", seq_idx)
        with FakeTensorMode() as mode:
            fakes = {k: None if x is None else mode.from_tensor(x).requires_grad_() for k, x in inputs.items()}
            with dispatch.using("native"):
                outputs = op(fakes, mode.from_tensor(seq_idx))
            present = {f"d{k}": x for k, x in fakes.items() if x is not None}
            ones = [torch.ones_like(x) for x in outputs.values()]
            grads = torch.autograd.grad(list(outputs.values()), list(present.values()), ones)
        found = outputs | dict(zip(present, grads, strict=True))
        assert {k: (x.shape, x.dtype) for k, x in found.items()} == {k: (x.shape, x.dtype) for k, x in due.items()}
