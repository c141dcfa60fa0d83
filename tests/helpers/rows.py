"""Shards of given tokens, and what their rows have to be, said one token at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.pack_shards import layout, survey
from mamba_pretrain.data.manifest import Manifest, SplitInfo, SplitRule, TokenizerInfo
from mamba_pretrain.data.packing import IGNORE, Block, Packed
from mamba_pretrain.data.packs import Pack, pack_path, write_pack
from mamba_pretrain.data.shards import DTYPES, HEADER, MAGIC, VERSION, Shard
from mamba_pretrain.data.writer import ShardWriter
from mamba_pretrain.files import sha256_of

Documents = list[list[int]]


def numbered(lengths: list[int]) -> Documents:
    """Documents of these lengths whose tokens are 1, 2, 3, ... through all of them: a token says where it was."""
    ends = np.cumsum(lengths).tolist()
    return [list(range(end - n + 1, end + 1)) for n, end in zip(lengths, ends, strict=True)]


def shard_of(directory: Path, documents: Documents, vocab_size: int = 100) -> Shard:
    with ShardWriter(directory / "train", vocab_size=vocab_size) as writer:
        for tokens in documents:
            writer.append(np.array(tokens))
    return Shard(directory / "train")


def dataset_of(directory: Path, documents: Documents, vocab_size: int = 100) -> Path:
    """A dataset with these documents as its training split; there is no tokenizer in it."""
    directory.mkdir(parents=True, exist_ok=True)
    with ShardWriter(directory / "train", vocab_size=vocab_size) as writer:
        for tokens in documents:
            writer.append(np.array(tokens))
    split = SplitInfo(writer.n_documents, writer.n_tokens, None, None, writer.files)
    tokenizer = TokenizerInfo("bytes", "0" * 64, vocab_size, 0, 0, "tokenizer.bytes")
    rule = SplitRule(0, {"train": 1.0}, "all")
    Manifest(tokenizer, writer.dtype.name, False, {"train": split}, rule, [], 0, 0, [], {}).write(directory)
    return directory


def foreign_shard(directory: Path, sequences: Documents, document_index: list[int], code: int = 4) -> Shard:
    """What other programs write: any number of sequences a document, empty ones too."""
    dtype = np.dtype(DTYPES[code])
    lengths = np.array([len(s) for s in sequences], "<i4")
    pointers = (np.cumsum(lengths, dtype="<i8") - lengths) * dtype.itemsize
    header = HEADER.pack(MAGIC, VERSION, code, len(sequences), len(document_index))
    index = np.array(document_index, "<i8")
    (directory / "train.bin").write_bytes(np.array([t for s in sequences for t in s], dtype).tobytes())
    parts = header, lengths.tobytes(), pointers.astype("<i8").tobytes(), index.tobytes()
    (directory / "train.idx").write_bytes(b"".join(parts))
    return Shard(directory / "train")


def packed(shard: Shard, seq_len: int, how: str, vocab_size: int = 100) -> Packed:
    """The rows of a pack that is made beside the shard."""
    directory, sha256 = shard.path.parent, sha256_of(shard.path.with_suffix(".idx"))
    found = survey(shard, seq_len)
    path = pack_path(directory, "train", how, seq_len)
    write_pack(path, how, seq_len, sha256, found.pieces, found.documents.unread, layout(shard, seq_len, how))
    return Packed(shard, Pack(directory, "train", how, seq_len, sha256), vocab_size)


def windows_of(documents: Documents, seq_len: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """All windows, (n, L) each: ids, labels, document numbers."""
    stream = [token for tokens in documents for token in tokens]
    owner = [j for j, tokens in enumerate(documents) for _ in tokens]
    n = max(len(stream) - 1, 0) // seq_len
    labels = [stream[t + 1] if owner[t] == owner[t + 1] else IGNORE for t in range(n * seq_len)]
    numbers = []
    for row in range(n):
        mine = owner[row * seq_len : (row + 1) * seq_len]
        numbers += [sorted(set(mine)).index(j) for j in mine]
    shape = n, seq_len
    ids = np.array(stream[: n * seq_len], np.int64).reshape(shape)
    return ids, np.array(labels, np.int64).reshape(shape), np.array(numbers, np.int32).reshape(shape)


def assert_equal(block: Block, ids: NDArray[np.int64], labels: NDArray[np.int64], seq_idx: NDArray[np.int32]) -> None:
    for name, found, due in zip(block._fields, block, (ids, labels, seq_idx), strict=False):
        assert found.dtype == due.dtype, name
        np.testing.assert_array_equal(found, due, name)
