"""Shows what is in a dataset: its table, its documents as text, where a string stands, statistics and pictures."""

from __future__ import annotations

import itertools
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_prep.build_shards import summary
from data_prep.command import local_directory, new_parser, run
from data_prep.find import find
from data_prep.plots import plot_lengths, plot_ranks
from data_prep.statistics import Lengths, TokenCounts, count_tokens, histogram, measure_lengths
from mamba_pretrain.data.dataset import open_split
from mamba_pretrain.data.manifest import Manifest
from mamba_pretrain.data.shards import Shard, ShardError
from mamba_pretrain.data.tokenizer import Tokenizer, dataset_tokenizer

DESCRIPTION = """\
Show a dataset: by default a table of its splits and where it came from. Examples:

    python -m data_prep.show_shards data/sotu
    python -m data_prep.show_shards data/sotu --split validation --document 3 --count 2
    python -m data_prep.show_shards data/sotu --find "state of the union" --hits 5
    python -m data_prep.show_shards data/sotu --stats --lengths --plot pictures
"""
SPLIT = "train"
FREQUENT = 20  # tokens in the table of --stats
QUANTILES = {"1%": 0.01, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "99%": 0.99}


def parser() -> ArgumentParser:
    result = new_parser("data_prep.show_shards", DESCRIPTION)
    result.add_argument("dataset", type=local_directory, help="directory made by build_shards or adopt_shards")
    result.add_argument("--split", default=SPLIT, help="default: %(default)s")
    result.add_argument("--document", type=int, metavar="N", help="decode document N, counted from 0")
    result.add_argument("--count", type=int, default=1, metavar="K", help="and those after it, K in all (default: 1)")
    result.add_argument("--find", metavar="STRING", help="search the decoded text, from --document on if that is given")
    result.add_argument("--hits", type=int, default=10, metavar="N", help="stop after N places (default: 10)")
    result.add_argument("--lengths", action="store_true", help="print a histogram of document lengths")
    result.add_argument("--stats", action="store_true", help="print quantiles of lengths, frequent tokens, duplicates")
    result.add_argument("--plot", type=Path, metavar="DIR", help="draw document_lengths.png and token_ranks.png there")
    result.add_argument(
        "--sample-tokens",
        type=int,
        default=1 << 24,
        metavar="N",
        help="tokens to count for --stats and --plot, spread evenly over the split (default: %(default)s)",
    )
    return result


def body(arguments: Namespace) -> int:
    manifest = Manifest.read(arguments.dataset)
    _check(arguments)
    if arguments.document is None and not (arguments.find or arguments.lengths or arguments.stats or arguments.plot):
        if arguments.split != SPLIT:
            open_split(arguments.dataset, arguments.split)  # or the error that names the splits
        info = manifest.tokenizer
        print(summary(manifest))
        print(f"tokenizer: {info.kind}, {info.vocab_size:,} ids, bos {info.bos_id}, eod {info.eod_id}, {info.sha256}")
        print("\n".join(f"source: {source.path} ({source.bytes:,} bytes)" for source in manifest.sources))
        return 0
    shard, _ = open_split(arguments.dataset, arguments.split)
    if arguments.document is not None and not 0 <= arguments.document < shard.n_documents:
        raise ShardError(f"no document {arguments.document} in {shard.path}: it has {shard.n_documents}, from 0 on")
    if arguments.lengths or arguments.stats or arguments.plot:
        _show_statistics(arguments, shard, manifest)
    if arguments.find:
        return _show_places(arguments, shard, dataset_tokenizer(arguments.dataset, manifest))
    if arguments.document is not None:
        tokenizer = dataset_tokenizer(arguments.dataset, manifest)
        for document in range(arguments.document, min(arguments.document + arguments.count, shard.n_documents)):
            start, stop = shard.document_bounds(document)
            print(f"--- {arguments.split} document {document}, tokens {start:,} to {stop:,} ({stop - start:,})")
            print(tokenizer.decode(shard.tokens(start, stop).tolist()))
    return 0


def _check(arguments: Namespace) -> None:
    for option in ("count", "hits", "sample_tokens"):
        if getattr(arguments, option) < 1:
            raise ShardError(f"--{option.replace('_', '-')} {getattr(arguments, option)}: expected 1 or more")
    if arguments.find == "":
        raise ShardError("--find: expected a string of at least one character")


def _show_places(arguments: Namespace, shard: Shard, tokenizer: Tokenizer) -> int:
    """Exit code 1, as grep's, where there is none."""
    first = arguments.document or 0
    total = shard.n_tokens - shard.document_bounds(first)[0] if shard.n_documents else 0
    n = 0
    with tqdm(total=total, unit="token", unit_scale=True, disable=None) as bar:
        hits = find(shard, tokenizer, arguments.find, first, bar.update)
        for hit in itertools.islice(hits, arguments.hits):
            tqdm.write(f"{arguments.split} {hit}", file=sys.stdout)
            n += 1
    if n == arguments.hits:
        print(f"stopped after {n:,} places, there may be more: --hits asks for more, --document begins elsewhere")
    elif shard.n_documents:
        print(f"{n:,} places in documents {first:,} to {shard.n_documents - 1:,} of {arguments.split}")
    else:
        print(f"no places: {arguments.split} is empty")
    return 0 if n else 1


def _show_statistics(arguments: Namespace, shard: Shard, manifest: Manifest) -> None:
    if not shard.n_documents:
        raise ShardError(f"{shard.path} has no documents: there is nothing to measure")
    with tqdm(total=shard.n_documents, unit="document", unit_scale=True, disable=None) as bar:
        lengths = measure_lengths(shard, bar.update)
    if arguments.lengths:
        print(histogram(lengths))
    if not (arguments.stats or arguments.plot):
        return
    total = min(shard.n_tokens, arguments.sample_tokens)
    with tqdm(total=total, unit="token", unit_scale=True, disable=None) as bar:
        tokens = count_tokens(shard, manifest.tokenizer.vocab_size, arguments.sample_tokens, bar.update)
    if arguments.stats:
        print(statistics(arguments.split, lengths, tokens, dataset_tokenizer(arguments.dataset, manifest)))
        print(_duplicates(manifest))
    if arguments.plot:
        arguments.plot.mkdir(parents=True, exist_ok=True)
        title = f"{arguments.dataset.resolve().name}, {arguments.split}"
        plot_lengths(title, lengths, arguments.plot / "document_lengths.png")
        plot_ranks(title, tokens, arguments.plot / "token_ranks.png")
        print(f"drew document_lengths.png and token_ranks.png in {arguments.plot}")


def statistics(split: str, lengths: Lengths, tokens: TokenCounts, tokenizer: Tokenizer) -> str:
    """Lengths and frequent tokens as text."""
    quantiles = ", ".join(f"{name} {lengths.quantile(share):,}" for name, share in QUANTILES.items())
    rows = [
        f"{split}: {lengths.documents:,} documents, {lengths.tokens:,} tokens",
        f"tokens in a document: shortest {lengths.shortest:,}, {quantiles}, longest {lengths.longest:,}, mean "
        f"{lengths.tokens / lengths.documents:,.1f} (quantiles from 512 on are at most 0.4% too small)",
        f"{np.count_nonzero(tokens.counts):,} of {tokenizer.vocab_size:,} ids occur in {tokens.sample}. Most frequent:",
        f"{'id':>10}{'count':>16}{'share':>9}  text",
    ]
    for i in np.argsort(-tokens.counts, kind="stable")[:FREQUENT].tolist():
        if count := int(tokens.counts[i]):
            text = tokenizer.decode_bytes([i])
            shown = repr(text.decode(errors="backslashreplace")) if text else "(a special token)"
            rows.append(f"{i:>10,}{count:>16,}{count / tokens.tokens:>9.2%}  {shown}")
    return "\n".join(rows)


def _duplicates(manifest: Manifest) -> str:
    if manifest.origin != "build_shards":
        return f"duplicates: not counted, the tokens are {manifest.origin}'s"
    found, selection = sum(info.documents for info in manifest.splits.values()), manifest.selection
    read = found + selection.duplicates * selection.duplicates_dropped
    fate = "left out" if selection.duplicates_dropped else "in the dataset"
    return (
        f"duplicates: {selection.duplicates:,} of {read:,} documents of all splits "
        f"({selection.duplicates / max(read, 1):.2%}) have the text of one before them; they are {fate}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    return run(parser(), body, argv)


if __name__ == "__main__":
    sys.exit(main())
