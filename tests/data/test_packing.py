"""Windows reproduce the token stream; labels and document numbers follow the documents."""

from __future__ import annotations

import contextlib
import pickle
import resource
import shutil
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_pretrain.data import packing, shards
from mamba_pretrain.data.packing import IGNORE, Windows, make_rows, n_windows
from mamba_pretrain.data.shards import HEADER, MAGIC, VERSION, Shard, ShardError
from tests.helpers.rows import assert_equal, dataset_of, foreign_shard, numbered, shard_of, windows_of


def test_documents_are_numbered_within_the_window_and_do_not_predict_each_other(tmp_path: Path) -> None:
    rows = Windows(shard_of(tmp_path, [[1, 2, 3], [4], [5, 6, 7, 8], [9, 10]]), 4, 100)
    assert (rows.n_rows, rows.unread_tokens) == (2, 2)
    block = rows.read(np.array([1, 0]))
    assert block.input_ids.tolist() == [[5, 6, 7, 8], [1, 2, 3, 4]]
    assert block.labels.tolist() == [[6, 7, 8, IGNORE], [2, 3, IGNORE, IGNORE]]  # 4 is a document alone
    assert block.seq_idx.tolist() == [[0, 0, 0, 0], [0, 0, 0, 1]]
    assert block.padding.tolist() == [0, 0]
    assert [part.dtype for part in block] == [np.int64, np.int64, np.int32, np.int64]


def test_a_document_cut_by_a_window_goes_on_in_the_next(tmp_path: Path) -> None:
    block = Windows(shard_of(tmp_path, [[1, 2, 3, 4, 5, 6, 7]]), 3, 100).read(np.array([0, 1]))
    assert block.labels.tolist() == [[2, 3, 4], [5, 6, 7]]


@pytest.mark.parametrize(("n_tokens", "expected"), [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_the_last_token_is_only_a_label(tmp_path: Path, n_tokens: int, expected: int) -> None:
    shard = shard_of(tmp_path, [list(range(n_tokens))])
    assert n_windows(shard, 4) == expected
    if expected:
        assert Windows(shard, 4, 100).unread_tokens == n_tokens - 4 * expected
    else:
        with pytest.raises(ShardError, match="fewer than one window of 4"):
            Windows(shard, 4, 100)


@pytest.mark.parametrize("resident", [0, 1 << 20])
@pytest.mark.parametrize(("seq_len", "at"), [(3, 5), (3, 6), (5000, 9999), (5000, 10_000)])
def test_a_token_beyond_the_vocabulary_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seq_len: int, at: int, resident: int
) -> None:
    """The last one that the second row reads, and the one behind, which is its last label."""
    monkeypatch.setattr(shards, "RESIDENT", resident)
    tokens = np.arange(3 * seq_len) % 50
    tokens[at] = 99
    rows = Windows(shard_of(tmp_path, [tokens.tolist()]), seq_len, 50)
    rows.read(np.array([0]))
    with pytest.raises(ShardError, match=rf"train\.bin has token id 99 at position {at:,}, the .* 50"):
        rows.read(np.array([0, 1]))


@pytest.mark.parametrize(("code", "vocab_size"), [(2, 100), (2, 300), (3, 100), (3, 70_000), (4, 100), (5, 100)])
def test_a_negative_token_is_named(tmp_path: Path, code: int, vocab_size: int) -> None:
    rows = Windows(foreign_shard(tmp_path, [[1, 2, 3, -4, 5, 6, 7]], [0, 1], code), 3, vocab_size)
    with pytest.raises(ShardError, match=r"token id -4 at position 3"):
        rows.read(np.array([1]))


@pytest.mark.parametrize(("code", "vocab_size"), [(1, 256), (8, 65_536)])
def test_a_vocabulary_of_the_whole_dtype_lets_every_token_pass(tmp_path: Path, code: int, vocab_size: int) -> None:
    shard = foreign_shard(tmp_path, [[0, 1, vocab_size - 1, 0]], [0, 1], code)
    assert Windows(shard, 3, vocab_size).read(np.array([0])).input_ids.tolist() == [[0, 1, vocab_size - 1]]
    with pytest.raises(ShardError, match=f"token id {vocab_size - 1} at position 2"):
        Windows(shard, 3, vocab_size - 1).read(np.array([0]))


@settings(deadline=None, max_examples=60)
@given(
    documents=st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=12), min_size=1),
    seq_len=st.integers(1, 9),
    resident=st.booleans(),
    compiled=st.booleans(),
    data=st.data(),
)
def test_rows_are_the_stream_however_they_are_read(
    documents: list[list[int]], seq_len: int, resident: bool, compiled: bool, data: st.DataObject
) -> None:
    ids, labels, numbers = windows_of(documents, seq_len)
    if not len(ids):
        return
    rows = np.array(data.draw(st.lists(st.integers(0, len(ids) - 1), min_size=1, max_size=12)))
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "RESIDENT", 1 << 20 if resident else 0)
        if not compiled:
            patch.setattr(packing, "compiled_functions", lambda: None)
        windows = Windows(shard_of(Path(directory), documents), seq_len, 100)
        assert_equal(windows.read(rows), ids[rows], labels[rows], numbers[rows])
        assert not windows.read(rows).padding.any()


@pytest.mark.parametrize("resident", [0, 1 << 20])
@pytest.mark.parametrize(
    ("sequences", "index", "documents"),
    [
        ([[1, 2], [3], [4, 5, 6], [7]], [0, 2, 4], [[1, 2, 3], [4, 5, 6, 7]]),
        ([[1, 2], [3], [4, 5, 6], [7]], [0, 2, 2, 4, 4], [[1, 2, 3], [4, 5, 6, 7]]),  # as many documents as sequences
        ([[1, 2], [], [3], [], [], [4, 5, 6, 7]], [0, 1, 2, 3, 4, 5, 6], [[1, 2], [3], [4, 5, 6, 7]]),
        ([[], [1, 2, 3], [4, 5, 6, 7], []], [0, 0, 1, 2, 4], [[1, 2, 3], [4, 5, 6, 7]]),
    ],
)
def test_documents_of_several_sequences_or_of_none(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sequences: list[list[int]],
    index: list[int],
    documents: list[list[int]],
    resident: int,
) -> None:
    monkeypatch.setattr(shards, "RESIDENT", resident)
    shard = foreign_shard(tmp_path, sequences, index)
    for seq_len in (1, 2, 3, 6):
        ids, labels, numbers = windows_of(documents, seq_len)
        rows = Windows(shard, seq_len, 100)
        assert_equal(rows.read(np.arange(rows.n_rows)), ids, labels, numbers)


@pytest.mark.parametrize(("code", "sequences"), [(8, 1), (4, 1), (8, 3)])
def test_documents_are_found_in_the_file_wherever_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, sequences: int
) -> None:
    """Thousands, of lengths that mislead a guess: one far longer than all others, runs of single tokens."""
    rng = np.random.default_rng(code)
    lengths = [*rng.integers(1, 40, 3000), 90_000, *[1] * 3000, *rng.lognormal(3, 2, 2000).astype(int) + 1, 1]
    edges = [*range(0, len(lengths), sequences), len(lengths)]  # so many sequences make a document
    shard = foreign_shard(tmp_path, [[i % 100] * n for i, n in enumerate(lengths)], edges, code)
    for seq_len in (1, 7, 600):
        windows = Windows(shard, seq_len, 100)
        rows = np.sort(rng.permutation(windows.n_rows)[:3000])
        expected = windows.read(rows)
        with monkeypatch.context() as patch:
            patch.setattr(shards, "RESIDENT", 0)
            elsewhere = Windows(Shard(shard.path), seq_len, 100)
            patch.setattr(Shard, "document_starts", lambda *_: pytest.fail("looked up by Python"))
            assert_equal(elsewhere.read(rows), *expected[:3])


@pytest.mark.parametrize("resident", [0, 1 << 20])
def test_an_index_that_runs_backwards_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resident: int
) -> None:
    monkeypatch.setattr(shards, "RESIDENT", resident)
    shard = shard_of(tmp_path, numbered([2, 3, 4, 5, 6, 7]))
    with (tmp_path / "train.idx").open("rb+") as stream:
        stream.seek(HEADER.size + 4 * 6 + 8 * 2)
        stream.write(np.array([20, 9, 15], "<i8").tobytes())
    with pytest.raises(ShardError, match="index is damaged"):
        Windows(shard, 26, 100).read(np.array([0]))


@pytest.mark.parametrize("compiled", [True, False])
def test_a_damaged_token_that_is_no_label_is_the_next_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    """The token behind a row that begins a document is nobody's label there."""
    if not compiled:
        monkeypatch.setattr(packing, "compiled_functions", lambda: None)
    rows = Windows(foreign_shard(tmp_path, [[1, 2, 3, 4], [999, 6, 7, 8, 9]], [0, 1, 2]), 4, 100)
    assert rows.read(np.array([0])).labels.tolist() == [[2, 3, 4, IGNORE]]
    with pytest.raises(ShardError, match="token id 999 at position 4"):
        rows.read(np.array([1]))


@pytest.mark.parametrize("entry", [-1, 1 << 40, 1 << 62])
@pytest.mark.parametrize("which", ["offset", "document"])
def test_a_searched_index_that_leads_nowhere_is_an_error_or_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str, entry: int
) -> None:
    """Of a damaged index rows may come out wrong where only verify_shards can tell, but never as another error."""
    monkeypatch.setattr(shards, "RESIDENT", 0)
    lengths = [3] * 64
    shard_of(tmp_path, [[1, 2, 3]] * 64)
    for document in range(1, 63):
        with (tmp_path / "train.idx").open("rb+") as stream:
            at = HEADER.size + 4 * len(lengths) + 8 * document + (8 * len(lengths) if which == "document" else 0)
            stream.seek(at)
            before = stream.read(8)
            stream.seek(at)
            stream.write(np.array([entry], "<i8").tobytes())
        windows = Windows(Shard(tmp_path / "train"), 19, 100)
        for row in range(windows.n_rows):
            with contextlib.suppress(ShardError):
                windows.read(np.array([row]))
        with (tmp_path / "train.idx").open("rb+") as stream:
            stream.seek(at)
            stream.write(before)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 8])
def test_compiled_rows_are_those_of_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """At lengths around the block of the loops, for every width and sign of a token."""
    assert packing.compiled_functions() is not None, (
        "there is a compiler: that sources do not build is no reason to skip"
    )
    rng = np.random.default_rng(code)
    documents = [rng.integers(0, 100, n).tolist() for n in rng.integers(0, 900, 40)]
    shard = foreign_shard(tmp_path, documents, list(range(41)), code)
    for seq_len in (1, 7, 1023, 1024, 1025, 3000):
        windows = Windows(shard, seq_len, 100)
        chosen = rng.permutation(windows.n_rows)[:9]
        compiled = windows.read(chosen)
        with monkeypatch.context() as patch:
            patch.setattr(packing, "compiled_functions", lambda: None)
            assert_equal(compiled, *Windows(shard, seq_len, 100).read(chosen)[:3])
        assert not compiled.padding.any()


def test_without_a_compiler_rows_come_from_numpy_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MAMBA_PRETRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "/nonexistent")
    monkeypatch.setattr(packing, "compiled_functions", cache(packing.compiled_functions.__wrapped__))
    rows = Windows(shard_of(tmp_path, [[1, 2, 3], [4, 5]]), 4, 100)
    assert rows.read(np.array([0])).labels.tolist() == [[2, 3, IGNORE, 5]]
    assert caplog.text.count("rows are read by numpy, which takes several times as long: no C++ compiler") == 1


def test_rows_by_name(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path / "data", numbered([5, 6, 7]))
    rows = make_rows(dataset, "train", seq_len=4, vocab_size=100, packing="windows")
    assert rows.read(np.array([1])).input_ids.tolist() == [[5, 6, 7, 8]]
    again = pickle.loads(pickle.dumps(rows))
    assert (again.n_rows, again.read(np.array([1])).labels.tolist()) == (4, [[IGNORE, 7, 8, 9]])
    assert len(pickle.dumps(rows)) < 1000
    with pytest.raises(ShardError, match="packing is 'bestfit': expected one of windows, best_fit, documents"):
        make_rows(dataset, "train", seq_len=4, vocab_size=100, packing="bestfit")


def test_a_trillion_tokens_open_in_little_memory(tmp_path: Path) -> None:
    """The files are holes, except where a row is read: 2 TB of tokens, 20 GB of index."""
    n_documents, size = 10**9, 1000
    n_tokens = n_documents * size
    with (tmp_path / "train.idx").open("wb") as stream:
        stream.write(HEADER.pack(MAGIC, VERSION, 8, n_documents, n_documents + 1))
        pointers = HEADER.size + 4 * n_documents
        index = pointers + 8 * n_documents
        stream.truncate(index + 8 * (n_documents + 1))
        target = 70_000_123
        near = np.arange(target - 20_000, target + 20_000)  # where a search for it looks
        for documents in (near, np.array([n_documents - 1])):
            stream.seek(pointers + 8 * int(documents[0]))
            stream.write((2 * size * documents).astype("<i8").tobytes())
            stream.seek(index + 8 * int(documents[0]))
            stream.write(documents.astype("<i8").tobytes())
        stream.seek(HEADER.size + 4 * (n_documents - 1))
        stream.write(np.array([size], "<i4").tobytes())
        stream.seek(index + 8 * n_documents)
        stream.write(np.array([n_documents], "<i8").tobytes())
    with (tmp_path / "train.bin").open("wb") as stream:
        stream.truncate(2 * n_tokens)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = Windows(Shard(tmp_path / "train"), 2048, 50_277)
    first = -(-target * size // 2048)
    block = rows.read(np.array([first]))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
    assert rows.n_rows == (n_tokens - 1) // 2048
    starts = [at for at in range(1, 2048) if (first * 2048 + at) % size == 0]
    assert np.flatnonzero(np.diff(block.seq_idx[0])).tolist() == [at - 1 for at in starts]
