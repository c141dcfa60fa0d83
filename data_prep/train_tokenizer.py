"""Trains a tokenizer that gives every text back byte for byte: a SentencePiece model, or a byte-level BPE in JSON."""

from __future__ import annotations

import heapq
import io
import os
import random
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from data_prep.command import new_parser, run
from data_prep.corpus import Corpus, add_split_arguments, chosen_rule, digest_of, split_files, split_of
from data_prep.records import Document
from data_prep.streams import CorpusError
from mamba_pretrain.data.tokenizer import TokenizerError, load_tokenizer
from mamba_pretrain.files import draft_of

DESCRIPTION = """\
Train a tokenizer on the documents of one split: with the same --seed and --split-fractions as build_shards, it never
sees what the model is tested on. The end of --output decides what it is:

    NAME.model   a SentencePiece model, without normalisation, with bytes for whatever has no piece; NAME.vocab beside
                 it is for reading
    NAME.json    a byte-level BPE of the tokenizers library, which transformers reads, too; <|endoftext|> has id 0

Decoding returns every text byte for byte with both. What is learned from is a random sample of all documents' text
that fits into --sample-bytes of memory, the same for the same --seed. Example:

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
END: Final = "<|endoftext|>"
SMALLEST_JSON: Final = 257
SMALLEST: Final = f"the smallest is {SMALLEST_JSON}, for the bytes and the end of a document"
ENTRY_BYTES: Final = 150  # what Python takes for a place in the sample, beside the text


def sentences(documents: Iterable[Document]) -> Iterator[str]:
    """Lines, as SentencePiece wants them, the longest in parts."""
    for document in documents:
        for line in document.text.splitlines(keepends=True):
            yield from (line[i : i + CHARACTERS] for i in range(0, len(line), CHARACTERS))


def passages(documents: Iterable[Document]) -> Iterator[str]:
    """Parts of documents with their line ends inside: a byte-level BPE learns runs of those, too."""
    for document in documents:
        yield from (document.text[i : i + CHARACTERS] for i in range(0, len(document.text), CHARACTERS))


def sample(items: Iterable[str], at_most_bytes: int, seed: int) -> list[str]:
    """A uniform sample that takes at most so much memory, in the order of the items; all of them if they fit.

    Every item draws a number, and those with the smallest ones stay: what the sample holds depends on the items and the
    seed alone, and memory is that of the sample.
    """
    rng = random.Random(seed)
    chosen: list[tuple[float, int, str]] = []  # a heap, the largest draw first
    held, limit = 0, 1.0
    for n, item in enumerate(items):
        if (draw := rng.random()) >= limit:
            continue
        heapq.heappush(chosen, (-draw, n, item))
        held += sys.getsizeof(item) + ENTRY_BYTES
        while held > at_most_bytes:
            negative, _, dropped = heapq.heappop(chosen)
            held, limit = held - sys.getsizeof(dropped) - ENTRY_BYTES, -negative
    return [item for _, _, item in sorted(chosen, key=lambda entry: entry[1])]


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


def train_json(texts: Sequence[str], *, vocab_size: int) -> bytes:
    """The content of a tokenizer.json. Raises TokenizerError where the texts do not yield so many ids."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    model.train_from_iterator(texts, trainer, length=len(texts))
    if (found := model.get_vocab_size()) != vocab_size:
        raise TokenizerError(
            f"--vocab-size {vocab_size}: {len(texts):,} passages of text yield {found:,} ids. Use more text, or "
            f"another size; {SMALLEST}"
        )
    return str(model.to_str(pretty=True)).encode()


def parser() -> ArgumentParser:
    result = new_parser("data_prep.train_tokenizer", DESCRIPTION)
    Corpus.add_arguments(result)
    result.add_argument("--output", required=True, type=Path, metavar="NAME.model|NAME.json")
    result.add_argument(
        "--vocab-size", required=True, type=int, help="ids, with 256 bytes and 3 special tokens (.json: 1)"
    )
    result.add_argument("--model-type", choices=("unigram", "bpe"), help="of a .model (default: unigram)")
    result.add_argument(
        "--character-coverage",
        type=float,
        help="share of characters with a piece, of a .model (default: 0.9995)",
    )
    result.add_argument("--split", choices=("train", "all"), default="train", help="documents to learn from")
    result.add_argument(
        "--sample-bytes",
        type=int,
        default=200_000_000,
        help="memory for the sample to learn from, drawn at random from all text; the learning itself takes several "
        "times as much (default: %(default)s)",
    )
    result.add_argument(
        "--read-bytes",
        type=int,
        metavar="N",
        help="stop reading after N bytes of text: the sample is then of the beginning only (default: read everything)",
    )
    add_split_arguments(result)
    result.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return result


def _check(arguments: Namespace) -> list[Path]:
    """The files to write. Raises TokenizerError for options that cannot work, before anything is read."""
    output: Path = arguments.output
    if output.suffix not in (".model", ".json"):
        raise TokenizerError(f"--output {output}: expected NAME.model (SentencePiece) or NAME.json (byte-level BPE)")
    for option in ("vocab_size", "sample_bytes", "read_bytes"):
        if (value := getattr(arguments, option)) is not None and value < 1:
            raise TokenizerError(f"--{option.replace('_', '-')} {value}: expected 1 or more")
    if output.suffix == ".json" and (arguments.model_type or arguments.character_coverage):
        raise TokenizerError("--model-type and --character-coverage are of SentencePiece, and a .json is none")
    if output.suffix == ".json" and arguments.vocab_size < SMALLEST_JSON:
        raise TokenizerError(f"--vocab-size {arguments.vocab_size}: {SMALLEST}")
    output.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(output.parent, os.W_OK):
        raise TokenizerError(f"{output.parent} is not writable; choose another output")
    files = [output] if output.suffix == ".json" else [output, output.with_suffix(".vocab")]
    for path in files:
        if path.is_dir() or (path.exists() and not arguments.overwrite):
            hint = "" if path.is_dir() else ", or pass --overwrite to replace it"
            raise TokenizerError(f"{path} exists; choose another output{hint}")
    return files


class _Reading:
    """Documents on their way through, counted; `at_most` bytes of their text, if given, and no more."""

    def __init__(self, documents: Iterable[tuple[str, Document]], at_most: int | None) -> None:
        self._documents, self._at_most = documents, at_most
        self.n_bytes, self.ended_early = 0, False

    def __iter__(self) -> Iterator[tuple[str, Document]]:
        with tqdm(unit="B", unit_scale=True, disable=None, desc="sampling") as bar:
            for n, (source, document) in enumerate(self._documents, start=1):
                if self._at_most is not None and self.n_bytes >= self._at_most:
                    self.ended_early = True
                    return
                size = len(document.utf8)
                self.n_bytes += size
                bar.update(size)
                if n % 1000 == 0:
                    bar.set_postfix_str(f"{n:,} documents", refresh=False)
                yield source, document


def body(arguments: Namespace) -> int:
    output, *vocab = _check(arguments)
    corpus = Corpus.from_arguments(arguments, split_files(arguments))
    rule = chosen_rule(arguments)
    reading = _Reading(corpus.by_input(), arguments.read_bytes)
    in_all = arguments.split == "all"
    chosen = (d for source, d in reading if in_all or split_of(digest_of(d.utf8), source, rule) == arguments.split)
    parts = passages(chosen) if output.suffix == ".json" else sentences(chosen)
    texts = sample(parts, arguments.sample_bytes, arguments.seed)
    left_out = [f"left out, it could not be read: {reason}" for reason in corpus.left_out]
    if not texts:
        message = (
            f"no text in the {arguments.split} split: use more documents, other --split-fractions, or more "
            "--sample-bytes"
        )
        raise CorpusError("\n".join([message, *left_out]))
    learned = sum(len(text.encode()) for text in texts)
    print(f"learning from {learned:,} bytes of text, sampled from {reading.n_bytes:,} bytes read", flush=True)
    if reading.ended_early:
        print("warning: --read-bytes ended the reading, and the rest of the corpus is not in the sample")
    if output.suffix == ".json":
        content = train_json(texts, vocab_size=arguments.vocab_size)
    else:
        content = train(
            texts,
            kind=arguments.model_type or "unigram",
            vocab_size=arguments.vocab_size,
            character_coverage=arguments.character_coverage or 0.9995,
        )
        model = sentencepiece.SentencePieceProcessor(model_proto=content)
        pieces = [f"{model.id_to_piece(i)!r}\t{model.get_score(i):g}\n" for i in range(model.get_piece_size())]
    with ExitStack() as drafts:  # both appear at the end
        if vocab:
            drafts.enter_context(draft_of(vocab[0])).write_bytes("".join(pieces).encode())
        drafts.enter_context(draft_of(output)).write_bytes(content)
    tokenizer = load_tokenizer(output)
    shown = texts[:1000]
    density = sum(len(tokenizer.encode(text)) for text in shown) / sum(len(text.encode()) for text in shown)
    if corpus.skipped:
        print(f"warning: {corpus.skipped:,} invalid records were left out")
    for line in left_out:
        print(f"warning: {line}")
    print(f"{output}: {tokenizer.vocab_size:,} ids, {density:.4f} tokens a byte, sha256 {tokenizer.sha256}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run(parser(), body, argv)


if __name__ == "__main__":
    sys.exit(main())
