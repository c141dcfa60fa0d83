"""Rows of L tokens out of a split: what the model reads, what it predicts, and where documents begin."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mamba_pretrain.data.dataset import open_split
from mamba_pretrain.data.packs import HOW, Pack
from mamba_pretrain.data.shards import Shard, ShardError

IGNORE: Final = -100  # the label that torch's cross entropy leaves out
PACKINGS: Final = ("windows", *HOW)
GROUP_TOKENS: Final = 1 << 15  # gathered at a time: 64 KiB of 2-byte tokens


class Block(NamedTuple):
    """B rows of L tokens."""

    input_ids: NDArray[np.int64]  # (B, L)
    labels: NDArray[np.int64]  # (B, L): the next token of the document, IGNORE where there is none
    seq_idx: NDArray[np.int32]  # (B, L): the documents of a row, counted from 0; the state starts anew where it changes
    padding: NDArray[np.int64]  # (B,): positions of each row that hold no token


class Rows(Protocol):
    """One split cut into rows, which can be read in any order. Pickles as paths: loader processes map files themselves.

    A row is read from what lies in the page cache or on disk; nothing of it stays in memory.
    """

    seq_len: int
    n_rows: int  # in one epoch
    unread_tokens: int  # of the split, in no row

    def read(self, rows: NDArray[np.int64]) -> Block:
        """The rows of these numbers (B,), each in range(n_rows).

        One call for 2^17 tokens or so takes much less time than one for each row. Raises ShardError for a token outside
        the vocabulary: on the GPU it would be an illegal memory access without a name.
        """
        ...


def make_rows(directory: Path, split: str, *, seq_len: int, vocab_size: int, packing: str) -> Rows:
    """The rows of a split: "windows" of its stream, "best_fit" packs of whole documents, or one of "documents" each.

    The last two need a pack, which `python -m data_prep.pack_shards` makes. Raises ShardError where there is none, or
    no row at all.
    """
    if packing not in PACKINGS:
        raise ShardError(f"packing is {packing!r}: expected one of {', '.join(PACKINGS)}")
    shard, manifest = open_split(directory, split)
    if packing == "windows":
        return Windows(shard, seq_len, vocab_size)
    pack = Pack(directory, split, packing, seq_len, manifest.splits[split].files[f"{split}.idx"].sha256)
    return Packed(shard, pack, vocab_size)


def n_windows(shard: Shard, seq_len: int) -> int:
    """Whole windows in the split. The last token is only ever a label; up to seq_len - 1 before it are unused."""
    return max(shard.n_tokens - 1, 0) // seq_len


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
        length, shard = self.seq_len, self.shard
        starts = [row * length for row in rows.tolist()]
        assert min(starts) >= 0 and max(starts) < self.n_rows * length
        pieces = [[(0, start, length + 1)] for start in starts]
        input_ids, labels = _read_tokens(shard, self.vocab_size, pieces, length)
        positions, counts = shard.document_starts_in(rows * length + 1, length)
        # In the flat (B * L,) block; a document that begins just behind a row cuts where the next row begins anyway.
        cuts = positions + (np.arange(0, labels.size, length) - starts).repeat(counts)
        seq_idx = _numbered(shard, cuts, counts, length)
        labels.reshape(-1)[cuts - 1] = IGNORE
        return Block(input_ids, labels, seq_idx, np.zeros(len(starts), np.int64))


class Packed:
    """Rows as a pack says: whole documents, and pieces of those that are longer than a row, padded at the end.

    The label of a piece's last token is the token after it where the document goes on. Padding has id 0, no label, and
    a number of its own in seq_idx, the row's last.
    """

    def __init__(self, shard: Shard, pack: Pack, vocab_size: int) -> None:
        self.shard, self.pack, self.vocab_size = shard, pack, vocab_size
        self.seq_len, self.n_rows, self.unread_tokens = pack.seq_len, pack.n_rows, pack.unread_tokens
        if self.n_rows == 0:
            raise ShardError(f"{shard.path} has no document of two tokens or more: there is nothing to predict")

    def read(self, rows: NDArray[np.int64]) -> Block:
        length, n_tokens = self.seq_len, self.shard.n_tokens
        assert rows.min() >= 0 and rows.max() < self.n_rows
        pieces: list[list[tuple[int, int, int]]] = []
        cuts: list[int] = []  # where documents end, in the flat (B * L,) block
        counts, filled = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
        for i, row in enumerate(self.pack.pieces(rows)):
            pieces.append([])
            column = 0
            for start, signed in row:
                count, goes_on = abs(signed), signed < 0
                if not 0 <= start < start + count + goes_on <= n_tokens or column + count > length:
                    raise ShardError(
                        f"{self.pack.path}: row {rows[i]:,} has {count:,} tokens from {start:,} on at column "
                        f"{column:,} of {length:,}, of a split of {n_tokens:,}: it is damaged; make it again by "
                        "data_prep.pack_shards"
                    )
                pieces[-1].append((column, start, count + goes_on))
                column += count
                if not goes_on:
                    cuts.append(i * length + column)
                    counts[i] += 1
            filled[i] = column
        input_ids, labels = _read_tokens(self.shard, self.vocab_size, pieces, length)
        ends = np.array(cuts, np.int64)
        labels.reshape(-1)[ends - 1] = IGNORE
        padding = length - filled
        for i in np.flatnonzero(padding).tolist():
            labels[i, filled[i] :] = IGNORE
        return Block(input_ids, labels, _numbered(self.shard, ends, counts, length), padding)


def _read_tokens(
    shard: Shard, vocab_size: int, rows: list[list[tuple[int, int, int]]], seq_len: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """input_ids and labels (B, L) of rows that are given as pieces: (column, first token, number of tokens).

    A row has L + 1 columns, those without a token are 0. Raises ShardError for a token outside the vocabulary.
    """
    # One allocation, which the C library keeps for the next block: new pages would cost more than reading does.
    input_ids, labels = np.empty((2, len(rows), seq_len), np.int64)
    stored, group = shard.stored, max(GROUP_TOKENS // seq_len, 1)
    unsigned = np.dtype(f"<u{shard.dtype.itemsize}")  # of which negative ids are the largest
    limit = min(vocab_size, int(np.iinfo(shard.dtype).max) + 1)
    may_exceed = shard.dtype != unsigned or vocab_size < 1 << 8 * unsigned.itemsize
    for first in range(0, len(rows), group):  # a few rows at a time are widened to 64 bits while they are in the cache
        chosen = rows[first : first + group]
        if group == 1 and len(chosen[0]) == 1 and chosen[0][0][2] == seq_len + 1:
            start = chosen[0][0][1]
            tokens = stored[start : start + seq_len + 1].reshape(1, -1)
        else:
            tokens = np.zeros((len(chosen), seq_len + 1), shard.dtype)
            for out, pieces in zip(tokens, chosen, strict=True):
                for column, start, count in pieces:
                    out[column : column + count] = stored[start : start + count]
        if may_exceed and tokens.view(unsigned).max() >= limit:
            i, at = np.argwhere(tokens.view(unsigned) >= limit)[0].tolist()
            column, start, _ = next(piece for piece in reversed(rows[first + i]) if piece[0] <= at)
            raise ShardError(
                f"{shard.path}.bin has token id {tokens[i, at]} at position {start + at - column:,}, the vocabulary "
                f"has {vocab_size:,}: the file is damaged (see python -m data_prep.verify_shards), or the model is for "
                "another tokenizer"
            )
        input_ids[first : first + group] = tokens[:, :-1]
        labels[first : first + group] = tokens[:, 1:]
    return input_ids, labels


def _numbered(shard: Shard, cuts: NDArray[np.int64], counts: NDArray[np.int64], seq_len: int) -> NDArray[np.int32]:
    """seq_idx (B, L): how many of a row's cuts, counts (B,) of them, lie at or before each position.

    `cuts` are positions in the flat (B * L,) block, ascending.
    """
    segments = counts + 1  # of each row
    row = np.arange(len(counts))
    firsts = segments.cumsum() - segments
    edges = np.empty(cuts.size + row.size + 1, np.int64)
    edges[np.arange(1, cuts.size + 1) + row.repeat(counts)] = cuts
    edges[firsts] = row * seq_len
    edges[-1] = row.size * seq_len
    numbers = np.arange(edges.size - 1, dtype=np.int32)
    numbers -= firsts.astype(np.int32).repeat(segments)
    try:
        return numbers.repeat(edges[1:] - edges[:-1]).reshape(-1, seq_len)
    except ValueError as error:  # a negative count
        raise ShardError(
            f"{shard.path}.idx: documents are not one after the other; the index is damaged, see python -m "
            "data_prep.verify_shards"
        ) from error
