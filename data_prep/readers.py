"""Documents out of text files: .txt, .jsonl and FASTA, plain or compressed, whole or by byte ranges."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import orjson

from data_prep.records import Document, Invalid, Reading, Record, Unit, too_long
from data_prep.streams import TooLong, blanks_before, content, lines


def byte_ranges(whole: Unit, unit_bytes: int) -> list[Unit]:
    """Units of `unit_bytes` each of a plain file, the last one shorter. None ends in a byte order mark, or with it."""
    total, unit_bytes = whole.source_bytes or 0, max(unit_bytes, len(codecs.BOM_UTF8) + 1)
    starts = range(0, total, unit_bytes) if total > unit_bytes else range(1)
    stops = [*starts[1:], total]
    return [replace(whole, start=a, stop=b, bytes=b - a) for a, b in zip(starts, stops, strict=True)]


def _lines(unit: Unit, reading: Reading) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of the lines that begin in the unit."""
    for number, offset, line in lines(unit.source, reading.max_record_bytes, unit.start, unit.stop):
        if unit.stop is not None and offset >= unit.stop:
            return
        if number:
            yield number, line


def read_txt(unit: Unit, reading: Reading) -> Iterator[Record]:
    if reading.txt_documents == "file":
        yield _text(content(unit.source, reading.max_record_bytes), unit, 1, reading)
    elif reading.txt_documents == "line":
        for number, line in _lines(unit, reading):
            if isinstance(line, TooLong) or line.strip():
                yield _text(line if isinstance(line, TooLong) else line.rstrip(b"\r\n"), unit, number, reading)
    else:
        yield from _blocks(unit, reading)


def _blocks(unit: Unit, reading: Reading) -> Iterator[Record]:
    """What stands between blank lines: the blocks that begin in the unit, to their end."""
    block: list[bytes] = []
    begin = size = 0

    def record() -> Record:
        whole = TooLong(block[0]) if size > reading.max_record_bytes else b"".join(block).rstrip(b"\r\n")
        return _text(whole, unit, begin, reading)

    blanks = blanks_before(unit.source, unit.start - 1) if unit.start else 0
    before = blanks is None  # in a block of the unit before
    for number, offset, line in lines(unit.source, reading.max_record_bytes, unit.start, unit.stop):
        blank = not isinstance(line, TooLong) and not line.strip()
        if number == 0:
            before = before or not blank or (blanks or 0) + len(line) > reading.max_record_bytes
            continue
        if blank and block:
            yield record()
            block, size = [], 0
        if not block and unit.stop is not None and offset >= unit.stop:
            return
        before = before and not blank
        if blank or before:
            continue
        begin = begin if block else number
        size += reading.max_record_bytes + 1 if isinstance(line, TooLong) else len(line)
        if not block or size <= reading.max_record_bytes:
            block.append(line)
        else:
            del block[1:]
    if block:
        yield record()


def _text(utf8: bytes, unit: Unit, line: int, reading: Reading) -> Record:
    if isinstance(utf8, TooLong):
        return too_long(unit.source, line, reading)
    try:
        return Document(utf8.decode(), unit.source, line)
    except UnicodeDecodeError as error:
        line += utf8.count(b"\n", 0, error.start)
        return Invalid(f"byte {utf8[error.start]:#04x} is not UTF-8", unit.source, line)


def read_jsonl(unit: Unit, reading: Reading) -> Iterator[Record]:
    for number, line in _lines(unit, reading):
        if isinstance(line, TooLong):
            yield too_long(unit.source, number, reading)
            continue
        if not line.strip():
            continue
        try:
            fields = _parsed(line)
        except UnicodeDecodeError as error:
            yield Invalid(f"byte {line[error.start]:#04x} is not UTF-8", unit.source, number)
        except (ValueError, RecursionError) as error:
            yield Invalid(f"not JSON ({error})", unit.source, number)
        else:
            yield text_field(fields, reading.text_key, unit.source, number)


def _parsed(line: bytes) -> Any:
    """The value of a line. Raises UnicodeDecodeError, ValueError, RecursionError."""
    try:
        return orjson.loads(line)
    except ValueError:  # it takes neither NaN nor half of a surrogate pair; Python's own does, and says what is wrong
        return json.loads(line.decode())


def text_field(fields: object, key: str, source: str, line: int) -> Record:
    if not isinstance(fields, dict):
        return Invalid(f"a JSON {type(fields).__name__}, expected an object with the key {key!r}", source, line)
    if key not in fields:
        return Invalid(f"no key {key!r} (--text-key), only {sorted(fields)}", source, line)
    return string(fields[key], key, source, line)


def string(value: object, key: str, source: str, line: int) -> Record:
    if not isinstance(value, str):
        return Invalid(f"{key!r} is {type(value).__name__}, expected a string", source, line)
    return Document(value, source, line)


def read_fasta(unit: Unit, reading: Reading) -> Iterator[Record]:
    """One document a record: its letters in the case they stand in, without header, comments and whitespace."""
    letters: list[str] = []
    begin, size, invalid = 0, 0, ""

    def record() -> Record:
        if size > reading.max_record_bytes:
            return too_long(unit.source, begin, reading)
        return Invalid(invalid, unit.source, begin) if invalid else Document("".join(letters), unit.source, begin)

    for number, line in _lines(unit, reading):
        if line.startswith(b";"):  # a comment
            continue
        if line.startswith(b">"):
            if begin:
                yield record()
            letters, begin, size, invalid = [], number, 0, ""
        elif (isinstance(line, TooLong) or line.strip()) and not begin:
            begin, invalid = number, "sequence before the first header, a line that starts with '>'"
        elif not line.isascii():
            invalid = f"the record has a byte beyond ASCII in line {number}"
        else:
            size += reading.max_record_bytes + 1 if isinstance(line, TooLong) else len(line)
            if size > reading.max_record_bytes:
                letters.clear()
            else:
                letters.append(b"".join(line.split()).decode("ascii"))
    if begin:
        yield record()
