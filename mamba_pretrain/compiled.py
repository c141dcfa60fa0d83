"""Builds and loads C++ sources of this package: once for each version of them, into a cache directory.

One compiler call makes a shared library with a plain C interface, which ctypes loads. It includes no header of PyTorch
or Python, so one build serves every version of either, takes seconds, and cannot break by their ABI.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Final

COMPILERS: Final = ("g++", "c++", "clang++")
COMPILE_TIMEOUT_S = 300
CHOOSE_CACHE: Final = "export MAMBA_PRETRAIN_CACHE=/a/writable/directory"


class BuildError(RuntimeError):
    """Sources cannot be built or loaded here; `mend` is a command that helps."""

    def __init__(self, reason: str, mend: str) -> None:
        super().__init__(reason)
        self.mend = mend


@dataclass(frozen=True)
class Library:
    """What a library is made of, and what is in it."""

    name: str
    sources: Path  # a directory, all files of which count as one version
    main: str  # the one that is compiled
    functions: tuple[str, ...]
    flags: tuple[str, ...]
    link_flags: tuple[str, ...] = ()  # used only where the library does not load without them

    def path(self) -> Path:
        """Where the library for the present sources is, or will be. Compiler and machine's name are no part of it:
        nodes without a compiler can use what another node of the same cluster has built."""
        digest = hashlib.sha256(repr((self.flags, platform.machine())).encode())
        for source in sorted(self.sources.iterdir()):
            digest.update(source.name.encode() + b"\0" + source.read_bytes())
        return cache_directory() / f"{self.name}-{digest.hexdigest()[:16]}.so"

    def load(self) -> ctypes.CDLL:
        """The library, built if need be. Raises BuildError."""
        path = self.path()
        try:
            if not is_whole(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                with _lock(path.parent) as alone:
                    if not is_whole(path):  # while this process waited, another has built it
                        self._build(path, alone)
            if path.parent.stat().st_mode & stat.S_IWOTH:
                raise BuildError(
                    f"anyone can write {path.parent}, and what lies there is run", f"chmod o-w {path.parent}"
                )
        except OSError as error:
            raise BuildError(f"cannot write {path.parent}: {error.strerror or error}", CHOOSE_CACHE) from error
        try:
            library = ctypes.CDLL(str(path))
            for function in self.functions:
                getattr(library, function)
        except (OSError, AttributeError) as error:
            raise BuildError(f"{path} does not load: {error}", f"rm {path}") from error
        return library

    def _build(self, path: Path, alone: bool) -> None:
        if alone:  # without the lock, they may be of a builder that is at work
            for stale in path.parent.glob("build-*"):
                shutil.rmtree(stale, ignore_errors=True)
        compile_command = [*compiler(), *self.flags, "-c", str(self.sources / self.main), "-o"]
        with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as directory:
            made, object_file = Path(directory) / "made.so", str(Path(directory) / "made.o")
            _run([*compile_command, object_file], mend=[*compile_command, "/dev/null"])
            _run([*compiler(), "-shared", object_file, "-o", str(made)])
            try:
                ctypes.CDLL(str(made))
            except OSError:
                _run([*compiler(), "-shared", *self.link_flags, object_file, "-o", str(made)])
                try:
                    ctypes.CDLL(str(made))
                except OSError as error:
                    raise BuildError(f"what is built in {path.parent} does not load: {error}", CHOOSE_CACHE) from error
            digest = Path(directory) / "made.sha256"
            digest.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
            os.replace(made, path)
            os.replace(digest, _digest_path(path))


def cache_directory() -> Path:
    if chosen := os.environ.get("MAMBA_PRETRAIN_CACHE"):
        return Path(chosen).absolute()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "mamba_pretrain"
    except RuntimeError as error:
        raise BuildError(f"no cache directory: {error}", CHOOSE_CACHE) from error


def _digest_path(path: Path) -> Path:
    return path.with_suffix(".sha256")


def is_whole(path: Path) -> bool:
    """Whether the library is what was built: one that a crash or a full disk cut short would kill the process."""
    if not path.exists() or not _digest_path(path).exists():
        return False
    return hashlib.sha256(path.read_bytes()).hexdigest().encode() == _digest_path(path).read_bytes()


def compiler() -> list[str]:
    """The command; it may have words, as in CXX="ccache g++". Raises BuildError if there is none."""
    try:
        chosen = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise BuildError(f"no C++ compiler: CXX is {os.environ['CXX']!r} ({error})", "unset CXX") from error
    if chosen:
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
