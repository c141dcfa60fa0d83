"""Do the kernels that would run here compute what the reference computes? Asked at start-up, in about a second.

Tests run where the code is written; a GPU, a compiler or a driver that no test has seen is met at start-up. The sizes
are small and awkward, and a wrong kernel is wrong by far more than rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mamba_pretrain.ops import dispatch
from mamba_pretrain.ops.add_norm import add_rms_norm_reference
from mamba_pretrain.ops.call import BlockWeights, Call, KernelError, ModelWeights
from mamba_pretrain.ops.causal_conv1d import causal_conv1d_reference
from mamba_pretrain.ops.cross_entropy import cross_entropy_reference_
from mamba_pretrain.ops.decode import DecodeStep
from mamba_pretrain.ops.mamba_inner import mamba_inner
from mamba_pretrain.ops.selective_scan import selective_scan_reference

# Of the largest value that is due. fp32 with the GPU's fast exponentials stays below 3e-5.
TOLERANCE = 2e-4
ADVICE = (
    "Choose others with train.kernels or MAMBA_PRETRAIN_KERNELS; report this with what `mamba-pretrain doctor` says"
)

B, L, D, E, N, R, K, V = 2, 67, 12, 24, 5, 3, 4, 43
DOCUMENTS = ([1, 3, 1, 1, 20, 41], [33, 32, 2])  # steps of each, for each row


class Checked(NamedTuple):
    op: str
    backend: str  # what dispatch chose
    error: float  # the largest deviation of an output or a gradient, relative to the largest value of that


class _Case(NamedTuple):
    call: Call
    reference: Callable[..., Any]
    arguments: tuple[Any, ...]
    adapt: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda op: op  # to a function of the arguments


def self_check(device: torch.device | str) -> list[Checked]:
    """Every op with the backend that is chosen for it in fp32, with and without documents, gradients included, and a
    step of decoding.

    Raises KernelError, naming op and backend, if one deviates or fails.
    """
    device = torch.device(device)
    worst: dict[tuple[str, str], float] = {}
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            for case in _cases(device):
                backend = dispatch.choose(case.call)
                key = case.call.op, dispatch.REFERENCE if backend is None else backend.NAME
                with torch.set_grad_enabled(case.call.grad):
                    error = 0.0 if backend is None else _deviation(case, backend)
                worst[key] = max(error, worst.get(key, 0.0))
    finally:
        torch.set_float32_matmul_precision(precision)
    return [Checked(op, backend, error) for (op, backend), error in worst.items()]


def _deviation(case: _Case, backend: ModuleType) -> float:
    op = case.call.op
    documents = " with documents" if case.call.packed else ""
    try:
        found = _results(case.adapt(getattr(backend, op)), case.arguments)
    except Exception as failure:
        message = f"{op}: the {backend.NAME} kernels fail on this {case.call.device}{documents}: {failure}"
        raise KernelError(f"{message}. {ADVICE}") from failure
    due = _results(case.reference, case.arguments)
    if found.keys() != due.keys():
        raise KernelError(f"{op}: the {backend.NAME} kernels return {sorted(found)}, expected {sorted(due)}")
    worst = 0.0
    for name, expected in due.items():
        scale = expected.abs().max().clamp(min=1e-6)
        error = ((found[name] - expected).abs().max() / scale).item()
        if not error <= TOLERANCE:  # nor NaN
            raise KernelError(
                f"{op}: the {backend.NAME} kernels are wrong on this {case.call.device}{documents}: {name} is off by "
                f"{error:.1e} of its largest value, expected at most {TOLERANCE:.0e}. {ADVICE}"
            )
        worst = max(worst, error)
    return worst


def _results(function: Callable[..., Any], arguments: tuple[Any, ...]) -> dict[str, Tensor]:
    """The outputs by number, what was written into arguments, and the gradients of a sum of squares."""
    given = [x.clone() if isinstance(x, Tensor) else x for x in arguments]  # without gradients if they are off
    leaves = {i: x for i, x in enumerate(given) if isinstance(x, Tensor) and x.requires_grad}
    outputs = function(*given)
    outputs = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x is not None]
    results = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    for i, x in enumerate(given):
        if isinstance(x, Tensor) and not x.requires_grad and x.is_floating_point():
            results[f"argument {i}, written in place,"] = x
    if leaves:
        total = torch.stack([x.square().mean() for x in outputs]).sum()
        for i, gradient in zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True):
            results[f"gradient of argument {i}"] = gradient
    return results


def _cases(device: torch.device) -> Iterator[_Case]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0, grad: bool = True) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(device).requires_grad_(grad)

    def call(op: str, size: int, packed: bool = False, taps: int = 0) -> Call:
        deterministic = torch.are_deterministic_algorithms_enabled()
        return Call(
            op, device.type, torch.float32, size, packed, grad=True, deterministic=deterministic, channels=E, taps=taps
        )

    A_EN = (-torch.arange(1.0, N + 1).repeat(E, 1)).to(device).requires_grad_()
    D_E, dt_bias_E = normal(E), (torch.randn(E, generator=generator) - 2).to(device).requires_grad_()
    conv_EK, conv_bias_E = normal(E, K, scale=0.5), normal(E, scale=0.3)
    rows = [[j for j, steps in enumerate(row) for _ in range(steps)] for row in DOCUMENTS]
    numbers_BL = torch.tensor(rows, dtype=torch.int32, device=device)
    for seq_idx_BL in (None, numbers_BL):
        packed = seq_idx_BL is not None
        last = (seq_idx_BL, None, False)
        x_BLE, delta_BLE, z_BLE = normal(B, L, E), normal(B, L, E), normal(B, L, E)
        B_BLN, C_BLN = normal(B, L, N), normal(B, L, N)
        yield _Case(call("causal_conv1d", K, packed), causal_conv1d_reference, (x_BLE, conv_EK, conv_bias_E, *last))
        yield _Case(
            call("selective_scan", N, packed),
            selective_scan_reference,
            (x_BLE, delta_BLE, A_EN, B_BLN, C_BLN, D_E, z_BLE, dt_bias_E, *last),
        )
        projections = (normal(2 * E, D, scale=0.3), None, conv_EK, conv_bias_E, normal(R + 2 * N, E, scale=0.4))
        scan = (normal(E, R, scale=0.6), dt_bias_E, A_EN, D_E)
        mixer = (normal(B, L, D), *projections, *scan, normal(D, E, scale=0.2), None, seq_idx_BL, None, None, False)
        yield _Case(call("mamba_inner", N, packed, taps=K), _composed, mixer)
        if not packed:
            states = (normal(B, K - 1, E, grad=False), normal(B, E, N, grad=False))
            step = call("mamba_inner", N, taps=K)._replace(initial_state=True, last_state=True, grad=False, length=1)
            yield _Case(step, _composed, (normal(B, 1, D, grad=False), *mixer[1:-4], None, *states, True))
            block = BlockWeights(normal(D), *mixer[1:-4])
            yield _decoding(ModelWeights(normal(V, D), [block], normal(D), normal(V, D), 1e-5), states)
    for residual_BLD in (None, normal(B, L, D)):
        norm = (normal(B, L, D), residual_BLD, normal(D), 1e-5, torch.float32)
        yield _Case(call("add_rms_norm", D), add_rms_norm_reference, norm)
    labels_T = torch.randint(V - 3, (L,), generator=generator)
    labels_T[::5] = -100
    logits_TV = normal(L, V, grad=False)
    logits_call = Call("cross_entropy_", device.type, torch.float32)
    yield _Case(logits_call, cross_entropy_reference_, (logits_TV, labels_T.to(device), V - 3, True))


def _decoding(weights: ModelWeights, states: tuple[Tensor, Tensor]) -> _Case:
    """One token of a model of one block."""
    (block,) = weights.blocks

    def reference(token_B: Tensor, conv_BSE: Tensor, ssm_BEN: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        norm = (weights.eps, torch.float32)
        x_BLD, stream_BLD = add_rms_norm_reference(weights.embedding[token_B][:, None], None, block.norm, *norm)
        x_BLD, conv, ssm = _composed(x_BLD, *block[1:], None, conv_BSE, ssm_BEN, True)
        x_BLD, _ = add_rms_norm_reference(x_BLD, stream_BLD, weights.norm, *norm)
        return x_BLD[:, 0] @ weights.head.t(), conv, ssm

    def adapt(op: Callable[[ModelWeights], DecodeStep]) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        def step(token_B: Tensor, conv_BSE: Tensor, ssm_BEN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits_BV, (conv,), (ssm,) = op(weights)(token_B, [conv_BSE], [ssm_BEN])
            return logits_BV, conv, ssm

        return step

    token_B = torch.arange(1, B + 1, device=weights.head.device)
    call = Call("decode_step", token_B.device.type, torch.float32)
    return _Case(call, reference, (token_B, *states), adapt)


def _composed(*arguments: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    with dispatch.using(dispatch.REFERENCE):
        return mamba_inner(*arguments)
