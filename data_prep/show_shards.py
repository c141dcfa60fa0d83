"""Shows what is in a dataset: its table, its documents as text, and how long they are."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from data_prep.build_shards import summary
from data_prep.command import new_parser, run
from mamba_pretrain.data.dataset import open_split
from mamba_pretrain.data.manifest import Manifest
from mamba_pretrain.data.shards import Shard, ShardError
from mamba_pretrain.data.tokenizer import dataset_tokenizer

DESCRIPTION = """\
Show a dataset: by default a table of its splits and where it came from. Examples:

    python -m data_prep.show_shards data/sotu
    python -m data_prep.show_shards data/sotu --split validation --document 3 --count 2
    python -m data_prep.show_shards data/sotu --lengths
"""
BAR = 50


def lengths(shard: Shard) -> str:
    """A histogram of document lengths in powers of two. Reads the index, not the tokens."""
    counts: dict[int, int] = {}
    for document in range(shard.n_documents):
        start, stop = shard.document_bounds(document)
        octave = (stop - start).bit_length()
        counts[octave] = counts.get(octave, 0) + 1
    if not counts:
        return "no documents"
    rows = [f"{'tokens':>25}{'documents':>14}"]
    for octave in range(min(counts), max(counts) + 1):
        count = counts.get(octave, 0)
        bar = "#" * -(-count * BAR // max(counts.values()))
        rows.append(f"{1 << octave >> 1:>11,} - {(1 << octave) - 1:>11,}{count:>14,} {bar}")
    return "\n".join(rows)


def parser() -> ArgumentParser:
    result = new_parser("data_prep.show_shards", DESCRIPTION)
    result.add_argument("dataset", type=Path, help="directory made by build_shards")
    result.add_argument("--split", default="train", help="default: train")
    result.add_argument("--document", type=int, metavar="N", help="decode document N, counted from 0")
    result.add_argument("--count", type=int, default=1, metavar="K", help="and those after it, K in all (default: 1)")
    result.add_argument("--lengths", action="store_true", help="print a histogram of document lengths")
    return result


def body(arguments: Namespace) -> int:
    manifest = Manifest.read(arguments.dataset)
    if arguments.document is None and not arguments.lengths:
        info = manifest.tokenizer
        print(summary(manifest))
        print(f"tokenizer: {info.kind}, {info.vocab_size:,} ids, bos {info.bos_id}, eod {info.eod_id}, {info.sha256}")
        print("\n".join(f"source: {source.path} ({source.bytes:,} bytes)" for source in manifest.sources))
        return 0
    shard, _ = open_split(arguments.dataset, arguments.split)
    if arguments.lengths:
        print(lengths(shard))
    if arguments.document is None:
        return 0
    if not 0 <= arguments.document < shard.n_documents:
        raise ShardError(f"no document {arguments.document} in {shard.path}: it has {shard.n_documents}, from 0 on")
    tokenizer = dataset_tokenizer(arguments.dataset, manifest)
    for document in range(arguments.document, min(arguments.document + arguments.count, shard.n_documents)):
        start, stop = shard.document_bounds(document)
        print(f"--- {arguments.split} document {document}, tokens {start:,} to {stop:,} ({stop - start:,})")
        print(tokenizer.decode(shard.tokens(start, stop).tolist()))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run(parser(), body, argv)


if __name__ == "__main__":
    sys.exit(main())
