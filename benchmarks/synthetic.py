"""Datasets of no meaning and any size: random letters as bytes, and a trillion tokens in a file of holes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from mamba_pretrain.data.manifest import FileInfo, Manifest, SplitInfo, SplitRule
from mamba_pretrain.data.shards import DTYPES, HEADER, MAGIC, VERSION
from mamba_pretrain.data.tokenizer import BytesTokenizer
from mamba_pretrain.data.writer import ShardWriter, token_dtype

MEAN_TOKENS = 1000
SPREAD = 1.0  # of the logarithm: a quarter of the documents is shorter than 310 tokens, a quarter longer than 1,190
BLOCK = 1 << 22  # documents of an index written at a time
DTYPE = token_dtype(BytesTokenizer.vocab_size)


def write_letters(directory: Path, tokens: int) -> None:
    """A sound dataset of about `tokens` tokens: documents of log-normal length, a word of random letters each."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(0)
    documents = max(tokens // MEAN_TOKENS, 1)
    lengths = rng.lognormal(np.log(MEAN_TOKENS) - SPREAD**2 / 2, SPREAD, documents).astype(np.int64) + 2
    letters = rng.integers(ord("a"), ord("z") + 1, int(lengths.max()) + (1 << 20), np.uint16)
    with ShardWriter(directory / "train", vocab_size=BytesTokenizer.vocab_size) as writer:
        for length, start in zip(lengths, rng.integers(0, 1 << 20, documents), strict=True):
            document = letters[start : start + length].copy()
            document[-1] = BytesTokenizer.eod_id
            writer.append(document)
    text_bytes = writer.n_tokens - documents
    write_manifest(directory, SplitInfo(documents, writer.n_tokens, text_bytes, documents, writer.files))


def write_holes(directory: Path, tokens: int, document_tokens: int) -> None:
    """A dataset whose tokens are all 0 and take no room, with a whole index: 20 bytes for each document."""
    directory.mkdir(parents=True)
    documents = tokens // document_tokens
    tokens = documents * document_tokens
    code = next(code for code, name in DTYPES.items() if np.dtype(name) == DTYPE)
    with (directory / "train.bin").open("wb") as stream:
        stream.truncate(tokens * DTYPE.itemsize)
    blocks = [range(first, min(first + BLOCK, documents)) for first in range(0, documents, BLOCK)]
    with (directory / "train.idx").open("wb") as stream:
        stream.write(HEADER.pack(MAGIC, VERSION, code, documents, documents + 1))
        for block in blocks:
            stream.write(np.full(len(block), document_tokens, "<i4").tobytes())
        for block in blocks:
            stream.write((np.arange(block.start, block.stop, dtype="<i8") * document_tokens * DTYPE.itemsize).tobytes())
        for block in (*blocks, range(documents, documents + 1)):
            stream.write(np.arange(block.start, block.stop, dtype="<i8").tobytes())
    sizes = {name: os.stat(directory / name).st_size for name in ("train.bin", "train.idx")}
    unread = {name: FileInfo(size, "0" * 64) for name, size in sizes.items()}  # nobody hashes two terabytes to start
    write_manifest(directory, SplitInfo(documents, tokens, tokens - documents, documents, unread))


def write_manifest(directory: Path, train: SplitInfo) -> None:
    tokenizer = BytesTokenizer()
    tokenizer.save(directory)
    Manifest(
        tokenizer=tokenizer.info,
        dtype=DTYPE.name,
        adds_bos=False,
        splits={"train": train},
        split_rule=SplitRule(0, {"train": 1.0}, "none: synthetic"),
        sources=[],
        skipped_records=0,
        empty_documents=0,
        command=["benchmarks.data"],
        versions={},
    ).write(directory)
