"""What is stored of an encoded document and what is known of it: its ids in the split's dtype, whether they decode to
its text, how many words it has. csrc/encodings.cpp is fast; without a compiler, the tokenizer and numpy do the same."""

from __future__ import annotations

import logging
from ctypes import c_char_p, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mamba_pretrain.compiled import BuildError, Library
from mamba_pretrain.data.tokenizer import Ids, Tokenizer

WIDTHS: Final = [(of_id, of_token) for of_id in (1, 4) for of_token in (2, 4)]  # bytes
LIBRARY: Final = Library(
    "encodings",
    Path(__file__).parent / "csrc",
    "encodings.cpp",
    ("encodings_words", *(f"encodings_store_{of_id}_{of_token}" for of_id, of_token in WIDTHS)),
    ("-std=c++17", "-O3", "-fPIC"),
)
HEAD: Final = 15  # bytes, as in encodings.cpp

log = logging.getLogger("mamba_pretrain")


class OutsideError(ValueError):
    """An encoding holds an id outside the tokenizer's vocabulary."""


class Encodings:
    """Takes what `tokenizer.encode_batch` gives, to be stored as `dtype`. Made in 10 ms, it serves many parts."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype[Any]) -> None:
        self.tokenizer, self.dtype = tokenizer, dtype
        self._table = _table(tokenizer)
        functions = compiled() or {}
        self._words = functions.get(("words",))
        self._store = {key[1]: function for key, function in functions.items() if key[2:] == (dtype.itemsize,)}

    def store(self, ids: Ids, utf8: bytes) -> tuple[NDArray[Any], bool]:
        """The ids (n,) as `dtype`, and whether they decode to exactly these bytes. Raises OutsideError."""
        tokenizer, store = self.tokenizer, self._store.get(ids.itemsize)
        if store is None:
            if ids.size and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
                raise self._outside(int(np.argmax((ids < 0) | (ids >= tokenizer.vocab_size))), ids)
            return ids.astype(self.dtype), tokenizer.decode_bytes(ids.tolist()) == utf8
        stored, table = np.empty(len(ids), self.dtype), self._table
        found = store(
            ids.ctypes.data,
            len(ids),
            tokenizer.vocab_size,
            stored.ctypes.data,
            *(table.addresses if table else (None, None, None)),
            tokenizer.drops_space,
            utf8,
            len(utf8),
        )
        if found < 0:
            raise self._outside(-1 - found, ids)
        return stored, found == 1 if table else tokenizer.decode_bytes(ids.tolist()) == utf8

    def words(self, utf8: bytes) -> int:
        """How many `str.split` makes of the text."""
        return len(utf8.decode().split()) if self._words is None else int(self._words(utf8, len(utf8)))

    def _outside(self, i: int, ids: Ids) -> OutsideError:
        return OutsideError(
            f"the tokenizer gives id {ids[i]}, its vocabulary has {self.tokenizer.vocab_size:,}: its file is damaged, "
            "or of a version that the installed library does not know"
        )


class _Table(NamedTuple):
    """What encodings.cpp knows a tokenizer's pieces by: `heads`, `bytes` and `ends` there."""

    arrays: tuple[NDArray[Any], ...]
    addresses: tuple[int, ...]


def _table(tokenizer: Tokenizer) -> _Table | None:
    if tokenizer.pieces is None:
        return None
    joined = np.frombuffer(b"".join(tokenizer.pieces) + bytes(HEAD), np.uint8)
    lengths = np.array([len(piece) for piece in tokenizer.pieces], np.int64)
    ends = lengths.cumsum()
    heads = np.empty((len(lengths), HEAD + 1), np.uint8)
    heads[:, :HEAD] = joined[(ends - lengths)[:, None] + np.arange(HEAD)]
    heads[:, HEAD] = np.minimum(lengths, 255)
    arrays = (heads, joined, ends)
    return _Table(arrays, tuple(array.ctypes.data for array in arrays))


@cache
def compiled() -> dict[tuple[Any, ...], Any] | None:
    """The functions of csrc/encodings.cpp, built if need be; None, which is said once, where they cannot be."""
    try:
        library = LIBRARY.load()
    except BuildError as error:
        log.warning("encodings are checked by Python, which takes several times as long: %s; %s", error, error.mend)
        return None
    words = library.encodings_words
    words.argtypes, words.restype = [c_char_p, c_int64], c_int64
    functions: dict[tuple[Any, ...], Any] = {("words",): words}
    for widths in WIDTHS:
        functions["store", *widths] = store = getattr(library, "encodings_store_{}_{}".format(*widths))
        store.argtypes = [c_void_p, c_int64, c_int64, *[c_void_p] * 4, c_int64, c_char_p, c_int64]
        store.restype = c_int64
    return functions
