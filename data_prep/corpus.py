"""Raw corpora as a stream of documents, and the rule that sends each document to a split.

Memory is bounded by the largest document (for Parquet, by a row group). An invalid record is named by file and line,
and stops the command or is counted; a damaged file always stops it, because what follows the damage is lost.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import sys
import zlib
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from mamba_pretrain.data.shards import SPLITS, SourceInfo, SplitRule

EXTRA: Final = "pip install 'mamba-pretrain[data]'"
DATASET_MARKERS: Final = ("dataset_dict.json", "state.json")  # what datasets' save_to_disk leaves in a directory


class CorpusError(ValueError):
    """The input is not a corpus this program can read."""


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
    `ignored` are files found in directories whose extension says nothing to this reader. Raises CorpusError here for
    inputs that match nothing, and while iterating for invalid records unless `on_error` is "skip".
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
            if path.is_dir() and not _is_dataset(path):
                self._add_directory(path)
            elif path.is_file() and _extension(path) not in READERS:
                raise CorpusError(f"{path}: unknown extension {path.suffix!r}; known are {_known()}")
            elif path.exists():
                self.files.append(path)
            else:
                raise CorpusError(f"{path} does not exist")
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
            print(f"warning: ignored {path}, its extension is unknown", file=sys.stderr)
        return corpus

    def _add_directory(self, directory: Path) -> None:
        for path in sorted(directory.iterdir()):
            if path.name.startswith("."):
                continue
            if path.is_dir() and not _is_dataset(path):
                self._add_directory(path)
            else:
                (self.files if path.is_dir() or _extension(path) in READERS else self.ignored).append(path)

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
            reader = _read_dataset if path.is_dir() else READERS[_extension(path)]
            for record in map(_storable, reader(path, self)):
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


def _known() -> str:
    return " ".join(READERS) + ", all but .parquet also .gz .zst"


def _is_dataset(path: Path) -> bool:
    return any((path / marker).is_file() for marker in DATASET_MARKERS)


def _extension(path: Path) -> str:
    plain = path.with_suffix("") if path.suffix in (".gz", ".zst") else path
    return "" if plain is not path and plain.suffix == ".parquet" else plain.suffix


def _storable(record: Record) -> Record:
    if isinstance(record, Document) and not record.text.isascii():
        try:
            record.text.encode()
        except UnicodeEncodeError:
            return Invalid(
                "the text holds half of a surrogate pair, which is not a character", record.source, record.line
            )
    return record


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line with its line feed) of a plain or compressed file."""
    number = 0
    try:
        with _open(path) as stream:
            for number, line in enumerate(stream, start=1):
                yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CorpusError(f"{path} is damaged after line {number} ({error}); get the file again") from error


def _open(path: Path) -> io.BufferedIOBase | IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(path)
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdStream(path))
    return path.open("rb")


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of one or more zstd frames. zstandard's own stream ends a truncated file without a word."""

    def __init__(self, path: Path) -> None:
        self._zstd = _optional("zstandard", path)
        self._file = path.open("rb")
        self._frame = self._zstd.ZstdDecompressor().decompressobj()
        self._ready, self._rest, self._inside = memoryview(b""), b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            block = self._rest or self._file.read(1 << 16)
            if not block and self._inside:
                raise EOFError("the last zstd frame is incomplete")
            if not block:
                return 0
            try:
                self._ready = memoryview(self._frame.decompress(block))
            except self._zstd.ZstdError as error:
                raise EOFError(str(error)) from error
            self._rest, self._inside = self._frame.unused_data, not self._frame.eof
            if self._frame.eof:
                self._frame = self._zstd.ZstdDecompressor().decompressobj()
        n = min(len(buffer), len(self._ready))
        buffer[:n], self._ready = self._ready[:n], self._ready[n:]
        return n

    def close(self) -> None:
        self._file.close()
        super().close()


def _optional(module: str, path: Path) -> Any:
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as error:
        raise CorpusError(f"{path}: reading it takes the package {module.split('.')[0]}: {EXTRA}") from error


def _read_txt(path: Path, corpus: Corpus) -> Iterator[Record]:
    def record(block: list[bytes], line: int) -> Record:
        text = b"".join(block)
        try:
            return Document((text if whole else text.rstrip(b"\r\n")).decode(), str(path), line)
        except UnicodeDecodeError as error:
            line += text.count(b"\n", 0, error.start)
            return Invalid(f"byte {text[error.start]:#04x} is not UTF-8", str(path), line)

    whole, block, begin = corpus.txt_documents == "file", list[bytes](), 1
    for number, line in _lines(path):
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
    for number, line in _lines(path):
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
    parquet = _optional("pyarrow.parquet", path)
    arrow_error = _optional("pyarrow", path).ArrowException
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
        raise CorpusError(f"{path} is damaged after row {row} ({error}); get the file again") from error


def _read_dataset(path: Path, corpus: Corpus) -> Iterator[Record]:
    datasets = _optional("datasets", path)
    loaded = datasets.load_from_disk(str(path))
    parts = loaded if isinstance(loaded, dict) else {"": loaded}
    for name in sorted(parts):
        if corpus.text_key not in parts[name].column_names:
            raise CorpusError(f"{path}: no column {corpus.text_key!r} (--text-key), only {parts[name].column_names}")
        for row, fields in enumerate(parts[name].select_columns([corpus.text_key]), start=1):
            yield _field(fields, corpus.text_key, path / name, row)


def _read_fasta(path: Path, _: Corpus) -> Iterator[Record]:
    """One document a record: its letters in the case they stand in, without header and line breaks."""
    letters: list[str] = []
    begin, invalid = 0, ""

    def record() -> Record:
        return Invalid(invalid, str(path), begin) if invalid else Document("".join(letters), str(path), begin)

    for number, line in _lines(path):
        if line.startswith(b">"):
            if begin:
                yield record()
            letters, begin, invalid = [], number, ""
        elif line.strip() and not begin:
            begin, invalid = number, "sequence before the first header, a line that starts with '>'"
        elif not line.isascii():
            invalid = f"the record has a byte beyond ASCII in line {number}"
        else:
            letters.append(line.strip().decode("ascii"))
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
