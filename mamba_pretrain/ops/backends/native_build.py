"""The C++ kernels of `ops/csrc` for this CPU, as one library.

It leaves its OpenMP symbols open and finds them in the runtime that PyTorch has loaded: both share one pool of threads.
Where PyTorch came with another runtime than this compiler's, the library brings the compiler's own.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import torch

from mamba_pretrain.compiled import Library
from mamba_pretrain.ops.call import KernelError

SOURCES = Path(__file__).parent.parent / "csrc"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
ISA_FLAGS = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mprefer-vector-width=512"),
    "avx2": ("-mavx2", "-mfma"),
    "portable": (),
}
FUNCTIONS = (
    *("mamba_scan_forward", "mamba_scan_backward", "mamba_conv_forward", "mamba_conv_backward"),
    *("mamba_norm_forward", "mamba_norm_backward", "mamba_cross_entropy", "mamba_decode_step"),
)


def isa() -> str:
    """The widest instruction set of this CPU that the kernels know; MAMBA_PRETRAIN_ISA chooses a narrower one.

    Raises KernelError for one that this CPU does not have.
    """
    found = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "portable")
    wanted = os.environ.get("MAMBA_PRETRAIN_ISA") or found
    known = list(ISA_FLAGS)
    if wanted not in known or known.index(wanted) < known.index(found):
        allowed = ", ".join(known[known.index(found) :])
        raise KernelError(f"MAMBA_PRETRAIN_ISA is {wanted!r}: this CPU runs {allowed}")
    return wanted


def library(instructions: str) -> Library:
    flags = (*FLAGS, *ISA_FLAGS[instructions])
    return Library(f"kernels-{instructions}", SOURCES, "kernels.cpp", FUNCTIONS, flags, ("-fopenmp",))


@cache
def version() -> str:
    """What the kernels are built from, and for: others round otherwise."""
    return library(isa()).path().stem.removeprefix("kernels-")


@cache
def load() -> ctypes.CDLL:
    """The kernels for this CPU, built if need be. Raises BuildError."""
    return library(isa()).load()
