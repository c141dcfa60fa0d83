"""Builds and loads the C++ kernels of `ops/csrc`: once for each version of the sources, into a cache directory.

One compiler call makes a shared library with a plain C interface, which ctypes loads. It includes no PyTorch header,
so one build serves every PyTorch and every Python, takes seconds, and cannot break by their ABI. The library leaves its
OpenMP symbols open and finds them in the runtime that PyTorch has loaded: both share one pool of threads.

The file appears complete or not at all: it is compiled in a directory of its own and renamed. Builders take turns under
a file lock, which the system releases when a builder dies. A hash beside it tells a whole file from one cut short.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

from mamba_pretrain.ops.call import KernelError, Missing

SOURCES = Path(__file__).parent.parent / "csrc"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
ISA_FLAGS = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mprefer-vector-width=512"),
    "avx2": ("-mavx2", "-mfma"),
    "portable": (),
}
COMPILERS = ("g++", "c++", "clang++")
COMPILE_TIMEOUT_S = 300
FUNCTIONS = (
    *("scan_forward", "scan_backward", "conv_forward", "conv_backward", "norm_forward", "norm_backward"),
    *("cross_entropy", "decode_step"),
)
CHOOSE_CACHE = "export MAMBA_PRETRAIN_CACHE=/a/writable/directory"


class BuildError(RuntimeError):
    """The kernels cannot be built or loaded here."""

    def __init__(self, reason: str, mend: str) -> None:
        super().__init__(reason)
        self.missing = Missing(reason, mend)


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
        if not _is_whole(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with _lock(path.parent) as alone:
                if not _is_whole(path):  # while this process waited, another has built it
                    _build(path, instructions, alone)
        if path.parent.stat().st_mode & stat.S_IWOTH:
            raise BuildError(f"anyone can write {path.parent}, and what lies there is run", f"chmod o-w {path.parent}")
    except OSError as error:
        raise BuildError(f"cannot write {path.parent}: {error.strerror or error}", CHOOSE_CACHE) from error
    try:
        library = ctypes.CDLL(str(path))
        for function in FUNCTIONS:
            getattr(library, f"mamba_{function}")
    except (OSError, AttributeError) as error:
        raise BuildError(f"{path} does not load: {error}", f"rm {path}") from error
    return library


def _digest_path(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _is_whole(path: Path) -> bool:
    """Whether the library is what was built: one that a crash or a full disk cut short would kill the process."""
    if not path.exists() or not _digest_path(path).exists():
        return False
    return hashlib.sha256(path.read_bytes()).hexdigest() == _digest_path(path).read_text()


def compiler() -> list[str]:
    """The command; it may have words, as in CXX="ccache g++". Raises BuildError if there is none."""
    if chosen := shlex.split(os.environ.get("CXX", "")):
        if found := shutil.which(chosen[0]):
            return [found, *chosen[1:]]
        raise BuildError(f"no C++ compiler: CXX is {os.environ['CXX']!r}, which is no command", "unset CXX")
    for name in COMPILERS:
        if found := shutil.which(name):
            return [found]
    raise BuildError(
        f"no C++ compiler: looked for {', '.join(COMPILERS)}",
        "apt-get install g++   # or: conda install gxx; or: export CXX=/path/to/a/compiler",
    )


def _build(path: Path, instructions: str, alone: bool) -> None:
    if alone:  # without the lock, they may be of a builder that is at work
        for stale in path.parent.glob("build-*"):
            shutil.rmtree(stale, ignore_errors=True)
    compile_command = [*compiler(), *FLAGS, *ISA_FLAGS[instructions], "-c", str(SOURCES / "kernels.cpp"), "-o"]
    with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as directory:
        made, object_file = Path(directory) / "kernels.so", str(Path(directory) / "kernels.o")
        _run([*compile_command, object_file], mend=[*compile_command, "/dev/null"])
        _run([*compiler(), "-shared", object_file, "-o", str(made)])
        try:
            ctypes.CDLL(str(made))
        except OSError:  # PyTorch came with another OpenMP runtime than this compiler's: bring the compiler's own
            _run([*compiler(), "-shared", "-fopenmp", object_file, "-o", str(made)])
            ctypes.CDLL(str(made))
        digest = Path(directory) / "kernels.sha256"
        digest.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
        os.replace(made, path)
        os.replace(digest, _digest_path(path))


def _run(command: list[str], mend: list[str] | None = None) -> None:
    again = shlex.join(mend or command)
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=COMPILE_TIMEOUT_S)
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error.strerror or error}", again) from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} took more than {COMPILE_TIMEOUT_S} s", again) from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        first = next((line for line in lines if "error" in line), lines[-1])
        raise BuildError(f"{command[0]} fails: {first}", again)


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[bool]:
    """Yields whether the lock was granted. On a disk without locks everyone builds and renames: a waste, no harm."""
    file = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        granted = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            granted = False
        yield granted
    finally:
        os.close(file)
