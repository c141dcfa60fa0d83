"""Raw corpora as a stream of documents, and the rule that sends each document to a split.

Memory is bounded by the largest document (of a table, by a batch of rows), and that by --max-record-bytes. An invalid
record is named by file and line, and stops the command or is counted; a damaged input stops it too, because what
follows the damage is lost, unless the whole of it may be left out.
"""

from __future__ import annotations

import logging
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import xxhash

from data_prep.finding import Found, find, is_dataset
from data_prep.readers import byte_ranges, read_fasta, read_jsonl, read_txt
from data_prep.records import MAX_RECORD_BYTES, NORMALIZATIONS, Document, Invalid, Reading, Record, Unit, finished
from data_prep.streams import (
    CorpusError,
    UnreadableError,
    extension,
    has_ranges,
    is_named_dataset,
    is_url,
    line_feeds,
    size_of,
)
from data_prep.tables import read_arrow, read_dataset, read_named, read_parquet, row_groups, rows, shards
from data_prep.web import read_warc
from mamba_pretrain.data.manifest import SPLITS, SourceInfo, SplitRule

log = logging.getLogger("mamba_pretrain")

UNIT_BYTES: Final = 64 << 20
TXT_DOCUMENTS: Final = ("file", "blank-line", "line")
ON_ERROR: Final = ("stop", "skip", "skip-files")
SHOWN: Final = 20  # inputs that a message lists


class Format(NamedTuple):
    read: Callable[[Unit, Reading], Iterator[Record]]
    compressed: bool = False  # whether .gz and .zst of it are read, too
    units: Callable[[Unit, int], list[Unit]] | None = None  # None: the whole is one


FORMATS: Final = {
    ".txt": Format(read_txt, compressed=True, units=byte_ranges),
    ".jsonl": Format(read_jsonl, compressed=True, units=byte_ranges),
    ".parquet": Format(read_parquet, units=row_groups),
    ".arrow": Format(read_arrow),
    **dict.fromkeys((".fa", ".fasta", ".fna"), Format(read_fasta, compressed=True)),
    **dict.fromkeys((".warc", ".wet"), Format(read_warc, compressed=True)),
}
SAVED: Final = Format(read_dataset, units=rows)
NAMED: Final = Format(read_named, units=shards)
KNOWN: Final = {
    name + compression: kind
    for name, kind in FORMATS.items()
    for compression in ("", ".gz", ".zst")
    if kind.compressed or not compression
}
NAMES: Final = " ".join(FORMATS) + ", all but .parquet and .arrow also .gz .zst"


def inputs_in(given: Sequence[str | Path]) -> Found:
    """The files, URLs and datasets that these name. Raises CorpusError where there is none."""
    if not given:
        raise CorpusError("no input: name files, directories, patterns, URLs or datasets")
    return find(given, lambda source: extension(source) in KNOWN, NAMES)


class Corpus:
    """The documents of files, directories (in sorted order), fsspec URLs, and datasets on disk or by name.

    Iterating reads everything again and counts `skipped` (invalid, left out) and `empty` (valid, without text) records,
    and lists in `left_out` the inputs that were. `ignored` is what directories hold that is hidden or has an extension
    that says nothing to this reader. Raises CorpusError here for inputs that match nothing or one file twice; while
    iterating UnreadableError for inputs that cannot be read, and CorpusError for invalid records, unless `on_error` is
    "skip-files" for the first, this or "skip" for the second. Pickles without what is known of the inputs' sizes.
    """

    def __init__(
        self,
        inputs: Sequence[str | Path],
        *,
        text_key: str = "text",
        txt_documents: str = "file",
        on_error: str = "stop",
        normalization: str = "none",
        max_record_bytes: int = MAX_RECORD_BYTES,
    ) -> None:
        for name, value, choices in (
            ("txt_documents", txt_documents, TXT_DOCUMENTS),
            ("on_error", on_error, ON_ERROR),
            ("normalization", normalization, NORMALIZATIONS),
        ):
            if value not in choices:
                raise CorpusError(f"{name} is {value!r}, expected one of {', '.join(choices)}")
        if max_record_bytes < 1:
            raise CorpusError(f"--max-record-bytes {max_record_bytes}: expected 1 or more")
        self.reading = Reading(text_key, txt_documents, normalization, max_record_bytes)
        self.on_error = on_error
        self.skipped = self.empty = 0
        self.left_out: list[str] = []
        found = inputs_in(inputs)
        self.files, self.ignored, self._sizes = found.files, found.ignored, found.sizes

    @classmethod
    def from_arguments(cls, arguments: Namespace, more: Sequence[str] = ()) -> Corpus:
        """The corpus that the options of `add_arguments` describe, and `more` inputs; says which files it ignores."""
        corpus = cls(
            [*arguments.inputs, *more],
            text_key=arguments.text_key,
            txt_documents=arguments.txt_documents,
            on_error=arguments.on_error,
            normalization=arguments.normalization,
            max_record_bytes=arguments.max_record_bytes,
        )
        for path in corpus.ignored:
            print(f"warning: ignored {path}, it is hidden or its extension is unknown", file=sys.stderr)
        return corpus

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        parser.add_argument(
            "inputs",
            nargs="*",
            metavar="INPUT",
            help=f"files ({NAMES}), directories of them, patterns like 'a/**/*.jsonl', fsspec URLs of all these "
            "(s3://, gs://, https://), datasets on disk, and hf://NAME[:CONFIG][@SPLIT][#REVISION], which streams a "
            "dataset of the Hugging Face hub (or of a directory NAME), its train split by default",
        )
        parser.add_argument("--text-key", default="text", help="field or column that holds the text (default: text)")
        parser.add_argument(
            "--txt-documents",
            choices=TXT_DOCUMENTS,
            default="file",
            help="what one document is in a .txt: the file (default), a block between blank lines, or a line",
        )
        parser.add_argument(
            "--on-error",
            choices=ON_ERROR,
            default="stop",
            help="what to do with an invalid record: stop and name it (default), or leave it out and count it; "
            "skip-files also leaves out, and names, inputs that are damaged or cannot be read",
        )
        parser.add_argument(
            "--normalization",
            choices=NORMALIZATIONS,
            default="none",
            help="Unicode normalization of the text, before all else that is done with it (default: none)",
        )
        parser.add_argument(
            "--max-record-bytes",
            type=int,
            default=MAX_RECORD_BYTES,
            metavar="N",
            help="a line, or a document of any other format, with more is an invalid record; reading takes a few times "
            f"this memory where there is one (default: {MAX_RECORD_BYTES})",
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sizes": {}}

    def sources(self) -> list[SourceInfo]:
        """Every input with its bytes, 0 where they are not known. Warns of those that are empty."""
        sizes = {source: self._size_of(source) for source in self.files}
        if empty := [source for source, size in sizes.items() if size == 0]:
            more = f" and {len(empty) - SHOWN:,} more" if len(empty) > SHOWN else ""
            log.warning("%d inputs are empty: %s", len(empty), ", ".join(empty[:SHOWN]) + more)
        return [SourceInfo(source, size or 0) for source, size in sizes.items()]

    def _size_of(self, source: str) -> int | None:
        size = self._sizes.get(source)  # of a listing: a million files are not asked one by one
        try:
            return size_of(source) if size is None else size
        except OSError:  # records() says what is wrong
            return None

    def units(self, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
        """The corpus in parts of about this size, in order: a function of the inputs and the options alone."""
        if unit_bytes < 1:
            raise CorpusError(f"units of {unit_bytes} bytes: expected 1 or more")
        return [unit for source in self.files for unit in self._units_of(source, unit_bytes)]

    def _units_of(self, source: str, unit_bytes: int) -> list[Unit]:
        size = self._size_of(source)
        whole = Unit(source, bytes=size or 0, source_bytes=size)
        split = _format(source).units
        if split is byte_ranges and self.reading.txt_documents == "file" and extension(source) == ".txt":
            split = None
        if extension(source).endswith((".gz", ".zst")) or ((size or 0) <= unit_bytes and split is not shards):
            split = None
        try:
            return split(whole, unit_bytes) if split is not None and has_ranges(source) else [whole]
        except (UnreadableError, OSError):  # records() says what is wrong
            return [whole]

    def records(self, unit: Unit) -> Iterator[Record]:
        """All that a unit holds, documents without text included.

        Raises UnreadableError where the input is damaged or is no longer what it was when the unit was planned.
        """
        try:
            _require_unchanged(unit)
            yield from (finished(record, self.reading) for record in _format(unit.source).read(unit, self.reading))
            _require_unchanged(unit)
        except (UnreadableError, OSError) as error:
            reason = str(error)
            if isinstance(error, OSError):
                reason = f"{unit.source} cannot be read: {error.strerror or error}"
            cure = "" if self.on_error == "skip-files" else "; --on-error skip-files leaves such inputs out"
            raise UnreadableError(reason + cure) from error

    def refusal(self, unit: Unit, record: Invalid) -> CorpusError:
        """What to raise for an invalid record of a unit. Names its line in the file, which takes reading up to it."""
        line, lines_before = record.line, unit.start and _format(unit.source).units is byte_ranges
        if lines_before:
            line += 1 + line_feeds(unit.source, unit.start - 1)
        return CorpusError(
            f"{record.source}:{line}: {record.reason}. Mend it, or pass --on-error skip to leave out and count such "
            "records"
        )

    def __iter__(self) -> Iterator[Document]:
        return (document for _, document in self.by_input())

    def by_input(self) -> Iterator[tuple[str, Document]]:
        """What iterating gives, each document with the one of `files` that it is of."""
        self.skipped = self.empty = 0
        self.left_out = []
        for unit in self.units():
            if self._may_be_read(unit):
                for document in self._documents(unit):
                    yield unit.source, document

    def _may_be_read(self, unit: Unit) -> bool:
        """Under skip-files a unit is read once more, beforehand: nothing of a damaged one may have gone out."""
        if self.on_error == "skip-files":
            try:
                for _ in self.records(unit):
                    pass
            except UnreadableError as error:
                self.left_out.append(str(error))
                return False
        return True

    def _documents(self, unit: Unit) -> Iterator[Document]:
        for record in self.records(unit):
            if isinstance(record, Invalid):
                if self.on_error == "stop":
                    raise self.refusal(unit, record)
                self.skipped += 1
            elif record.text:
                yield record
            else:
                self.empty += 1


def _require_unchanged(unit: Unit) -> None:
    if unit.source_bytes is not None and (size := size_of(unit.source)) != unit.source_bytes:
        raise UnreadableError(
            f"{unit.source} had {unit.source_bytes:,} bytes when the work was divided and has {size or 0:,} now: "
            "something writes to it; begin again when it is complete"
        )


def _format(source: str) -> Format:
    if is_named_dataset(source):
        return NAMED
    if not is_url(source) and is_dataset(Path(source)):
        return SAVED
    return KNOWN[extension(source)]


def add_split_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--split-fractions",
        nargs=3,
        type=float,
        metavar=("TRAIN", "VALIDATION", "TEST"),
        help="share of each split in the documents of INPUT (default: 0.98 0.01 0.01; all in train with --split-files)",
    )
    parser.add_argument(
        "--split-files",
        action="extend",
        nargs="+",
        type=_split_file,
        default=[],
        metavar="SPLIT=INPUT",
        help="more inputs, which a corpus has set apart: all documents of each are of that split, as in "
        "--split-files validation=data/raw/enwik8/validation.jsonl test=data/raw/enwik8/test.jsonl",
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed is another division into splits (default: 0)")


def _split_file(text: str) -> tuple[str, str]:
    split, _, given = text.partition("=")
    if split not in SPLITS or not given:
        raise ArgumentTypeError(f"{text!r}: expected SPLIT=INPUT, with one of {', '.join(SPLITS)} as SPLIT")
    return split, given


def split_files(arguments: Namespace) -> list[str]:
    """The inputs that `--split-files` names."""
    return [given for _, given in arguments.split_files]


def chosen_rule(arguments: Namespace) -> SplitRule:
    """What the options of `add_split_arguments` say."""
    fractions = arguments.split_fractions or ((1, 0, 0) if arguments.split_files else (0.98, 0.01, 0.01))
    rule = split_rule(fractions, arguments.seed)
    if not arguments.split_files:
        return rule
    if arguments.split_fractions and not arguments.inputs:
        raise CorpusError("--split-fractions are of INPUT, and there is none: all inputs are --split-files")
    inputs = {file: split for split, given in arguments.split_files for file in inputs_in([given]).files}
    how = f"{rule.how}; of inputs as in `inputs`" if arguments.inputs else "by input, as in `inputs`"
    return SplitRule(rule.seed, rule.fractions if arguments.inputs else {}, how, inputs)


def split_rule(fractions: Sequence[float], seed: int) -> SplitRule:
    """The rule for (train, validation, test) shares. A document's split depends on its text and the seed alone."""
    if len(fractions) != len(SPLITS) or min(fractions) < 0 or not abs(sum(fractions) - 1) < 1e-6:
        raise CorpusError(f"split fractions {tuple(fractions)}: expected three shares, none negative, that add up to 1")
    if not abs(seed) < 2**63:
        raise CorpusError(f"--seed {seed}: expected a number of at most 63 bits")
    shares = {split: float(share) for split, share in zip(SPLITS, fractions, strict=True) if share > 0}
    how = "XXH3-64, seeded, of the text's XXH3-128 (its 16 bytes, big-endian), against cumulated fractions"
    return SplitRule(seed, shares, how)


def digest_of(utf8: bytes) -> bytes:
    """16 bytes that only copies of a document share: of 10^10 documents, two that differ do with odds of 10^-19.

    Twenty times as fast as sha256. Who makes two that share them on purpose gets one split for both, or loses one of
    them to --drop-duplicates.
    """
    return xxhash.xxh3_128_digest(utf8)


def split_of(digest: bytes, source: str, rule: SplitRule) -> str:
    """The split of a document, by its `digest_of` and the input it is of.

    Copies share it, so none is both trained on and tested on, unless inputs of given splits hold them.
    """
    if source in rule.inputs:
        return rule.inputs[source]
    u, total = xxhash.xxh3_64_intdigest(digest, rule.seed % 2**64) / 2**64, 0.0
    for split, share in rule.fractions.items():
        total += share
        if u < total:
            return split
    return split  # rounding: the shares add up to a hair less than 1
