"""Packs: every token once, whole documents where they fit, and no pack of another index."""

from __future__ import annotations

import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import pack_shards
from mamba_pretrain.data import packing
from mamba_pretrain.data.packing import IGNORE, Block, Packed, make_rows
from mamba_pretrain.data.packs import HEADER, Pack, Pieces, pack_path, write_pack
from mamba_pretrain.data.shards import Shard, ShardError
from tests.helpers.rows import Documents, dataset_of, foreign_shard, numbered, packed, shard_of

HOW = ("best_fit", "documents")


def segments(block: Block) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each run of one number in the rows, padding left out."""
    found = []
    for ids, labels, numbers, padding in zip(*block, strict=True):
        length = len(ids) - int(padding)
        assert numbers[0] == 0 and set(np.diff(numbers).tolist()) <= {0, 1}
        if padding:
            assert (ids[length:] == 0).all() and (labels[length:] == IGNORE).all()
            assert len(set(numbers[length:].tolist())) == 1
            assert numbers[length] not in numbers[:length]
        for number in range(int(numbers[length - 1]) + 1):
            here = np.flatnonzero(numbers[:length] == number)
            assert len(here), "a number without a token"
            found.append((ids[here].tolist(), labels[here].tolist()))
    return found


def check(rows: Packed, documents: Documents, how: str) -> None:
    """Documents are numbered through, so a token tells where it was."""
    seq_len, order = rows.seq_len, np.arange(rows.n_rows)[::-1].copy()
    block = rows.read(order)
    assert block.input_ids.shape == (rows.n_rows, seq_len)
    pieces = sorted(segments(block))
    due = []
    for tokens in documents:
        for first in range(0, len(tokens), seq_len):
            ids, after = tokens[first : first + seq_len], tokens[first + seq_len : first + seq_len + 1]
            if len(ids) > 1 or after:  # else its only token is a target already, or a document of one token
                due.append((ids, [*ids[1:], *(after or [IGNORE])]))
    assert pieces == sorted(due)
    targets = sorted(int(t) for t in block.labels[block.labels != IGNORE])
    assert targets == sorted(t for tokens in documents for t in tokens[1:])
    read = block.labels.size - int(block.padding.sum())
    assert read + rows.unread_tokens == sum(len(tokens) for tokens in documents)
    if how == "documents":
        assert rows.n_rows == len(due)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("lengths", [[1, 8, 9], [9], [8], [2], [7, 1, 1], [16, 17, 15, 24, 25], [*range(1, 8)] * 3])
def test_no_token_is_lost_or_doubled(tmp_path: Path, lengths: list[int], how: str) -> None:
    documents = numbered(lengths)
    check(packed(shard_of(tmp_path, documents, 1000), 8, how, 1000), documents, how)


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=25),
    seq_len=st.integers(2, 12),
    how=st.sampled_from(HOW),
    block=st.integers(1, 9),
    compiled=st.booleans(),
)
def test_no_token_is_lost_or_doubled_whatever_the_lengths(
    lengths: list[int], seq_len: int, how: str, block: int, compiled: bool
) -> None:
    documents = numbered(lengths)
    if max(lengths) < 2:
        return
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_shards, "BLOCK", block)
        if not compiled:
            patch.setattr(packing, "compiled_functions", lambda: None)
        check(packed(shard_of(Path(directory), documents, 1000), seq_len, how, 1000), documents, how)


@pytest.mark.parametrize("how", HOW)
def test_documents_of_several_sequences_or_of_none(tmp_path: Path, how: str) -> None:
    sequences = [[1, 2], [3], [4, 5, 6], [], [7, 8, 9, 10, 11], [12]]
    shard = foreign_shard(tmp_path, sequences, [0, 2, 2, 4, 5, 5, 6, 6])
    check(packed(shard, 4, how), [[1, 2, 3], [4, 5, 6], [7, 8, 9, 10, 11], [12]], how)


def test_best_fit_by_hand(tmp_path: Path) -> None:
    block = packed(shard_of(tmp_path, numbered([3, 5, 2, 11])), 8, "best_fit").read(np.array([0, 1, 2]))
    assert sorted(block.input_ids.tolist()) == [
        [4, 5, 6, 7, 8, 1, 2, 3],  # the longest first; 19..21, the rest of the longest, came after 1..3
        [11, 12, 13, 14, 15, 16, 17, 18],
        [19, 20, 21, 9, 10, 0, 0, 0],
    ]
    assert sorted(block.labels.tolist()) == [
        [5, 6, 7, 8, IGNORE, 2, 3, IGNORE],
        [12, 13, 14, 15, 16, 17, 18, 19],  # the document goes on in another row
        [20, 21, IGNORE, 10, IGNORE, IGNORE, IGNORE, IGNORE],
    ]
    assert sorted(block.seq_idx.tolist()) == [[0] * 8, [0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 2, 2, 2]]
    assert sorted(block.padding.tolist()) == [0, 0, 3]


@pytest.mark.parametrize("documents", [[[1, 2, 3], [4, 99, 6, 7], [5, 5]], [[1, 2, 3, 4, 99, 6]]])
def test_a_token_beyond_the_vocabulary_is_named_where_it_lies(tmp_path: Path, documents: Documents) -> None:
    """Of a row's own, or the one behind it, which is its last label."""
    rows = packed(shard_of(tmp_path, documents), 4, "best_fit", 50)
    with pytest.raises(ShardError, match=r"train\.bin has token id 99 at position 4, the vocabulary has 50"):
        rows.read(np.array([0]))


@pytest.mark.parametrize("how", HOW)
def test_rows_by_name_and_by_pickle(tmp_path: Path, how: str) -> None:
    dataset = dataset_of(tmp_path / "data", numbered([5, 6, 7]))
    options = {"seq_len": 8, "vocab_size": 100, "packing": how}
    expected = rf"does not exist.* run python -m data_prep.pack_shards {dataset} --seq-len 8 --how {how} --split train"
    with pytest.raises(ShardError, match=expected):
        make_rows(dataset, "train", **options)
    assert pack_shards.main([str(dataset), "--seq-len", "8", "--how", how]) == 0
    rows = make_rows(dataset, "train", **options)
    again = pickle.loads(pickle.dumps(rows))
    order = np.arange(rows.n_rows)
    for found, due in zip(again.read(order), rows.read(order), strict=True):
        np.testing.assert_array_equal(found, due)
    assert len(pickle.dumps(rows)) < 1000


def damaged(path: Path, at: int, data: bytes) -> None:
    with path.open("rb+") as stream:
        stream.seek(at)
        stream.write(data)


def test_a_pack_is_refused_that_does_not_belong_here(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path / "data", numbered([5, 6, 7]))
    assert pack_shards.main([str(dataset), "--seq-len", "8"]) == 0
    path = pack_path(dataset, "train", "best_fit", 8)
    good = path.read_bytes()

    def read(seq_len: int = 8) -> None:
        make_rows(dataset, "train", seq_len=seq_len, vocab_size=100, packing="best_fit")

    for at, data, message in (
        (0, b"MAMB", ""),
        (0, b"NUMPY", "not a pack"),
        (8, b"\x03", "version 3; this reader knows version 2 only"),
        (12, b"\x02", "it was renamed"),
        (40, b"\xff" * 8, "negative number"),
        (50, b"\x00\x01\x02\x03", "belongs to an index with sha256"),
        (len(good), b"more", "its header promises"),
    ):
        path.write_bytes(good)
        damaged(path, at, data)
        if message:
            with pytest.raises(ShardError, match=message) as caught:
                read()
            assert "run python -m data_prep.pack_shards" in str(caught.value)
        else:
            read()
    path.write_bytes(good)
    path.rename(pack_path(dataset, "train", "best_fit", 9))
    with pytest.raises(ShardError, match="renamed"):
        read(9)


def test_a_pack_whose_contents_changed_is_found(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path / "data", numbered([5, 6, 7, 30]))
    assert pack_shards.main([str(dataset), "--seq-len", "8"]) == 0
    path = pack_path(dataset, "train", "best_fit", 8)
    rows = make_rows(dataset, "train", seq_len=8, vocab_size=100, packing="best_fit")
    assert isinstance(rows, Packed)
    assert list(rows.pack.problems()) == []
    damaged(path, HEADER.size, np.array([1000], "<i8").tobytes())
    again = Packed(Shard(dataset / "train"), Pack(*rows.pack.__reduce__()[1]), 100)
    assert "not what was written" in next(again.pack.problems())
    with pytest.raises(ShardError, match="row 0 has 8 tokens from 1,000 on at column 0"):
        again.read(np.arange(again.n_rows))


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        (Pieces(np.array([2, 1]), np.array([0, 2, 16]), np.array([2, 2, -4])), "row 1 has 4 tokens from 16 on at col"),
        (Pieces(np.array([2, 1]), np.array([0, 2, 17]), np.array([2, 2, 4])), "row 1 has 4 tokens from 17 on at col"),
        (Pieces(np.array([4, 1]), np.array([0, 2]), np.array([2, 2])), "row 1 is pieces 4 to 5 of 2"),
    ],
    ids=["goes on at the end", "ends after the end", "no such piece"],
)
def test_a_row_beyond_the_tokens_or_the_pieces_is_refused(tmp_path: Path, pieces: Pieces, message: str) -> None:
    """Whatever lies there: behind the pieces it is numbers of the same file, which would do for a piece."""
    shard = shard_of(tmp_path, numbered([20]))
    path, sha256 = pack_path(tmp_path, "train", "best_fit", 8), "0" * 64
    write_pack(path, "best_fit", 8, sha256, len(pieces.starts), 0, [pieces])
    rows = Packed(shard, Pack(tmp_path, "train", "best_fit", 8, sha256), 100)
    with pytest.raises(ShardError, match=message):
        rows.read(np.array([1]))


def test_nothing_to_predict_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no document of two tokens or more"):
        packed(shard_of(tmp_path, [[1], [2]]), 8, "best_fit")
