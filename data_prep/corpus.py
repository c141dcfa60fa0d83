"""Raw corpora as a stream of documents, and the rule that sends each document to a split.

Memory is bounded by the largest document (for Parquet, by a row group). An invalid record is named by file and line,
and stops the command or is counted; a damaged file always stops it, because what follows the damage is lost.
"""

from __future__ import annotations

import hashlib
import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from data_prep.streams import CorpusError, lines, optional
from mamba_pretrain.data.manifest import SPLITS, SourceInfo, SplitRule

DATASET_MARKERS: Final = ("dataset_dict.json", "state.json")  # what datasets' save_to_disk leaves in a directory


@dataclass(frozen=True)
class Document:
    text: str
    source: str
    line: int  # where it begins: line, row or record, from 1


@dataclass(frozen=True)
class Invalid:
    reason: str
    source: str
    line: int


Record = Document | Invalid


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
    ) -> None:
        self.text_key, self.txt_documents, self.on_error = text_key, txt_documents, on_error
        self.files: list[Path] = []
        self.ignored: list[Path] = []
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
                self.files.append(path)
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
        )
        for path in corpus.ignored:
            print(f"warning: ignored {path}, it is hidden or its extension is unknown", file=sys.stderr)
        return corpus

    def _add_directory(self, directory: Path, above: tuple[Path, ...] = ()) -> None:
        above = (*above, directory.resolve())
        if _is_dataset(directory):
            self.files.append(directory)
        elif above[-1] not in above[:-1]:  # else a symbolic link has led back up
            for path in sorted(directory.iterdir()):
                hidden = path.name.startswith(".")
                if path.is_dir() and not hidden:
                    self._add_directory(path, above)
                else:
                    readable = _extension(path) in READERS and (path.is_file() or not path.exists())
                    (self.files if readable and not hidden else self.ignored).append(path)

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

    def sources(self) -> list[SourceInfo]:
        def size(path: Path) -> int:
            files = (file for file in path.rglob("*") if file.is_file()) if path.is_dir() else (path,)
            return sum(file.stat().st_size for file in files)

        return [SourceInfo(str(path), size(path)) for path in self.files]

    def __iter__(self) -> Iterator[Document]:
        self.skipped = self.empty = 0
        for path in self.files:
            for record in self._records(path):
                if isinstance(record, Document):
                    if record.text:
                        yield record
                    else:
                        self.empty += 1
                elif self.on_error == "skip":
                    self.skipped += 1
                else:
                    raise CorpusError(
                        f"{record.source}:{record.line}: {record.reason}. Mend it, or pass --on-error skip to leave "
                        "out and count such records"
                    )

    def _records(self, path: Path) -> Iterator[Record]:
        reader = _read_dataset if path.is_dir() else READERS[_extension(path)]
        try:
            yield from map(_storable, reader(path, self))
        except OSError as error:
            raise CorpusError(f"{path} cannot be read: {error.strerror or error}") from error


def _known() -> str:
    return " ".join(READERS) + ", all but .parquet also .gz .zst"


def _is_dataset(path: Path) -> bool:
    return any((path / marker).is_file() for marker in DATASET_MARKERS)


def _extension(path: Path) -> str:
    plain = path.with_suffix("") if path.suffix in (".gz", ".zst") else path
    return "" if plain is not path and plain.suffix == ".parquet" else plain.suffix


def _require_distinct(files: Sequence[Path]) -> None:
    first: dict[Path, Path] = {}
    for path in files:
        if (other := first.setdefault(path.resolve(), path)) is not path:
            raise CorpusError(f"{path} is among the inputs twice, first as {other}: its text would count double")


def _storable(record: Record) -> Record:
    if isinstance(record, Document) and not record.text.isascii():
        try:
            record.text.encode()
        except UnicodeEncodeError:
            return Invalid(
                "the text holds half of a surrogate pair, which is not a character", record.source, record.line
            )
    return record


def _read_txt(path: Path, corpus: Corpus) -> Iterator[Record]:
    def record(block: list[bytes], line: int) -> Record:
        text = b"".join(block)
        try:
            return Document((text if whole else text.rstrip(b"\r\n")).decode(), str(path), line)
        except UnicodeDecodeError as error:
            line += text.count(b"\n", 0, error.start)
            return Invalid(f"byte {text[error.start]:#04x} is not UTF-8", str(path), line)

    whole, block, begin = corpus.txt_documents == "file", list[bytes](), 1
    for number, line in lines(path):
        blank = not whole and not line.strip()
        if block and (blank or corpus.txt_documents == "line"):
            yield record(block, begin)
            block = []
        if not blank:
            begin = begin if block else number
            block.append(line)
    if block or whole:
        yield record(block, begin)


def _read_jsonl(path: Path, corpus: Corpus) -> Iterator[Record]:
    for number, line in lines(path):
        if not line.strip():
            continue
        try:
            fields = json.loads(line.decode())
        except UnicodeDecodeError as error:
            yield Invalid(f"byte {line[error.start]:#04x} is not UTF-8", str(path), number)
        except (ValueError, RecursionError) as error:
            yield Invalid(f"not JSON ({error})", str(path), number)
        else:
            yield _field(fields, corpus.text_key, path, number)


def _field(fields: object, key: str, path: Path, line: int) -> Record:
    if not isinstance(fields, dict):
        return Invalid(f"a JSON {type(fields).__name__}, expected an object with the key {key!r}", str(path), line)
    if key not in fields:
        return Invalid(f"no key {key!r} (--text-key), only {sorted(fields)}", str(path), line)
    return _string(fields[key], key, path, line)


def _string(value: object, key: str, path: Path, line: int) -> Record:
    if not isinstance(value, str):
        return Invalid(f"{key!r} is {type(value).__name__}, expected a string", str(path), line)
    return Document(value, str(path), line)


def _read_parquet(path: Path, corpus: Corpus) -> Iterator[Record]:
    parquet = optional("pyarrow.parquet", path)
    arrow_error = optional("pyarrow", path).ArrowException
    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if corpus.text_key not in names:
                raise CorpusError(f"{path} has no column {corpus.text_key!r} (--text-key), only {names}")
            for batch in file.iter_batches(batch_size=1024, columns=[corpus.text_key]):
                for scalar in batch.column(0):
                    row += 1
                    try:
                        yield _string(scalar.as_py(), corpus.text_key, path, row)
                    except UnicodeDecodeError as error:
                        yield Invalid(f"byte {error.object[error.start]:#04x} is not UTF-8", str(path), row)
    except (arrow_error, OSError) as error:
        if getattr(error, "errno", None):  # the system's, not pyarrow's
            raise
        raise CorpusError(f"{path} is damaged after row {row} ({error}); get the file again") from error


def _read_dataset(path: Path, corpus: Corpus) -> Iterator[Record]:
    datasets = optional("datasets", path)
    row = 0
    try:
        loaded = datasets.load_from_disk(str(path))
        parts = loaded if isinstance(loaded, dict) else {"": loaded}
        for name in sorted(parts):
            names = parts[name].column_names
            if corpus.text_key not in names:
                raise CorpusError(f"{path}: no column {corpus.text_key!r} (--text-key), only {names}")
            for row, fields in enumerate(parts[name].select_columns([corpus.text_key]), start=1):
                yield _field(fields, corpus.text_key, path / name, row)
    except (CorpusError, PermissionError):
        raise
    except Exception as error:  # of pyarrow, json, fsspec, or a bare KeyError
        raise CorpusError(f"{path} is damaged after row {row} ({error!r}); get the dataset again") from error


def _read_fasta(path: Path, _: Corpus) -> Iterator[Record]:
    """One document a record: its letters in the case they stand in, without header, comments and whitespace."""
    letters: list[str] = []
    begin, invalid = 0, ""

    def record() -> Record:
        return Invalid(invalid, str(path), begin) if invalid else Document("".join(letters), str(path), begin)

    for number, line in lines(path):
        if line.startswith(b";"):  # a comment
            continue
        if line.startswith(b">"):
            if begin:
                yield record()
            letters, begin, invalid = [], number, ""
        elif line.strip() and not begin:
            begin, invalid = number, "sequence before the first header, a line that starts with '>'"
        elif not line.isascii():
            invalid = f"the record has a byte beyond ASCII in line {number}"
        else:
            letters.append(b"".join(line.split()).decode("ascii"))
    if begin:
        yield record()


READERS: Final[dict[str, Callable[[Path, Corpus], Iterator[Record]]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".fa": _read_fasta,
    ".fasta": _read_fasta,
    ".fna": _read_fasta,
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
