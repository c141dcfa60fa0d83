"""What works on this machine, why the rest does not, and the commands that mend it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from mamba_pretrain import compiled
from mamba_pretrain.data import encodings, packing
from mamba_pretrain.distributed.env import bf16_is_native
from mamba_pretrain.ops import dispatch
from mamba_pretrain.ops.backends import native_build
from mamba_pretrain.ops.call import KernelError
from mamba_pretrain.ops.selective_scan import selective_scan
from mamba_pretrain.ops.selfcheck import self_check

PACKAGES = ("torch", "triton", "mamba-ssm", "causal-conv1d", "deepspeed", "transformers", "numpy")
SCAN = (2, 256, 512, 16)  # B, L, E, N of the speed check: some hundredths of a second for the reference on one core


@dataclass
class Kernels:
    """One backend on one device."""

    backend: str
    device: str
    usable: bool
    reason: str | None = None  # why it is not, or what its parity check found wrong
    mend: str | None = None
    deviation: dict[str, float] = field(default_factory=dict)  # of each op from the reference, relative
    scan_ms: float | None = None  # forward and backward
    times_reference: float | None = None  # how many times faster than the reference


@dataclass
class Report:
    versions: dict[str, str]
    cpu: dict[str, Any]
    gpu: dict[str, Any]
    kernels: list[Kernels]

    def failures(self, required: tuple[str, ...] = ()) -> list[str]:
        """What a run on this machine would miss: a device that only the reference serves, or a required backend."""
        found = []
        for device in sorted({k.device for k in self.kernels if k.device == "cpu" or self.gpu["devices"]}):
            here = [k for k in self.kernels if k.device == device]
            if not any(k.usable for k in here):
                found.append(
                    f"on {device} only the reference runs: {'; '.join(f'{k.backend}: {k.reason}' for k in here)}"
                )
        for name in required:
            found += [f"{name} is required: {k.reason}" for k in self.kernels if k.backend == name and not k.usable]
        return found

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        def section(title: str, facts: dict[str, Any]) -> list[str]:
            width = max(map(len, facts))
            return [title, *(f"  {key:<{width}}  {value}" for key, value in facts.items()), ""]

        lines = [*section("versions", self.versions), *section("cpu", self.cpu), *section("gpu", self.gpu), "kernels"]
        for k in self.kernels:
            lines.append(f"  {k.backend} on {k.device}: {'works' if k.usable else 'does not work'}")
            if k.usable:
                worst = max(k.deviation, key=lambda op: k.deviation[op])
                lines.append(f"    within {k.deviation[worst]:.0e} of the reference (the most in {worst})")
                lines.append(f"    scan {k.scan_ms:.1f} ms, {k.times_reference:.1f} times as fast as the reference")
            else:
                lines += [f"    why:  {k.reason}", f"    mend: {k.mend}"]
        return "\n".join(lines)


def examine() -> Report:
    """Builds the native kernels if they are not built yet; takes some seconds."""
    kernels = []
    for device, backends in dispatch.ORDER.items():
        present = device == "cpu" or torch.cuda.is_available()
        reference_ms = _scan_ms(device, dispatch.REFERENCE) if present else 0.0
        for backend in backends:
            entry = Kernels(backend.NAME, device, usable=False)
            kernels.append(entry)
            if (lack := backend.missing()) is not None:
                entry.reason, entry.mend = lack
                continue
            if not present:
                entry.reason, entry.mend = "there is no GPU", "run on a machine with one"
                continue
            try:
                with dispatch.using(backend.NAME):
                    checks = self_check(device)
            except KernelError as error:
                entry.reason, entry.mend = str(error), "export MAMBA_PRETRAIN_KERNELS=reference   # until it is mended"
                continue
            entry.usable = True
            entry.deviation = {c.op: c.error for c in checks if c.backend == backend.NAME}
            entry.scan_ms = _scan_ms(device, backend.NAME)
            entry.times_reference = reference_ms / entry.scan_ms
    return Report(_versions(), _cpu(), _gpu(), kernels)


def _scan_ms(device: str, kernels: str, rounds: int = 5) -> float:
    B, L, E, N = SCAN
    u_BLE, delta_BLE, z_BLE = (torch.randn(B, L, E, device=device, requires_grad=True) for _ in range(3))
    B_BLN, C_BLN = (torch.randn(B, L, N, device=device, requires_grad=True) for _ in range(2))
    A_EN = -torch.arange(1.0, N + 1, device=device).repeat(E, 1)
    D_E = torch.ones(E, device=device)
    seconds = []
    with dispatch.using(kernels):
        for _ in range(rounds + 1):
            began = time.perf_counter()
            y_BLE, _ = selective_scan(
                u_BLE, delta_BLE, A_EN, B_BLN, C_BLN, D_E, z_BLE, D_E - 3, return_last_state=False
            )
            y_BLE.sum().backward()  # type: ignore[no-untyped-call]
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
    return 1e3 * statistics.median(seconds[1:])


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _cpu() -> dict[str, Any]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)
    except OSError:
        model = None
    return {
        "model": model or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": _or_reason(native_build.isa),
        "bf16 products": "native" if bf16_is_native(torch.device("cpu")) else "emulated",
        "compiler": _or_reason(lambda: _first_line([*compiled.compiler(), "--version"])),
        "native kernels": _or_reason(lambda: _library(native_build.library(native_build.isa()))),
        "row reader": _or_reason(lambda: _library(packing.LIBRARY)),
        "encodings": _or_reason(lambda: _library(encodings.LIBRARY)),
    }


def _library(library: compiled.Library) -> str:
    path = library.path()
    return f"{path}{'' if path.exists() else ' (not built)'}"


def _or_reason(fact: Callable[[], str]) -> str:
    try:
        return fact()
    except (compiled.BuildError, OSError) as error:
        return str(error)


def _gpu() -> dict[str, Any]:
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    nvcc = shutil.which("nvcc")
    return {
        "devices": [f"{d.name}, {d.total_memory / 2**30:.0f} GiB, sm_{d.major}{d.minor}" for d in devices],
        "torch's CUDA": torch.version.cuda,
        "CUDA_HOME": os.environ.get("CUDA_HOME"),
        "nvcc": nvcc and f"{nvcc}: {_first_line([nvcc, '--version'], -1)}",
    }


def _first_line(command: list[str], line: int = 0) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.splitlines()[line].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return f"{command[0]}: does not run"
