"""What is stored of an encoded document and what is known of it: its ids in the split's dtype, whether they decode to
its text, how many words it has. csrc/encodings.cpp is fast; without a compiler, the tokenizer and numpy do the same."""

from __future__ import annotations

import logging
from ctypes import c_char_p, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, Final

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
PADDING: Final = bytes(8)  # the compiled comparison reads so far

log = logging.getLogger("mamba_pretrain")


class OutsideError(ValueError):
    """An encoding holds an id outside the tokenizer's vocabulary."""


class Encodings:
    """Takes what `tokenizer.encode_batch` gives, to be stored as `dtype`."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype[Any]) -> None:
        self._tokenizer, self._dtype = tokenizer, dtype
        self._bytes, self._ends = b"", None
        if tokenizer.pieces is not None:
            self._bytes = b"".join(tokenizer.pieces) + PADDING
            self._ends = np.cumsum([len(piece) for piece in tokenizer.pieces], dtype=np.int64)

    def store(self, ids: Ids, utf8: bytes) -> tuple[NDArray[Any], bool]:
        """The ids (n,) as `dtype`, and whether they decode to exactly these bytes. Raises OutsideError."""
        functions, tokenizer = compiled(), self._tokenizer
        if functions is None:
            if ids.size and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
                raise self._outside(int(np.argmax((ids < 0) | (ids >= tokenizer.vocab_size))), ids)
            return ids.astype(self._dtype), tokenizer.decode_bytes(ids.tolist()) == utf8
        stored, ends = np.empty(len(ids), self._dtype), self._ends
        found = functions["store", ids.itemsize, stored.itemsize](
            ids.ctypes.data,
            len(ids),
            tokenizer.vocab_size,
            stored.ctypes.data,
            self._bytes,
            None if ends is None else ends.ctypes.data,
            tokenizer.drops_space,
            utf8,
            len(utf8),
        )
        if found < 0:
            raise self._outside(-1 - found, ids)
        return stored, found == 1 if ends is not None else tokenizer.decode_bytes(ids.tolist()) == utf8

    def words(self, utf8: bytes) -> int:
        """How many `str.split` makes of the text."""
        functions = compiled()
        return len(utf8.decode().split()) if functions is None else int(functions["words",](utf8, len(utf8)))

    def _outside(self, i: int, ids: Ids) -> OutsideError:
        return OutsideError(
            f"the tokenizer gives id {ids[i]}, its vocabulary has {self._tokenizer.vocab_size:,}: its file is damaged, "
            "or of a version that the installed library does not know"
        )


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
        store.argtypes = [c_void_p, c_int64, c_int64, c_void_p, c_char_p, c_void_p, c_int64, c_char_p, c_int64]
        store.restype = c_int64
    return functions
