"""The C functions of `ops/csrc` as ops of torch.library: what they allocate, and how ctypes calls them.

Argument structures repeat those of the headers, field for field, in the same order.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import byref, c_float, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from mamba_pretrain.ops.backends import native_build

CHUNK, GROUP = 32, 128  # of scan.h
SMALL = 1 << 15  # below so many elements a second thread costs more than it brings


class View(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("batch", c_int64), ("time", c_int64)]


def _structure(name: str, sizes: str, views: str, pointers: str) -> type[ctypes.Structure]:
    kinds = [(sizes, c_int64), (views, View), (pointers, c_void_p)]
    return type(name, (ctypes.Structure,), {"_fields_": [(field, kind) for s, kind in kinds for field in s.split()]})


ScanArgs = _structure(
    "ScanArgs",
    "batch length inner state threads",
    "u delta B C z y dy du ddelta dB dC dz",
    "A D bias starts first last kept dlast dA dD dbias dfirst dBC",
)
ConvArgs = _structure(
    "ConvArgs",
    "batch length inner taps threads",
    "x y dy dx",
    "weight bias starts first dlast dweight dbias dfirst",
)
LossArgs = type(
    "LossArgs",
    (ctypes.Structure,),
    {
        "_fields_": [(field, c_int64) for field in ["rows", "columns", "vocabulary", "threads"]]
        + [(field, c_void_p) for field in ["logits", "labels", "loss"]]
        + [("gradient", c_int64)]
    },
)
NormArgs = type(
    "NormArgs",
    (ctypes.Structure,),
    {
        "_fields_": [(field, c_int64) for field in ["rows", "width", "threads", "parts"]]
        + [(field, c_void_p) for field in ["x", "residual", "weight", "stream", "y", "scale"]]
        + [("eps", c_float)]
        + [(field, c_void_p) for field in ["dy", "dstream", "dx", "dresidual", "dweight"]]
    },
)


def _call(function: str, arguments: ctypes.Structure, *flags: bool) -> None:
    library = native_build.load()
    getattr(library, f"mamba_{function}")(byref(arguments), *map(int, flags))


def _fill(arguments: Any, tensors: dict[str, Tensor | None]) -> None:
    """Pointers, or views with strides where the structure has a view; None stays null."""
    kinds = dict(arguments._fields_)
    for name, tensor in tensors.items():
        if tensor is not None:
            view = kinds[name] is View
            setattr(
                arguments,
                name,
                View(tensor.data_ptr(), tensor.stride(0), tensor.stride(1)) if view else tensor.data_ptr(),
            )


def _rows(tensor: Tensor) -> Tensor:
    """A tensor whose last dimension is contiguous."""
    return tensor if tensor.shape[-1] < 2 or tensor.stride(-1) == 1 else tensor.contiguous()


def _threads(elements: int) -> int:
    return torch.get_num_threads() if elements > SMALL else 1


def _fold(parts: Tensor) -> Tensor:
    """The sum over the first dimension, always in the same order."""
    total = parts[0].clone() if len(parts) else parts.new_zeros(parts.shape[1:])
    for part in parts[1:]:
        total += part
    return total


def _half(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bfloat16


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


_library = torch.library.Library("mamba_pretrain", "DEF")  # type: ignore[no-untyped-call]


def _op(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as a CPU kernel, and `fake`, which only allocates its results."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _library.define(schema)  # type: ignore[no-untyped-call]
        name = schema.split("(")[0]
        _library.impl(name, function, "CPU")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"mamba_pretrain::{name}", fake, lib=_library)
        return function

    return register


def _scan_results(u: Tensor, A: Tensor, keep: bool, want_last: bool) -> tuple[Tensor, Tensor, Tensor]:
    (batch, length, inner), state = u.shape, A.shape[1]
    last = u.new_empty((batch, inner, state) if want_last else 0, dtype=torch.float32)
    lanes = 16  # the widest; narrower libraries use less of the last vectors
    size = (batch, _ceil_div(length, CHUNK), _ceil_div(inner, lanes) * lanes, state) if keep else (0,)
    return u.new_empty(batch, length, inner), last, u.new_empty(size, dtype=torch.float32)


@_op(
    "scan_forward(Tensor u, Tensor delta, Tensor B, Tensor C, Tensor z, Tensor A, Tensor D, Tensor bias, "
    "Tensor? first, Tensor? starts, bool keep, bool want_last) -> (Tensor, Tensor, Tensor)",
    lambda u, delta, B, C, z, A, D, bias, first, starts, keep, want_last: _scan_results(u, A, keep, want_last),
)
def _scan_forward(
    u: Tensor,
    delta: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor,
    A: Tensor,
    D: Tensor,
    bias: Tensor,
    first: Tensor | None,
    starts: Tensor | None,
    keep: bool,
    want_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y, last, kept = _scan_results(u, A, keep, want_last)
    u, delta, B, C, z = map(_rows, (u, delta, B, C, z))
    A, D, bias = (t.contiguous() for t in (A, D, bias))
    first = None if first is None else first.contiguous()
    arguments = ScanArgs(*u.shape, A.shape[1], _threads(u.numel() * A.shape[1]))
    _fill(arguments, {"u": u, "delta": delta, "B": B, "C": C, "z": z, "y": y, "A": A, "D": D, "bias": bias})
    _fill(
        arguments,
        {"first": first, "starts": starts, "last": last if want_last else None, "kept": kept if keep else None},
    )
    _call("scan_forward", arguments, _half(u))
    return y, last, kept


def _scan_gradients(u: Tensor, A: Tensor, want_first: bool) -> tuple[Tensor, ...]:
    (batch, length, inner), state = u.shape, A.shape[1]
    wide, narrow = u.new_empty(batch, length, inner), u.new_empty(batch, length, state)
    dA, dD = u.new_empty(inner, state, dtype=torch.float32), u.new_empty(inner, dtype=torch.float32)
    dfirst = u.new_empty((batch, inner, state) if want_first else 0, dtype=torch.float32)
    like = torch.empty_like
    return wide, like(wide), narrow, like(narrow), like(wide), dA, dD, like(dD), dfirst


@_op(
    "scan_backward(Tensor dy, Tensor? dlast, Tensor u, Tensor delta, Tensor B, Tensor C, Tensor z, Tensor A, Tensor D, "
    "Tensor bias, Tensor? starts, Tensor kept, bool want_first) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda dy, dlast, u, delta, B, C, z, A, D, bias, starts, kept, want_first: _scan_gradients(u, A, want_first),
)
def _scan_backward(
    dy: Tensor,
    dlast: Tensor | None,
    u: Tensor,
    delta: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor,
    A: Tensor,
    D: Tensor,
    bias: Tensor,
    starts: Tensor | None,
    kept: Tensor,
    want_first: bool,
) -> tuple[Tensor, ...]:
    (batch, length, inner), state = u.shape, A.shape[1]
    du, ddelta, dB, dC, dz, _, _, _, dfirst = _scan_gradients(u, A, want_first)
    part = u.new_empty
    dA, dD = part(batch, inner, state, dtype=torch.float32), part(batch, inner, dtype=torch.float32)
    dbias = torch.empty_like(dD)
    dBC = part(batch, _ceil_div(inner, GROUP), length, 2 * state, dtype=torch.float32)
    dy, u, delta, B, C, z = map(_rows, (dy, u, delta, B, C, z))
    A, D, bias = (t.contiguous() for t in (A, D, bias))
    dlast = None if dlast is None else dlast.contiguous()
    arguments = ScanArgs(batch, length, inner, state, _threads(u.numel() * state))
    _fill(arguments, {"u": u, "delta": delta, "B": B, "C": C, "z": z, "dy": dy, "A": A, "D": D, "bias": bias})
    _fill(arguments, {"du": du, "ddelta": ddelta, "dB": dB, "dC": dC, "dz": dz, "dA": dA, "dD": dD, "dbias": dbias})
    _fill(
        arguments,
        {"starts": starts, "kept": kept, "dlast": dlast, "dfirst": dfirst if want_first else None, "dBC": dBC},
    )
    _call("scan_backward", arguments, _half(u))
    return du, ddelta, dB, dC, dz, _fold(dA), _fold(dD), _fold(dbias), dfirst


@_op(
    "conv_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? first, Tensor? starts) -> Tensor",
    lambda x, weight, bias, first, starts: x.new_empty(x.shape),
)
def _conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, first: Tensor | None, starts: Tensor | None
) -> Tensor:
    y = x.new_empty(x.shape)
    arguments, x, keep = _conv_arguments(x, weight, bias, first, starts)
    _fill(arguments, {"y": y})
    _call("conv_forward", arguments, _half(x))
    del keep
    return y


def _conv_arguments(x: Tensor, weight: Tensor, bias: Tensor | None, first: Tensor | None, starts: Tensor | None) -> Any:
    """The arguments, x, and whatever must live until the call is over."""
    x = _rows(x)
    weight = weight.t().contiguous()
    bias, first = (None if t is None else t.contiguous() for t in (bias, first))
    arguments = ConvArgs(*x.shape, weight.shape[0], _threads(8 * x.numel()))
    tensors = {"x": x, "weight": weight, "bias": bias, "first": first, "starts": starts}
    _fill(arguments, tensors)
    return arguments, x, tensors


@_op(
    "conv_backward(Tensor dy, Tensor? dlast, Tensor x, Tensor weight, Tensor? bias, Tensor? first, Tensor? starts) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    lambda dy, dlast, x, weight, bias, first, starts: (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape[0]),
        weight.new_empty(0 if first is None else first.shape),
    ),
)
def _conv_backward(
    dy: Tensor,
    dlast: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    first: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, _, inner = x.shape
    dx = x.new_empty(x.shape)
    dweight, dbias = weight.new_empty(batch, weight.shape[1], inner), weight.new_empty(batch, inner)
    dfirst = weight.new_empty(0 if first is None else first.shape)
    dy, dlast = _rows(dy), None if dlast is None else dlast.contiguous()
    arguments, x, keep = _conv_arguments(x, weight, bias, first, starts)
    _fill(arguments, {"dy": dy, "dx": dx, "dlast": dlast, "dweight": dweight, "dbias": dbias})
    _fill(arguments, {"dfirst": None if first is None else dfirst})
    _call("conv_backward", arguments, _half(x))
    del keep
    return dx, _fold(dweight).t().contiguous(), _fold(dbias), dfirst


def _norm_results(x: Tensor, narrow: bool) -> tuple[Tensor, Tensor, Tensor]:
    stream = x.new_empty(x.shape, dtype=torch.float32)
    return torch.empty_like(stream, dtype=torch.bfloat16 if narrow else None), stream, stream.new_empty(x.shape[:-1])


@_op(
    "norm_forward(Tensor x, Tensor? residual, Tensor weight, float eps, bool narrow) -> (Tensor, Tensor, Tensor)",
    lambda x, residual, weight, eps, narrow: _norm_results(x, narrow),
)
def _norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, narrow: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y, stream, scale = _norm_results(x, narrow)
    x, weight, residual = x.contiguous(), weight.contiguous(), None if residual is None else residual.contiguous()
    arguments = NormArgs(rows=scale.numel(), width=x.shape[-1], threads=_threads(x.numel()), eps=eps)
    _fill(arguments, {"x": x, "residual": residual, "weight": weight, "stream": stream, "y": y, "scale": scale})
    _call("norm_forward", arguments, _half(x), narrow)
    return y, stream, scale


@_op(
    "norm_backward(Tensor dy, Tensor? dstream, Tensor weight, Tensor stream, Tensor scale, ScalarType dtype, "
    "bool want_residual) -> (Tensor, Tensor, Tensor)",
    lambda dy, dstream, weight, stream, scale, dtype, want_residual: (
        torch.empty_like(stream, dtype=dtype),
        stream.new_empty(stream.shape if want_residual else 0),
        weight.new_empty(weight.shape),
    ),
)
def _norm_backward(
    dy: Tensor,
    dstream: Tensor | None,
    weight: Tensor,
    stream: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    want_residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = scale.numel(), stream.shape[-1]
    parts = max(1, min(64, rows))  # not the number of threads: the sum must not depend on it
    dx = torch.empty_like(stream, dtype=dtype)
    dresidual, dweight = stream.new_empty(stream.shape if want_residual else 0), weight.new_empty(parts, width)
    dy, dstream, weight = dy.contiguous(), None if dstream is None else dstream.contiguous(), weight.contiguous()
    arguments = NormArgs(rows=rows, width=width, threads=_threads(stream.numel()), parts=parts)
    _fill(arguments, {"weight": weight, "stream": stream, "scale": scale, "dy": dy, "dstream": dstream})
    _fill(arguments, {"dx": dx, "dresidual": dresidual if want_residual else None, "dweight": dweight})
    _call("norm_backward", arguments, _half(dx), _half(dy))
    return dx, dresidual, dweight[0].clone()


@_op(
    "cross_entropy_(Tensor(a!) logits, Tensor labels, int vocab_size, bool gradient) -> Tensor",
    lambda logits, labels, vocab_size, gradient: logits.new_empty(len(logits), dtype=torch.float32),
)
def _cross_entropy(logits: Tensor, labels: Tensor, vocab_size: int, gradient: bool) -> Tensor:
    wrong = labels[((labels < 0) | (labels >= vocab_size)) & (labels != -100)]
    if len(wrong):  # the kernel would read and write beside the row
        raise IndexError(f"linear_cross_entropy: label {wrong[0].item()}, expected 0 to {vocab_size - 1} or -100")
    loss = logits.new_empty(len(logits), dtype=torch.float32)
    labels = labels.contiguous()
    arguments = LossArgs(*logits.shape, vocab_size, _threads(logits.numel()), gradient=gradient)
    _fill(arguments, {"logits": logits, "labels": labels, "loss": loss})
    _call("cross_entropy", arguments, _half(logits))
    return loss
