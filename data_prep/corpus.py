"""Raw corpora as a stream of documents, and the rule that sends each document to a split.

Memory is bounded by the largest document (for Parquet, by a row group). An invalid record is named by file and line,
and stops the command or is counted; a damaged file always stops it, because what follows the damage is lost.
"""

from __future__ import annotations

import hashlib
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from data_prep.readers import byte_ranges, read_fasta, read_jsonl, read_txt
from data_prep.records import NORMALIZATIONS, Document, Invalid, Reading, Record, Unit, finished
from data_prep.streams import CorpusError, line_feeds, size_of
from data_prep.tables import read_dataset, read_parquet
from mamba_pretrain.data.manifest import SPLITS, SourceInfo, SplitRule

DATASET_MARKERS: Final = ("dataset_dict.json", "state.json")  # what datasets' save_to_disk leaves in a directory
UNIT_BYTES: Final = 64 << 20


class Corpus:
    """The documents of files and directories, in sorted order within a directory.

    Iterating reads everything again and counts `skipped` (invalid, left out) and `empty` (valid, without text) records.
    `ignored` is what directories hold that is hidden or has an extension that says nothing to this reader. Raises
    CorpusError here for inputs that match nothing or one file twice; while iterating for files that cannot be read, and
    for invalid records unless `on_error` is "skip".
    """

    def __init__(
        self,
        inputs: Sequence[str | Path],
        *,
        text_key: str = "text",
        txt_documents: str = "file",
        on_error: str = "stop",
        normalization: str = "none",
    ) -> None:
        self.reading = Reading(text_key, txt_documents, normalization)
        self.on_error = on_error
        self.files: list[str] = []  # paths or URLs, in order
        self.ignored: list[str] = []
        self.skipped = self.empty = 0
        for path in map(Path, inputs):
            if not path.exists():
                raise CorpusError(f"{path} does not exist")
            if path.is_dir():
                self._add_directory(path)
            elif not path.is_file():
                raise CorpusError(f"{path} is a pipe or a device; save what it gives to a file ending in {_known()}")
            elif _extension(path) not in READERS:
                raise CorpusError(f"{path}: unknown extension {path.suffix!r}; known are {_known()}")
            else:
                self.files.append(str(path))
        _require_distinct(self.files)
        if not self.files:
            raise CorpusError(f"nothing to read in {', '.join(map(str, inputs))}: no file ends in {_known()}")

    @classmethod
    def from_arguments(cls, arguments: Namespace) -> Corpus:
        """The corpus that the options of `add_arguments` describe; says which files it ignores."""
        corpus = cls(
            arguments.inputs,
            text_key=arguments.text_key,
            txt_documents=arguments.txt_documents,
            on_error=arguments.on_error,
            normalization=arguments.normalization,
        )
        for path in corpus.ignored:
            print(f"warning: ignored {path}, it is hidden or its extension is unknown", file=sys.stderr)
        return corpus

    def _add_directory(self, directory: Path, above: tuple[Path, ...] = ()) -> None:
        above = (*above, directory.resolve())
        if _is_dataset(directory):
            self.files.append(str(directory))
        elif above[-1] not in above[:-1]:  # else a symbolic link has led back up
            for path in sorted(directory.iterdir()):
                hidden = path.name.startswith(".")
                if path.is_dir() and not hidden:
                    self._add_directory(path, above)
                else:
                    readable = _extension(path) in READERS and (path.is_file() or not path.exists())
                    (self.files if readable and not hidden else self.ignored).append(str(path))

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        parser.add_argument(
            "inputs", nargs="+", metavar="INPUT", help=f"files ({_known()}), directories of them, datasets on disk"
        )
        parser.add_argument("--text-key", default="text", help="field or column that holds the text (default: text)")
        parser.add_argument(
            "--txt-documents",
            choices=("file", "blank-line", "line"),
            default="file",
            help="what one document is in a .txt: the file (default), a block between blank lines, or a line",
        )
        parser.add_argument(
            "--on-error",
            choices=("stop", "skip"),
            default="stop",
            help="what to do with an invalid record: stop and name it (default), or leave it out and count it",
        )
        parser.add_argument(
            "--normalization",
            choices=NORMALIZATIONS,
            default="none",
            help="Unicode normalization of the text (default: none)",
        )

    def sources(self) -> list[SourceInfo]:
        return [SourceInfo(path, self._bytes_of(path) or 0) for path in self.files]

    def _bytes_of(self, source: str) -> int | None:
        path = Path(source)
        files = (file for file in path.rglob("*") if file.is_file()) if path.is_dir() else (path,)
        try:
            return sum(size_of(str(file)) for file in files)
        except OSError:  # records() says what is wrong
            return None

    def units(self, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
        """The corpus in parts of about this size, in order: a function of the inputs and the options alone."""
        return [unit for source in self.files for unit in self._units_of(source, unit_bytes)]

    def _units_of(self, source: str, unit_bytes: int) -> list[Unit]:
        size = self._bytes_of(source)
        whole = Unit(source, bytes=size or 0, source_bytes=size)
        suffix = Path(source).suffix
        lines = suffix == ".jsonl" or (suffix == ".txt" and self.reading.txt_documents != "file")
        return byte_ranges(whole, unit_bytes) if lines and size else [whole]

    def size(self, unit: Unit) -> int:
        return unit.bytes

    def __iter__(self) -> Iterator[Document]:
        self.skipped = self.empty = 0
        for unit in self.units():
            for record in self.records(unit):
                if isinstance(record, Invalid):
                    if self.on_error == "stop":
                        raise self.refusal(unit, record)
                    self.skipped += 1
                elif record.text:
                    yield record
                else:
                    self.empty += 1

    def refusal(self, unit: Unit, record: Invalid) -> CorpusError:
        """What to raise for an invalid record of a unit: it is named by its line in the file."""
        line = record.line + (1 + line_feeds(unit.source, unit.start - 1) if unit.start else 0)
        return CorpusError(
            f"{record.source}:{line}: {record.reason}. Mend it, or pass --on-error skip to leave out and count such "
            "records"
        )

    def records(self, unit: Unit) -> Iterator[Record]:
        """All that a unit holds, documents without text included. Raises CorpusError where the input is damaged."""
        path = Path(unit.source)
        reader = read_dataset if path.is_dir() else READERS[_extension(path)]
        try:
            yield from (finished(record, self.reading) for record in reader(unit, self.reading))
        except OSError as error:
            raise CorpusError(f"{path} cannot be read: {error.strerror or error}") from error


def _known() -> str:
    return " ".join(READERS) + ", all but .parquet also .gz .zst"


def _is_dataset(path: Path) -> bool:
    return any((path / marker).is_file() for marker in DATASET_MARKERS)


def _extension(path: Path) -> str:
    plain = path.with_suffix("") if path.suffix in (".gz", ".zst") else path
    return "" if plain is not path and plain.suffix == ".parquet" else plain.suffix


def _require_distinct(files: Sequence[str]) -> None:
    first: dict[str, str] = {}
    for path in files:
        if (other := first.setdefault(os.path.realpath(path), path)) is not path:
            raise CorpusError(f"{path} is among the inputs twice, first as {other}: its text would count double")


READERS: Final[dict[str, Callable[[Unit, Reading], Iterator[Record]]]] = {
    ".txt": read_txt,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
    ".fa": read_fasta,
    ".fasta": read_fasta,
    ".fna": read_fasta,
}


def add_split_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--split-fractions",
        nargs=3,
        type=float,
        default=(0.98, 0.01, 0.01),
        metavar=("TRAIN", "VALIDATION", "TEST"),
        help="share of the documents in each split (default: 0.98 0.01 0.01)",
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed is another division into splits (default: 0)")


def split_rule(fractions: Sequence[float], seed: int) -> SplitRule:
    """The rule for (train, validation, test) shares. A document's split depends on its text and the seed alone."""
    if len(fractions) != len(SPLITS) or min(fractions) < 0 or not abs(sum(fractions) - 1) < 1e-6:
        raise CorpusError(f"split fractions {tuple(fractions)}: expected three shares, none negative, that add up to 1")
    if not abs(seed) < 2**63:
        raise CorpusError(f"--seed {seed}: expected a number of at most 63 bits")
    shares = {split: float(share) for split, share in zip(SPLITS, fractions, strict=True) if share > 0}
    return SplitRule(seed, shares, "blake2b-64 of the UTF-8 text, keyed by the seed, against cumulated fractions")


def split_of(text: str, rule: SplitRule) -> str:
    """The split of a document. Copies of one document share it, so none is both trained on and tested on."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=b"split %d" % rule.seed).digest()
    u, total = int.from_bytes(digest, "little") / 2**64, 0.0
    for split, share in rule.fractions.items():
        total += share
        if u < total:
            return split
    return split  # rounding: the shares add up to a hair less than 1
