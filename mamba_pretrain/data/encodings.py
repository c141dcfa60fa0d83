"""What is stored of an encoded document and what is known of it: its ids in the split's dtype, whether they decode to
its text, how many words it has. csrc/encodings.cpp is fast; without a compiler, the tokenizer and numpy do the same."""

from __future__ import annotations

import logging
from ctypes import POINTER, Structure, c_char_p, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np

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
SHORT: Final = 1 << 16  # ids of a document that take memory of their own twice; one of 2^31 would be noticed

log = logging.getLogger("mamba_pretrain")


class OutsideError(ValueError):
    """An encoding holds an id outside the tokenizer's vocabulary."""


class Encodings:
    """Takes what `tokenizer.encode_batch` gives, to be stored as `dtype`. Made in up to 0.1 s, it serves many parts."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype[Any]) -> None:
        self.tokenizer, self.dtype = tokenizer, dtype
        functions = compiled() or {}
        self._words = functions.get(("words",))
        self._store = {key[1]: function for key, function in functions.items() if key[2:] == (dtype.itemsize,)}
        self._pieces = _Pieces.of(tokenizer)
        self._room = self._make_room(SHORT)

    def _make_room(self, n: int) -> tuple[memoryview, int]:
        """Bytes for n ids, and their address."""
        room = np.empty(n, self.dtype)
        return room.data.cast("B"), room.ctypes.data

    def append(self, ids: Ids, utf8: bytes, tokens: bytearray) -> bool:
        """Adds the ids (n,) as `dtype` to the tokens; whether they decode to exactly these bytes. Raises OutsideError,
        and then adds nothing."""
        tokenizer, store, n = self.tokenizer, self._store.get(ids.itemsize), ids.size
        if store is None:
            if n and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
                raise self._outside(int(np.argmax((ids < 0) | (ids >= tokenizer.vocab_size))), ids)
            tokens += ids.astype(self.dtype).data
            return tokenizer.decode_bytes(ids.tolist()) == utf8
        # A few ids are copied in a tenth of the time that numpy takes to say where they are.
        given: bytes | int
        given, (stored, address) = (ids.tobytes(), self._room) if n <= SHORT else (ids.ctypes.data, self._make_room(n))
        found = store(self._pieces, given, n, address, utf8, len(utf8))
        if found < 0:
            raise self._outside(-1 - found, ids)
        tokens += stored[: n * self.dtype.itemsize]
        return found == 1 if self._pieces.heads else tokenizer.decode_bytes(ids.tolist()) == utf8

    def words(self, utf8: bytes) -> int:
        """How many `str.split` makes of the text."""
        return len(utf8.decode().split()) if self._words is None else int(self._words(utf8, len(utf8)))

    def _outside(self, i: int, ids: Ids) -> OutsideError:
        return OutsideError(
            f"the tokenizer gives id {ids[i]}, its vocabulary has {self.tokenizer.vocab_size:,}: its file is damaged, "
            "or of a version that the installed library does not know"
        )


class _Pieces(Structure):
    """What encodings.cpp knows a tokenizer's pieces by."""

    _fields_: ClassVar = [
        ("number", c_int64),
        ("heads", c_void_p),
        ("bytes", c_void_p),
        ("ends", c_void_p),
        ("drops_space", c_int64),
    ]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> _Pieces:
        if tokenizer.pieces is None:
            return cls(number=tokenizer.vocab_size)
        joined = np.frombuffer(b"".join(tokenizer.pieces) + bytes(HEAD), np.uint8)
        lengths = np.array([len(piece) for piece in tokenizer.pieces], np.int64)
        ends = lengths.cumsum()
        heads = np.empty((len(lengths), HEAD + 1), np.uint8)
        heads[:, :HEAD] = joined[(ends - lengths)[:, None] + np.arange(HEAD)]
        heads[:, HEAD] = np.minimum(lengths, 255)
        arrays = heads, joined, ends
        pieces = cls(tokenizer.vocab_size, *(array.ctypes.data for array in arrays), tokenizer.drops_space)
        pieces._arrays = arrays  # these are to live as long
        return pieces


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
        store.argtypes = [POINTER(_Pieces), c_void_p, c_int64, c_void_p, c_char_p, c_int64]
        store.restype = c_int64
    return functions
