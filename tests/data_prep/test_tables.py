"""Tables give the same documents however they are divided, with the numbers of their rows in the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.corpus import Corpus
from data_prep.records import Invalid
from data_prep.streams import CorpusError, UnreadableError
from tests.helpers.corpora import make_documents, write_jsonl
from tests.helpers.inputs import save_dataset, save_dataset_dict, texts, write_parquet

pytest.importorskip("datasets")
import pyarrow as pa
import pyarrow.parquet as pq

DOCUMENTS = make_documents(100)


@pytest.mark.parametrize("unit_bytes", [1, 3000, 1 << 20])
def test_row_groups_are_units(tmp_path: Path, unit_bytes: int) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": DOCUMENTS}), path, row_group_size=7)
    corpus = Corpus([path])
    units = corpus.units(unit_bytes)
    assert len(units) in {1: (15,), 3000: range(3, 9), 1 << 20: (1,)}[unit_bytes]
    records = [record for unit in units for record in corpus.records(unit)]
    assert [(r.text, r.line) for r in records] == [(text, i) for i, text in enumerate(DOCUMENTS, start=1)]  # type: ignore[union-attr]
    assert abs(sum(unit.bytes for unit in units) - path.stat().st_size) < len(units)


@pytest.mark.parametrize("unit_bytes", [1, 1000, 1 << 20])
@pytest.mark.parametrize("save", [save_dataset, save_dataset_dict])
def test_rows_of_a_dataset_on_disk_are_units(
    tmp_path: Path, unit_bytes: int, save: Callable[[Path, list[str]], Path]
) -> None:
    documents = DOCUMENTS[:20]
    path = save(tmp_path / "saved", documents)
    corpus = Corpus([path])
    units = corpus.units(unit_bytes)
    assert len(units) in {1: (20,), 1000: range(3, 15), 1 << 20: (1,)}[unit_bytes]
    records = [record for unit in units for record in corpus.records(unit)]
    assert [record.text for record in records] == documents  # type: ignore[union-attr]
    numbers = [1, *range(1, 20)] if save is save_dataset_dict else [*range(1, 21)]  # of the row in its split
    assert [record.line for record in records] == numbers
    assert 0 < sum(unit.bytes for unit in units) <= sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_arrow_files_are_read(tmp_path: Path, kind: str) -> None:
    table = pa.table({"other": list(range(100)), "text": DOCUMENTS})
    path = tmp_path / "a.arrow"
    with (pa.ipc.new_file if kind == "file" else pa.ipc.new_stream)(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=30)
    corpus = Corpus([tmp_path])
    assert [(d.text, d.line) for d in corpus] == [(text, i) for i, text in enumerate(DOCUMENTS, start=1)]
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(UnreadableError, match=r"a\.arrow is damaged after row \d+"):
        list(Corpus([path]))
    with pytest.raises(CorpusError, match=r"a\.arrow has no column 'body' \(--text-key\), only \['other', 'text'\]"):
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
        list(Corpus([path], text_key="body"))


def test_text_of_a_table_that_is_not_utf8_or_null_is_invalid(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"\xff", None, b"last"], pa.binary())
    pq.write_table(pa.table({"text": raw.view(pa.string())}), tmp_path / "a.parquet")
    corpus = Corpus([tmp_path / "a.parquet"], on_error="skip")
    (unit,) = corpus.units()
    bad = [(r.line, r.reason) for r in corpus.records(unit) if isinstance(r, Invalid)]
    assert bad == [(2, "byte 0xff is not UTF-8"), (3, "'text' is NoneType, expected a string")]
    assert [d.text for d in corpus] == ["good", "last"]


def test_a_table_obeys_the_limit_of_a_record(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["short", "long" * 10, "last"])
    corpus = Corpus([path], on_error="skip", max_record_bytes=20)
    assert [d.text for d in corpus] == ["short", "last"]


@pytest.fixture
def named(tmp_path: Path) -> Path:
    """A directory that load_dataset takes for a dataset's name: two splits, the first of three files."""
    for i in range(3):
        write_jsonl(tmp_path / f"train-{i}.jsonl", DOCUMENTS[i * 30 : (i + 1) * 30])
    write_jsonl(tmp_path / "test-0.jsonl", DOCUMENTS[90:])
    return tmp_path


def test_a_dataset_by_name_streams_shard_by_shard(named: Path) -> None:
    corpus = Corpus([f"hf://{named}"])
    units = corpus.units()
    assert [(unit.start, unit.stop) for unit in units] == [(0, 1), (1, 2), (2, 3)]
    assert [record.text for record in corpus.records(units[1])] == DOCUMENTS[30:60]  # type: ignore[union-attr]
    assert texts(corpus, 1) == DOCUMENTS[:90]
    assert [d.text for d in Corpus([f"hf://{named}@test"])] == DOCUMENTS[90:]
    assert [d.text for d in Corpus([f"hf://{named}:default@test"])] == DOCUMENTS[90:]
    assert [(s.path, s.bytes) for s in corpus.sources()] == [(f"hf://{named}", 0)]


def test_an_invalid_row_of_a_dataset_by_name_is_named_with_its_shard(named: Path) -> None:
    (named / "train-1.jsonl").write_text(json.dumps({"text": None}) + "\n" + json.dumps({"text": "x"}) + "\n")
    with pytest.raises(CorpusError, match=r"hf://.* shard 1:1: 'text' is NoneType, expected a string"):
        list(Corpus([f"hf://{named}"]))


@pytest.mark.parametrize(
    ("suffix", "reason"),
    [
        ("@nosuch", "datasets.load_dataset cannot load it: .*split.*nosuch"),
        (":nosuch", "datasets.load_dataset cannot load it: .*nosuch"),
        ("/gone", "datasets.load_dataset cannot load it: .*gone"),
    ],
)
def test_a_dataset_by_name_that_cannot_be_loaded_says_so(named: Path, suffix: str, reason: str) -> None:
    with pytest.raises(UnreadableError, match=reason):
        list(Corpus([f"hf://{named}{suffix}"]))


def test_a_dataset_by_name_without_the_column_says_so(named: Path) -> None:
    with pytest.raises(UnreadableError, match=r"has no column 'body' \(--text-key\), only \['text'\]"):
        list(Corpus([f"hf://{named}"], text_key="body"))
