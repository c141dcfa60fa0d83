"""Bytes of compressed files, whatever they were compressed with, and in bounded memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from data_prep.streams import extension, lines, open_bytes
from tests.helpers.inputs import write_bytes

MIB = 1 << 20


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a/b.jsonl", ".jsonl"),
        ("a.b/c.jsonl.zst", ".jsonl.zst"),
        ("a/b.gz", ".gz"),
        ("a.gz/b", ""),
        ("https://host/a.jsonl.gz?token=x.y#z", ".jsonl.gz"),
        ("s3://bucket/what?.txt", ".txt"),
    ],
)
def test_the_extension_is_that_of_the_name(source: str, expected: str) -> None:
    assert extension(source) == expected


def test_lines_from_the_middle_begin_with_the_rest_of_the_one_before(tmp_path: Path) -> None:
    path = str(write_bytes(tmp_path / "a.txt", b"one\ntwo\nthree"))
    assert list(lines(path, 100)) == [(1, 0, b"one\n"), (2, 4, b"two\n"), (3, 8, b"three")]
    assert list(lines(path, 100, 4)) == [(0, 3, b"\n"), (1, 4, b"two\n"), (2, 8, b"three")]
    assert list(lines(path, 100, 5)) == [(0, 4, b"two\n"), (1, 8, b"three")]
    assert list(lines(path, 100, 5, 6)) == [(0, 4, b"tw")]  # nothing begins before 6: so far and no further
    assert list(lines(path, 1, 5, 7)) == [(0, 4, b"tw")]  # a TooLong
    assert list(lines(path, 100, 5, 8)) == [(0, 4, b"two\n")]
    assert list(lines(path, 100, 5, 9)) == [(0, 4, b"two\n"), (1, 8, b"three")]
    assert list(lines(path, 4, 1)) == [(0, 0, b"one\n"), (1, 4, b"two\n"), (2, 8, b"three")]


def test_a_zst_file_of_a_long_window_is_read(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # no size: the window is what counts
    path = write_bytes(tmp_path / "a.txt.zst", stream.compress(b"text\n" * 1000) + stream.flush())
    with open_bytes(str(path)) as opened:
        assert opened.read() == b"text\n" * 1000


def test_a_zst_file_of_nothing_but_zeros_does_not_fill_the_memory(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    stream = zstandard.ZstdCompressor().compressobj()
    path = tmp_path / "a.txt.zst"
    with path.open("wb") as out:
        for _ in range(300):
            out.write(stream.compress(bytes(MIB)))
        out.write(stream.flush())
    assert path.stat().st_size < MIB // 10
    total = 0
    tracemalloc.start()
    try:
        with open_bytes(str(path)) as opened:
            while piece := opened.read(MIB):
                total += len(piece)
        assert tracemalloc.get_traced_memory()[1] < 100 * MIB
    finally:
        tracemalloc.stop()
    assert total == 300 * MIB
