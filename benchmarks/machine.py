"""What a figure was measured on, and how much memory this process holds."""

from __future__ import annotations

import os
import platform
import resource
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    *("mamba-pretrain", "torch", "numpy", "tokenizers", "sentencepiece"),
    *("transformers", "mambapy", "datasets", "datatrove", "megatron-core"),
)
MIB = 2**20


def machine() -> dict[str, Any]:
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vector_unit": torch.backends.cpu.get_cpu_capability(),
        "bf16_products": bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_1min": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def resident_mib() -> float:
    """Memory of this process right now."""
    return _status("VmRSS") or peak_mib()


def own_mib() -> float:
    """Memory that only this process holds: without the files it has mapped, whose pages are the system's cache."""
    return _status("RssAnon") or resident_mib()


def peak_mib() -> float:
    """Most memory that this process has held.

    Not ru_maxrss where that can be avoided: Linux hands it on through fork and exec, so that a small child of a large
    parent reports the parent's.
    """
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def forget_peak() -> None:
    """Peaks count from here on, where the system lets a process say so; else they count from its start."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _status(key: str) -> float | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(key + ":")), None)
