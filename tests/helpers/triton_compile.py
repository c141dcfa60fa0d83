"""Compiles the Triton kernels as real calls launch them, for GPUs that need not be here; prints one JSON line each.

Runs in a process of its own, `python -m tests.helpers.triton_compile 80 16 bfloat16 128` (compute capability,
states, dtype, steps), because the interpreter takes over the kernels of a process for good.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32"}


def compile_instead(capability: int) -> None:
    """From now on a launch compiles its kernel, for the types and values of its arguments, and runs nothing."""

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        options = {name: named.pop(name) for name in list(named) if name not in kernel.arg_names}
        signature, constants, attributes = {}, {}, {}
        for i, (name, value) in enumerate((dict(zip(kernel.arg_names, arguments, strict=False)) | named).items()):
            if (
                value is None or (isinstance(value, int) and value == 1) or kernel.params[i].is_constexpr
            ):  # launches take a 1 as known, too
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[name], attributes[i,] = POINTERS[value.dtype], [["tt.divisibility", 16]]
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
                if isinstance(value, int) and value % 16 == 0:
                    attributes[i,] = [["tt.divisibility", 16]]
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        print(json.dumps({"kernel": kernel.__name__, **options, **ptxas(compiled.asm["ptx"], capability)}), flush=True)

    triton.JITFunction.run = run


def ptxas(ptx: str, capability: int) -> dict[str, int]:
    """Registers of a thread, and bytes it stores elsewhere for want of registers."""
    architecture = re.search(r"\.target (\w+)", ptx)
    assert architecture is not None
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "kernel.ptx")
        path.write_text(ptx)
        said = subprocess.run(
            [get_ptxas(capability).path, "-v", f"-arch={architecture[1]}", path, "-o", "/dev/null"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    return {
        "registers": int(re.findall(r"Used (\d+) registers", said)[0]),
        "spilled": int(re.findall(r"(\d+) bytes spill stores", said)[0]),
    }


def main(capability: int, d_state: int, dtype: torch.dtype, length: int) -> None:
    from mamba_pretrain.ops.backends import triton_conv, triton_norm, triton_scan

    compile_instead(capability)
    batch, inner, taps = 2, 64, 4

    def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    def wide(last: int) -> Tensor:
        return tensor(batch, length, last, dtype=dtype)

    seq_idx = torch.zeros(batch, length, dtype=torch.int32)
    A, D, bias = tensor(inner, d_state), tensor(inner), tensor(inner)
    outputs = triton_scan.selective_scan(
        wide(inner), wide(inner), A, wide(d_state), wide(d_state), D, wide(inner), bias, seq_idx,
        tensor(batch, inner, d_state),
    )  # fmt: skip
    outputs += triton_conv.causal_conv1d(
        wide(inner), tensor(inner, taps), bias, seq_idx, tensor(batch, taps - 1, inner)
    )
    outputs += triton_norm.add_rms_norm(wide(inner), tensor(batch, length, inner), bias, 1e-5, dtype)
    sum(x.sum() for x in outputs if x is not None).backward()  # type: ignore[union-attr]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3]), int(sys.argv[4]))
