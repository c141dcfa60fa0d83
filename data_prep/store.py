"""Where the parts of a build and its result are kept: a local directory, or one on any file system fsspec knows.

What a store holds under a name is whole, however a process ends: `write` and `add` replace it at once. What was given
to `write` is on disk when that returns; what was given to `add`, a power failure may spoil: its readers check it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol

import fsspec

from data_prep.streams import is_url
from mamba_pretrain.data.shards import ShardError
from mamba_pretrain.files import sync

DRAFT: Final = ".draft-"  # in the name of a file that is being written
REMOTE_BLOCK: Final = 1 << 26  # bytes read or sent at a time
REMOTE_BLOCKS: Final = 9000  # S3 takes at most 10,000 in one object


class Store(Protocol):
    """Pickles, so that worker processes write into it themselves."""

    def names(self) -> dict[str, int]:
        """Of the files held, with their bytes; none where the directory does not exist."""

    def read(self, name: str) -> bytes: ...

    def open(self, name: str) -> BinaryIO:
        """For reading from the beginning to the end, with seeks forward."""

    def draft(self, name: str) -> Path:
        """A local path at which to write the file that `add` puts in place."""

    def drafts(self) -> list[Path]:
        """Those of this machine that were never added and whose processes are gone."""

    def add(self, draft: Path, name: str) -> None: ...

    def write(self, name: str, content: bytes) -> None: ...

    def remove(self, name: str) -> None: ...

    def remove_all(self, first: str) -> None:
        """Everything, `first` before the rest."""

    def lock(self, name: str, *, shared: bool = False, wait: bool = False) -> contextlib.AbstractContextManager[None]:
        """Excludes other processes that lock `name`, but for shared locks each other. ShardError if one has it."""


def store_at(place: str | Path) -> Store:
    return RemoteStore(str(place)) if is_url(str(place)) else LocalStore(Path(os.path.abspath(place)))


class LocalStore(Store):
    def __init__(self, root: Path) -> None:
        self._root = root

    def __str__(self) -> str:
        return str(self._root)

    def names(self) -> dict[str, int]:
        if not self._root.is_dir():
            return {}
        with os.scandir(self._root) as entries:
            found = {}
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # another process has put it in place or removed it
                    found[entry.name] = entry.stat().st_size
            return found

    def read(self, name: str) -> bytes:
        return (self._root / name).read_bytes()

    def open(self, name: str) -> BinaryIO:
        return (self._root / name).open("rb")

    def draft(self, name: str) -> Path:
        return self._root / f"{name}{DRAFT}{socket.gethostname()}-{os.getpid()}"

    def drafts(self) -> list[Path]:
        mine = f"{DRAFT}{socket.gethostname()}-"
        return [self._root / name for name in self.names() if mine in name and not _lives(name)]

    def add(self, draft: Path, name: str) -> None:
        draft.replace(self._root / name)

    def write(self, name: str, content: bytes) -> None:
        draft = self.draft(name)
        draft.write_bytes(content)
        sync(draft)
        draft.replace(self._root / name)
        sync(self._root)

    def remove(self, name: str) -> None:
        (self._root / name).unlink(missing_ok=True)

    def remove_all(self, first: str) -> None:
        self.remove(first)
        sync(self._root)
        shutil.rmtree(self._root)

    @contextlib.contextmanager
    def lock(self, name: str, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
        path = self._root / name
        while True:
            try:
                self._root.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ShardError(
                    f"{self._root}, which is to hold the parts of the build, cannot be made: {error.strerror} "
                    f"({error.filename}). Choose an output elsewhere"
                ) from error
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                self._flock(path, descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX), wait)
                if _same_file(path, descriptor):  # else its directory went while this process waited
                    if not shared:
                        os.ftruncate(descriptor, 0)
                        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                    yield
                    return
            finally:
                os.close(descriptor)

    def _flock(self, path: Path, descriptor: int, kind: int, wait: bool) -> None:
        try:
            fcntl.flock(descriptor, kind | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            holder = os.read(descriptor, 1000).decode(errors="replace") or "another process"
            raise ShardError(
                f"{self._root} is in use by another run ({holder} has locked {path.name}): wait for it, or end it"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            message = "its file system has no locks, so nothing keeps a second run from the same output"
            print(f"warning: {self._root}: {message}", file=sys.stderr)


class RemoteStore(Store):
    """Objects at a URL. Drafts are written to $TMPDIR, one part's at a time for each worker.

    Object stores have no locks. Two runs with one plan do no harm there: both put the same bytes, whole objects at a
    time. Of two with different plans the later plan stands, and each part says of which it is.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def __str__(self) -> str:
        return self._url

    def __reduce__(self) -> tuple[type[RemoteStore], tuple[str]]:
        return RemoteStore, (self._url,)

    @cached_property
    def _fs(self) -> Any:
        return fsspec.core.url_to_fs(self._url)[0]

    def _path(self, name: str = "") -> str:
        return f"{self._url}/{name}".rstrip("/")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """A client library's own exceptions as the system's."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno or errno.EIO, f"{self._url}: {error.strerror or error}") from error
        except Exception as error:
            raise OSError(errno.EIO, f"{self._url}: {error!r}") from error

    def names(self) -> dict[str, int]:
        with self._errors():
            self._fs.invalidate_cache()
            if not self._fs.exists(self._path()):
                return {}
            listed = self._fs.ls(self._path(), detail=True)
            return {info["name"].rstrip("/").rpartition("/")[2]: info["size"] or 0 for info in listed}

    def read(self, name: str) -> bytes:
        with self._errors():
            return bytes(self._fs.cat_file(self._path(name)))

    def open(self, name: str) -> BinaryIO:
        with self._errors():
            stream: BinaryIO = self._fs.open(self._path(name), "rb", block_size=REMOTE_BLOCK, cache_type="readahead")
            return stream

    def create(self, name: str, size: int) -> BinaryIO:
        """A stream that becomes the object when it is closed; `size` is what it will come to."""
        with self._errors():
            block = max(REMOTE_BLOCK, -(-size // REMOTE_BLOCKS))
            stream: BinaryIO = self._fs.open(self._path(name), "wb", block_size=block)
            return stream

    def draft(self, name: str) -> Path:
        return Path(tempfile.gettempdir()) / f"{name}{self._mark}{os.getpid()}"

    def drafts(self) -> list[Path]:
        found = Path(tempfile.gettempdir()).glob(f"*{self._mark}*")
        return [path for path in found if not _lives(path.name)]

    @property
    def _mark(self) -> str:
        return f"{DRAFT}{hashlib.sha256(self._url.encode()).hexdigest()[:16]}-"

    def add(self, draft: Path, name: str) -> None:
        with self._errors():
            self._fs.put_file(str(draft), self._path(name))
        draft.unlink()

    def write(self, name: str, content: bytes) -> None:
        with self._errors():
            self._fs.pipe_file(self._path(name), content)

    def remove(self, name: str) -> None:
        with self._errors():
            if self._fs.exists(self._path(name)):
                self._fs.rm_file(self._path(name))

    def remove_all(self, first: str) -> None:
        self.remove(first)
        with self._errors():
            self._fs.rm(self._path(), recursive=True)

    @contextlib.contextmanager
    def lock(self, name: str, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
        self.write(name, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


def _lives(draft: str) -> bool:
    """Whether the process that began it does; tasks that divide the work otherwise may be at the same part."""
    return Path(f"/proc/{draft.rpartition('-')[2]}").exists()


def _same_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
