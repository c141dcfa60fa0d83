"""A part of a dataset: what one worker makes of some units of the input, in three files.

NUMBER.tokens       the token ids of its documents, one after the other, in the dataset's dtype
NUMBER.documents    a ROW for each of them, in the same order
NUMBER.json         counts and checksums; written last

Nothing here waits for the disk. The first two are held against the checksums in the third when they are merged, and a
part that is not as it was written (after a power failure, say) counts as missing and is made again.

Documents of one split keep the corpus's order; splits take turns every few megabytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, Final, NamedTuple

import numpy as np
import xxhash

from data_prep.corpus import Corpus, digest_of, split_of
from data_prep.plan import Plan, name_of
from data_prep.records import Document
from data_prep.store import Store
from data_prep.streams import CorpusError, UnreadableError
from mamba_pretrain.data.encodings import Encodings, OutsideError
from mamba_pretrain.data.manifest import from_json
from mamba_pretrain.data.shards import ShardError
from mamba_pretrain.data.tokenizer import TokenizerError
from mamba_pretrain.data.writer import MAX_TOKENS, token_dtype
from mamba_pretrain.files import DISK_FULL

log = logging.getLogger("mamba_pretrain")

ROW: Final = np.dtype(
    [
        ("hash", "<u8", (2,)),  # digest_of the UTF-8 text
        ("text_bytes", "<i8"),
        ("words", "<i8"),
        ("tokens", "<i4"),  # with bos and eod
        ("split", "u1"),  # which one of the split rule's
        ("lossy", "u1"),  # 1: does not decode back to its own bytes
    ]
)
PACK: Final = struct.Struct("<16sqqiBB").pack
BATCH_CHARACTERS: Final = 1 << 18  # given to the tokenizer at a time
BATCH_DOCUMENTS: Final = 1024
CHECKED: Final = ("documents", "tokens")
KINDS: Final = (*CHECKED, "json")
BUFFER_BYTES: Final = 1 << 22  # of tokens, before they are written or after they were read
REPORT_S: Final = 1.0


@dataclass
class Counts:
    """NUMBER.json"""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    skipped: int = 0
    empty: int = 0
    too_short: int = 0
    too_long: int = 0
    left_out: list[str] = field(default_factory=list)
    xxh3: dict[str, str] = field(default_factory=dict)  # of the part's other files
    plan: str = ""  # its digest


@dataclass(frozen=True)
class Task:
    part: int
    left_out: dict[int, str] = field(default_factory=dict)  # units not to read, and why
    fatal: frozenset[int] = frozenset()  # units at which a worker died


@dataclass(frozen=True)
class Progress:
    unit: int  # the one that is being read
    documents: int
    tokens: int
    text_bytes: int


@dataclass(frozen=True)
class Failed:
    reason: str
    disk_full: bool = False


class Mark(NamedTuple):
    counts: Counts
    ends: list[int]  # of the files
    hashes: dict[str, xxhash.xxh3_128]


class PartWriter:
    """Encodes documents in batches and writes them as they come."""

    def __init__(self, tokens: BinaryIO, rows: BinaryIO, encodings: Encodings, plan: Plan) -> None:
        self.counts = Counts()
        self._files = rows, tokens
        self._hashes = {kind: xxhash.xxh3_128() for kind in CHECKED}
        self._encodings, self._plan = encodings, plan
        self._splits = tuple(plan.split_rule.splits)
        tokenizer, dtype = encodings.tokenizer, encodings.dtype
        self._bos = np.array([tokenizer.bos_id] * plan.adds_bos, dtype).tobytes()
        self._eod = np.array([tokenizer.eod_id], dtype).tobytes()
        self._batch: list[Document] = []
        self._characters = 0
        self._source = ""
        self._buffers = [(bytearray(), bytearray()) for _ in self._splits]  # rows, tokens

    def add(self, document: Document) -> None:
        size = len(document.utf8)
        if not size:
            self.counts.empty += 1
        elif size < self._plan.min_bytes:
            self.counts.too_short += 1
        elif self._plan.max_bytes and size > self._plan.max_bytes:
            self.counts.too_long += 1
        else:
            self._batch.append(document)
            self._characters += len(document.text)
            if self._characters >= BATCH_CHARACTERS or len(self._batch) >= BATCH_DOCUMENTS:
                self._encode()

    def flush(self) -> None:
        if self._batch:
            self._encode()
        self._write()

    def begin(self, source: str) -> None:
        """What is added next is of this input."""
        self.flush()
        self._source = source

    def finish(self) -> Counts:
        """When all is flushed."""
        xxh3 = {kind: known.hexdigest() for kind, known in self._hashes.items()}
        return dataclasses.replace(self.counts, xxh3=xxh3, plan=self._plan.digest)

    def mark(self) -> Mark:
        """A point to which `rewind` goes back; right after `flush` only."""
        counts = dataclasses.replace(self.counts, left_out=list(self.counts.left_out))
        return Mark(counts, [file.tell() for file in self._files], {k: h.copy() for k, h in self._hashes.items()})

    def rewind(self, mark: Mark) -> None:
        self.counts, ends, self._hashes = mark
        self._batch, self._characters = [], 0
        for buffers in self._buffers:
            for buffer in buffers:
                buffer.clear()
        for file, end in zip(self._files, ends, strict=True):
            file.seek(end)
            file.truncate()

    def _encode(self) -> None:
        batch, self._batch, self._characters = self._batch, [], 0
        # All of a batch before the rest: the tokenizer's tables, and then ours, stay in the core's caches.
        both = zip(*((document.text, document.utf8) for document in batch), strict=True)
        encoded = list(self._encodings.tokenizer.encode_batch(*both))
        append, count_words = self._encodings.append, self._encodings.words
        rule, extra = self._plan.split_rule, 1 + self._plan.adds_bos
        n_tokens = n_bytes = split = 0
        for document, ids in zip(batch, encoded, strict=True):
            utf8, length = document.utf8, len(ids) + extra
            if length > MAX_TOKENS:
                raise ShardError(
                    f"{document.source}:{document.line}: a document of {length:,} tokens; the format holds at most "
                    f"{MAX_TOKENS:,} in one: cut it, or leave it out with --max-bytes"
                )
            digest = digest_of(utf8)
            if len(self._splits) > 1:
                split = self._splits.index(split_of(digest, self._source, rule))
            rows, tokens = self._buffers[split]
            tokens += self._bos
            try:
                exact = append(ids, utf8, tokens)
            except OutsideError as error:
                raise ShardError(f"{document.source}:{document.line}: {error}") from None
            tokens += self._eod
            rows += PACK(digest, len(utf8), count_words(utf8), length, split, not exact)
            n_tokens += length
            n_bytes += len(utf8)
        self.counts.documents += len(batch)
        self.counts.tokens += n_tokens
        self.counts.text_bytes += n_bytes
        if sum(len(tokens) for _, tokens in self._buffers) >= BUFFER_BYTES:
            self._write()

    def _write(self) -> None:
        for buffers in self._buffers:
            for file, known, buffer in zip(self._files, self._hashes.values(), buffers, strict=True):
                file.write(buffer)
                known.update(buffer)
                buffer.clear()


def write_part(
    task: Task, report: Callable[[Progress], None], *, corpus: Corpus, plan: Plan, store: Store, encodings: Encodings
) -> Counts | Failed:
    """Makes the part and puts it into the store, or says why not; then nothing of it is there."""
    drafts = {kind: store.draft(f"{task.part:06d}.{kind}") for kind in KINDS}
    try:
        with (
            drafts["tokens"].open("wb") as tokens,
            drafts["documents"].open("wb") as rows,
        ):
            writer = PartWriter(tokens, rows, encodings, plan)
            for unit in plan.units_of(task.part):
                report(_progress(unit, writer))
                if unit in task.left_out:
                    writer.counts.left_out.append(task.left_out[unit])
                else:
                    _read_unit(unit, writer, report, corpus, plan)
        counts = writer.finish()
        drafts["json"].write_text(json.dumps(dataclasses.asdict(counts)))
        for kind in KINDS:
            store.add(drafts[kind], f"{task.part:06d}.{kind}")
        drafts.clear()
        return counts
    except (CorpusError, ShardError, TokenizerError) as error:
        return Failed(str(error))
    except OSError as error:
        if error.errno in DISK_FULL:
            return Failed(f"{os.strerror(error.errno)}: {error.filename or drafts['tokens'].parent}", disk_full=True)
        return Failed(f"{plan.name_of(task.part)}: {error}")
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)


def _read_unit(unit: int, writer: PartWriter, report: Callable[[Progress], None], corpus: Corpus, plan: Plan) -> None:
    planned, due = plan.units[unit], time.monotonic() + REPORT_S
    writer.begin(planned.source)
    mark = writer.mark()
    try:
        for record in corpus.records(planned):
            if isinstance(record, Document):
                writer.add(record)
            elif corpus.on_error == "stop":
                raise corpus.refusal(planned, record)
            else:
                writer.counts.skipped += 1
            if time.monotonic() >= due:
                report(_progress(unit, writer))
                due = time.monotonic() + REPORT_S
        writer.flush()
    except UnreadableError as error:
        if corpus.on_error != "skip-files":
            raise
        writer.rewind(mark)
        writer.counts.left_out.append(left_out(name_of(planned), str(error)))


def left_out(unit: str, reason: str) -> str:
    """An entry of the manifest's list."""
    return reason if reason.startswith(unit) else f"{unit}: {reason}"


def _progress(unit: int, writer: PartWriter) -> Progress:
    return Progress(unit, writer.counts.documents, writer.counts.tokens, writer.counts.text_bytes)


def finished(store: Store, plan: Plan) -> dict[int, Counts]:
    """The parts that are there, of this plan, and what its --on-error would make: nothing left out unless it says so.

    Of their files the sizes are looked at, the checksums are not.
    """
    found, sizes = {}, store.names()
    digest = plan.digest  # once, before it goes to the workers with the plan
    width = token_dtype(plan.tokenizer.vocab_size).itemsize
    for name in sorted(sizes):
        number, _, kind = name.partition(".")
        if kind != "json" or not number.isdecimal() or int(number) >= len(plan.parts):
            continue
        try:
            counts = from_json(Counts, json.loads(store.read(name)), f"{store}/{name}")
            if counts.xxh3.keys() != set(CHECKED):
                raise ShardError(f"xxh3 of {sorted(counts.xxh3)}")
            if counts.plan != digest:
                raise ShardError("it is of a build with other inputs or options")
            for kind, size in (("tokens", counts.tokens * width), ("documents", counts.documents * ROW.itemsize)):
                is_now = sizes.get(file := f"{number}.{kind}")
                if is_now != size:
                    state = "is not there" if is_now is None else f"has {is_now:,} bytes"
                    raise ShardError(f"{file} {state}, expected {size:,}")
        except ValueError as error:
            log.warning("%s/%s is not what this build wrote, its part counts as missing: %s", store, name, error)
            continue
        stop, skip = (plan.choices.on_error == choice for choice in ("stop", "skip"))
        if not ((stop and counts.skipped) or ((stop or skip) and counts.left_out)):
            found[int(number)] = counts
    return found


def sweep(store: Store, parts: range) -> None:
    """Removes what killed workers were writing of `parts`. For who holds their lock."""
    for draft in store.drafts():
        number, _, _ = draft.name.partition(".")
        if number.isdecimal() and int(number) in parts:
            draft.unlink(missing_ok=True)


def rows_of(store: Store, part: int, counts: Counts) -> Iterator[np.ndarray]:
    """The part's ROWs, some at a time. Raises DamagedError if they are not those that were written."""
    with contextlib.closing(Checked(store, part, "documents", counts)) as stream:
        for block in stream.blocks(ROW.itemsize * counts.documents, ROW.itemsize << 15):
            yield np.frombuffer(block, ROW)
        stream.require_end()


class DamagedError(ShardError):
    """A file of a part is not what was written; the part counts as missing from now on."""


class Checked:
    """One of a part's files, read from its beginning to its end and held against its checksum."""

    def __init__(self, store: Store, part: int, kind: str, counts: Counts) -> None:
        self._store, self._name = store, f"{part:06d}.{kind}"
        self._expected, self._hash = counts.xxh3[kind], xxhash.xxh3_128()
        self._stream = store.open(self._name)

    def blocks(self, size: int, at_once: int = BUFFER_BYTES) -> Iterator[bytes]:
        """The next `size` bytes. Raises DamagedError if there are fewer."""
        while size:
            block = self._stream.read(wanted := min(size, at_once))
            if len(block) < wanted:
                raise self._damaged("ends early")
            self._hash.update(block)
            size -= len(block)
            yield block

    def require_end(self) -> None:
        """Raises DamagedError where there is more, or what was read is not what was written."""
        if self._stream.read(1):
            raise self._damaged("goes on after its last document")
        if self._hash.hexdigest() != self._expected:
            raise self._damaged("has another checksum")

    def close(self) -> None:
        self._stream.close()

    def _damaged(self, how: str) -> DamagedError:
        self._store.remove(f"{self._name.partition('.')[0]}.json")  # and with it the part
        return DamagedError(f"{self._name} {how}")
