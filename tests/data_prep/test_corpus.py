"""Every format gives the same documents; every invalid record is named or counted."""

from __future__ import annotations

import gzip
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.corpus import Corpus, digest_of, split_of, split_rule
from data_prep.streams import CorpusError
from tests.helpers.corpora import make_documents, write_jsonl
from tests.helpers.inputs import (
    jsonl_bytes,
    save_dataset,
    save_dataset_dict,
    texts,
    write_bytes,
    write_parquet,
    write_zst,
)

DOCUMENTS = ["first\nline two", "  \u00e9 \U0001f600\t", "third"]


WRITERS: dict[str, Callable[[Path], Path]] = {
    "jsonl": lambda d: write_bytes(d / "a.jsonl", jsonl_bytes(DOCUMENTS)),
    "jsonl without last newline": lambda d: write_bytes(d / "a.jsonl", jsonl_bytes(DOCUMENTS).rstrip()),
    "jsonl.gz": lambda d: write_bytes(d / "a.jsonl.gz", gzip.compress(jsonl_bytes(DOCUMENTS))),
    "jsonl.gz of two members": lambda d: write_bytes(
        d / "a.jsonl.gz", gzip.compress(jsonl_bytes(DOCUMENTS[:1])) + gzip.compress(jsonl_bytes(DOCUMENTS[1:]))
    ),
    "jsonl.zst": lambda d: write_zst(d / "a.jsonl.zst", jsonl_bytes(DOCUMENTS)),
    "jsonl.zst of three frames": lambda d: write_zst(d / "a.jsonl.zst", jsonl_bytes(DOCUMENTS), frames=3),
    "parquet": lambda d: write_parquet(d / "a.parquet", [*DOCUMENTS]),
    "dataset": lambda d: save_dataset(d / "saved", DOCUMENTS),
    "dataset dict": lambda d: save_dataset_dict(d / "saved", DOCUMENTS),
    "directory": lambda d: [write_jsonl(d / f"{i}.jsonl", [text]) for i, text in enumerate(DOCUMENTS)] and d,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_gives_the_documents_in_order(tmp_path: Path, kind: str) -> None:
    corpus = Corpus([WRITERS[kind](tmp_path)])
    assert [document.text for document in corpus] == DOCUMENTS
    assert [document.text for document in corpus] == DOCUMENTS  # and again
    assert sum(source.bytes for source in corpus.sources()) > 0


def test_a_large_zst_file_streams_whole(tmp_path: Path) -> None:
    documents = make_documents(20_000)
    path = write_zst(tmp_path / "a.jsonl.zst", jsonl_bytes(documents), frames=2)
    assert [document.text for document in Corpus([path])] == documents


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("file", ["one\n two\r\n\n \nthree\n"]),
        ("line", ["one", " two", "three"]),
        ("blank-line", ["one\n two", "three"]),
    ],
)
def test_what_a_document_is_in_plain_text(tmp_path: Path, mode: str, expected: list[str]) -> None:
    path = write_bytes(tmp_path / "a.txt", b"one\n two\r\n\n \nthree\n")
    documents = list(Corpus([path], txt_documents=mode))
    assert [document.text for document in documents] == expected
    assert documents[-1].line == (1 if mode == "file" else 5)


@pytest.mark.parametrize("mode", ["file", "line", "blank-line"])
def test_a_text_file_that_is_one_document_is_not_cut_into_units(tmp_path: Path, mode: str) -> None:
    """Each of its units would be a copy of the whole."""
    text = "".join(f"{i}\n\n" for i in range(500))
    corpus = Corpus([write_bytes(tmp_path / "a.txt", text.encode())], txt_documents=mode)
    units = corpus.units(100)
    assert (len(units) == 1) == (mode == "file")
    assert sum(unit.bytes for unit in units) == len(text)
    assert texts(corpus, 100) == ([text] if mode == "file" else [str(i) for i in range(500)])


@pytest.mark.parametrize("suffix", [".fa", ".fasta", ".fna", ".fa.gz"])
def test_fasta_gives_a_document_a_record_without_header(tmp_path: Path, suffix: str) -> None:
    content = b";made by hand\n>one some words\nACGT\n;caf\xe9\nAC nn\r\n\n>two\n1 TT TT\n>empty\n"
    path = write_bytes(tmp_path / f"a{suffix}", gzip.compress(content) if suffix.endswith("gz") else content)
    corpus = Corpus([path])
    assert [(d.text, d.line) for d in corpus] == [("ACGTACnn", 2), ("1TTTT", 7)]
    assert corpus.empty == 1


INVALID = [
    ("a.jsonl", b'{"text": "good"}\n{"text": \n{"text": "last"}\n', 2, "not JSON"),
    (
        "a.jsonl",
        b'{"text": "good"}\n\n{"body": "x"}\n{"text": "last"}\n',
        3,
        r"no key 'text' .--text-key., only \['bo",
    ),
    ("a.jsonl", b'{"text": "good"}\n{"text": 5}\n{"text": "last"}\n', 2, "'text' is int, expected a string"),
    ("a.jsonl", b'{"text": "good"}\n["text"]\n{"text": "last"}\n', 2, "a JSON list, expected an object"),
    ("a.jsonl", b'{"text": "good"}\n{"text": "\xff"}\n{"text": "last"}\n', 2, "byte 0xff is not UTF-8"),
    ("a.jsonl", b'{"text": "good"}\n{"text": "\\ud800"}\n{"text": "last"}\n', 2, "half of a surrogate pair"),
    ("a.txt", b"good\n\xe9t\xe9\nlast\n", 2, "byte 0xe9 is not UTF-8"),
    ("a.fa", b">a\ngood\n>b\n\xff\n>c\nlast\n", 3, "a byte beyond ASCII in line 4"),
]


@pytest.mark.parametrize(("name", "content", "line", "reason"), INVALID)
def test_an_invalid_record_stops_by_name_or_is_counted(
    tmp_path: Path, name: str, content: bytes, line: int, reason: str
) -> None:
    path = write_bytes(tmp_path / name, content)
    with pytest.raises(CorpusError, match=f"{name}:{line}: .*{reason}.*--on-error skip"):
        list(Corpus([path], txt_documents="line"))
    corpus = Corpus([path], txt_documents="line", on_error="skip")
    assert [document.text for document in corpus] == ["good", "last"]
    assert corpus.skipped == 1


def test_a_null_in_parquet_is_invalid(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["good", None, "last"])
    with pytest.raises(CorpusError, match=r"a\.parquet:2: 'text' is NoneType"):
        list(Corpus([path]))
    corpus = Corpus([path], on_error="skip")
    assert [(d.text, d.line) for d in corpus] == [("good", 1), ("last", 3)]


def test_sequence_before_a_fasta_header_is_invalid(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"a\.fa:1: sequence before the first header"):
        list(Corpus([write_bytes(tmp_path / "a.fa", b"ACGT\n>a\nAC\n")]))


def test_the_text_key_may_be_another(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "a.jsonl", jsonl_bytes(DOCUMENTS, "body"))
    assert [document.text for document in Corpus([path], text_key="body")] == DOCUMENTS
    parquet = write_parquet(tmp_path / "a.parquet", [*DOCUMENTS], "body")
    with pytest.raises(CorpusError, match=r"no column 'text' \(--text-key\), only \['body', 'other'\]"):
        list(Corpus([parquet]))


def damage_dataset(directory: Path, pattern: str, content: bytes) -> Path:
    path = save_dataset(directory / "saved", DOCUMENTS)
    (file,) = path.glob(pattern)
    write_bytes(file, content)
    return path


DAMAGED = {
    "truncated gz": lambda d: write_bytes(d / "a.jsonl.gz", gzip.compress(jsonl_bytes(make_documents(500)))[:-20]),
    "no gz": lambda d: write_bytes(d / "a.jsonl.gz", b"plain"),
    "truncated zst": lambda d: write_bytes(
        d / "a.jsonl.zst", write_zst(d / "whole.zst", jsonl_bytes(make_documents(5000))).read_bytes()[:-20]
    ),
    "no zst": lambda d: write_bytes(d / "a.jsonl.zst", b"plain text"),
    "empty gz": lambda d: write_bytes(d / "a.jsonl.gz", b""),
    "empty zst": lambda d: write_bytes(d / "a.jsonl.zst", b""),
    "dataset without a table": lambda d: damage_dataset(d, "*.arrow", b""),
    "dataset without a schema": lambda d: damage_dataset(d, "dataset_info.json", b"{"),
    "dataset without a state": lambda d: damage_dataset(d, "state.json", b"{}"),
    "no parquet": lambda d: write_bytes(d / "a.parquet", b"plain text"),
}


@pytest.mark.parametrize("kind", DAMAGED)
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_damaged_file_always_stops(tmp_path: Path, kind: str, on_error: str) -> None:
    if "zst" in kind:
        pytest.importorskip("zstandard")
    if "parquet" in kind:
        pytest.importorskip("pyarrow")
    path = DAMAGED[kind](tmp_path)
    with pytest.raises(CorpusError, match=rf"{path.name} is damaged after .*get the (file|dataset) again"):
        list(Corpus([path], on_error=on_error))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "a.parquet"])
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_file_that_cannot_be_opened_always_stops(tmp_path: Path, name: str, on_error: str) -> None:
    (tmp_path / name).symlink_to("gone")
    with pytest.raises(CorpusError, match=f"{name} cannot be read: .*[Nn]o such file"):
        list(Corpus([tmp_path], on_error=on_error))


def test_pipes_are_refused_rather_than_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(
        CorpusError, match=r"a\.jsonl is a pipe or a device; save what it gives to a file ending in .txt"
    ):
        Corpus([tmp_path / "a.jsonl"])
    with pytest.raises(CorpusError, match="/dev/null is a pipe or a device"):
        Corpus(["/dev/null"])
    write_jsonl(tmp_path / "b.jsonl", ["b"])
    assert [Path(path).name for path in Corpus([tmp_path]).ignored] == ["a.jsonl"]


def test_one_file_under_two_names_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["a"])
    with pytest.raises(CorpusError, match=r"a\.jsonl is among the inputs twice: its text"):
        Corpus([tmp_path, path])
    (tmp_path / "b.jsonl").symlink_to(path)
    with pytest.raises(CorpusError, match=r"b\.jsonl is among the inputs twice, first as .*a\.jsonl"):
        Corpus([tmp_path])


def test_a_link_back_up_is_not_followed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["a"])
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)
    assert Corpus([tmp_path]).files == [str(path)]


def test_directories_are_read_in_sorted_order_and_say_what_they_ignore(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "a.jsonl", "b/1.jsonl", "README.md", ".hidden.jsonl", "b/notes.parquet.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / name, [name])
    corpus = Corpus([tmp_path])
    assert [document.text for document in corpus] == ["a.jsonl", "b/1.jsonl", "b/2.jsonl"]
    assert [Path(path).name for path in corpus.ignored] == [".hidden.jsonl", "README.md", "notes.parquet.gz"]


def test_inputs_that_are_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="gone does not exist"):
        Corpus([tmp_path / "gone"])
    with pytest.raises(CorpusError, match="nothing to read in .*: no file ends in .txt .jsonl .parquet"):
        Corpus([tmp_path])
    with pytest.raises(CorpusError, match=r"a\.csv: unknown extension '.csv'; known are .txt"):
        Corpus([write_bytes(tmp_path / "a.csv", b"x")])


@pytest.mark.parametrize(("name", "package"), [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    for module in (package, "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(CorpusError, match=rf"package {package}: pip install 'mamba-pretrain\[data\]'"):
        list(Corpus([write_bytes(tmp_path / name, b"x")]))


@pytest.mark.parametrize("pieces", ["file", "line", "blank-line"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, pieces: str) -> None:
    mark = b"\xef\xbb\xbf"
    jsonl = write_bytes(tmp_path / "a.jsonl", mark + b'{"text": "one"}\n{"text": "\xef\xbb\xbftwo"}\n')
    txt = write_bytes(tmp_path / "b.txt", mark + b"three")
    corpus = Corpus([jsonl, txt], txt_documents=pieces)
    assert [document.text for document in corpus] == ["one", "\ufefftwo", "three"]


def test_splits_follow_the_fractions_and_the_text_alone() -> None:
    rule = split_rule((0.7, 0.2, 0.1), seed=0)
    documents = make_documents(5000)
    splits = [split_of(digest_of(text.encode()), "", rule) for text in documents]
    counts = Counter(splits)
    for split, share in (("train", 0.7), ("validation", 0.2), ("test", 0.1)):
        assert abs(counts[split] / 5000 - share) < 0.03
    assert [split_of(digest_of(text.encode()), "", rule) for text in reversed(documents)] == splits[::-1]
    assert [split_of(digest_of(text.encode()), "", split_rule((0.7, 0.2, 0.1), seed=1)) for text in documents] != splits


def test_the_hash_of_a_document_is_that_of_its_specification() -> None:
    """Another release of the library makes the same splits, and finds the parts of this one whole."""
    assert digest_of(b"").hex() == "99aa06d3014798d86001c324468d497f"
    rule = split_rule((0.5, 0.25, 0.25), seed=-1)
    assert [split_of(digest_of(b"%d" % i), "", rule) for i in range(4)] == ["validation", "validation", "train", "test"]


def test_splits_without_a_share_get_nothing() -> None:
    rule = split_rule((0.5, 0, 0.5), seed=0)
    assert {split_of(digest_of(text.encode()), "", rule) for text in make_documents(200)} == {"train", "test"}
    assert list(split_rule((1, 0, 0), 0).fractions) == ["train"]


def test_a_seed_beyond_63_bits_is_refused() -> None:
    with pytest.raises(CorpusError, match="--seed 9{60}: expected"):
        split_rule((1, 0, 0), int("9" * 60))


@pytest.mark.parametrize("fractions", [(0.5, 0.5, 0.5), (1.5, -0.5, 0), (float("nan"), 0, 1)])
def test_fractions_that_make_no_whole_are_refused(fractions: tuple[float, ...]) -> None:
    with pytest.raises(CorpusError, match="three shares, none negative, that add up to 1"):
        split_rule(fractions, 0)
