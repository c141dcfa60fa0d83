"""Every kind of damage is found and named; a split is read once, and blocks join without a seam."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from data_prep import verify_shards
from data_prep.train_tokenizer import train_json
from mamba_pretrain.data import scan as scan_module
from mamba_pretrain.data.dataset import verify
from mamba_pretrain.data.manifest import Manifest, TokenizerInfo
from mamba_pretrain.data.scan import scan
from mamba_pretrain.data.shards import Shard
from mamba_pretrain.data.tokenizer import BYTES_FILE
from mamba_pretrain.data.writer import ShardWriter
from mamba_pretrain.files import sha256_of
from tests.helpers.corpora import make_dataset, make_documents

INFO = TokenizerInfo("bytes", "", 257, 256, 256, "tokenizer.bytes")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "data")


def write_tokens(path: Path, position: int, *ids: int) -> None:
    content = np.fromfile(path, "<u2")
    content[position : position + len(ids)] = ids
    content.tofile(path)


def rehash(dataset: Path, split: str = "train") -> None:
    """As if the manifest had been made of the files as they are now: what remains to be found is in the content."""
    content = (dataset / "manifest.json").read_text()
    for name, file in Manifest.read(dataset).splits[split].files.items():
        content = content.replace(file.sha256, sha256_of(dataset / name))
    (dataset / "manifest.json").write_text(content)


def test_a_shard_edited_after_the_manifest_is_named(dataset: Path) -> None:
    write_tokens(dataset / "train.bin", 3, ord("x"))
    (problem,) = verify(dataset)
    assert "train.bin has sha256" in problem and "it changed" in problem


def test_a_truncated_shard_is_named_even_if_its_index_is_whole(dataset: Path) -> None:
    os.truncate(dataset / "validation.bin", (dataset / "validation.bin").stat().st_size - 2)
    found = verify(dataset)
    assert any("validation.bin has sha256" in problem for problem in found)
    assert any("truncated, or the two files are of different datasets" in problem for problem in found)


def test_a_swapped_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(train_json(make_documents(60), vocab_size=300))
    dataset = make_dataset(tmp_path / "data", tokenizer=tmp_path / "tokenizer.json")
    assert verify(dataset) == []
    other = tokenizers.Tokenizer.from_file(str(dataset / "tokenizer.json"))
    other.add_tokens(["river"])
    other.save(str(dataset / "tokenizer.json"))
    (problem,) = verify(dataset)
    assert "tokenizer.json has sha256" in problem and "it changed, or is another tokenizer" in problem


def test_settings_beside_the_tokenizer_that_move_the_end_are_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(train_json(make_documents(60), vocab_size=300))
    dataset = make_dataset(tmp_path / "data", tokenizer=tmp_path / "tokenizer.json")
    settings = (dataset / "tokenizer_config.json").read_text()
    (dataset / "tokenizer_config.json").write_text(settings.replace("<|endoftext|>", "!"))
    (problem,) = verify(dataset)
    assert "a tokenizer_config.json beside it, changed" in problem


def test_a_manifest_of_a_newer_version_is_named(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = (dataset / "manifest.json").read_text()
    (dataset / "manifest.json").write_text(content.replace('"version": 4', '"version": 5'))
    assert verify_shards.main([str(dataset)]) == 2
    assert "a newer version of this program may have made it" in capsys.readouterr().err


def test_another_count_of_documents_than_the_manifests_is_named(dataset: Path) -> None:
    info = Manifest.read(dataset).splits["train"]
    content = (dataset / "manifest.json").read_text()
    (dataset / "manifest.json").write_text(
        content.replace(f'"documents": {info.documents},', f'"documents": {info.documents + 1},')
    )
    assert any(f"the manifest says {info.documents + 1}" in problem for problem in verify(dataset))


def test_documents_without_their_marks_are_counted_and_the_first_named(dataset: Path) -> None:
    shard = Shard(dataset / "train")
    for document in (5, 7):
        write_tokens(dataset / "train.bin", shard.document_bounds(document)[0], 65)
    write_tokens(dataset / "train.bin", shard.document_bounds(9)[1] - 1, 65)
    rehash(dataset)
    bos, eod = verify(dataset)
    assert "2 documents do not begin with the bos, id 256" in bos and "the first is document 5" in bos
    assert "1 documents do not end with the eod, id 256" in eod and "the first is document 9" in eod


def test_a_document_that_is_no_text_is_found_by_decoding(dataset: Path) -> None:
    write_tokens(dataset / "train.bin", 3, 0xFF)
    rehash(dataset)
    (problem,) = verify(dataset)
    assert problem == f"{dataset}/train: document 0 does not decode to UTF-8 (invalid start byte at byte 2)"
    fields = json.loads((dataset / "manifest.json").read_text())
    for split, problems in (("validation", 1), ("train", 0)):  # of which the tokenizer says that it loses text
        fields["splits"][split]["not_round_trip"] = 1
        (dataset / "manifest.json").write_text(json.dumps(fields))
        assert len(verify(dataset)) == problems
    write_tokens(dataset / "train.bin", Shard(dataset / "train").document_bounds(1)[0] + 3, 0xFF)
    rehash(dataset)
    assert len(verify(dataset)) == 2  # more than it may lose


def test_a_document_longer_than_the_sample_may_be_cut_inside_a_character(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_dataset(tmp_path / "data", documents=["\u4e2d\u6587" * 20], fractions=(1, 0, 0))
    for tokens in (5, 6, 7):
        monkeypatch.setattr(scan_module, "SAMPLE_TOKENS", tokens)
        assert verify(dataset) == []


@pytest.mark.parametrize("block", [8, 16, 64, 1 << 21])
def test_blocks_join_without_a_seam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Marks, ids and hashes are those of the whole, wherever a block ends."""
    monkeypatch.setattr(scan_module, "BLOCK_BYTES", block)
    rng = np.random.default_rng(0)
    documents = [[*rng.choice([256, 7, 8], rng.integers(1, 12))] for _ in range(300)]
    with ShardWriter(tmp_path / "train", vocab_size=300) as writer:
        for tokens in documents:
            writer.append(np.array(tokens))
    found = scan(Shard(tmp_path / "train"), INFO)
    long = [tokens for tokens in documents if len(tokens) > 1]
    marks = found.marks
    assert marks.documents == len(long)
    assert marks.with_bos == sum(tokens[0] == 256 for tokens in long)
    assert marks.with_eod == sum(tokens[-1] == 256 for tokens in long)
    assert marks.first_without_bos == next(i for i, t in enumerate(documents) if len(t) > 1 and t[0] != 256)
    assert marks.first_without_eod == next(i for i, t in enumerate(documents) if len(t) > 1 and t[-1] != 256)
    assert found.problems == [] and found.files == writer.files
    outside = scan(Shard(tmp_path / "train"), TokenizerInfo("bytes", "", 8, 256, 256, ""))
    tokens = np.concatenate(documents)
    first = int(np.argmax(tokens >= 8))
    assert outside.problems == [
        f"{tmp_path}/train.bin: {(tokens >= 8).sum():,} tokens outside the vocabulary of 8, the first is id "
        f"{tokens[first]} at position {first:,}"
    ]


def test_many_datasets_are_read_at_a_time_and_each_gets_its_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = [make_dataset(tmp_path / name, seed=seed) for seed, name in enumerate("abc")]
    write_tokens(datasets[1] / "train.bin", 3, ord("x"))
    assert verify_shards.main(["--workers", "3", *map(str, datasets)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert [line for line in out if line.endswith(("sound", "problems"))] == [
        f"{datasets[0]}: sound",
        f"{datasets[1]}: 1 problems",
        f"{datasets[2]}: sound",
    ]
    assert verify_shards.main(["--workers", "0", str(datasets[0])]) == 2


def test_splits_are_read_at_the_same_time(dataset: Path) -> None:
    """Each waits, at its first block, for the other: one after the other would never meet."""
    meeting, seen = threading.Barrier(2), set[str]()

    def progress(read: int) -> None:
        name = threading.current_thread().name
        if read > len(BYTES_FILE) and name not in seen:
            seen.add(name)
            meeting.wait(timeout=20)

    assert verify(dataset, progress=progress, workers=3) == []
    assert len(seen) == 2


def test_a_disk_that_fails_is_named_with_the_file(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(stream: object, buffer: memoryview) -> int:
        raise OSError(5, "Input/output error", "train.bin")

    monkeypatch.setattr(scan_module, "_fill", fail)
    assert any("train.bin cannot be read: Input/output error" in problem for problem in verify(dataset, ["train"]))
