"""Rows of L tokens out of a split: what the model reads, what it predicts, and where documents begin."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mamba_pretrain.data.dataset import open_split
from mamba_pretrain.data.shards import Shard, ShardError

IGNORE: Final = -100  # the label that torch's cross entropy leaves out
PACKINGS: Final = ("windows", "best_fit", "documents")


class Block(NamedTuple):
    """B rows of L tokens."""

    input_ids: NDArray[np.int64]  # (B, L)
    labels: NDArray[np.int64]  # (B, L): the next token of the document, IGNORE where there is none
    seq_idx: NDArray[np.int32]  # (B, L): the documents of a row, counted from 0; the state starts anew where it changes
    padding: NDArray[np.int64]  # (B,): positions of each row that hold no token


class Rows(Protocol):
    """One split cut into rows, which can be read in any order. Pickles as a path: loader processes map it themselves."""

    seq_len: int
    n_rows: int  # in one epoch
    unread_tokens: int  # of the split, in no row

    def read(self, rows: NDArray[np.int64]) -> Block:
        """The rows of these numbers (B,), each in range(n_rows). Raises ShardError for damaged data."""
        ...


def make_rows(directory: Path, split: str, *, seq_len: int, vocab_size: int, packing: str) -> Rows:
    """The rows of a split: "windows" of its stream, "best_fit" packs of whole documents, or one of "documents" each.

    The last two need a pack, which `python -m data_prep.pack_shards` makes. Raises ShardError where there is none, or
    no row at all.
    """
    shard, _ = open_split(directory, split)
    if packing == "windows":
        return Windows(shard, seq_len, vocab_size)
    raise ShardError(f"packing is {packing!r}: expected one of {', '.join(PACKINGS)}")


class Windows:
    """Row i is tokens [i * L, (i + 1) * L) of the split, wherever documents begin and end."""

    def __init__(self, shard: Shard, seq_len: int, vocab_size: int) -> None:
        self.shard, self.seq_len, self.vocab_size = shard, seq_len, vocab_size
        self.n_rows = n_windows(shard, seq_len)
        self.unread_tokens = shard.n_tokens - self.n_rows * seq_len
        if self.n_rows == 0:
            raise ShardError(
                f"{shard.path} has {shard.n_tokens:,} tokens, fewer than one window of {seq_len:,} and its last label: "
                "use more data, or a shorter sequence length"
            )

    def read(self, rows: NDArray[np.int64]) -> Block:
        parts = [window(self.shard, i, self.seq_len, vocab_size=self.vocab_size) for i in rows.tolist()]
        input_ids, labels, seq_idx = (np.stack(part) for part in zip(*parts, strict=True))
        return Block(input_ids, labels, seq_idx, np.zeros(len(rows), np.int64))


def n_windows(shard: Shard, seq_len: int) -> int:
    """Whole windows in the split. The last token is only ever a label; up to seq_len - 1 before it are unused."""
    return max(shard.n_tokens - 1, 0) // seq_len


def window(
    shard: Shard, index: int, seq_len: int, *, vocab_size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """Window `index`, L = seq_len tokens from index * L on, as (input_ids (L,), labels (L,), seq_idx (L,)).

    labels[t] is the token after input_ids[t], or IGNORE where that token belongs to another document. seq_idx[t] counts
    the documents of the window from 0; the model's state starts anew where it changes. Raises ShardError for a token
    outside the vocabulary: on the GPU it would be an illegal memory access without a name.
    """
    assert 0 <= index < n_windows(shard, seq_len)
    start = index * seq_len
    stop = start + seq_len
    tokens = shard.tokens(start, stop + 1)
    if tokens.max() >= vocab_size or tokens.min() < 0:
        at = int(np.argmax((tokens >= vocab_size) | (tokens < 0)))
        raise ShardError(
            f"{shard.path}.bin has token id {tokens[at]} at position {start + at:,}, the vocabulary has "
            f"{vocab_size:,}: the file is damaged (see python -m data_prep.verify_shards), or the model "
            "is for another tokenizer"
        )
    begins = np.zeros(seq_len + 1, np.bool_)  # whether a document, not the window's first, begins at each token
    begins[shard.document_starts(start + 1, stop + 1) - start] = True
    labels = np.where(begins[1:], IGNORE, tokens[1:])
    return tokens[:-1], labels, np.cumsum(begins[:-1], dtype=np.int32)
