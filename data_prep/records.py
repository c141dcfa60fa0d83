"""What readers read and give: units of the input, and the records in them."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

NORMALIZATIONS: Final = ("none", "NFC", "NFD", "NFKC", "NFKD")
MAX_RECORD_BYTES: Final = 1 << 30


@dataclass(frozen=True)
class Document:
    text: str
    source: str
    line: int  # where it begins: line, row or record, from 1; in a unit that starts within a text file, of that unit

    @cached_property
    def utf8(self) -> bytes:
        return self.text.encode()


@dataclass(frozen=True)
class Invalid:
    reason: str
    source: str
    line: int


Record = Document | Invalid


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of one input that can be read by itself.

    `start` and `stop` count bytes of a plain .jsonl or .txt (the documents that begin there), row groups of a .parquet,
    rows of a dataset on disk, shards of one that is read by name. Every other input is one unit.
    """

    source: str
    start: int = 0
    stop: int | None = None  # None: to the end
    bytes: int = 0  # of input, for progress; of compressed and columnar files an estimate
    source_bytes: int | None = None  # size of the whole input when this was planned; None: unknown


@dataclass(frozen=True)
class Reading:
    """How to read: all that decides which records a unit holds, and small enough to send to any process."""

    text_key: str = "text"
    txt_documents: str = "file"
    normalization: str = "none"
    max_record_bytes: int = MAX_RECORD_BYTES


def finished(record: Record, reading: Reading) -> Record:
    """The record as it is tokenized: normalized, and invalid if its text cannot be stored."""
    if isinstance(record, Invalid):
        return record
    if _exceeds(record.text, reading.max_record_bytes):
        return too_long(record.source, record.line, reading)
    if record.text.isascii():
        return record
    try:
        _ = record.utf8  # the document keeps it
    except UnicodeEncodeError:
        return Invalid("the text holds half of a surrogate pair, which is not a character", record.source, record.line)
    if reading.normalization == "none":
        return record
    return replace(record, text=unicodedata.normalize(reading.normalization, record.text))  # type: ignore[arg-type]


def _exceeds(text: str, limit: int) -> bool:
    """Whether it has more bytes of UTF-8, of which a character has at most four."""
    return len(text) > limit or (4 * len(text) > limit and len(text.encode(errors="replace")) > limit)


def too_long(source: str, line: int, reading: Reading) -> Invalid:
    return Invalid(f"it has more than {reading.max_record_bytes:,} bytes (--max-record-bytes)", source, line)
