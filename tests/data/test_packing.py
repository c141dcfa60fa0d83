"""Windows reproduce the token stream; labels and document numbers follow the documents."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_pretrain.data.packing import IGNORE, n_windows, window
from mamba_pretrain.data.shards import Shard, ShardError
from mamba_pretrain.data.writer import ShardWriter


def shard_of(directory: Path, documents: list[list[int]], vocab_size: int = 100) -> Shard:
    with ShardWriter(directory / "train", vocab_size=vocab_size) as writer:
        for tokens in documents:
            writer.append(np.array(tokens))
    return Shard(directory / "train")


def test_documents_are_numbered_within_the_window_and_do_not_predict_each_other(tmp_path: Path) -> None:
    shard = shard_of(tmp_path, [[1, 2, 3], [4], [5, 6, 7, 8], [9, 10]])
    assert n_windows(shard, 4) == 2
    input_ids, labels, seq_idx = window(shard, 0, 4, vocab_size=100)
    assert input_ids.tolist() == [1, 2, 3, 4]
    assert labels.tolist() == [2, 3, IGNORE, IGNORE]  # 4 is a document alone, 5 belongs to the next
    assert seq_idx.tolist() == [0, 0, 0, 1]
    input_ids, labels, seq_idx = window(shard, 1, 4, vocab_size=100)
    assert input_ids.tolist() == [5, 6, 7, 8]
    assert labels.tolist() == [6, 7, 8, IGNORE]
    assert seq_idx.tolist() == [0, 0, 0, 0]
    assert (input_ids.dtype, labels.dtype, seq_idx.dtype) == (np.int64, np.int64, np.int32)


def test_a_document_cut_by_a_window_goes_on_in_the_next(tmp_path: Path) -> None:
    shard = shard_of(tmp_path, [[1, 2, 3, 4, 5, 6, 7]])
    assert window(shard, 0, 3, vocab_size=100)[1].tolist() == [2, 3, 4]
    assert window(shard, 1, 3, vocab_size=100)[1].tolist() == [5, 6, 7]


@pytest.mark.parametrize(("n_tokens", "expected"), [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_the_last_token_is_only_a_label(tmp_path: Path, n_tokens: int, expected: int) -> None:
    assert n_windows(shard_of(tmp_path, [list(range(n_tokens))]), 4) == expected


def test_a_token_beyond_the_vocabulary_is_named(tmp_path: Path) -> None:
    shard = shard_of(tmp_path, [[1, 2, 3, 4, 5, 99, 7]])
    window(shard, 0, 3, vocab_size=50)
    with pytest.raises(ShardError, match=r"train\.bin has token id 99 at position 5, the vocabulary has 50"):
        window(shard, 1, 3, vocab_size=50)


@settings(deadline=None, max_examples=60)
@given(documents=st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=12), min_size=1), seq_len=st.integers(1, 9))
def test_windows_in_a_row_are_the_stream(documents: list[list[int]], seq_len: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        shard = shard_of(Path(directory), documents)
        rows = [window(shard, i, seq_len, vocab_size=100) for i in range(n_windows(shard, seq_len))]
    stream = [token for tokens in documents for token in tokens]
    owner = [j for j, tokens in enumerate(documents) for _ in tokens]
    used = len(rows) * seq_len
    assert [int(t) for row in rows for t in row[0]] == stream[:used]
    assert [int(t) for row in rows for t in row[1]] == [
        stream[t + 1] if owner[t] == owner[t + 1] else IGNORE for t in range(used)
    ]
    for i, row in enumerate(rows):
        begin = i * seq_len
        assert row[2].tolist() == [owner[begin + t] - owner[begin] for t in range(seq_len)]
