"""Which backend runs an op, and why the faster ones do not.

For each device the backends stand in one order, fastest first; the first that has no reason against a call runs it, and
behind them stands the reference, which runs everything. Each decision is logged once with its reasons. A backend that
was chosen by name (`train.kernels`, MAMBA_PRETRAIN_KERNELS) runs or the call fails: it is never replaced silently.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from types import ModuleType

import torch

from mamba_pretrain.ops.backends import cuda, native, triton
from mamba_pretrain.ops.call import Call, KernelError

log = logging.getLogger("mamba_pretrain")

# A backend is a module with NAME, OPS (the names of the functions in it that are ops), `missing() -> Missing | None`
# (what this machine lacks, looked up once) and `refuses(call) -> str | None`.
ORDER: dict[str, tuple[ModuleType, ...]] = {"cpu": (native,), "cuda": (cuda, triton)}
REFERENCE = "reference"
CHOICES = ("auto", native.NAME, cuda.NAME, triton.NAME, REFERENCE)
COMPOSED = frozenset({"mamba_inner"})  # where no backend takes it whole, it is made of ops that are chosen in turn

# An unknown name in the environment is refused at the first use: importing must not fail.
_selected = os.environ.get("MAMBA_PRETRAIN_KERNELS") or "auto"
_decisions: dict[tuple[Call, str], ModuleType | None] = {}


def select(name: str) -> str:
    """From now on ops run on this backend only; `auto`: on MAMBA_PRETRAIN_KERNELS if that is set, else on the first
    that can. Returns what was selected before."""
    global _selected
    if name == "auto":
        name = os.environ.get("MAMBA_PRETRAIN_KERNELS") or "auto"
    before, _selected = _known(_selected), _known(name)
    return before


def _known(name: str) -> str:
    if name not in CHOICES:
        raise KernelError(f"there are no kernels named {name!r}: expected one of {', '.join(CHOICES)}")
    return name


def selected() -> str:
    return _selected


@contextlib.contextmanager
def using(name: str) -> Iterator[None]:
    """`select` for the length of a with statement."""
    global _selected
    before = select(name)
    try:
        yield
    finally:
        _selected = before


def choose(call: Call) -> ModuleType | None:
    """The backend for a call; None stands for the reference. Raises KernelError if the selected one cannot run it."""
    key = (call, _selected)
    if key not in _decisions:
        _decisions[key] = _decide(call)
    return _decisions[key]


def _why_not(backend: ModuleType, call: Call) -> str | None:
    if call.op not in backend.OPS:
        return _lacks(call)
    if (lack := backend.missing()) is not None:
        return str(lack.reason)
    refusal: str | None = backend.refuses(call)
    return refusal


def _lacks(call: Call) -> str:
    return f"has no {call.op}"


def _decide(call: Call) -> ModuleType | None:
    if _known(_selected) == REFERENCE:
        _say(call, "reference, as was asked", {})
        return None
    backends = [b for b in ORDER.get(call.device, ()) if _selected in ("auto", b.NAME)]
    against: dict[str, str] = {}
    for backend in backends:
        why_not = _why_not(backend, call)
        if why_not is None:
            _say(call, backend.NAME, against)
            return backend
        against[backend.NAME] = why_not
    # An op that the selected backend does not have at all is the reference's.
    if _selected != "auto" and call.op not in COMPOSED and all(call.op in b.OPS for b in backends):
        why = against.get(_selected, f"it does not run on {call.device}")
        raise KernelError(
            f"{call.op}: the {_selected} kernels were selected, and cannot run this call: {why}. "
            "Choose others with train.kernels, or MAMBA_PRETRAIN_KERNELS; `mamba-pretrain doctor` says what works here"
        )
    _say(call, REFERENCE, against)
    return None


def announce(device: str, dtype: torch.dtype, *, d_state: int, taps: int, inner: int, packed: bool) -> dict[str, str]:
    """Logs, before the first step, what a model will be trained on, and why the rest of the backends do not run.

    Returns the names by op.
    """
    sizes = {"mamba_inner": d_state, "causal_conv1d": taps, "selective_scan": d_state, "add_rms_norm": 1}
    calls = [
        *(Call(op, device, dtype, size, packed, grad=True, channels=inner, taps=taps) for op, size in sizes.items()),
        Call("cross_entropy_", device, dtype),
    ]
    chosen = {call.op: choose(call) for call in calls}
    return {op: REFERENCE if backend is None else backend.NAME for op, backend in chosen.items()}


_said: set[str] = set()


def _say(call: Call, name: str, against: dict[str, str]) -> None:
    """One line for each decision; a reason that was given before is not given again."""
    if call.op in COMPOSED and name.startswith(REFERENCE):
        if all(why == _lacks(call) for why in against.values()):
            return  # nobody takes it whole here: the ops it is made of will be named
        name = "composed of the ops below it"
    line = f"{call.op} on {call.device}: {name}"
    for other, why in against.items():
        reason = f"; {other}: {why}"
        line += f"; {other}: as said" if reason in _said else reason
    if line not in _said:
        _said.update((line, *(f"; {other}: {why}" for other, why in against.items())))
        log.info("%s", line)
