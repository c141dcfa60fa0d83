"""Builds and loads the C++ kernels of `ops/csrc`: once for each version of the sources, into a cache directory.

One compiler call makes a shared library with a plain C interface, which ctypes loads. It includes no PyTorch header,
so one build serves every PyTorch and every Python, takes seconds, and cannot break by their ABI. The library leaves its
OpenMP symbols open and finds them in the runtime that PyTorch has loaded: both share one pool of threads.

The file appears complete or not at all: it is compiled in a directory of its own and renamed. Builders take turns under
a file lock, which the system releases when a builder dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

from mamba_pretrain.ops.call import Missing

SOURCES = Path(__file__).parent.parent / "csrc"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
ISA_FLAGS = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mprefer-vector-width=512"),
    "avx2": ("-mavx2", "-mfma"),
    "portable": (),
}
COMPILE_TIMEOUT_S = 300
CHOOSE_CACHE = "export MAMBA_PRETRAIN_CACHE=/a/writable/directory"


class BuildError(RuntimeError):
    """The kernels cannot be built or loaded here."""

    def __init__(self, reason: str, mend: str) -> None:
        super().__init__(reason)
        self.missing = Missing(reason, mend)


def isa() -> str:
    """The widest instruction set of this CPU that the kernels know; MAMBA_PRETRAIN_ISA chooses a narrower one."""
    found = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "portable")
    wanted = os.environ.get("MAMBA_PRETRAIN_ISA", found)
    known = list(ISA_FLAGS)
    if wanted not in known or known.index(wanted) < known.index(found):
        allowed = ", ".join(known[known.index(found) :])
        raise BuildError(f"MAMBA_PRETRAIN_ISA is {wanted!r}: this CPU runs {allowed}", "unset MAMBA_PRETRAIN_ISA")
    return wanted


def cache_directory() -> Path:
    if chosen := os.environ.get("MAMBA_PRETRAIN_CACHE"):
        return Path(chosen).absolute()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "mamba_pretrain"
    except RuntimeError as error:
        raise BuildError(f"no cache directory: {error}", CHOOSE_CACHE) from error


def library_path(instructions: str) -> Path:
    """Where the library for the present sources is, or will be. Compiler and machine are no part of its name: nodes
    without a compiler can use what another node of the same cluster has built."""
    digest = hashlib.sha256(repr((FLAGS, ISA_FLAGS[instructions], platform.machine())).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return cache_directory() / f"kernels-{instructions}-{digest.hexdigest()[:16]}.so"


@cache
def load() -> ctypes.CDLL:
    """The kernels for this CPU, built if need be. Raises BuildError."""
    instructions = isa()
    path = library_path(instructions)
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with _lock(path.parent):
                if not path.exists():  # while this process waited, another has built it
                    _build(path, instructions)
    except OSError as error:
        raise BuildError(f"cannot write {path.parent}: {error.strerror or error}", CHOOSE_CACHE) from error
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} does not load: {error}", f"rm {path}") from error


def compiler() -> str:
    """Raises BuildError if there is none."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    for name in candidates:
        if found := shutil.which(name):
            return found
    raise BuildError(
        f"no C++ compiler: looked for {', '.join(candidates)}",
        "apt-get install g++   # or: conda install gxx; or: export CXX=/path/to/a/compiler",
    )


def _build(path: Path, instructions: str) -> None:
    for stale in path.parent.glob("build-*"):  # of a builder that was killed: the lock is ours
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as directory:
        made, object_file = Path(directory) / "kernels.so", str(Path(directory) / "kernels.o")
        _run(compiler(), *FLAGS, *ISA_FLAGS[instructions], "-c", str(SOURCES / "kernels.cpp"), "-o", object_file)
        _run(compiler(), "-shared", object_file, "-o", str(made))
        try:
            ctypes.CDLL(str(made))
        except OSError:  # PyTorch came with another OpenMP runtime than this compiler's: bring the compiler's own
            _run(compiler(), "-shared", "-fopenmp", object_file, "-o", str(made))
            ctypes.CDLL(str(made))
        os.replace(made, path)


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=COMPILE_TIMEOUT_S)
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error.strerror or error}", " ".join(command)) from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} took more than {COMPILE_TIMEOUT_S} s", " ".join(command)) from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        first = next(
            (line for line in lines if "error" in line), lines[-1] if lines else f"exit code {done.returncode}"
        )
        raise BuildError(f"{command[0]} fails: {first}", " ".join(command))


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[None]:
    with open(directory / "lock", "w") as file:
        # On a disk without locks everyone builds: a waste, but the rename keeps it correct.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
