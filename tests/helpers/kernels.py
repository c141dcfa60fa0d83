"""Runs an op with one backend or another, and holds its outputs and every gradient against float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamba_pretrain.ops import dispatch
from mamba_pretrain.ops.add_norm import add_rms_norm
from mamba_pretrain.ops.causal_conv1d import causal_conv1d
from mamba_pretrain.ops.selective_scan import selective_scan

ROOT = Path(__file__).parent.parent.parent
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # half a unit in the last place
Inputs = dict[str, Tensor | None]
Results = dict[str, Tensor]  # outputs under their names, the gradient of input x under dx


def scan_inputs(batch: int, length: int, inner: int, state: int, *, first: bool = False, seed: int = 0) -> Inputs:
    """fp32: steps from 1e-3 to 1, states that keep and states that forget."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    return {
        "u": normal(batch, length, inner),
        "delta": normal(batch, length, inner),
        "A": -torch.exp(normal(inner, state)),
        "B": normal(batch, length, state),
        "C": normal(batch, length, state),
        "D": normal(inner),
        "z": normal(batch, length, inner),
        "delta_bias": normal(inner) - 2,
        "initial_state": normal(batch, inner, state) if first else None,
    }


def conv_inputs(
    batch: int, length: int, inner: int, taps: int, *, bias: bool = True, first: bool = False, seed: int = 0
) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(batch, length, inner, generator=g),
        "weight": torch.randn(inner, taps, generator=g),
        "bias": torch.randn(inner, generator=g) if bias else None,
        "initial_state": torch.randn(batch, taps - 1, inner, generator=g) if first else None,
    }


def scan(inputs: Inputs, seq_idx: Tensor | None = None, last: bool = True) -> Results:
    *given, first = inputs.values()
    return _named(selective_scan(*given, seq_idx, first, last))  # type: ignore[arg-type]


def conv(inputs: Inputs, seq_idx: Tensor | None = None, last: bool = True) -> Results:
    *given, first = inputs.values()
    return _named(causal_conv1d(*given, seq_idx, first, last))  # type: ignore[arg-type]


def norm(inputs: Inputs, out_dtype: torch.dtype | None = None) -> Results:
    return _named(add_rms_norm(*inputs.values(), 1e-5, out_dtype))  # type: ignore[arg-type]


def _named(outputs: tuple[Tensor | None, ...]) -> Results:
    return {name: x for name, x in zip(("y", "last"), outputs, strict=True) if x is not None}


def leaves(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    return {k: None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for k, x in inputs.items()}


def outcome(
    op: Callable[..., Results], inputs: Inputs, kernels: str, *options: Any, dtype: torch.dtype | None = None
) -> Results:
    """Outputs, and gradients of their products with the same bf16 numbers, whatever the dtype."""
    given = leaves(inputs, dtype)
    with dispatch.using(kernels):
        outputs = op(given, *options)
        return {k: x.detach() for k, x in outputs.items()} | gradients(outputs, given)


def gradients(outputs: Results, given: Inputs, seed: int = 1) -> Results:
    g = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(x.shape, generator=g).bfloat16().to(x.dtype) for x in outputs.values()]
    present = {f"d{k}": x for k, x in given.items() if x is not None}
    found = torch.autograd.grad(list(outputs.values()), list(present.values()), upstream)
    return dict(zip(present, found, strict=True))


def judge(op: Callable[..., Results], inputs: Inputs, *options: Any) -> Results:
    """The reference in float64 on the same numbers."""
    return outcome(op, inputs, dispatch.REFERENCE, *options, dtype=torch.float64)


def deviations(found: Mapping[str, Tensor], due: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest error of each, relative to its largest value."""
    assert found.keys() == due.keys()
    errors = {}
    for name, expected in due.items():
        assert found[name].shape == expected.shape, name
        if expected.numel():
            scale = expected.double().abs().max().clamp(min=1e-30)
            errors[name] = ((found[name].double() - expected.double()).abs().max() / scale).item()
    return errors


def check(found: Mapping[str, Tensor], due: Mapping[str, Tensor], tolerance: float) -> None:
    wrong = {name: error for name, error in deviations(found, due).items() if not error <= tolerance}  # nor NaN
    assert not wrong, f"off by more than {tolerance:.0e} of the largest value: {wrong}"


def check_rounded_once(found: Mapping[str, Tensor], due: Mapping[str, Tensor]) -> None:
    """What is bf16 differs from `due` by half a unit in its last place, and fp32's own error."""
    for name, x in found.items():
        if x.dtype == torch.bfloat16 and x.numel():
            atol = 1e-5 * due[name].abs().max().item()
            torch.testing.assert_close(
                x.double(), due[name], rtol=1.001 * ROUNDING[x.dtype], atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )


def narrow(inputs: Inputs, *names: str, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    return {k: x.to(dtype) if k in names and x is not None else x for k, x in inputs.items()}


def documents(batch: int, *lengths: int) -> Tensor:
    """The same documents in every row."""
    row = torch.cat([torch.full((n,), 3 + 2 * i, dtype=torch.int32) for i, n in enumerate(lengths)])
    return row.repeat(batch, 1)


@contextmanager
def poisoned_buffers() -> Iterator[None]:
    """Every buffer that PyTorch hands out uninitialised is full of NaN."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def python(code: str, timeout_s: float = 120, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own; variables that are None are removed from its environment."""
    return finish(start(code, **environment), timeout_s)


def start(code: str, **environment: str | None) -> subprocess.Popen[str]:
    merged = {k: v for k, v in (os.environ | environment).items() if v is not None}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=merged,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    out, errors = process.communicate(timeout=timeout_s)
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def said(done: subprocess.CompletedProcess[str]) -> Any:
    """The JSON of the last line that a process printed."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
