"""Tensors by name in any number of safetensors files, each file holding flat pieces of some of them.

Every way of sharding that the engines know (whole, rows of FSDP2, ranges of ZeRO's flat groups, ZeRO-3's partitions)
leaves a rank with contiguous ranges of flattened tensors. So a rank writes what it holds without any communication, and
a reader puts together whatever ranges it needs, however many ranks wrote them.

In a file, a whole tensor stands under its name with its shape. A piece is one-dimensional, stands under
"NAME[START:STOP]" (elements of the flattened tensor), and the file's metadata has the whole shape under NAME.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # safetensors' names of dtypes
_KEY = re.compile(r"(.+)\[(\d+):(\d+)\]")
_BLOCK_BYTES = 1 << 24  # written and hashed at a time


class PiecesError(ValueError):
    """A file cannot be read, or a range of a tensor is in none of the files."""


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + data.numel()) of a flattened tensor."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    start: int
    data: Tensor  # one-dimensional, contiguous
    copy: tuple[int, int] = (0, 1)  # (i, n): n ranks hold these elements, this is number i; each writes an nth

    @property
    def stop(self) -> int:
        return self.start + self.data.numel()

    def share(self) -> Piece:
        """What this rank writes of a piece that several hold."""
        (i, n), size = self.copy, self.data.numel()
        first, last = size * i // n, size * (i + 1) // n
        return replace(self, start=self.start + first, data=self.data[first:last], copy=(0, 1))


def write_pieces(path: Path, pieces: Iterable[Piece]) -> dict[str, Any]:
    """Writes the pieces (empty ones left out) as a safetensors file, synced to disk; returns its "bytes" and "sha256".

    Our own writer of that format, because it hashes what passes through it (a second pass over the file would double
    the time), copies from a GPU one tensor at a time, and lets Python run meanwhile: a save in the background must not
    stop the training.
    """
    pieces = [piece for piece in pieces if piece.data.numel()]
    header: dict[str, Any] = {}
    shapes: dict[str, str] = {"format": "pt"}
    position = 0
    for piece in pieces:
        size = piece.data.numel() * piece.data.element_size()
        key, shape = piece.name, list(piece.shape)
        if piece.data.numel() != math.prod(piece.shape):
            key, shape = f"{piece.name}[{piece.start}:{piece.stop}]", [piece.data.numel()]
            shapes[piece.name] = json.dumps(piece.shape)
        header[key] = {
            "dtype": _NAMES[piece.data.dtype],
            "shape": shape,
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps({"__metadata__": shapes, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    digest, written = hashlib.sha256(), 0
    head = len(text).to_bytes(8, "little") + text
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as hasher:
        for block in itertools.chain([memoryview(head)], *(_blocks(piece.data) for piece in pieces)):
            hashed = hasher.submit(digest.update, block)
            written += len(block)
            while block:
                block = block[file.write(block) :]
            hashed.result()
        os.fsync(file.fileno())
    return {"bytes": written, "sha256": digest.hexdigest()}


class Pieces:
    """Reads tensors from the files that `write_pieces`, or any other writer of safetensors, made."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._found: dict[str, list[tuple[int, int, Any, str]]] = {}  # name: start, stop, file, key
        for path in self.paths:
            try:
                file = safe_open(path, framework="pt")
                self._index(file)
            except (SafetensorError, OSError, PiecesError) as error:
                raise PiecesError(f"{path} is not a safetensors file: {error}") from error
        for parts in self._found.values():
            parts.sort(key=lambda part: part[:2])

    def _index(self, file: Any) -> None:
        metadata = file.metadata() or {}
        for key in file.keys():  # noqa: SIM118 - the file is no mapping
            shape = tuple(file.get_slice(key).get_shape())
            name, start, stop = key, 0, math.prod(shape)
            if match := _KEY.fullmatch(key):
                name, start, stop = match[1], int(match[2]), int(match[3])
                if name not in metadata:
                    raise PiecesError(f"no shape of {name}, of which it has {key}")
                shape = tuple(json.loads(metadata[name]))
            self.shapes[name] = shape
            self._found.setdefault(name, []).append((start, stop, file, key))

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def check(self, piece: Piece) -> None:
        """Raises PiecesError where `piece` could not be read, or is of a tensor of another shape. Reads nothing."""
        if self.shapes.get(piece.name, piece.shape) != piece.shape:
            raise PiecesError(f"{piece.name} has the shape {self.shapes[piece.name]}, expected is {piece.shape}")
        for _ in self._parts(piece.name, piece.start, piece.stop):
            pass

    def tensor(self, name: str) -> Tensor:
        """The whole tensor, on the CPU; raises PiecesError where a part of it is missing."""
        shape = self.shapes.get(name, ())
        return self.read(name, 0, math.prod(shape)).view(shape)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor, on the CPU. Reads no more of the files than that."""
        found = self._parts(name, start, stop)
        parts: list[Tensor] = [file.get_tensor(key).view(-1)[first:last] for file, key, first, last in found]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts) if parts else torch.empty(0)

    def _parts(self, name: str, start: int, stop: int) -> list[tuple[Any, str, int, int]]:
        """File, key and elements within it, in order, that make up [start, stop)."""
        found, at = [], start
        for first, last, file, key in self._found.get(name, ()):
            if first <= at < last and at < stop:
                end = min(stop, last)
                found.append((file, key, at - first, end - first))
                at = end
        if at < stop:
            what = f"elements {at} to {stop} of {name} are" if name in self.shapes else f"{name} is"
            raise PiecesError(
                f"{what} in none of {', '.join(map(str, self.paths[:4]))}{', ...' * (len(self.paths) > 4)}"
            )
        return found


def _blocks(data: Tensor) -> Iterator[memoryview]:
    raw = memoryview(data.detach().cpu().contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]
    for at in range(0, len(raw), _BLOCK_BYTES):
        yield raw[at : at + _BLOCK_BYTES]
