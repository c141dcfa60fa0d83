"""The shard format byte for byte, and everything that may be wrong with it."""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import pickle
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mamba_pretrain.data.dataset import open_split, verify, verify_up_to
from mamba_pretrain.data.manifest import Manifest
from mamba_pretrain.data.shards import HEADER, Shard, ShardError
from mamba_pretrain.data.writer import ShardWriter
from mamba_pretrain.files import atomic_directory
from tests.helpers.corpora import make_dataset


def write_shard(prefix: Path, documents: list[list[int]], vocab_size: int = 1000) -> Path:
    with ShardWriter(prefix, vocab_size=vocab_size) as writer:
        for tokens in documents:
            writer.append(np.array(tokens))
    return prefix


def write_megatron(prefix: Path, sequences: list[list[int]], document_index: list[int], code: int, kind: str) -> Path:
    """The format by hand, with nothing of ours."""
    size, lengths = struct.calcsize(kind), [len(s) for s in sequences]
    pointers = [size * sum(lengths[:i]) for i in range(len(lengths))]
    prefix.with_name(prefix.name + ".bin").write_bytes(
        b"".join(struct.pack(f"<{len(s)}{kind}", *s) for s in sequences),
    )
    prefix.with_name(prefix.name + ".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, len(sequences), len(document_index))
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(pointers)}q", *pointers)
        + struct.pack(f"<{len(document_index)}q", *document_index)
    )
    return prefix


@pytest.mark.parametrize(("vocab_size", "code", "kind"), [(65_536, 8, "H"), (65_537, 4, "i")])
def test_files_are_byte_for_byte_what_megatron_writes(tmp_path: Path, vocab_size: int, code: int, kind: str) -> None:
    documents = [[7, 8, 9], [1], [vocab_size - 1, 0]]
    write_shard(tmp_path / "ours", documents, vocab_size)
    write_megatron(tmp_path / "hand", documents, [0, 1, 2, 3], code, kind)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"hand{suffix}").read_bytes()


@pytest.mark.parametrize(("code", "kind"), [(1, "B"), (2, "b"), (3, "h"), (4, "i"), (5, "q"), (8, "H")])
def test_reads_megatron_files_with_several_sequences_a_document(tmp_path: Path, code: int, kind: str) -> None:
    sequences = [[1, 2], [3], [4, 5, 6], [7]]
    shard = Shard(write_megatron(tmp_path / "train", sequences, [0, 2, 2, 4], code, kind))
    assert (shard.n_tokens, shard.n_documents) == (7, 3)
    assert shard.tokens(0, 7).tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert shard.tokens(0, 7).dtype == np.int64
    assert [shard.document_bounds(j) for j in range(3)] == [(0, 3), (3, 3), (3, 7)]
    assert [shard.document_at(t) for t in range(7)] == [0, 0, 0, 2, 2, 2, 2]
    assert set(shard.document_starts(1, 7).tolist()) == {3}
    assert shard.document_starts(0, 3).tolist() == [0]
    assert list(shard.problems()) == []


@pytest.mark.slow  # importing megatron.core takes ten seconds
def test_megatron_itself_reads_our_files(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(write_shard(tmp_path / "train", [[1, 2, 3], [4]])))
    assert [dataset[i].tolist() for i in range(len(dataset))] == [[1, 2, 3], [4]]
    assert dataset.document_indices.tolist() == [0, 1, 2]


def test_written_documents_are_read_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 1000, rng.integers(1, 50)).tolist() for _ in range(200)]
    shard = pickle.loads(pickle.dumps(Shard(write_shard(tmp_path / "train", documents))))
    assert [shard.tokens(*shard.document_bounds(j)).tolist() for j in range(200)] == documents
    owners = np.repeat(np.arange(200), [len(tokens) for tokens in documents])
    assert [shard.document_at(t) for t in range(shard.n_tokens)] == owners.tolist()


@pytest.mark.parametrize("entry", [-7, -1, 9])
def test_a_document_index_beyond_the_sequences_is_damage(tmp_path: Path, entry: int) -> None:
    shard = Shard(write_megatron(tmp_path / "train", [[1, 2], [3]], [0, entry, 2], 8, "H"))
    for document in (0, 1):
        with pytest.raises(
            ShardError, match=rf"train\.idx: document {document} runs .* the index is damaged, see python"
        ):
            shard.document_bounds(document)


def test_negative_lengths_that_add_up_are_a_problem(tmp_path: Path) -> None:
    prefix = write_megatron(tmp_path / "train", [[1, 2], [], [3]], [0, 1, 2, 3], 8, "H")
    index = bytearray((tmp_path / "train.idx").read_bytes())
    struct.pack_into("<3i3q", index, HEADER.size, 2, -1, 2, 0, 4, 2)
    (tmp_path / "train.idx").write_bytes(index)
    shard = Shard(prefix)
    assert [problem for problem in shard.problems() if "length -1" in problem]
    with pytest.raises(ShardError, match="document 1 runs from token 2 to 1 of 3"):
        shard.document_bounds(1)


def test_a_split_without_documents_opens(tmp_path: Path) -> None:
    shard = Shard(write_shard(tmp_path / "test", []))
    assert (shard.n_tokens, shard.n_documents, shard.tokens(0, 0).tolist()) == (0, 0, [])
    assert list(shard.problems()) == []


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.array([3, 1000]), "token id 1000, the vocabulary has 1,000"),
        (np.array([-1]), "token id -1"),
        (np.array([], dtype=np.int64), "has 0 tokens"),
        (np.array([0.5]), "float64, expected a list of integers"),
    ],
)
def test_writer_refuses_impossible_documents_by_name(
    tmp_path: Path, tokens: np.ndarray[Any, Any], message: str
) -> None:
    with pytest.raises(ShardError, match=message), ShardWriter(tmp_path / "train", vocab_size=1000) as writer:
        writer.append(tokens)
    assert not (tmp_path / "train.idx").exists()


def test_a_kernel_that_knows_no_huge_pages_opens_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = Shard(make_dataset(tmp_path / "data") / "train")
    expected = shard.document_bounds(3)
    monkeypatch.setattr(mmap, "MADV_NOHUGEPAGE", 9999)  # the system answers as it does to what it does not know
    assert Shard(shard.path).document_bounds(3) == expected


def test_a_terabyte_opens_with_four_numbers_read(tmp_path: Path) -> None:
    """1e12 tokens in 1e9 documents, as sparse files: 2 TB and 20 GB, of which nothing is on the disk."""
    n, length = 10**9, 1000
    prefix = tmp_path / "train"
    with (tmp_path / "train.bin").open("wb") as stream:
        stream.truncate(2 * n * length)
    with (tmp_path / "train.idx").open("wb") as stream:
        stream.write(HEADER.pack(b"MMIDIDX\x00\x00", 1, 8, n, n + 1))

        def put(offset: int, kind: str, value: int) -> None:
            stream.seek(HEADER.size + offset)
            stream.write(struct.pack(kind, value))

        put(4 * (n - 1), "<i", length)
        put(12 * n - 8, "<q", 2 * length * (n - 1))
        put(20 * n, "<q", n)
    reads: list[int] = []

    class Counting(Shard):
        def _document_start(self, document: int) -> int:
            reads.append(document)
            return document * length  # what the sparse index would say

    tracemalloc.start()
    shard = Counting(prefix)
    assert (shard.n_tokens, shard.n_documents) == (10**12, 10**9)
    assert reads == []
    assert shard.document_at(123_456_789_012) == 123_456_789
    assert shard.tokens(10**12 - 3, 10**12).tolist() == [0, 0, 0]
    assert tracemalloc.get_traced_memory()[1] < 1 << 18
    tracemalloc.stop()
    assert len(reads) <= 31  # log2 of the documents


def flip_bit(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def cut(path: Path, size: int) -> None:
    os.truncate(path, path.stat().st_size - size)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "train.bin").unlink(), r"train\.bin does not exist"),
        (lambda d: (d / "train.idx").unlink(), r"train\.idx does not exist"),
        (lambda d: cut(d / "train.bin", 2), r"train\.bin has [\d,]+ bytes, train\.idx promises [\d,]+: truncated"),
        (lambda d: cut(d / "train.idx", 8), r"train\.idx has [\d,]+ bytes, its header promises [\d,]+ "),
        (lambda d: os.truncate(d / "train.idx", 20), "less than its 34-byte header: truncated"),
        (lambda d: flip_bit(d / "train.idx", 0), "not b'MMIDIDX.*: it is not a Megatron index"),
        (lambda d: flip_bit(d / "train.idx", 9), "has version 0; this reader knows version 1 only"),
        (lambda d: (d / "train.bin").write_bytes(b""), "has 0 bytes"),
    ],
)
def test_a_damaged_pair_is_refused(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    dataset = make_dataset(tmp_path / "data")
    damage(dataset)
    with pytest.raises(ShardError, match=message):
        open_split(dataset, "train")


@pytest.mark.parametrize(("code", "name"), [(6, "float64"), (7, "float32"), (9, "unknown")])
def test_a_dtype_that_holds_no_ids_is_refused(tmp_path: Path, code: int, name: str) -> None:
    with pytest.raises(ShardError, match=rf"dtype code {code} \({name}\)"):
        Shard(write_megatron(tmp_path / "train", [[1]], [0, 1], code, "f"))


def test_opening_names_what_is_missing_and_what_exists(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="the directory does not exist"):
        open_split(tmp_path / "nowhere", "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ShardError, match="would hold a manifest.json, and the directory has none"):
        open_split(tmp_path / "empty", "train")
    with pytest.raises(ShardError, match="no split 'test'; it has train, validation"):
        open_split(make_dataset(tmp_path / "data"), "test")


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data")
    own = Manifest.read(dataset).tokenizer.sha256
    assert open_split(dataset, "train", tokenizer_sha256=own)[0].n_tokens > 0
    with pytest.raises(ShardError, match=f"another tokenizer .bytes, sha256 {own[:12]}.*asked for .sha256 abcabc"):
        open_split(dataset, "train", tokenizer_sha256="abcabc")


def test_files_of_another_size_than_in_the_manifest_are_refused(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data", fractions=(1, 0, 0))
    write = ShardWriter(tmp_path / "train", vocab_size=257)
    with write:
        write.append(np.array([1, 2, 3]))
    for suffix in (".bin", ".idx"):
        (tmp_path / f"train{suffix}").replace(dataset / f"train{suffix}")
    with pytest.raises(ShardError, match="has 6 bytes, the manifest says"):
        open_split(dataset, "train")


def edit_manifest(dataset: Path, **fields: object) -> None:
    path = dataset / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": 5}, "'version': 5}; this reader knows .* versions 1 to 4: a newer version of this program"),
        ({"format": "npy"}, "'format': 'npy'"),
        ({"colour": "red"}, r"unknown fields \['colour'\], missing \[\]"),
        ({"adds_bos": 1}, "adds_bos: 1 is not a bool"),
        ({"splits": {"train": {"tokens": 3}}}, "missing .*'documents'"),
        (
            {
                "splits": {
                    "train": {
                        "documents": 1,
                        "tokens": 1,
                        "text_bytes": 1,
                        "words": 1,
                        "files": {},
                        "not_round_trip": 0,
                    }
                }
            },
            "files of train are",
        ),
    ],
)
def test_a_manifest_this_version_does_not_know_is_refused(
    tmp_path: Path, fields: dict[str, object], message: str
) -> None:
    dataset = make_dataset(tmp_path / "data")
    edit_manifest(dataset, **fields)
    with pytest.raises(ShardError, match=message):
        Manifest.read(dataset)


def test_a_manifest_of_version_1_is_read_as_what_it_said(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data")
    path, now = dataset / "manifest.json", Manifest.read(dataset)
    fields = json.loads(path.read_text()) | {"version": 1, "not_round_trip": 0}
    for split in fields["splits"].values():
        del split["not_round_trip"]
    path.write_text(json.dumps({k: v for k, v in fields.items() if k not in ("selection", "origin")}))
    assert Manifest.read(dataset) == now
    path.write_text(json.dumps(fields | {"version": 3, "not_round_trip": 2}))  # in one of its splits, or several
    assert {split.not_round_trip for split in Manifest.read(dataset).splits.values()} == {2}


def test_manifest_survives_json(tmp_path: Path) -> None:
    manifest = Manifest.read(make_dataset(tmp_path / "data"))
    (tmp_path / "copy").mkdir()
    manifest.write(tmp_path / "copy")
    assert Manifest.read(tmp_path / "copy") == manifest


def test_fingerprint_follows_tokens_documents_and_tokenizer_only(tmp_path: Path) -> None:
    one, same, other = (
        Manifest.read(make_dataset(tmp_path / name, seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert one.fingerprint("train") == same.fingerprint("train")
    retold = dataclasses.replace(one, tokenizer=dataclasses.replace(one.tokenizer, sha256="0" * 64))
    cut = json.loads(json.dumps(dataclasses.asdict(one)))  # the same tokens, in other documents
    for split in ("train", "validation"):
        cut["splits"][split]["files"][f"{split}.idx"]["sha256"] = "0" * 64
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/manifest.json").write_text(json.dumps(cut))
    recut = Manifest.read(tmp_path / "cut")
    prints = {m.fingerprint(split) for m in (one, other, retold, recut) for split in ("train", "validation")}
    assert len(prints) == 8


def test_verify_finds_nothing_in_a_sound_dataset_and_reports_progress(tmp_path: Path) -> None:
    dataset, seen = make_dataset(tmp_path / "data"), list[int]()
    assert verify(dataset, progress=seen.append) == []
    assert sum(seen) == sum(p.stat().st_size for p in dataset.iterdir() if p.name != "manifest.json")


def test_verify_lists_every_problem(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data")
    flip_bit(dataset / "train.bin", 1)  # the high byte of a byte tokenizer's first id: 256, bos, becomes 0
    flip_bit(dataset / "validation.idx", HEADER.size)  # a length
    (dataset / "tokenizer.bytes").unlink()
    found = "\n".join(verify(dataset, ["train", "validation", "test"]))
    assert "no split 'test'" in found
    assert "tokenizer.bytes is missing" in found
    assert "train.bin has sha256" in found
    assert "validation.idx has sha256" in found
    assert "1 sequences do not follow the one before, the first is sequence 1" in found


def test_verify_names_tokens_beyond_the_vocabulary(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data")
    flip_bit(dataset / "train.bin", 7)  # token 3 becomes 256 + a letter
    assert any("1 tokens outside the vocabulary of 257, the first is id" in p for p in verify(dataset))
    assert any("at position 3" in p for p in verify(dataset))


def test_a_damaged_split_is_refused_and_one_above_the_limit_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = make_dataset(tmp_path / "dataset", n_documents=80)
    verify_up_to(dataset, ["train", "validation"], 1.0)
    flip_bit(dataset / "validation.bin", 0)
    with pytest.raises(ShardError, match=r"dataset is damaged:\n- .*validation\.bin has sha256"):
        verify_up_to(dataset, ["train", "validation"], 1.0)
    assert caplog.text == ""
    verify_up_to(dataset, ["validation"], 0)
    assert "validation: 0.0 GiB, more than 0, are not hashed" in caplog.text


def test_a_document_index_that_runs_backwards_is_a_problem(tmp_path: Path) -> None:
    shard = Shard(write_megatron(tmp_path / "train", [[1], [2], [3]], [0, 2, 1, 3], 8, "H"))
    assert list(shard.problems()) == [
        f"{tmp_path}/train.idx: the document index runs backwards after document 1",
    ]


def test_a_failed_build_leaves_nothing_and_the_old_output_stays(tmp_path: Path) -> None:
    output = tmp_path / "data"
    with atomic_directory(output, error=ShardError) as scratch:
        (scratch / "config.json").write_text("old")
    with (
        pytest.raises(ShardError, match="exists; choose another output"),
        atomic_directory(output, error=ShardError),
    ):
        pass
    with pytest.raises(RuntimeError), atomic_directory(output, error=ShardError, overwrite=True) as scratch:
        (scratch / "config.json").write_text("new")
        raise RuntimeError
    assert (output / "config.json").read_text() == "old"
    with atomic_directory(output, error=ShardError, overwrite=True) as scratch:
        (scratch / "manifest.json").write_text("new")
        assert (output / "config.json").read_text() == "old"
    assert [p.name for p in output.iterdir()] == ["manifest.json"]
    assert list(tmp_path.iterdir()) == [output]


def test_a_kill_between_the_two_renames_is_undone(tmp_path: Path) -> None:
    output, dead = tmp_path / "data", 2**22 + 1  # beyond the largest process id of Linux
    with atomic_directory(output, error=ShardError) as scratch:
        (scratch / "a").write_text("old")
        host = scratch.name.removeprefix("data.tmp-").rpartition("-")[0]
    output.rename(tmp_path / f"data.old-{host}-{dead}")
    (tmp_path / f"data.tmp-{host}-{dead}").mkdir()
    (tmp_path / f"data.tmp-{host}-1").mkdir()  # a living process
    (tmp_path / f"data.tmp-elsewhere-{dead}").mkdir()  # another node's
    with pytest.raises(ShardError, match="exists"), atomic_directory(output, error=ShardError):
        pass
    assert (output / "a").read_text() == "old"
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"data", f"data.tmp-{host}-1", f"data.tmp-elsewhere-{dead}"}
