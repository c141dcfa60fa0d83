"""Rows of L tokens out of a split: what the model reads, what it predicts, and where documents begin."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from ctypes import Structure, byref, c_int32, c_int64, c_uint64, c_void_p
from functools import cache, cached_property, partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mamba_pretrain.compiled import BuildError, Library
from mamba_pretrain.data.dataset import open_split
from mamba_pretrain.data.packs import HOW, Pack
from mamba_pretrain.data.shards import Shard, ShardError

IGNORE: Final = -100  # the label that torch's cross entropy leaves out
PACKINGS: Final = ("windows", *HOW)
# Of the compiled functions: what rows are cut by, and the tables and counts of their Source.
KINDS: Final = (
    "windows",  # where documents begin, and how many there are
    "searched",  # the index's byte offsets and its documents, and how many there are of each
    "packed",  # Pack.layout
)
WIDTHS: Final = (1, 2, 4, 8)  # bytes of a token
LIBRARY: Final = Library(
    "rows",
    Path(__file__).parent / "csrc",
    "rows.cpp",
    tuple(f"rows_{kind}_{width}" for kind in KINDS for width in WIDTHS),
    ("-std=c++17", "-O3", "-fPIC"),
)

Functions = dict[tuple[str, int], Any]  # by kind and width of a token

log = logging.getLogger("mamba_pretrain")


class Source(Structure):
    """What all rows of a split are read from; void pointers are addresses of arrays."""

    _fields_ = (
        ("tokens", c_void_p),
        ("n_tokens", c_int64),
        ("limit", c_uint64),
        ("length", c_int64),
        ("tables", c_void_p * 3),
        ("counts", c_int64 * 2),
    )


class Block(NamedTuple):
    """B rows of L tokens."""

    input_ids: NDArray[np.int64]  # (B, L)
    labels: NDArray[np.int64]  # (B, L): the next token of the document, IGNORE where there is none
    seq_idx: NDArray[np.int32]  # (B, L): the documents of a row, counted from 0; the state starts anew where it changes
    padding: NDArray[np.int64]  # (B,): positions of each row that hold no token

    @classmethod
    def empty(cls, count: int, length: int) -> Block:
        # One allocation for both, which the C library keeps for the next block: new pages cost more than reading does.
        both = np.empty((2, count, length), np.int64)
        return cls(both[0], both[1], np.empty((count, length), np.int32), np.empty(count, np.int64))

    @classmethod
    def at(cls, outputs: Outputs, count: int, length: int) -> Block:
        """The block in memory that somebody else holds."""
        wide = (count, length)
        types = ((c_int64, wide), (c_int64, wide), (c_int32, wide), (c_int64, (count,)))
        return cls(*(_array(at, kind, shape) for at, (kind, shape) in zip(outputs, types, strict=True)))

    def outputs(self) -> Outputs:
        ids, labels, seq_idx, padding = (part.ctypes.data for part in self)
        return ids, labels, seq_idx, padding


class Piece(NamedTuple):
    start: int  # token of the split
    tokens: int
    goes_on: bool  # its document has more after it, so that its last label is the token there


Outputs = tuple[int, ...]  # four addresses of a block's arrays
Reader = Callable[..., int]  # rows, count, *outputs as Rows.write; returns the first row that it cannot read, else -1


class Rows(Protocol):
    """One split cut into rows, which can be read in any order. Pickles as paths: loader processes map files themselves.

    A row is read from what lies in the page cache or on disk; nothing of it stays in memory.
    """

    seq_len: int
    n_rows: int  # in one epoch
    unread_tokens: int  # of the split, in no row

    def read(self, rows: NDArray[np.int64]) -> Block:
        """The rows of these numbers (B,), B at least 1, each in range(n_rows).

        Raises ShardError for a token outside the vocabulary: on the GPU it would be an illegal memory access without a
        name.
        """
        ...

    def write(self, rows: int, count: int, outputs: Outputs) -> None:
        """As `read`, of `count` rows whose numbers (int64) are at the address `rows`, into memory that the caller has.

        A training step wants tensors: to make them of arrays and ask those for their addresses takes as long as a row.
        """
        ...


def make_rows(directory: Path, split: str, *, seq_len: int, vocab_size: int, packing: str) -> Rows:
    """The rows of a split: "windows" of its stream, "best_fit" packs of whole documents, or one of "documents" each.

    The last two need a pack, which `python -m data_prep.pack_shards` makes. Raises ShardError where there is none, or
    no row at all.
    """
    if packing not in PACKINGS:
        raise ShardError(f"packing is {packing!r}: expected one of {', '.join(PACKINGS)}")
    shard, manifest = open_split(directory, split)
    if packing == "windows":
        return Windows(shard, seq_len, vocab_size)
    pack = Pack(directory, split, packing, seq_len, manifest.splits[split].files[f"{split}.idx"].sha256)
    return Packed(shard, pack, vocab_size)


def n_windows(shard: Shard, seq_len: int) -> int:
    """Whole windows in the split. The last token is only ever a label; up to seq_len - 1 before it are unused."""
    return max(shard.n_tokens - 1, 0) // seq_len


class _Pieces(ABC):
    """Rows that are pieces of documents, one after the other, and padding: `_fill` says how, csrc/rows.cpp is fast."""

    def __init__(self, shard: Shard, seq_len: int, n_rows: int, vocab_size: int) -> None:
        self.shard, self.seq_len, self.n_rows, self.vocab_size = shard, seq_len, n_rows, vocab_size
        # Of the stored numbers, read as unsigned ones: negative ids are the largest of those.
        self._limit = min(vocab_size, int(np.iinfo(shard.dtype).max) + 1)
        compiled_functions()  # built, or said to be missing, before a run begins, and before it forks loader processes

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_reader"}

    def read(self, rows: NDArray[np.int64]) -> Block:
        rows = np.ascontiguousarray(rows, np.int64)
        block = Block.empty(len(rows), self.seq_len)
        self.write(rows.ctypes.data, len(rows), block.outputs())
        return block

    def write(self, rows: int, count: int, outputs: Outputs) -> None:
        read = self._reader
        refused = 0 if read is None else read(rows, count, *outputs)
        if refused < 0:
            return
        block, numbers = Block.at(outputs, count, self.seq_len), _array(rows, c_int64, (count,)).tolist()
        for b in range(refused, count):
            self._fill(block, b, numbers[b])
            if read is not None:
                raise AssertionError(f"row {numbers[b]} of {self.shard.path} was refused for no reason")

    @abstractmethod
    def _pieces(self, row: int) -> list[Piece]:
        """Raises ShardError for what cannot be a row."""

    @cached_property
    def _reader(self) -> Reader | None:
        functions = compiled_functions()
        return None if functions is None else self._reader_of(functions)

    @abstractmethod
    def _reader_of(self, functions: Functions) -> Reader: ...

    def _source(self, tables: Sequence[int], counts: Sequence[int]) -> Any:
        """A reference to a Source, which it keeps alive."""
        shard = self.shard
        given = (c_void_p * 3)(*tables), (c_int64 * 2)(*counts)
        return byref(Source(shard.stored_address, shard.n_tokens, self._limit, self.seq_len, *given))

    def _fill(self, block: Block, b: int, row: int) -> None:
        assert 0 <= row < self.n_rows
        input_ids, labels, seq_idx = (part[b] for part in block[:3])
        column = number = 0
        for start, count, goes_on in self._pieces(row):
            tokens, end = self.shard.tokens(start, start + count + goes_on), column + count
            outside = (tokens < 0) | (tokens >= self.vocab_size)
            if outside.any():
                at = int(outside.argmax())
                raise ShardError(
                    f"{self.shard.path}.bin has token id {tokens[at]} at position {start + at:,}, the vocabulary has "
                    f"{self.vocab_size:,}: the file is damaged (see python -m data_prep.verify_shards), or the model "
                    "is for another tokenizer"
                )
            input_ids[column:end] = tokens[:count]
            labels[column:end] = tokens[1:] if goes_on else [*tokens[1:], IGNORE]
            seq_idx[column:end] = number
            column, number = end, number + (not goes_on)
        input_ids[column:], labels[column:], seq_idx[column:] = 0, IGNORE, number
        block.padding[b] = self.seq_len - column


class Windows(_Pieces):
    """Row i is tokens [i * L, (i + 1) * L) of the split, wherever documents begin and end."""

    def __init__(self, shard: Shard, seq_len: int, vocab_size: int) -> None:
        super().__init__(shard, seq_len, n_windows(shard, seq_len), vocab_size)
        self.unread_tokens = shard.n_tokens - self.n_rows * seq_len
        if self.n_rows == 0:
            raise ShardError(
                f"{shard.path} has {shard.n_tokens:,} tokens, fewer than one window of {seq_len:,} and its last label: "
                "use more data, or a shorter sequence length"
            )

    def _pieces(self, row: int) -> list[Piece]:
        first, end = row * self.seq_len, (row + 1) * self.seq_len
        edges = [first, *self.shard.document_starts(first + 1, end + 1).tolist()]
        pieces = [Piece(start, stop - start, False) for start, stop in pairwise(edges)]
        return pieces if edges[-1] == end else [*pieces, Piece(edges[-1], end - edges[-1], True)]

    def _reader_of(self, functions: Functions) -> Reader:
        shard, length = self.shard, self.seq_len
        read = functions["windows", shard.dtype.itemsize]
        if (starts := shard.resident_starts) is not None:
            return partial(read, self._source([shard.starts_address], [len(starts)]))
        offsets, documents, *counts = shard.index_addresses
        searched = partial(functions["searched", shard.dtype.itemsize], self._source([offsets, documents], counts))

        def search(rows: int, count: int, *outputs: int) -> int:
            refused: int = searched(rows, count, *outputs)
            if refused < 0:
                return refused
            # An index that is not as plain as ours, or damaged.
            for b, row in enumerate(_array(rows, c_int64, (count,)).tolist()):
                starts = shard.document_starts(row * length + 1, (row + 1) * length + 1)
                source = self._source([starts.ctypes.data], [len(starts)])
                if read(source, rows + 8 * b, 1, *row_of(outputs, b, length)) >= 0:
                    return b
            return -1

        return search


class Packed(_Pieces):
    """Rows as a pack says: whole documents, and pieces of those that are longer than a row, padded at the end.

    The label of a piece's last token is the token after it where the document goes on. Padding has id 0, no label, and
    a number of its own in seq_idx, the row's last.
    """

    def __init__(self, shard: Shard, pack: Pack, vocab_size: int) -> None:
        super().__init__(shard, pack.seq_len, pack.n_rows, vocab_size)
        self.pack, self.unread_tokens = pack, pack.unread_tokens
        if self.n_rows == 0:
            raise ShardError(f"{shard.path} has no document of two tokens or more: there is nothing to predict")

    def _pieces(self, row: int) -> list[Piece]:
        pieces, column = [], 0
        for start, signed in self.pack.pieces(row):
            piece = Piece(start, abs(signed), signed < 0)
            if not 0 <= start < start + piece.tokens + piece.goes_on <= self.shard.n_tokens or (
                column + piece.tokens > self.seq_len
            ):
                raise ShardError(
                    f"{self.pack.path}: row {row:,} has {piece.tokens:,} tokens from {start:,} on at column {column:,} "
                    f"of {self.seq_len:,}, of a split of {self.shard.n_tokens:,}: it is damaged; make it again by "
                    "data_prep.pack_shards"
                )
            pieces.append(piece)
            column += piece.tokens
        return pieces

    def _reader_of(self, functions: Functions) -> Reader:
        *tables, n_pieces, n_rows = self.pack.layout
        return partial(functions["packed", self.shard.dtype.itemsize], self._source(tables, [n_pieces, n_rows]))


def row_of(outputs: Sequence[int], b: int, length: int) -> Outputs:
    """Where row b of a block is."""
    ids, labels, seq_idx, padding = outputs
    before = b * length
    return ids + 8 * before, labels + 8 * before, seq_idx + 4 * before, padding + 8 * b


def _array(address: int, kind: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    return np.ctypeslib.as_array((kind * math.prod(shape)).from_address(address)).reshape(shape)


@cache
def compiled_functions() -> Functions | None:
    """The functions of csrc/rows.cpp, built if need be; None, which is said once, where they cannot be."""
    try:
        library = LIBRARY.load()
    except BuildError as error:
        log.warning("rows are read by numpy, which takes several times as long: %s; %s", error, error.mend)
        return None
    functions: Functions = {}
    for kind, width in product(KINDS, WIDTHS):
        functions[kind, width] = function = getattr(library, f"rows_{kind}_{width}")
        function.argtypes = [c_void_p, c_void_p, c_int64, *[c_void_p] * 4]  # Source, rows, their number, Outputs
        function.restype = c_int64
    return functions
