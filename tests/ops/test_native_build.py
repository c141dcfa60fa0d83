"""The build of the C++ kernels: from nothing, by several at once, killed half-way, and where it cannot be."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from mamba_pretrain import compiled
from mamba_pretrain.compiled import BuildError
from mamba_pretrain.ops import dispatch
from mamba_pretrain.ops.backends import native, native_build
from tests.helpers import kernels

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
BUILD = """
import json, sys
from mamba_pretrain.compiled import BuildError
from mamba_pretrain.ops.backends import native_build
try:
    print(json.dumps([str(native_build.load()._name), None]))
except BuildError as error:
    print(json.dumps([str(error), error.mend]))
"""


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def quick_compiler(directory: Path, before: str = "") -> str:
    """g++ without optimisation: what is built is not used for sums here."""
    return script(directory / "quick", f'{before}\nexec g++ "$@" -O0 -Wno-psabi')


def build(cache: Path, **environment: str | None) -> Any:
    return kernels.said(kernels.python(BUILD, MAMBA_PRETRAIN_CACHE=str(cache), **environment))


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, in this process too, and nothing remembered of the library in use."""
    monkeypatch.setenv("MAMBA_PRETRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MAMBA_PRETRAIN_ISA", raising=False)
    if shutil.which("g++"):
        monkeypatch.setenv("CXX", quick_compiler(tmp_path))
    monkeypatch.setattr(native_build, "load", native_build.load.__wrapped__)
    return tmp_path / "cache"


@needs_compiler
@pytest.mark.slow
def test_two_at_once_from_nothing(tmp_path: Path) -> None:
    """Both end with the library, and nothing but it and the lock stays. The sources are untouched."""
    sources = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in native_build.SOURCES.iterdir()}
    calls = tmp_path / "calls"
    environment = {
        "MAMBA_PRETRAIN_CACHE": str(tmp_path / "deep/cache"),
        "CXX": quick_compiler(tmp_path, f"echo called >> {calls}"),
    }
    builders = [kernels.start(BUILD, **environment) for _ in range(2)]
    found = [kernels.said(kernels.finish(builder)) for builder in builders]
    (library,) = (tmp_path / "deep/cache").glob("*.so")
    assert found == [[str(library), None]] * 2
    digest = library.with_suffix(".sha256").name
    assert sorted(p.name for p in library.parent.iterdir()) == sorted([library.name, digest, "lock"])
    assert len(calls.read_text().split()) == 2, "it was built twice: a build is one compilation and one link"
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in native_build.SOURCES.iterdir()} == sources
    assert build(library.parent, CXX="/nonexistent") == [str(library), None], "what is built needs no compiler"


@needs_compiler
@pytest.mark.slow
def test_a_builder_killed_half_way_is_no_obstacle(tmp_path: Path) -> None:
    cache, reached = tmp_path / "cache", tmp_path / "reached"
    slow = script(tmp_path / "slow", f"touch {reached}; sleep 60")
    builder = kernels.start(BUILD, MAMBA_PRETRAIN_CACHE=str(cache), CXX=slow)
    began = time.monotonic()
    while not reached.exists():
        assert builder.poll() is None and time.monotonic() - began < 60
        time.sleep(0.02)
    os.killpg(builder.pid, signal.SIGKILL)
    builder.communicate()
    assert [p.name[:6] for p in sorted(cache.iterdir())] == ["build-", "lock"]
    path, reason = build(cache, CXX=quick_compiler(tmp_path))
    assert reason is None
    digest = Path(path).with_suffix(".sha256").name
    assert sorted(p.name for p in cache.iterdir()) == sorted([Path(path).name, digest, "lock"])


@needs_compiler
@pytest.mark.slow
def test_a_builder_whose_compiler_outlives_it_does_not_hold_the_lock(tmp_path: Path) -> None:
    """Only the builder is killed; the compiler, which inherits what the builder has open, goes on for a while."""
    cache, reached = tmp_path / "cache", tmp_path / "reached"
    slow = script(tmp_path / "slow", f"echo $$ > {reached}; exec sleep 60")
    builder = kernels.start(BUILD, MAMBA_PRETRAIN_CACHE=str(cache), CXX=slow)
    began = time.monotonic()
    while not (reached.exists() and reached.read_text()):
        assert builder.poll() is None and time.monotonic() - began < 60
        time.sleep(0.02)
    builder.kill()
    builder.wait()
    try:
        assert build(cache, CXX=quick_compiler(tmp_path))[1] is None
        assert Path(f"/proc/{reached.read_text().strip()}").exists(), "it has ended too early to prove anything"
    finally:
        os.killpg(builder.pid, signal.SIGKILL)
        builder.communicate()


@pytest.mark.slow
def test_without_a_compiler_the_reason_is_said_once_and_the_reference_runs(tmp_path: Path) -> None:
    code = """
import json, logging, sys
logging.basicConfig(level="INFO", stream=sys.stderr, format="%(message)s")
from mamba_pretrain.ops import dispatch
from tests.helpers.kernels import *
given = scan_inputs(2, 40, 17, 4)
same = all(
    torch.equal(a, b)
    for _ in range(3)
    for a, b in zip(outcome(scan, given, "auto").values(), outcome(scan, given, "reference").values())
)
from mamba_pretrain.ops.backends import native
print(json.dumps([same, native.missing()]))
"""
    for environment, lack, cure in (
        ({"CXX": "/nonexistent"}, "CXX is '/nonexistent', which is no command", "unset CXX"),
        ({"CXX": None, "PATH": ""}, "looked for g++, c++, clang++", "apt-get install g++"),
    ):
        done = kernels.python(code, MAMBA_PRETRAIN_CACHE=str(tmp_path / "cache"), **environment)
        same, (reason, mend) = kernels.said(done)
        assert same
        assert reason == f"no C++ compiler: {lack}"
        assert cure in mend
        line = f"selective_scan on cpu: reference; native: {reason}"
        assert done.stderr.splitlines().count(line) == 1
        assert done.stderr.count(reason) == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "echo 'kernels.cpp:1: error: no such thing' >&2; echo 'error: second' >&2; exit 1",
            "fails: kernels.cpp:1: error: no",
        ),
        ("echo 'out of memory' >&2; exit 1", "fails: out of memory"),
        ("exit 3", "fails: exit code 3"),
        ("printf 'error: \\377\\376\\n' >&2; exit 1", "fails: error: "),
    ],
)
def test_a_compiler_that_fails_is_quoted(
    text: str, reason: str, fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", script(tmp_path / "broken", text))
    with pytest.raises(BuildError, match=f"broken {reason}") as caught:
        native_build.load()
    assert caught.value.mend.startswith(f"{tmp_path / 'broken'} -std=c++17")
    assert [p.name for p in fresh.iterdir()] == ["lock"]


def test_a_compiler_that_does_not_run_or_never_ends(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no-program").write_bytes(b"\x7fELF, but not really")
    (tmp_path / "no-program").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "no-program"))
    with pytest.raises(BuildError, match="no-program does not run: Exec format error"):
        native_build.load()
    monkeypatch.setenv("CXX", script(tmp_path / "endless", "exec sleep 60"))
    monkeypatch.setattr(compiled, "COMPILE_TIMEOUT_S", 0.1)
    with pytest.raises(BuildError, match="endless took more than 0.1 s"):
        native_build.load()
    assert [p.name for p in fresh.iterdir()] == ["lock"]


def test_a_compiler_that_cannot_be_parsed_and_a_hash_that_cannot_be_read(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = native_build.library(native_build.isa()).path()
    path.parent.mkdir()
    path.write_bytes(b"not a library")
    path.with_suffix(".sha256").write_bytes(b"\xff\xfe")
    assert not compiled.is_whole(path)
    monkeypatch.setenv("CXX", '"')
    with pytest.raises(BuildError, match="CXX is '\"' .No closing quotation"):
        native_build.load()


def test_a_cache_that_cannot_be_written(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh.write_text("a file where the directory should be")
    for cache in (fresh, fresh / "below"):
        monkeypatch.setenv("MAMBA_PRETRAIN_CACHE", str(cache))
        with pytest.raises(BuildError, match=f"cannot write {cache}: (File exists|Not a directory)") as caught:
            native_build.load()
        assert caught.value.mend == "export MAMBA_PRETRAIN_CACHE=/a/writable/directory"


def test_a_cache_that_cannot_be_searched(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's, or of a home that is not mounted: stat fails with an error of its own."""

    def forbidden(path: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", forbidden)
    with pytest.raises(BuildError, match=f"cannot write {fresh}: Permission denied"):
        native_build.load()


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("MAMBA_PRETRAIN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(BuildError, match="no cache directory: Could not determine home") as caught:
        native_build.load.__wrapped__()
    assert "MAMBA_PRETRAIN_CACHE" in caught.value.mend


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("kept", [0, 5000, -1])
def test_a_library_that_was_cut_short_is_built_again(kept: int, fresh: Path) -> None:
    """Loading it would end the process with a bus error, and the next one's, and so on."""
    native_build.load()
    path = native_build.library(native_build.isa()).path()
    whole = path.read_bytes()
    path.unlink()  # the file in use stays as it is
    path.write_bytes(whole[:kept])
    native_build.load()
    assert compiled.is_whole(path)
    assert len(path.read_bytes()) == len(whole)


def test_a_library_of_other_contents_is_named(fresh: Path) -> None:
    path = native_build.library(native_build.isa()).path()
    path.parent.mkdir()
    path.write_bytes(b"not a library")
    path.with_suffix(".sha256").write_text(hashlib.sha256(b"not a library").hexdigest())
    with pytest.raises(BuildError, match=f"{path} does not load: ") as caught:
        native_build.load()
    assert caught.value.mend == f"rm {path}"


@needs_compiler
def test_without_locks_the_builds_of_others_are_left_alone(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    (fresh / "build-of-another").mkdir(parents=True)
    monkeypatch.setattr(compiled.fcntl, "flock", no_locks)
    native_build.load()
    assert (fresh / "build-of-another").is_dir()


@needs_compiler
def test_what_anyone_can_write_is_not_run(fresh: Path) -> None:
    fresh.mkdir()
    fresh.chmod(0o777)
    with pytest.raises(BuildError, match=f"anyone can write {fresh}") as caught:
        native_build.load()
    assert caught.value.mend == f"chmod o-w {fresh}"


def test_the_lock_is_no_way_to_another_file(fresh: Path, tmp_path: Path) -> None:
    fresh.mkdir()
    (tmp_path / "precious").write_text("kept")
    (fresh / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(BuildError, match="cannot write"):
        native_build.load()
    assert (tmp_path / "precious").read_text() == "kept"


def test_where_the_library_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAMBA_PRETRAIN_CACHE", ".")
    before = native_build.library("portable").path()
    assert before.parent == tmp_path, "a bare name would be looked for among the system's libraries"
    assert before != native_build.library("avx2").path()
    monkeypatch.delenv("MAMBA_PRETRAIN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert native_build.library("portable").path().parent == tmp_path / "xdg/mamba_pretrain"
    copy = tmp_path / "csrc"
    shutil.copytree(native_build.SOURCES, copy)
    monkeypatch.setattr(native_build, "SOURCES", copy)
    assert native_build.library("portable").path().name == before.name
    with (copy / "vec.h").open("a") as file:
        file.write("// changed\n")
    assert native_build.library("portable").path().name != before.name


@needs_compiler
def test_read_only_sources_are_enough(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "csrc"
    shutil.copytree(native_build.SOURCES, copy)
    for path in (*copy.iterdir(), copy):
        path.chmod(0o555 if path.is_dir() else 0o444)
    monkeypatch.setattr(native_build, "SOURCES", copy)
    monkeypatch.setenv("CXX", quick_compiler(tmp_path))
    before = sorted(p.name for p in copy.iterdir())
    try:
        assert native_build.load().mamba_chunk() == native_build.ctypes.c_int64(32).value
        assert sorted(p.name for p in copy.iterdir()) == before
    finally:
        copy.chmod(0o755)


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
def test_threads_are_pytorchs_own() -> None:
    """A second OpenMP runtime would start threads of its own, twice as many as there are cores."""
    code = """
import json, re
from pathlib import Path
def runtimes():
    return sorted(set(re.findall(r"\\S*lib(?:g|i)?omp\\S*", Path("/proc/self/maps").read_text())))
import torch
torch.ones(1000000).exp()
before = runtimes()
from tests.helpers.kernels import *
torch.set_num_threads(2)
outcome(scan, scan_inputs(2, 64, 300, 4), "native")
print(json.dumps([before, runtimes(), len(list(Path("/proc/self/task").iterdir()))]))
"""
    before, after, _ = kernels.said(kernels.python(code))
    assert len(before) == 1
    assert after == before


def test_missing_is_asked_once(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = tmp_path / "calls"
    monkeypatch.setenv("CXX", script(tmp_path / "broken", f"echo once >> {calls}; echo 'an error' >&2; exit 1"))
    native.missing.cache_clear()
    monkeypatch.setattr(dispatch, "_decisions", {})
    try:
        lacks = {native.missing() for _ in range(3)}
    finally:
        native.missing.cache_clear()
    (lack,) = lacks
    assert lack is not None and lack.reason.endswith("broken fails: an error")
    assert calls.read_text() == "once\n"
