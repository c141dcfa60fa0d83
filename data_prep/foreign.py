"""The token files of other programs: which there are, what must hold for them, and an index for those without ours.

Megatron-LM, GPT-NeoX, datatrove's MegatronDocumentTokenizer:   PREFIX.bin, PREFIX.idx   our own format
datatrove's DocumentTokenizer and its merger, for NAME.ds:
    NAME.ds            raw tokens of 2 or 4 bytes, unsigned, little-endian
    NAME.ds.index      u64 for each document: its end, in tokens from the beginning of the file
    NAME.ds.metadata   text, where it was asked for: "tokenizer|bytes in a token", then the number of tokens
    NAME.ds.loss       a byte for each token, where it was asked for: 0 where the loss is to leave the token out
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from mamba_pretrain.data.shards import BLOCK_BYTES, HEADER, MAGIC, VERSION, Shard, ShardError

# Ids of 4 bytes are unsigned in a .ds; the format has no unsigned code, and below 2^31 the bytes are the same.
CODE_OF: Final = {2: 8, 4: 4}
Link = Literal["symbolic", "hard"]


@dataclass(frozen=True)
class Foreign:
    """One split's files. `idx` is None where one has to be written from `ends`, the .index of a .ds."""

    origin: str  # megatron or datatrove
    tokens: Path
    idx: Path | None = None
    ends: Path | None = None
    token_bytes: int = 0  # 0: stands in the idx
    tokenizer: str = ""  # the name in the metadata; "": none

    @property
    def files(self) -> list[Path]:
        return [self.tokens, *(path for path in (self.idx, self.ends) if path is not None)]


def find(prefix: Path, token_bytes: int | None, *, ignore_loss_mask: bool = False) -> Foreign:
    """What a name given by the user stands for. Raises ShardError where that is nothing, or nothing to train on."""
    name = prefix.with_suffix("") if prefix.suffix in (".bin", ".idx") else prefix
    bin_file, idx_file = (name.with_name(name.name + suffix) for suffix in (".bin", ".idx"))
    if bin_file.is_file() and idx_file.is_file():
        _require_text_only(idx_file)
        if token_bytes is not None:
            raise ShardError(f"--token-bytes {token_bytes}: {idx_file} says itself what its tokens are; leave it out")
        return Foreign("megatron", bin_file, idx=idx_file)
    ds_file = prefix if prefix.suffix == ".ds" else prefix.with_name(prefix.name + ".ds")
    if not ds_file.is_file():
        raise ShardError(
            f"{prefix} is no dataset of tokens: expected {bin_file} and {idx_file.name} (Megatron-LM, GPT-NeoX), or "
            f"{ds_file} and {ds_file.name}.index (datatrove)"
        )
    ends, metadata, loss = (ds_file.with_name(ds_file.name + suffix) for suffix in (".index", ".metadata", ".loss"))
    if not ends.is_file():
        raise ShardError(f"{ends} does not exist: where documents end is unknown. Tokenize with save_index=True")
    if loss.is_file() and not ignore_loss_mask:
        raise ShardError(
            f"{loss} says which tokens the loss leaves out, and training here leaves out none; pass --ignore-loss-mask "
            "if that is what you want"
        )
    stated, tokenizer, n_tokens = _read_metadata(metadata) if metadata.is_file() else (None, "", None)
    if stated and token_bytes and stated != token_bytes:
        raise ShardError(f"--token-bytes {token_bytes}: {metadata} says {stated}")
    size = stated or token_bytes
    if size is None:
        raise ShardError(
            f"{ds_file}: how many bytes a token has stands neither in {metadata.name} nor in the file; pass "
            "--token-bytes 2, or 4 where the tokenizer has more than 65,536 ids"
        )
    if size not in CODE_OF:
        raise ShardError(f"{ds_file}: tokens of {size} bytes; datatrove writes 2 or 4")
    if n_tokens is not None and n_tokens * size != ds_file.stat().st_size:
        raise ShardError(
            f"{ds_file} has {ds_file.stat().st_size:,} bytes, {metadata.name} promises {n_tokens:,} tokens of {size} "
            "bytes: truncated, or the two are of different datasets"
        )
    return Foreign("datatrove", ds_file, ends=ends, token_bytes=size, tokenizer=tokenizer)


def link(foreign: Foreign, prefix: Path, how: Link) -> Shard:
    """Makes `prefix`.bin and .idx without copying a token, and opens them. Raises ShardError for a damaged source."""
    bin_file, idx_file = (prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx"))
    _link(foreign.tokens, bin_file, how)
    if foreign.idx is not None:
        _link(foreign.idx, idx_file, how)
    else:
        _write_idx(foreign, idx_file)
    return Shard(prefix)


def _link(source: Path, target: Path, how: Link) -> None:
    if how == "symbolic":
        target.symlink_to(os.path.abspath(source))
        return
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        raise ShardError(
            f"{source} cannot be linked into {target.parent.parent} ({error.strerror}): hard links stay on one file "
            "system, symbolic ones do not"
        ) from error


def _require_text_only(idx_file: Path) -> None:
    with idx_file.open("rb") as stream:
        header = stream.read(HEADER.size)
    if header[:6] == b"TNTIDX":
        raise ShardError(f"{idx_file} is of the older kinds `lazy` and `cached`: preprocess with --dataset-impl mmap")
    if header[: len(MAGIC)] != MAGIC or len(header) < HEADER.size:
        return  # Shard says what is wrong
    *_, n_sequences, index_length = HEADER.unpack(header)
    if n_sequences and idx_file.stat().st_size == HEADER.size + 13 * n_sequences + 8 * index_length:
        raise ShardError(
            f"{idx_file} is a multimodal index, with a mode for each sequence: some of its tokens are not text, and "
            "this program trains on text alone"
        )


def _read_metadata(path: Path) -> tuple[int | None, str, int | None]:
    """Bytes in a token, the tokenizer's name and the number of tokens, as far as they stand there."""
    lines = path.read_text().splitlines()
    name, bar, size = (lines or [""])[0].rpartition("|")
    count = int(lines[1]) if len(lines) > 1 and lines[1].isdecimal() else None
    if not bar or not size.isdecimal():  # datatrove before 0.3 wrote the name alone
        return None, (lines or [""])[0], count
    return int(size), name, count


def _lengths(foreign: Foreign) -> Iterator[NDArray[np.int64]]:
    """Tokens in each document, in blocks. Raises ShardError where the ends cannot be right."""
    assert foreign.ends is not None
    documents, rest = divmod(foreign.ends.stat().st_size, 8)
    if rest:
        raise ShardError(f"{foreign.ends} has {rest} bytes after its last whole number: truncated")
    before, seen = 0, 0
    with foreign.ends.open("rb") as stream:
        while seen < documents:
            ends = np.fromfile(stream, "<u8", BLOCK_BYTES // 8).astype(np.int64)
            lengths = np.diff(ends, prepend=before)
            wrong = np.flatnonzero((lengths < 0) | (lengths >= 1 << 31))
            if wrong.size:
                i = int(wrong[0])
                raise ShardError(
                    f"{foreign.ends}: document {seen + i:,} has {lengths[i]:,} tokens, and 0 to 2,147,483,647 are "
                    "possible: the file is damaged, or the documents are too long for the format"
                )
            yield lengths
            before, seen = int(ends[-1]), seen + ends.size
    if before * foreign.token_bytes != foreign.tokens.stat().st_size:
        raise ShardError(
            f"{foreign.tokens} has {foreign.tokens.stat().st_size:,} bytes, {foreign.ends.name} promises {before:,} "
            f"tokens of {foreign.token_bytes} bytes: truncated, of different datasets, or --token-bytes is wrong"
        )


def _write_idx(foreign: Foreign, idx_file: Path) -> None:
    """The .index read twice and written as ours, block by block: the file has lengths first, then offsets."""
    assert foreign.ends is not None
    documents = foreign.ends.stat().st_size // 8
    with idx_file.open("xb") as stream:
        stream.write(HEADER.pack(MAGIC, VERSION, CODE_OF[foreign.token_bytes], documents, documents + 1))
        for lengths in _lengths(foreign):
            stream.write(lengths.astype("<i4").tobytes())
        offset = 0
        for lengths in _lengths(foreign):
            ends = offset + np.cumsum(lengths) * foreign.token_bytes
            stream.write(np.append(offset, ends[:-1]).astype("<i8").tobytes())
            offset = int(ends[-1])
        rows = BLOCK_BYTES // 8
        for begin in range(0, documents + 1, rows):
            stream.write(np.arange(begin, min(begin + rows, documents + 1), dtype="<i8").tobytes())
