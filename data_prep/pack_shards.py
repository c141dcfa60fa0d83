"""Lays out the documents of a split in rows, once: whole documents by best fit, or one document a row."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data_prep.best_fit import best_fit
from data_prep.command import new_parser, run
from mamba_pretrain.data.dataset import open_split
from mamba_pretrain.data.manifest import SPLITS
from mamba_pretrain.data.packs import HOW, Pieces, pack_path, write_pack
from mamba_pretrain.data.shards import Shard, ShardError

DESCRIPTION = """\
Lay out the documents of a split in rows of a fixed number of tokens, for training with data.packing other than windows.
Writes one file beside the shard, SPLIT.HOW-LENGTH.pack, from the index alone, and prints what each way of packing
wastes on this data:

    windows     slices of the stream, which need no pack: nothing is padded, but most documents are cut somewhere
    best_fit    whole documents, as many as fit in a row; only those longer than a row are cut
    documents   one document a row, the rest is padding; for data whose documents are about as long as a row

Documents longer than a row become rows of their own and a rest, which is packed like a document. No token is lost
and none is trained on twice, whatever the packing. Examples:

    python -m data_prep.pack_shards data/sotu --seq-len 2048
    python -m data_prep.pack_shards data/sotu --seq-len 2048 --how documents --split validation

A million documents at a time are packed by themselves, in memory that does not grow with the dataset. What that costs
is in the padding that is printed, some 0.002 % where documents are shorter than rows. A pack belongs to one index:
after the dataset is built again, so must be its packs.
"""
BLOCK: Final = 1 << 20  # documents packed together, and rows written at a time


@dataclass
class Waste:
    """What one way of packing makes of a split."""

    rows: int = 0
    padding: int = 0  # positions without a token
    masked: int = 0  # positions with a token that predicts nothing
    cut: int = 0  # documents that are not in one row
    unread: int = 0  # tokens in no row


@dataclass
class Survey:
    """The two ways that follow from the lengths alone, and what is common to both kinds of pack."""

    windows: Waste
    documents: Waste
    pieces: int = 0


def survey(shard: Shard, seq_len: int, progress: Callable[[int], object] = lambda _: None) -> Survey:
    """Counts, in one pass over the index."""
    windows, documents, pieces = Waste(), Waste(), 0
    windows.rows = max(shard.n_tokens - 1, 0) // seq_len
    read = windows.rows * seq_len
    windows.unread = shard.n_tokens - read
    for edges in _blocks(shard, progress):
        starts, ends = edges[:-1], edges[1:]
        lengths = ends - starts
        some = lengths > 0
        windows.cut += int((some & (starts // seq_len != (ends - 1) // seq_len)).sum())
        windows.masked += int((some & (starts > 0) & (starts <= read)).sum())
        alone = int((lengths % seq_len == 1).sum())  # last tokens that would be pieces of their own
        here = int((-(-lengths // seq_len)).sum()) - alone
        pieces += here
        documents.cut += int((lengths > seq_len + 1).sum())
        documents.masked += int(some.sum()) - alone
        documents.unread += alone
    documents.rows = pieces
    documents.padding = pieces * seq_len - (shard.n_tokens - documents.unread)
    return Survey(windows, documents, pieces)


def layout(
    shard: Shard, seq_len: int, how: str, progress: Callable[[int], object] = lambda _: None
) -> Iterator[Pieces]:
    """The rows, in blocks of bounded size whatever the documents' lengths."""
    for edges in _blocks(shard, progress):
        starts, lengths = edges[:-1], np.diff(edges)
        whole = lengths // seq_len
        yield from _whole_rows(starts, lengths, whole, seq_len)
        rests = lengths - whole * seq_len
        packed = rests > 1
        rests, firsts = rests[packed], (starts + whole * seq_len)[packed]
        if how == "documents":
            yield Pieces(np.ones(len(rests), np.int64), firsts, rests)
        else:
            order, counts = best_fit(rests, seq_len)
            yield Pieces(counts, firsts[order], rests[order])


def _whole_rows(
    starts: NDArray[np.int64], lengths: NDArray[np.int64], whole: NDArray[np.int64], seq_len: int
) -> Iterator[Pieces]:
    """The pieces of seq_len tokens; `whole` of each document."""
    ends = np.cumsum(whole)
    for first in range(0, int(ends[-1]) if len(ends) else 0, BLOCK):
        numbers = np.arange(first, min(first + BLOCK, int(ends[-1])))
        document = np.searchsorted(ends, numbers, side="right")
        offset = (numbers - ends[document] + whole[document]) * seq_len
        goes_on = offset + seq_len < lengths[document]
        yield Pieces(np.ones(len(numbers), np.int64), starts[document] + offset, np.where(goes_on, -seq_len, seq_len))


def _blocks(shard: Shard, progress: Callable[[int], object]) -> Iterator[NDArray[np.int64]]:
    for first in range(0, shard.n_documents, BLOCK):
        stop = min(first + BLOCK, shard.n_documents)
        yield shard.document_edges(first, stop)
        progress(stop - first)


def pack(
    directory: Path, split: str, seq_len: int, how: str, progress: Callable[[int], object] = lambda _: None
) -> dict[str, Waste]:
    """Writes a pack and returns the waste by packing; `progress` is told documents, each of them `passes(how)` times.

    Raises ShardError for a split that holds nothing to pack, or where it cannot be written.
    """
    if seq_len < 2:
        raise ShardError(f"--seq-len is {seq_len}: a row has at least two tokens")
    shard, manifest = open_split(directory, split)
    found = survey(shard, seq_len, progress)
    if found.pieces == 0:
        raise ShardError(f"{shard.path} has no document of two tokens or more: there is nothing to pack")
    sha256 = manifest.splits[split].files[f"{split}.idx"].sha256
    best = Waste(0, 0, found.documents.masked, found.documents.cut, found.documents.unread)

    def counted(blocks: Iterator[Pieces]) -> Iterator[Pieces]:
        for block in blocks:
            best.rows += len(block.counts)
            yield block

    blocks = counted(layout(shard, seq_len, "best_fit", progress))
    if how == "documents":
        for _ in blocks:
            pass
        blocks = layout(shard, seq_len, how, progress)
    write_pack(pack_path(directory, split, how, seq_len), how, seq_len, sha256, found.pieces, best.unread, blocks)
    best.padding = best.rows * seq_len - (shard.n_tokens - best.unread)
    return {"windows": found.windows, "best_fit": best, "documents": found.documents}


def passes(how: str) -> int:
    return 2 if how == "best_fit" else 3  # over the index: the survey, best fit, and the pack that is written


def table(wastes: dict[str, Waste], seq_len: int, documents: int) -> str:
    """One line a packing. Shares are of all positions in the rows, or of all documents."""
    shares = f"{'padding':>10}{'masked':>9}{'trained':>9}{'documents cut':>15}"
    lines = [f"{'':<11}{'rows':>14}{shares}{'tokens in no row':>18}"]
    for how, waste in wastes.items():
        positions = max(waste.rows * seq_len, 1)
        padding, masked = waste.padding / positions, waste.masked / positions
        shares = f"{padding:>10.2%}{masked:>9.2%}{1 - padding - masked:>9.2%}{waste.cut / max(documents, 1):>15.2%}"
        lines.append(f"{how:<11}{waste.rows:>14,}{shares}{waste.unread:>18,}")
    return "\n".join(lines)


def parser() -> ArgumentParser:
    result = new_parser("data_prep.pack_shards", DESCRIPTION)
    result.add_argument("dataset", type=Path, help="directory made by build_shards")
    result.add_argument("--seq-len", type=int, required=True, metavar="L", help="tokens in a row, as data.seq_len")
    result.add_argument("--how", choices=tuple(HOW), default="best_fit", help="default: best_fit")
    result.add_argument("--split", choices=SPLITS, default="train", help="default: train")
    return result


def body(arguments: Namespace) -> int:
    shard, _ = open_split(arguments.dataset, arguments.split)
    with tqdm(total=passes(arguments.how) * shard.n_documents, unit=" documents", unit_scale=True, disable=None) as bar:
        wastes = pack(arguments.dataset, arguments.split, arguments.seq_len, arguments.how, bar.update)
    path = pack_path(arguments.dataset, arguments.split, arguments.how, arguments.seq_len)
    print(table(wastes, arguments.seq_len, shard.n_documents))
    print(f"{path}: {wastes[arguments.how].rows:,} rows of {arguments.seq_len:,} tokens, {path.stat().st_size:,} bytes")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run(parser(), body, argv)


if __name__ == "__main__":
    sys.exit(main())
