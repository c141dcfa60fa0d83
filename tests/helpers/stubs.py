"""mamba_ssm and causal_conv1d on a CPU: their own Python over stand-ins for the two modules that they compile.

The stand-ins have the compiled functions' argument lists, check what those check (read in csrc/selective_scan.cpp and
csrc/causal_conv1d.cpp of the releases in constraints.txt) and compute by the equations, in fp32 and with the rounding
of the kernels: outputs to the dtype of the inputs, and the scan's backward by the kernel's formulas, fused
multiply-add included, because one of them takes a rounding error for a state.
"""

from __future__ import annotations

import contextlib
import os
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 2048  # steps between two states that the scan keeps for its backward
PACKAGES = ("mamba_ssm", "causal_conv1d", "selective_scan_cuda", "causal_conv1d_cuda")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
calls: list[str] = []  # the compiled functions, as they were called


def check(condition: bool, rule: str) -> None:
    if not condition:
        raise RuntimeError(f"the compiled module refuses this: {rule}")


def steps_inside(name: str, x: Tensor) -> None:
    """The last dimension is dense; where the length fits its blocks, the scan reads 16 bytes at a time, unchecked."""
    check(x.stride(-1) == 1 or x.size(-1) == 1, f"{name}.stride(-1) == 1")
    length = x.size(-1)
    block = next((n for n in (128, 256, 512, 1024) if length <= n), 2048)
    if length % block == 0:
        strides = [stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
        aligned = x.data_ptr() % 16 == 0 and all(s * x.element_size() % 16 == 0 for s in strides)
        check(aligned, f"rows of {name} start at multiples of 16 bytes")


def check_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Any, z: Any, bias: Any) -> None:
    (batch, dim, length), n = u.shape, A.shape[1]
    check(u.dtype in FLOATS, "u is fp32, fp16 or bf16")
    check(A.dtype == torch.float32 and A.shape == (dim, n) and n <= 256, "A is (dim, dstate <= 256) fp32")
    for name, x in {"delta": delta, "z": z}.items():
        if x is not None:
            check(x.dtype == u.dtype and x.shape == u.shape, f"{name} has the dtype and shape of u")
    for name, x in {"B": B, "C": C}.items():
        check(x.dtype == u.dtype and x.shape == (batch, 1, n, length), f"{name} is (batch, 1, dstate, L), dtype of u")
    for name, x in {"D": D, "delta_bias": bias}.items():
        if x is not None:
            check(x.dtype == torch.float32 and x.shape == (dim,) and x.stride(-1) == 1, f"{name} is (dim) fp32")
    for name, x in {"u": u, "delta": delta, "z": z, "B": B, "C": C}.items():
        if x is not None:
            steps_inside(name, x)


def step_size(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    raw = delta.float() if bias is None else delta.float() + bias[:, None]
    return torch.where(raw <= 20, torch.log1p(torch.exp(raw.clamp(max=20))), raw) if softplus else raw


def states(step: Tensor, u: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """decay and h, both (L, batch, dim, dstate)."""
    decay = torch.exp(step.permute(2, 0, 1)[..., None] * A)
    drive = (step * u.float()).permute(2, 0, 1)[..., None] * B[:, 0].float().permute(2, 0, 1)[:, :, None]
    h = torch.zeros_like(drive[:1]).squeeze(0) if len(drive) else drive
    out = []
    for t in range(len(drive)):
        h = torch.addcmul(drive[t], decay[t], h)
        out.append(h)
    return decay, torch.stack(out)


def scan_fwd(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Any, z: Any, bias: Any, softplus: bool
) -> list[Tensor]:
    calls.append("scan_fwd")
    check_scan(u, delta, A, B, C, D, z, bias)
    length, n = u.shape[2], A.shape[1]
    check(length > 0, "there is a step")
    decay, h = states(step_size(delta, bias, softplus), u, A, B)
    y = (h * C[:, 0].float().permute(2, 0, 1)[:, :, None]).sum(-1).permute(1, 2, 0)
    if D is not None:
        y = y + D[:, None] * u.float()
    out = torch.empty_like(delta).copy_(y)
    x = torch.empty(*u.shape[:2], -(-length // CHUNK), 2 * n)
    for chunk in range(x.shape[2]):
        last = min(length, (chunk + 1) * CHUNK) - 1
        x[:, :, chunk, 0::2] = decay[: last + 1].prod(0)
        x[:, :, chunk, 1::2] = h[last]
    return [out, x] if z is None else [out, x, torch.empty_like(z).copy_(y * F.silu(z.float()))]


def scan_bwd(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Any, z: Any, bias: Any,
    dout: Tensor, x: Tensor, out: Any, dz: Any, softplus: bool, recompute_out_z: bool,
) -> list[Any]:  # fmt: skip
    calls.append("scan_bwd")
    check_scan(u, delta, A, B, C, D, z, bias)
    check(dout.dtype == u.dtype and dout.shape == u.shape, "dout has the dtype and shape of u")
    steps_inside("dout", dout)
    check(x.is_contiguous() and x.shape == (*u.shape[:2], -(-u.shape[2] // CHUNK), 2 * A.shape[1]), "x is of fwd")
    step = step_size(delta, bias, softplus)
    decay, h = states(step, u, A, B)
    g, gate = dout.float(), None
    if z is not None:
        check(out is not None and out.dtype == u.dtype and out.shape == u.shape, "out is that of fwd")
        steps_inside("out", out)
        sigmoid = torch.sigmoid(z.float())
        gate = z.float() * sigmoid
        dz = torch.empty_like(z) if dz is None else dz
        check(dz.dtype == u.dtype and dz.shape == u.shape, "dz has the dtype and shape of z")
        dz.copy_(g * out.float() * sigmoid * (1 + z.float() * (1 - sigmoid)))
        g = g * gate
    time_first = [v.permute(2, 0, 1) for v in (step, u.float(), g)]
    step_T, u_T, g_T = (v[..., None] for v in time_first)  # (L, batch, dim, 1)
    B_T, C_T = (v[:, 0].float().permute(2, 0, 1)[:, :, None] for v in (B, C))
    dh = g_T * C_T
    for t in range(len(dh) - 2, -1, -1):
        dh[t] += decay[t + 1] * dh[t + 1]
    drive = step_T * u_T
    before = (h.double() - drive.double() * B_T.double()).float()  # of the previous state, what is left: fused
    du = (dh * B_T).sum(-1).permute(1, 2, 0) * step
    if D is not None:
        du = du + D[:, None] * g
    dstep = (dh * B_T * u_T + dh * A * before).sum(-1).permute(1, 2, 0)
    if softplus:
        raw = delta.float() if bias is None else delta.float() + bias[:, None]
        dstep = torch.where(raw <= 20, dstep / (1 + torch.exp(-raw)), dstep)
    results: list[Any] = [
        torch.empty_like(u).copy_(du),
        torch.empty_like(delta).copy_(dstep),
        (dh * step_T * before).sum((0, 1)),
        (dh * drive).sum(2).permute(1, 2, 0)[:, None].to(B.dtype),
        (g_T * h).sum(2).permute(1, 2, 0)[:, None].to(C.dtype),
        None if D is None else (g * u.float()).sum((0, 2)),
        None if bias is None else dstep.sum((0, 2)),
    ]
    if gate is not None:
        results.append(dz)
        if recompute_out_z:
            results.append(torch.empty_like(out).copy_(out.float() * gate))
    return results


def check_conv(x: Tensor, weight: Tensor, bias: Any, seq_idx: Any, initial: Any) -> None:
    (batch, dim, length), width = x.shape, weight.shape[-1]
    check(x.dtype in FLOATS and weight.dtype in FLOATS, "dtypes are fp32, fp16 or bf16")
    check(x.stride(2) == 1 or x.stride(1) == 1, "x is dense along channels or steps")
    check(weight.shape == (dim, width) and 2 <= width <= 4, "width is 2 to 4")
    channel_last = x.stride(1) == 1 and x.stride(2) > 1
    if channel_last:
        check(dim % 8 == 0 and x.stride(0) % 8 == 0 and x.stride(2) % 8 == 0, "channels and strides: multiples of 8")
    vector = channel_last or length % (16 // x.element_size()) == 0
    check(not vector or x.data_ptr() % 16 == 0, "x starts at a multiple of 16 bytes")
    if bias is not None:
        check(bias.dtype == weight.dtype and bias.shape == (dim,) and bias.stride(-1) == 1, "bias: dtype of weight")
    if seq_idx is not None:
        check(channel_last, "seq_idx only with channels last")
        check(seq_idx.dtype == torch.int32 and seq_idx.is_contiguous(), "seq_idx is contiguous int32")
        check(seq_idx.shape == (batch, length), "seq_idx is (batch, L)")
    if initial is not None:
        check(channel_last, "states only with channels last")
        check(initial.dtype == x.dtype and initial.shape == (batch, dim, width - 1), "states: dtype of x")
        check(initial.stride(1) == 1, "states are dense along channels")


def windows(x: Tensor, width: int, seq_idx: Any, initial: Any) -> tuple[Tensor, Tensor]:
    """Each step's inputs (batch, dim, L, width), and which of them count, (batch, 1, L, width)."""
    batch, dim, _ = x.shape
    past = torch.zeros(batch, dim, width - 1) if initial is None else initial.float()
    seen = torch.cat([past, x.float()], dim=2).unfold(2, width, 1)
    if seq_idx is None:
        return seen, torch.ones(1, 1, 1, 1)
    first = seq_idx[:, :1] if initial is not None else torch.full_like(seq_idx[:, :1], -1)
    numbers = torch.cat([first.expand(-1, width - 1), seq_idx], dim=1).unfold(1, width, 1)
    counts = (numbers == seq_idx[..., None]) & (seq_idx >= 0)[..., None]
    return seen, counts[:, None].float()


def conv_fwd(
    x: Tensor, weight: Tensor, bias: Any, seq_idx: Any, initial: Any, out: Tensor, final: Any, silu: bool
) -> None:
    calls.append("conv_fwd")
    check_conv(x, weight, bias, seq_idx, initial)
    check(final is None, "no final states: the adapter picks them out itself")
    seen, counts = windows(x, weight.shape[1], seq_idx, initial)
    y = (seen * counts * weight.float()[:, None]).sum(-1) + (0 if bias is None else bias.float()[:, None])
    y = F.silu(y) if silu else y
    out.copy_(y if seq_idx is None else y * (seq_idx >= 0)[:, None])


def conv_bwd(
    x: Tensor, weight: Tensor, bias: Any, dout: Tensor, seq_idx: Any, initial: Any, dfinal: Any,
    dx: Tensor, dweight: Tensor, dbias: Any, dinitial: Any, silu: bool,
) -> None:  # fmt: skip
    calls.append("conv_bwd")
    check_conv(x, weight, bias, seq_idx, initial)
    check((bias is None) == (dbias is None) and dfinal is None, "dbias goes with bias")
    check(dx.dtype == x.dtype and dx.shape == x.shape, "dx has the dtype and shape of x")
    width = weight.shape[1]
    seen, counts = windows(x, width, seq_idx, initial)
    pre = (seen * counts * weight.float()[:, None]).sum(-1) + (0 if bias is None else bias.float()[:, None])
    sigmoid = torch.sigmoid(pre)
    dpre = dout.float() * (sigmoid * (1 + pre * (1 - sigmoid)) if silu else 1)
    history = torch.zeros(*x.shape[:2], x.shape[2] + width - 1)
    for k in range(width):
        taken = counts[..., min(k, counts.shape[-1] - 1)]
        history[:, :, k : k + x.shape[2]] += dpre * taken * weight[:, k, None].float()
    dx.copy_(history[:, :, width - 1 :])
    if dinitial is not None:
        dinitial.copy_(history[:, :, : width - 1])
    dweight.add_((dpre[..., None] * seen * counts).sum((0, 2)))
    if dbias is not None:
        dbias.add_(dpre.sum((0, 2)))


def conv_update(
    x: Tensor, state: Tensor, weight: Tensor, bias: Any, out: Tensor, silu: bool, cache_seqlens: Any, indices: Any
) -> None:
    calls.append("conv_update")
    width = weight.shape[1]
    check(x.dtype in FLOATS and state.dtype == x.dtype, "the state has the dtype of x")
    check(state.shape[:2] == x.shape[:2] and state.shape[2] >= width - 1, "the state is (batch, dim, >= width - 1)")
    check(2 <= width <= 4 and (bias is None or bias.dtype == weight.dtype), "width is 2 to 4, bias: dtype of weight")
    check(cache_seqlens is None and indices is None, "no circular buffer")
    history = torch.cat([state.float(), x.float()], dim=2)
    y = (history[:, :, -x.shape[2] - width + 1 :].unfold(2, width, 1) * weight.float()[:, None]).sum(-1)
    y = y if bias is None else y + bias.float()[:, None]
    out.copy_(F.silu(y) if silu else y)
    state.copy_(history[:, :, -state.shape[2] :])


def extensions() -> dict[str, types.ModuleType]:
    scan, conv = types.ModuleType("selective_scan_cuda"), types.ModuleType("causal_conv1d_cuda")
    scan.__dict__.update(fwd=scan_fwd, bwd=scan_bwd)
    conv.__dict__.update(causal_conv1d_fwd=conv_fwd, causal_conv1d_bwd=conv_bwd, causal_conv1d_update=conv_update)
    return {"selective_scan_cuda": scan, "causal_conv1d_cuda": conv}


@contextlib.contextmanager
def interpreted_library() -> Iterator[None]:
    """Triton's own functions for its interpreter, though triton may have been loaded without it before."""
    import triton
    import triton.language as tl

    with contextlib.ExitStack() as stack:
        for module in (tl, tl.standard):
            for name, function in list(vars(module).items()):
                if isinstance(function, triton.runtime.JITFunction):
                    stack.enter_context(mock.patch.object(module, name, triton.jit(function.fn)))
        yield


_loaded: dict[str, types.ModuleType] = {}


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Within this, both packages can be imported and run; after it the modules are as they were, pinned or absent."""
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in PACKAGES}
    sys.modules.update(_loaded or extensions())
    try:
        # Triton's interpreter runs the one kernel of theirs that we call on a CPU; it is chosen when they are loaded.
        with (
            mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1", "MAMBA_DETERMINISTIC": "1"}),
            mock.patch("torch.cuda.device", lambda index: contextlib.nullcontext()),
            interpreted_library(),
        ):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of their triton kernels, that the settings above go together
                import mamba_ssm.ops.selective_scan_interface
                import mamba_ssm.ops.triton.selective_state_update  # noqa: F401
            yield
    finally:
        now = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in PACKAGES}
        _loaded.update(now)
        sys.modules.update(before)


@contextlib.contextmanager
def autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast for CPU tensors that mamba_ssm, which asks for the state of CUDA's, also sees."""
    if dtype is None:
        yield
        return
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        with torch.autocast("cpu", dtype):
            yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
