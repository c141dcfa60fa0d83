"""Text files give the same documents however they are divided into units, and in bounded memory."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data_prep import streams
from data_prep.corpus import Corpus
from data_prep.records import Document, Invalid
from data_prep.streams import CorpusError
from tests.helpers.inputs import write_bytes, write_zst

LINES = st.lists(st.sampled_from(["", " ", "\r", "a", "b c", "\u00e9\u00e9", "long " * 5, "\t x"]), max_size=12)
MIB = 1 << 20


@pytest.mark.parametrize("mode", ["line", "blank-line", "jsonl"])
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=LINES, mark=st.booleans(), end=st.sampled_from(["", "\n"]), unit_bytes=st.integers(1, 40))
@example(lines=["", "a"], mark=True, end="", unit_bytes=3)  # a border right behind the byte order mark
def test_any_unit_size_gives_the_same_documents(
    tmp_path: Path, mode: str, lines: list[str], mark: bool, end: str, unit_bytes: int
) -> None:
    if mode == "jsonl":
        lines = [json.dumps({"text": line}) if line.strip() else line for line in lines]
    path = tmp_path / ("a.jsonl" if mode == "jsonl" else "a.txt")
    path.write_bytes(codecs.BOM_UTF8 * mark + ("\n".join(lines) + end).encode())
    corpus = Corpus([path], txt_documents="file" if mode == "jsonl" else mode)
    (whole,) = corpus.units(MIB)
    expected = [record.text for record in corpus.records(whole)]
    if mode == "line":
        assert expected == [line.rstrip("\r") for line in lines if line.strip()]
    units = corpus.units(unit_bytes)
    found = [[record.text for record in corpus.records(unit)] for unit in units]
    assert [text for texts in found for text in texts] == expected
    assert sum(unit.bytes for unit in units) == path.stat().st_size
    assert max(unit.bytes for unit in units) <= max(unit_bytes, 4)  # none is cut in the byte order mark


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
@pytest.mark.parametrize("unit_bytes", [1, 7, 20, 64, 1000])
def test_an_invalid_line_is_named_by_its_number_in_the_file_whatever_unit_it_is_in(
    tmp_path: Path, name: str, unit_bytes: int
) -> None:
    good = b'{"text": "good"}\n'
    path = write_bytes(tmp_path / name, good * 5 + b"\n" + b'{"text": "\xff"}\n' + good * 3)
    corpus = Corpus([path], txt_documents="line")
    bad = [(unit, r) for unit in corpus.units(unit_bytes) for r in corpus.records(unit) if isinstance(r, Invalid)]
    assert len(bad) == 1
    assert str(corpus.refusal(*bad[0])).startswith(f"{path}:7: byte 0xff is not UTF-8")


LONG = [
    ("a.jsonl", "file", b'{"text": "ok"}\n{"text": "%s"}\n{"text": "last"}\n', 2),
    ("a.txt", "line", b"ok\n%s\nlast\n", 2),
    ("a.txt", "blank-line", b"ok\n\nx\n%s\n\nlast\n", 3),
    ("a.fa", "file", b">1\nok\n>2\n%s\n>3\nlast\n", 3),
]


@pytest.mark.parametrize(("name", "mode", "content", "line"), LONG)
@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_a_huge_line_is_invalid_and_takes_no_more_memory_than_the_limit_allows(
    tmp_path: Path, name: str, mode: str, content: bytes, line: int, compression: str
) -> None:
    path = tmp_path / (name + compression)
    huge = content % (b"A" * (24 * MIB))
    if compression == ".gz":
        path.write_bytes(gzip.compress(huge, 1))
    elif compression == ".zst":
        write_zst(path, huge)
    else:
        path.write_bytes(huge)
    del huge
    corpus = Corpus([path], txt_documents=mode, on_error="skip", max_record_bytes=MIB)
    (unit,) = corpus.units(1 << 30)
    tracemalloc.start()
    try:
        records = list(corpus.records(unit))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * MIB or compression == ".zst"  # whose own bound is higher, see test_streams
    assert [record.text for record in records if isinstance(record, Document)] == ["ok", "last"]
    (bad,) = (record for record in records if isinstance(record, Invalid))
    assert (bad.line, bad.reason) == (line, f"it has more than {MIB:,} bytes (--max-record-bytes)")
    with pytest.raises(CorpusError, match=rf"{path.name}:{line}: it has more than .*--on-error skip"):
        list(Corpus([path], txt_documents=mode, max_record_bytes=MIB))


@pytest.mark.parametrize("limit", [1 << 12, 1 << 30])
@pytest.mark.parametrize("mode", ["line", "blank-line"])
def test_a_line_that_fills_many_units_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, mode: str
) -> None:
    path = write_bytes(tmp_path / "a.txt", b"x" * MIB + b"\n\nlast\n")
    whole, read = streams.open_raw, [0]

    class Counting(io.BufferedReader):
        def readline(self, size: int | None = -1) -> bytes:
            line = super().readline(size)
            read[0] += len(line)
            return line

    monkeypatch.setattr(streams, "open_raw", lambda source, **_: Counting(whole(source).detach()))  # type: ignore[union-attr]
    corpus = Corpus([path], txt_documents=mode, max_record_bytes=limit)
    records = [record for unit in corpus.units(MIB // 64) for record in corpus.records(unit)]
    assert [type(record).__name__ for record in records] == ["Invalid" if limit < MIB else "Document", "Document"]
    assert read[0] < 2.2 * MIB


@pytest.mark.parametrize("unit_bytes", [5, 64, 1000])
def test_blanks_longer_than_a_line_may_be_are_no_blank_line_in_any_unit(tmp_path: Path, unit_bytes: int) -> None:
    path = write_bytes(tmp_path / "a.txt", b"first\n" + b" " * 99 + b"\nsecond\n" + b" " * 98 + b"\nthird\n")
    corpus = Corpus([path], txt_documents="blank-line", on_error="skip", max_record_bytes=99)
    found = [record for unit in corpus.units(unit_bytes) for record in corpus.records(unit)]
    assert [type(record).__name__ for record in found] == ["Invalid", "Document"]


def test_many_lines_without_a_blank_one_between_them_are_bounded_like_one(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "a.txt", b"first\n\n" + b"line\n" * 100 + b"\nlast\n")
    corpus = Corpus([path], txt_documents="blank-line", on_error="skip", max_record_bytes=100)
    assert [document.text for document in corpus] == ["first", "last"]
    assert corpus.skipped == 1


def test_a_fasta_record_of_many_lines_is_bounded_too(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "a.fa", b">1\n" + b"ACGT\n" * 100 + b">2\nAC\n")
    corpus = Corpus([path], on_error="skip", max_record_bytes=100)
    assert [document.text for document in corpus] == ["AC"]
    assert corpus.skipped == 1


@pytest.mark.parametrize(("limit", "expected"), [(8, ["a" * 8]), (7, [])])
def test_a_txt_file_as_one_document_obeys_the_limit_to_the_byte(
    tmp_path: Path, limit: int, expected: list[str]
) -> None:
    corpus = Corpus([write_bytes(tmp_path / "a.txt", b"a" * 8)], on_error="skip", max_record_bytes=limit)
    assert [document.text for document in corpus] == expected
    assert corpus.skipped == 1 - len(expected)


def test_a_line_may_have_the_limit_with_its_line_feed(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "a.txt", b"1234567\n12345678\n123\n")
    corpus = Corpus([path], txt_documents="line", on_error="skip", max_record_bytes=8)
    assert [(document.text, document.line) for document in corpus] == [("1234567", 1), ("123", 3)]


@pytest.mark.slow
def test_a_line_of_two_gigabytes_is_read_over(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as stream:
        stream.write(b'{"text": "')
        stream.seek(2 << 30)  # zeros in between that take no place on the disk
        stream.write(b'"}\n{"text": "last"}\n')
    corpus = Corpus([path], on_error="skip", max_record_bytes=16 * MIB)
    tracemalloc.start()
    try:
        (document,) = corpus
        assert tracemalloc.get_traced_memory()[1] < 64 * MIB
    finally:
        tracemalloc.stop()
    assert (document.text, corpus.skipped) == ("last", 1)


def test_a_long_record_that_begins_with_blanks_is_not_a_blank_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("first\n" + 50 * " " + 200 * "x" + "\nlast\n")
    corpus = Corpus([path], txt_documents="line", max_record_bytes=100, on_error="skip")
    assert [document.text for document in corpus] == ["first", "last"]
    assert corpus.skipped == 1
