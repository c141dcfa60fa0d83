"""What is damaged, unreadable, empty or changing: named, or left out and counted as asked for."""

from __future__ import annotations

import builtins
import gzip
import pickle
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.corpus import Corpus
from data_prep.records import NORMALIZATIONS, Unit
from data_prep.streams import CorpusError, UnreadableError
from tests.helpers.corpora import make_documents, write_jsonl
from tests.helpers.inputs import jsonl_bytes, save_dataset, texts, write_bytes, write_parquet, write_zst

DOCUMENTS = make_documents(60)


def cut(path: Path, n_bytes: int = 20) -> Path:
    return write_bytes(path, path.read_bytes()[:-n_bytes])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated gzip": lambda d: cut(write_bytes(d / "b.jsonl.gz", gzip.compress(jsonl_bytes(DOCUMENTS * 20)))),
    "gzip with a wrong byte": lambda d: write_bytes(
        d / "b.jsonl.gz", gzip.compress(jsonl_bytes(DOCUMENTS * 20), mtime=0).replace(b"\x00" * 4, b"\xff" * 4, 1)[:-3]
    ),
    "truncated zstd": lambda d: cut(write_zst(d / "b.jsonl.zst", jsonl_bytes(DOCUMENTS * 20))),
    "empty gzip": lambda d: write_bytes(d / "b.jsonl.gz", b""),
    "truncated parquet": lambda d: cut(write_parquet(d / "b.parquet", [*DOCUMENTS])),
    "damaged dataset": lambda d: write_bytes(save_dataset(d / "b", DOCUMENTS) / "state.json", b"{}"),
    "a link to nothing": lambda d: (d / "b.jsonl").symlink_to("gone"),
    "a link to nothing, parquet": lambda d: (d / "b.parquet").symlink_to("gone"),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("on_error", ["stop", "skip", "skip-files"])
def test_a_damaged_input_among_many_stops_or_is_left_out_whole_and_named(
    tmp_path: Path, kind: str, on_error: str
) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["first", ""])
    DAMAGE[kind](tmp_path)
    write_bytes(tmp_path / "c.jsonl", b'{"text": "last"}\n{"bad"\n')
    corpus = Corpus([tmp_path], on_error=on_error)
    if on_error != "skip-files":
        with pytest.raises(UnreadableError, match=r"b(\.\S*)? (is damaged after|cannot be read: )"):
            list(corpus)
        return
    for _ in range(2):
        assert [d.text for d in corpus] == ["first", "last"]
        assert (corpus.skipped, corpus.empty) == (1, 1)
        assert len(corpus.left_out) == 1 and str(tmp_path / "b") in corpus.left_out[0]
    assert len(corpus.sources()) == 3


def test_a_file_whose_disk_fails_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
        write_jsonl(tmp_path / name, [name])
    whole = builtins.open

    def failing(path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path).endswith("b.jsonl"):
            raise OSError(5, "Input/output error")
        return whole(path, *arguments, **options)

    monkeypatch.setattr(builtins, "open", failing)
    with pytest.raises(UnreadableError, match=r"b\.jsonl cannot be read: Input/output error"):
        list(Corpus([tmp_path]))
    corpus = Corpus([tmp_path], on_error="skip-files")
    assert [d.text for d in corpus] == ["a.jsonl", "c.jsonl"]
    assert corpus.left_out == [f"{tmp_path / 'b.jsonl'} cannot be read: Input/output error"]


def test_a_directory_in_the_place_of_a_file_is_unreadable(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["a"])
    corpus = Corpus([path])
    path.unlink()
    path.mkdir()
    with pytest.raises(UnreadableError, match=r"a\.jsonl cannot be read: Is a directory"):
        list(corpus)


def test_a_missing_package_stops_whatever_may_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    corpus = Corpus([write_bytes(tmp_path / "a.jsonl.zst", b"x")], on_error="skip-files")
    with pytest.raises(CorpusError, match="takes the package zstandard"):
        list(corpus)


@pytest.mark.parametrize("change", [b"", b'{"text": "x"}\n' * 9, b'{"text": "x"}\n' * 99])
def test_a_file_that_changes_after_it_was_divided_is_named(tmp_path: Path, change: bytes) -> None:
    path = write_bytes(tmp_path / "a.jsonl", b'{"text": "x"}\n' * 50)
    corpus = Corpus([path])
    units = corpus.units(100)
    write_bytes(path, change)
    with pytest.raises(UnreadableError, match="had 700 bytes when the work was divided and has [0-9,]+ now"):
        list(corpus.records(units[3]))


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "a.jsonl", b'{"text": "x"}\n' * 50)
    corpus = Corpus([path])
    records = corpus.records(corpus.units(100)[3])
    next(records)
    cut(path)
    with pytest.raises(UnreadableError, match="had 700 bytes when the work was divided and has 680 now"):
        list(records)


@pytest.mark.parametrize(
    ("name", "content", "empty"), [("a.jsonl", b"", 0), ("a.txt", b"", 1), ("a.fa", b"", 0), ("a.wet", b"", 0)]
)
def test_an_empty_file_has_no_documents(tmp_path: Path, name: str, content: bytes, empty: int) -> None:
    if name == "a.wet":
        pytest.importorskip("fastwarc")
    corpus = Corpus([write_bytes(tmp_path / name, content)])
    assert (list(corpus), corpus.empty, corpus.skipped) == ([], empty, 0)
    assert len(corpus.units()) == 1


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst"])
def test_a_compressed_file_of_nothing_is_empty_too(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    write_bytes(path, gzip.compress(b"")) if suffix.endswith("gz") else write_zst(path, b"", frames=1)
    assert list(Corpus([path])) == []


def test_one_file_as_path_and_as_url_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["a"])
    assert [d.text for d in Corpus([f"file://{path}"])] == ["a"]
    with pytest.raises(CorpusError, match=r"a\.jsonl is among the inputs twice"):
        Corpus([path, f"file://{path}"])


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_text_is_normalized_as_asked_for(tmp_path: Path, normalization: str, name: str) -> None:
    text = "e\u0301 \u00e9 \ufb01"  # e and an accent, both as one, the ligature fi
    expected = {
        "none": text,
        "NFC": "\u00e9 \u00e9 \ufb01",
        "NFD": "e\u0301 e\u0301 \ufb01",
        "NFKC": "\u00e9 \u00e9 fi",
        "NFKD": "e\u0301 e\u0301 fi",
    }
    path = tmp_path / name
    write_jsonl(path, [text]) if name == "a.jsonl" else write_parquet(path, [text])
    assert texts(Corpus([path], normalization=normalization), 1 << 20) == [expected[normalization]]


def test_a_unit_may_be_made_by_hand(tmp_path: Path) -> None:
    corpus = Corpus([write_jsonl(tmp_path / "a.jsonl", ["a", "b"])])
    assert [r.text for r in corpus.records(Unit(corpus.files[0]))] == ["a", "b"]  # type: ignore[union-attr]


def test_sizes_add_up_for_progress(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    write_bytes(tmp_path / "b.jsonl.gz", gzip.compress(jsonl_bytes(DOCUMENTS)))
    corpus = Corpus([tmp_path])
    assert sum(unit.bytes for unit in corpus.units(100)) == sum(source.bytes for source in corpus.sources())


def test_units_depend_on_files_and_options_only(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    assert Corpus([tmp_path]).units(100) == Corpus([tmp_path]).units(100)


def test_a_corpus_pickles_as_what_it_is_made_of(tmp_path: Path) -> None:
    for i in range(50):
        write_jsonl(tmp_path / f"{i:02}.jsonl", DOCUMENTS)
    corpus = Corpus([tmp_path], normalization="NFC", on_error="skip")
    twin = pickle.loads(pickle.dumps(corpus))
    assert (twin.files, twin.reading, twin.on_error) == (corpus.files, corpus.reading, "skip")
    assert len(pickle.dumps(corpus)) < 50 * (len(corpus.files[0]) + 10) + 1000
    assert len(pickle.dumps(corpus.reading)) < 200


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"on_error": "ignore"}, "on_error is 'ignore', expected one of stop, skip, skip-files"),
        ({"normalization": "NFX"}, "normalization is 'NFX', expected one of none, NFC"),
        ({"txt_documents": "page"}, "txt_documents is 'page', expected one of file"),
        ({"max_record_bytes": 0}, "--max-record-bytes 0: expected 1 or more"),
    ],
)
def test_options_that_do_not_exist_are_refused(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(CorpusError, match=reason):
        Corpus([write_jsonl(tmp_path / "a.jsonl", ["a"])], **options)


def test_every_option_of_a_command_reaches_the_corpus(tmp_path: Path) -> None:
    parser = ArgumentParser()
    Corpus.add_arguments(parser)
    path = str(write_jsonl(tmp_path / "a.jsonl", ["a"]))
    options = ["--text-key", "body", "--txt-documents", "line", "--on-error", "skip-files", "--normalization", "NFKC"]
    corpus = Corpus.from_arguments(parser.parse_args([path, *options, "--max-record-bytes", "77"]))
    reading = corpus.reading
    assert (reading.text_key, reading.txt_documents, reading.normalization) == ("body", "line", "NFKC")
    assert (reading.max_record_bytes, corpus.on_error) == (77, "skip-files")
