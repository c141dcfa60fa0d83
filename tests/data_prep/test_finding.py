"""Inputs by path, pattern and URL: a real S3 server, a real web server, fsspec's memory."""

from __future__ import annotations

import gzip
import os
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from data_prep.corpus import Corpus
from data_prep.streams import CorpusError, UnreadableError, open_raw
from tests.helpers.corpora import make_documents, write_jsonl
from tests.helpers.inputs import jsonl_bytes, save_dataset, texts, write_parquet, write_zst
from tests.helpers.s3 import s3_server
from tests.helpers.web import Quiet, web_server

DOCUMENTS = make_documents(300)
HALF = len(DOCUMENTS) // 2


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The URL of a bucket on a server of its own, with what a corpus may look like."""
    with s3_server():
        files = fsspec.filesystem("s3")
        files.mkdir("bucket")
        files.pipe("bucket/corpus/a.jsonl", jsonl_bytes(DOCUMENTS[:HALF]))
        files.pipe("bucket/corpus/deep/b.jsonl", jsonl_bytes(DOCUMENTS[HALF:]))
        files.pipe("bucket/corpus/.hidden.jsonl", b"x")
        files.pipe("bucket/corpus/README.md", b"x")
        files.pipe("bucket/corpus/empty/", b"")
        yield "s3://bucket"


def test_a_prefix_on_s3_is_a_directory(s3: str) -> None:
    corpus = Corpus([f"{s3}/corpus"])
    assert corpus.files == [f"{s3}/corpus/a.jsonl", f"{s3}/corpus/deep/b.jsonl"]
    assert sorted(corpus.ignored) == [f"{s3}/corpus/.hidden.jsonl", f"{s3}/corpus/README.md"]
    assert [d.text for d in corpus] == DOCUMENTS
    assert [s.bytes for s in corpus.sources()] == [len(jsonl_bytes(d)) for d in (DOCUMENTS[:HALF], DOCUMENTS[HALF:])]


def test_ranges_of_a_file_on_s3_are_units(s3: str) -> None:
    corpus = Corpus([f"{s3}/corpus/a.jsonl"])
    assert len(corpus.units(3000)) == -(-len(jsonl_bytes(DOCUMENTS[:HALF])) // 3000) > 3
    assert texts(corpus, 3000) == DOCUMENTS[:HALF]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow", "a.txt"])
def test_every_kind_of_file_is_read_from_s3(s3: str, tmp_path: Path, name: str) -> None:
    path, files = tmp_path / name, fsspec.filesystem("s3")
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(jsonl_bytes(DOCUMENTS)))
    elif name.endswith(".zst"):
        write_zst(path, jsonl_bytes(DOCUMENTS))
    elif name.endswith(".parquet"):
        write_parquet(path, [*DOCUMENTS])
    elif name.endswith(".arrow"):
        pa = pytest.importorskip("pyarrow")
        table = pa.table({"text": DOCUMENTS})
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    else:
        path.write_text("\n\n".join(text.strip() for text in DOCUMENTS))
    files.put(str(path), f"bucket/kinds/{name}")
    corpus = Corpus([f"{s3}/kinds/{name}"], txt_documents="blank-line")
    assert [text.strip() for text in texts(corpus, 9000)] == [text.strip() for text in DOCUMENTS]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("corpus/*.jsonl", ["a"]), ("corpus/**/*.jsonl", ["a", "deep/b"]), ("c*s/deep", ["deep/b"])],
)
def test_patterns_on_s3_are_expanded(s3: str, pattern: str, expected: list[str]) -> None:
    assert Corpus([f"{s3}/{pattern}"]).files == [f"{s3}/corpus/{name}.jsonl" for name in expected]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gone.jsonl", "does not exist"),
        ("gone", "does not exist"),
        ("gone*", "matches nothing"),
        ("corpus/README.md", "unknown extension '.md'; known are .txt"),
    ],
)
def test_what_is_not_on_s3_is_named(s3: str, name: str, reason: str) -> None:
    with pytest.raises(CorpusError, match=re.escape(f"{s3}/{name}") + ".*" + reason):
        Corpus([f"{s3}/{name}"])


def test_an_object_that_changes_or_goes_while_it_is_read_is_named(s3: str) -> None:
    files = fsspec.filesystem("s3", skip_instance_cache=True)  # another's: ours is not told of what it writes
    files.pipe("bucket/moving/a.jsonl", jsonl_bytes(DOCUMENTS))
    corpus = Corpus([f"{s3}/moving"])
    units = corpus.units(2000)
    files.pipe("bucket/moving/a.jsonl", jsonl_bytes(DOCUMENTS[:-1]))
    with pytest.raises(
        UnreadableError, match=r"a\.jsonl had [\d,]+ bytes when the work was divided and has [\d,]+ now"
    ):
        list(corpus.records(units[0]))
    files.rm("bucket/moving/a.jsonl")
    with pytest.raises(UnreadableError, match=r"a\.jsonl cannot be read: "):
        list(corpus.records(units[0]))


def test_one_object_twice_is_refused(s3: str) -> None:
    with pytest.raises(CorpusError, match=r"a\.jsonl is among the inputs twice"):
        Corpus([f"{s3}/corpus", f"{s3}/corpus/a.jsonl"])
    with pytest.raises(CorpusError, match=r"a\.jsonl is among the inputs twice"):
        Corpus([f"{s3}/corpus/a.jsonl", f"{s3.replace('s3://', 's3a://')}/corpus/a.jsonl"])


def test_a_corpus_at_urls_is_read_in_another_process(s3: str) -> None:
    corpus = Corpus([f"{s3}/corpus"])
    units = corpus.units(1 << 20)
    twin = pickle.loads(pickle.dumps(corpus))
    assert [r.text for unit in units for r in twin.records(unit)] == DOCUMENTS
    assert corpus._sizes and not twin._sizes  # which are what grows with the listing, and units carry them


def test_a_web_server_with_ranges_is_read_by_units(s3: str) -> None:
    address = os.environ["AWS_ENDPOINT_URL"]  # S3 is a web server, too
    fsspec.filesystem("s3").chmod("bucket", "public-read")
    fsspec.filesystem("s3").chmod("bucket/corpus/a.jsonl", "public-read")
    corpus = Corpus([f"{address}/bucket/corpus/a.jsonl?x=1"])
    assert len(corpus.units(2000)) > 3
    assert texts(corpus, 2000) == DOCUMENTS[:HALF]


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    pytest.importorskip("aiohttp")
    (tmp_path / "deep").mkdir()
    write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:HALF])
    write_jsonl(tmp_path / "deep" / "b c.jsonl", DOCUMENTS[HALF:])
    (tmp_path / "README.md").write_text("x")
    with web_server(tmp_path) as url:
        yield url


def test_a_web_server_without_ranges_is_read_file_by_file(web: str) -> None:
    corpus = Corpus([web + "/"])
    assert corpus.files == [f"{web}/a.jsonl", f"{web}/deep/b%20c.jsonl"]
    assert corpus.ignored == [f"{web}/README.md"]
    assert [(unit.start, unit.stop) for unit in corpus.units(100)] == [(0, None), (0, None)]
    assert texts(corpus, 100) == DOCUMENTS


def test_what_a_web_server_does_not_have_is_named(web: str) -> None:
    with pytest.raises(CorpusError, match=r"/gone\.jsonl does not exist, or cannot be reached"):
        Corpus([f"{web}/gone.jsonl"])


def test_a_compressed_answer_is_read_to_its_end_and_no_further(
    web: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl_bytes(["a log line of some words\n" * 40] * 500)))
    assert len(texts(Corpus([f"{web}/a.jsonl.gz"]), 100)) == 500
    assert caplog.text == ""  # aiohttp takes more reads at the end for an infinite loop


def test_an_answer_that_ends_early_is_no_whole_file(web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = Corpus([f"{web}/a.jsonl"])
    (unit,) = corpus.units()

    def cut(self: Quiet, source: object, target: object) -> None:
        target.write(source.read()[:-100])  # type: ignore[attr-defined]

    monkeypatch.setattr(Quiet, "copyfile", cut)
    with pytest.raises(UnreadableError, match=r"a\.jsonl cannot be read: ClientPayloadError"):
        list(corpus.records(unit))


def test_any_other_file_system_of_fsspec_is_read() -> None:
    files = fsspec.filesystem("memory")
    files.pipe("/corpus/a.jsonl", jsonl_bytes(DOCUMENTS))
    try:
        with open_raw("memory://corpus/a.jsonl") as stream:
            whole = stream.read()
            assert stream.read() == b"" and stream.seek(0) == 0 and stream.read() == whole != b""
        corpus = Corpus(["memory://corpus"])
        assert texts(corpus, 3000) == DOCUMENTS
        assert len(corpus.units(3000)) > 3
    finally:
        files.rm("/corpus", recursive=True)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("nosuch://host/a.jsonl", "Protocol not known: nosuch"),
        ("gs://bucket/a.jsonl", r"takes another package: pip install 'mamba-pretrain\[gcs\]'"),
    ],
)
def test_a_file_system_that_is_not_there_is_named(url: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(CorpusError, match=re.escape(url) + ".*" + reason):
        Corpus([url])


def test_patterns_of_local_files_are_expanded(tmp_path: Path) -> None:
    for name in ("b/1.jsonl", "a/2.jsonl", "a/[3].jsonl", "a/x.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / name, [name])
    corpus = Corpus([tmp_path / "**/*"])
    assert [d.text for d in corpus] == ["a/2.jsonl", "a/[3].jsonl", "b/1.jsonl"]


def test_the_files_of_a_dataset_are_not_read_twice(tmp_path: Path) -> None:
    saved = save_dataset(tmp_path / "saved", DOCUMENTS)
    (table,) = saved.glob("*.arrow")
    with pytest.raises(CorpusError, match=r"\.arrow is part of the dataset .*saved, which is among the inputs, too"):
        Corpus([saved, table])


def test_one_name_twice_is_one_file_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:2])
    monkeypatch.chdir(tmp_path)
    for other in ("a.jsonl", "./a.jsonl", str(tmp_path / "a.jsonl")):
        with pytest.raises(CorpusError, match="is among the inputs twice(, first as a.jsonl)?: its text"):
            Corpus(["a.jsonl", other])
