"""Turns raw corpora into a dataset of token shards: one directory with splits, tokenizer and manifest."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

import mamba_pretrain
from data_prep.command import new_parser, run
from data_prep.corpus import Corpus, add_split_arguments, split_of, split_rule
from data_prep.records import Document
from data_prep.streams import CorpusError
from mamba_pretrain.data.manifest import Manifest, SplitInfo, SplitRule, TokenizerInfo
from mamba_pretrain.data.shards import ShardError
from mamba_pretrain.data.tokenizer import BytesTokenizer, Tokenizer, load_tokenizer
from mamba_pretrain.data.writer import ShardWriter
from mamba_pretrain.files import atomic_directory

DESCRIPTION = """\
Tokenize corpora into a dataset directory of train, validation and test shards (Megatron's .bin and .idx),
with a copy of the tokenizer and a manifest of hashes and counts. The directory appears when it is complete, or not at
all. Example:

    python -m data_prep.build_shards corpora/sotu.jsonl.gz --tokenizer bytes --output data/sotu \\
        --split-fractions 0.9 0.1 0
    python -m data_prep.show_shards data/sotu --split train --document 0
"""


@dataclass(frozen=True)
class Encoded:
    split: str
    tokens: NDArray[np.int32]
    text_bytes: int
    words: int
    round_trip: bool


@dataclass
class Counts:
    text_bytes: int = 0
    words: int = 0


def encode(document: Document, tokenizer: Tokenizer, rule: SplitRule, add_bos: bool) -> Encoded:
    """All the work on one document, and nothing that depends on another: this is what may be spread over processes."""
    utf8 = document.text.encode()
    if isinstance(tokenizer, BytesTokenizer):  # a list of them all would take eight times the memory
        ids, round_trip = np.frombuffer(utf8, np.uint8), True
    else:
        found = tokenizer.encode(document.text)
        ids, round_trip = np.array(found, np.int32), tokenizer.decode_bytes(found) == utf8
    bos, eod = np.array([tokenizer.bos_id] * add_bos, np.int32), np.array([tokenizer.eod_id], np.int32)
    return Encoded(
        split=split_of(document.text, rule),
        tokens=np.concatenate((bos, ids, eod)),
        text_bytes=len(utf8),
        words=len(document.text.split()),
        round_trip=round_trip,
    )


def build(
    corpus: Corpus,
    tokenizer: Tokenizer,
    output: Path,
    *,
    rule: SplitRule,
    add_bos: bool = True,
    overwrite: bool = False,
    command: Sequence[str] = (),
) -> Manifest:
    """Writes the dataset `output` and returns its manifest. Raises CorpusError, ShardError; then nothing is left."""
    with atomic_directory(output, error=ShardError, overwrite=overwrite) as scratch:
        counts = {split: Counts() for split in rule.fractions}
        not_round_trip = 0
        with ExitStack() as stack:
            writers = {
                split: stack.enter_context(ShardWriter(scratch / split, vocab_size=tokenizer.vocab_size))
                for split in rule.fractions
            }
            work = partial(encode, tokenizer=tokenizer, rule=rule, add_bos=add_bos)
            for encoded in _with_progress(map(work, corpus)):
                writers[encoded.split].append(encoded.tokens)
                counts[encoded.split].text_bytes += encoded.text_bytes
                counts[encoded.split].words += encoded.words
                not_round_trip += not encoded.round_trip
        _require_training_data({split: writer.n_documents for split, writer in writers.items()}, corpus)
        tokenizer.save(scratch)
        manifest = Manifest(
            tokenizer=TokenizerInfo(
                tokenizer.kind,
                tokenizer.sha256,
                tokenizer.vocab_size,
                tokenizer.bos_id,
                tokenizer.eod_id,
                tokenizer.file,
            ),
            dtype=next(iter(writers.values())).dtype.name,
            adds_bos=add_bos,
            splits={
                split: SplitInfo(
                    writer.n_documents,
                    writer.n_tokens,
                    counts[split].text_bytes,
                    counts[split].words,
                    writer.files,
                )
                for split, writer in writers.items()
            },
            split_rule=rule,
            sources=corpus.sources(),
            skipped_records=corpus.skipped,
            empty_documents=corpus.empty,
            not_round_trip=not_round_trip,
            command=list(command),
            versions={
                "mamba_pretrain": mamba_pretrain.__version__,
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in ("numpy", "sentencepiece", "tokenizers")},
            },
        )
        manifest.write(scratch)
    return manifest


def _with_progress(documents: Iterator[Encoded]) -> Iterator[Encoded]:
    began = time.perf_counter()
    with tqdm(unit="B", unit_scale=True, disable=None) as bar:  # None: silent where stderr is no terminal
        for n, encoded in enumerate(documents, start=1):
            yield encoded
            bar.update(encoded.text_bytes)
            if n % 1000 == 0:
                bar.set_postfix_str(f"{n / (time.perf_counter() - began):,.0f} documents/s", refresh=False)


def _require_outside(output: Path, inputs: Sequence[str | Path]) -> None:
    for path in inputs:
        if Path(path).resolve().is_relative_to(output.resolve()):
            raise ShardError(f"{output} holds the input {path}, which it would replace: choose another output")


def _require_training_data(documents: dict[str, int], corpus: Corpus) -> None:
    if not any(documents.values()):
        raise CorpusError(
            f"no documents in {len(corpus.files)} files: {corpus.empty} records are empty, {corpus.skipped} invalid"
        )
    if documents.get("train") == 0:
        raise CorpusError(
            f"the train split is empty, the documents fell like this: {documents}. Use more documents (--txt-documents "
            "line or blank-line makes more of a .txt), other --split-fractions, or another --seed"
        )


def summary(manifest: Manifest) -> str:
    """A table of the splits, and a sentence for everything a reader should know before training on them."""
    rows = [f"{'split':<12}{'documents':>12}{'tokens':>16}{'text bytes':>16}{'tokens/byte':>13}"]
    rows += [
        f"{split:<12}{info.documents:>12,}{info.tokens:>16,}"
        + ("" if info.text_bytes is None else f"{info.text_bytes:>16,}{info.tokens / max(info.text_bytes, 1):>13.4f}")
        for split, info in manifest.splits.items()
    ]
    rows += [f"warning: the {split} split is empty" for split, info in manifest.splits.items() if not info.documents]
    for count, what in (
        (manifest.skipped_records, "invalid records were left out"),
        (manifest.empty_documents, "records without text were left out"),
        (manifest.not_round_trip, "documents do not decode back to their own bytes: the tokenizer loses text"),
    ):
        rows += [f"warning: {count:,} {what}"] if count else []
    return "\n".join(rows)


def parser() -> ArgumentParser:
    result = new_parser("data_prep.build_shards", DESCRIPTION)
    Corpus.add_arguments(result)
    result.add_argument(
        "--tokenizer", required=True, help="`bytes`, a SentencePiece .model, a tokenizer.json, or a directory with one"
    )
    result.add_argument("--eod", help="special token that ends a document, where a tokenizer.json leaves it open")
    result.add_argument("--output", required=True, type=Path, help="dataset directory to make")
    add_split_arguments(result)
    result.add_argument(
        "--no-bos",
        action="store_true",
        help="store tokens + [eod] rather than [bos] + tokens + [eod]. With bos, and state reset where documents "
        "begin, the first token is predicted too, so that bits per byte count every byte",
    )
    result.add_argument("--overwrite", action="store_true", help="replace an existing output, once the new is complete")
    return result


def body(arguments: Namespace) -> int:
    began = time.perf_counter()
    corpus = Corpus.from_arguments(arguments)
    _require_outside(
        arguments.output, [*corpus.files, *([] if arguments.tokenizer == "bytes" else [arguments.tokenizer])]
    )
    manifest = build(
        corpus,
        load_tokenizer(arguments.tokenizer, eod=arguments.eod),
        arguments.output,
        rule=split_rule(arguments.split_fractions, arguments.seed),
        add_bos=not arguments.no_bos,
        overwrite=arguments.overwrite,
        command=sys.argv,
    )
    seconds = time.perf_counter() - began
    text_mb = sum(info.text_bytes or 0 for info in manifest.splits.values()) / 1e6
    print(summary(manifest))
    print(f"{arguments.output}: {text_mb:,.1f} MB of text in {seconds:,.1f} s, {text_mb / seconds:,.1f} MB/s")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run(parser(), body, argv)


if __name__ == "__main__":
    sys.exit(main())
