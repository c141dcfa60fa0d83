"""Which files the inputs of a command are: files, directories, datasets, patterns, on local disks and at URLs."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from data_prep.streams import HTTP, CorpusError, as_os_errors, extension, filesystem, is_named_dataset, is_url

DATASET_MARKERS: Final = ("dataset_dict.json", "state.json")  # what datasets' save_to_disk leaves in a directory


@dataclass
class Found:
    """What the inputs hold, in order. `sizes` are those that a listing told."""

    files: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    sizes: dict[str, int | None] = field(default_factory=dict)


def find(inputs: Sequence[str | Path], known: Callable[[str], bool], names: str) -> Found:
    """The files that inputs name, and those of a kind that is known in directories, prefixes and patterns.

    `known` says whether a file of this name can be read, `names` lists the extensions for messages.
    """
    found = Found()
    for given in map(str, inputs):
        source = given.removeprefix("file://") if given.startswith("file:///") else given
        if is_named_dataset(source):
            found.files.append(source)
        elif is_url(source):
            _find_remote(source, known, names, found)
        elif glob.has_magic(source) and not os.path.lexists(source):
            matches = sorted(glob.glob(source, recursive=True))
            if not matches:
                raise CorpusError(f"{source} matches nothing")
            part = Found()
            for match in matches:
                _take(Path(match), known, part, ())
            found.files += dict.fromkeys(part.files)  # once, though `**` matches a directory and what is in it
            found.ignored += dict.fromkeys(part.ignored)
        else:
            _find_local(Path(source), known, names, found)
    if not found.files:
        raise CorpusError(f"nothing to read in {', '.join(map(str, inputs))}: no file ends in {names}")
    _require_distinct(found.files)
    return found


def _find_local(path: Path, known: Callable[[str], bool], names: str, found: Found) -> None:
    if not path.exists():
        raise CorpusError(f"{path} does not exist")
    if path.is_dir():
        _add_directory(path, known, found, ())
    elif not path.is_file():
        raise CorpusError(f"{path} is a pipe or a device; save what it gives to a file ending in {names}")
    elif not known(str(path)):
        raise CorpusError(f"{path}: unknown extension {path.suffix!r}; known are {names}")
    else:
        found.files.append(str(path))


def _add_directory(directory: Path, known: Callable[[str], bool], found: Found, above: tuple[Path, ...]) -> None:
    above = (*above, directory.resolve())
    if is_dataset(directory):
        found.files.append(str(directory))
    elif above[-1] not in above[:-1]:  # else a symbolic link has led back up
        try:
            inside = sorted(directory.iterdir())
        except OSError as error:
            raise CorpusError(f"{directory} cannot be listed: {error.strerror}") from error
        for path in inside:
            _take(path, known, found, above)


def _take(path: Path, known: Callable[[str], bool], found: Found, above: tuple[Path, ...]) -> None:
    hidden = path.name.startswith(".")
    if path.is_dir() and not hidden:
        _add_directory(path, known, found, above)
    else:
        readable = known(str(path)) and (path.is_file() or not path.exists())
        (found.files if readable and not hidden else found.ignored).append(str(path))


def is_dataset(path: Path) -> bool:
    return any((path / marker).is_file() for marker in DATASET_MARKERS)


def _find_remote(url: str, known: Callable[[str], bool], names: str, found: Found) -> None:
    fs, path = filesystem(url)
    try:
        with as_os_errors():
            listed = dict(_listing(fs, path, url, known))
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        raise CorpusError(
            f"{url} does not exist, or cannot be reached" if missing else f"{url} cannot be listed: {error}"
        ) from error
    if not listed:
        raise CorpusError(f"{url} matches nothing" if _has_magic(path) else f"{url} does not exist")
    for name, size in sorted(listed.items()):
        source = fs.unstrip_protocol(name)
        hidden = any(part.startswith(".") for part in name.removeprefix(path).split("/"))
        if known(source) and not hidden:
            found.files.append(source)
            found.sizes[source] = size
        elif name == path:
            raise CorpusError(f"{url}: unknown extension {extension(url)!r}; known are {names}")
        else:
            found.ignored.append(source)


def _has_magic(path: str) -> bool:
    return any(letter in path for letter in "*[")  # a ? begins the query of a URL


def _listing(fs: Any, path: str, url: str, known: Callable[[str], bool]) -> Iterator[tuple[str, int | None]]:
    """(path, size if the listing tells) of all files that a URL names."""
    if _has_magic(path):
        for name, info in fs.glob(path, detail=True).items():
            if info["type"] == "directory":
                yield from _listing(fs, name.rstrip("/") + "/", url, known)
            else:
                yield name, info["size"]
        return
    if not url.startswith(HTTP) or known(url):
        info = fs.info(path)
        if info["type"] != "directory":
            yield path, info["size"]
            return
    for name, info in fs.find(path, detail=True).items():
        if not name.endswith("/"):  # an empty object that stands for a directory
            yield name, info["size"]


def _require_distinct(files: Sequence[str]) -> None:
    first: dict[str, str] = {}
    for path in files:
        place = path if is_url(path) else os.path.realpath(path)
        if place in first:
            again = "" if path == first[place] else f", first as {first[place]}"
            raise CorpusError(
                f"{path} is among the inputs twice{again}: its text would count double (a directory or a pattern may "
                "hold what is also named by itself, or by --split-files)"
            )
        first[place] = path
    for place, path in first.items():
        directory = os.path.dirname(place)
        if path.endswith(".arrow") and (dataset := first.get(directory) or first.get(os.path.dirname(directory))):
            raise CorpusError(f"{path} is part of the dataset {dataset}, which is among the inputs, too: leave out one")
