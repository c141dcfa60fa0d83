"""Trains a SentencePiece tokenizer that gives every text back byte for byte."""

from __future__ import annotations

import io
import os
import random
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import sentencepiece

from data_prep.command import new_parser, run
from data_prep.corpus import Corpus, add_split_arguments, split_of, split_rule
from data_prep.records import Document
from data_prep.streams import CorpusError
from mamba_pretrain.data.tokenizer import TokenizerError, load_tokenizer

DESCRIPTION = """\
Train a SentencePiece tokenizer on the documents of one split: with the same --seed and --split-fractions as
build_shards, it never sees what the model is tested on. No normalisation, and bytes for whatever has no piece, so that
decoding returns every text byte for byte. Writes NAME.model and, for reading, NAME.vocab. Example:

    python -m data_prep.train_tokenizer corpora/sotu.jsonl.gz --vocab-size 4096 --output data/sotu.model \\
        --split-fractions 0.9 0.1 0
    python -m data_prep.build_shards corpora/sotu.jsonl.gz --tokenizer data/sotu.model --output data/sotu \\
        --split-fractions 0.9 0.1 0
"""
CHARACTERS: Final = 2000  # SentencePiece drops longer sentences without an error; a cut in a word each 2,000 is noise
MAX_BYTES: Final = 4 * CHARACTERS  # of such a sentence in UTF-8
# The sums of unigram's EM depend on how the sentences are divided over threads: a fixed number makes one model of one
# input on every machine.
THREADS: Final = 4


def sentences(documents: Iterable[Document]) -> Iterator[str]:
    for document in documents:
        for line in document.text.splitlines(keepends=True):
            yield from (line[i : i + CHARACTERS] for i in range(0, len(line), CHARACTERS))


def sample(items: Iterable[str], size: int, seed: int) -> list[str]:
    """A uniform sample of at most `size` (reservoir sampling), all of them and in order if there are no more."""
    rng = random.Random(seed)
    chosen: list[str] = []
    for n, item in enumerate(items):
        if n < size:
            chosen.append(item)
        elif (slot := rng.randrange(n + 1)) < size:
            chosen[slot] = item
    return chosen


def train(texts: Sequence[str], *, kind: str, vocab_size: int, character_coverage: float) -> bytes:
    """The content of a .model file. Raises TokenizerError with SentencePiece's reason."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            max_sentence_length=MAX_BYTES,
            num_threads=THREADS,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            minloglevel=2,  # hundreds of lines of progress otherwise; errors still come as exceptions
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2] or str(error)
        raise TokenizerError(f"SentencePiece: {reason} (--vocab-size {vocab_size}, {len(texts):,} lines)") from error
    return model.getvalue()


def write_atomically(path: Path, content: bytes) -> None:
    scratch = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with scratch.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def parser() -> ArgumentParser:
    result = new_parser("data_prep.train_tokenizer", DESCRIPTION)
    Corpus.add_arguments(result)
    result.add_argument("--output", required=True, type=Path, metavar="NAME.model")
    result.add_argument("--vocab-size", required=True, type=int, help="pieces, with 3 special tokens and 256 bytes")
    result.add_argument("--model-type", choices=("unigram", "bpe"), default="unigram", help="default: unigram")
    result.add_argument(
        "--character-coverage",
        type=float,
        default=0.9995,
        help="share of characters with a piece (default: 0.9995)",
    )
    result.add_argument("--split", choices=("train", "all"), default="train", help="documents to learn from")
    result.add_argument(
        "--max-sentences",
        type=int,
        default=500_000,
        help="lines to learn from, drawn at random from all; about 1 kB of memory each (default: 500000)",
    )
    add_split_arguments(result)
    result.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return result


def body(arguments: Namespace) -> int:
    output: Path = arguments.output
    if output.suffix != ".model":
        raise TokenizerError(f"--output {output}: the name of a SentencePiece model ends in .model")
    for option, value in (("--vocab-size", arguments.vocab_size), ("--max-sentences", arguments.max_sentences)):
        if value < 1:
            raise TokenizerError(f"{option} {value}: expected 1 or more")
    output.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(output.parent, os.W_OK):
        raise TokenizerError(f"{output.parent} is not writable; choose another output")
    for path in (output, output.with_suffix(".vocab")):
        if path.is_dir() or (path.exists() and not arguments.overwrite):
            hint = "" if path.is_dir() else ", or pass --overwrite to replace it"
            raise TokenizerError(f"{path} exists; choose another output{hint}")
    corpus = Corpus.from_arguments(arguments)
    rule = split_rule(arguments.split_fractions, arguments.seed)
    chosen = (d for d in corpus if arguments.split == "all" or split_of(d.text, rule) == arguments.split)
    texts = sample(sentences(chosen), arguments.max_sentences, arguments.seed)
    if not texts:
        raise CorpusError(f"no text in the {arguments.split} split: use more documents, or other --split-fractions")
    content = train(
        texts,
        kind=arguments.model_type,
        vocab_size=arguments.vocab_size,
        character_coverage=arguments.character_coverage,
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=content)
    pieces = [f"{model.id_to_piece(i)!r}\t{model.get_score(i):g}\n" for i in range(model.get_piece_size())]
    write_atomically(output.with_suffix(".vocab"), "".join(pieces).encode())
    write_atomically(output, content)
    tokenizer = load_tokenizer(output)
    shown = texts[:1000]
    density = sum(len(tokenizer.encode(text)) for text in shown) / sum(len(text.encode()) for text in shown)
    if corpus.skipped:
        print(f"warning: {corpus.skipped:,} invalid records were left out")
    print(
        f"{output}: {tokenizer.vocab_size:,} pieces from {len(texts):,} lines, {density:.4f} tokens a byte, "
        f"sha256 {tokenizer.sha256}"
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run(parser(), body, argv)


if __name__ == "__main__":
    sys.exit(main())
