"""Documents out of tables: .parquet by row groups, .arrow, datasets on disk by rows, datasets by name by shards."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import Any, Final

from data_prep.readers import string, text_field
from data_prep.records import Invalid, Reading, Record, Unit
from data_prep.streams import HUB, CorpusError, UnreadableError, is_url, open_raw, optional

BATCH: Final = 256  # rows that are Python strings at a time
NAMED: Final = re.compile(r"(?P<name>[^:@#]+)(:(?P<config>[^@#]+))?(@(?P<split>[^#]+))?(#(?P<revision>.+))?")


def read_parquet(unit: Unit, reading: Reading) -> Iterator[Record]:
    source, key, row = unit.source, reading.text_key, [0]
    with _damage(source, row, "file"), _parquet_file(source) as file:
        groups = range(file.metadata.num_row_groups)[unit.start : unit.stop]
        row[0] = sum(file.metadata.row_group(group).num_rows for group in range(unit.start))
        _require_column(key, file.schema_arrow.names, source)
        for batch in file.iter_batches(batch_size=BATCH, row_groups=list(groups), columns=[key]):
            yield from _column(batch.column(0), row, source, key)


def row_groups(whole: Unit, unit_bytes: int) -> list[Unit]:
    """Units of as many row groups as make `unit_bytes`."""
    with _damage(whole.source, [0], "file"), _parquet_file(whole.source) as file:
        sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups)]
    scale = whole.bytes / max(sum(sizes), 1)  # sizes are those before compression
    units, start, size = [], 0, 0.0
    for stop, group_bytes in enumerate(sizes, start=1):
        size += group_bytes * scale
        if size >= unit_bytes or stop == len(sizes):
            units.append(replace(whole, start=start, stop=stop, bytes=round(size)))
            start, size = stop, 0.0
    return units or [whole]


@contextmanager
def _parquet_file(source: str) -> Iterator[Any]:
    parquet = optional("pyarrow.parquet", source)
    with open_raw(source) if is_url(source) else nullcontext(source) as place, parquet.ParquetFile(place) as file:
        yield file


def read_arrow(unit: Unit, reading: Reading) -> Iterator[Record]:
    """Arrow's file and stream formats, such as `datasets` keeps in its cache."""
    source, key, row = unit.source, reading.text_key, [0]
    ipc = optional("pyarrow.ipc", source)
    with _damage(source, row, "file"), open_raw(source) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        table = (ipc.open_file if is_file else ipc.open_stream)(file)
        _require_column(key, table.schema.names, source)
        for batch in (table.get_batch(i) for i in range(table.num_record_batches)) if is_file else table:
            column = batch.column(table.schema.names.index(key))
            for start in range(0, len(column), BATCH):
                yield from _column(column.slice(start, BATCH), row, source, key)


def read_dataset(unit: Unit, reading: Reading) -> Iterator[Record]:
    """A dataset on disk, the splits of a DatasetDict one after the other."""
    source, key, row = unit.source, reading.text_key, [0]
    with _damage(source, row, "dataset"):
        before = 0
        for name, part in _parts(source):
            _require_column(key, part.column_names, source)
            start = max(unit.start - before, 0)
            stop = len(part) if unit.stop is None else min(unit.stop - before, len(part))
            before += len(part)
            if start >= stop:
                continue
            row[0] = start
            chosen = part.select_columns([key]).select(range(start, stop)).with_format("arrow")
            for table in chosen.iter(BATCH):
                yield from _column(table.column(0), row, f"{source}/{name}" if name else source, key)


def rows(whole: Unit, unit_bytes: int) -> list[Unit]:
    """Units of as many rows as make `unit_bytes` on average."""
    with _damage(whole.source, [0], "dataset"):
        n_rows = sum(len(part) for _, part in _parts(whole.source))
    step = max(n_rows * unit_bytes // max(whole.bytes, 1), 1)
    bounds = [(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]
    return [replace(whole, start=a, stop=b, bytes=whole.bytes * (b - a) // n_rows) for a, b in bounds] or [whole]


def _parts(source: str) -> list[tuple[str, Any]]:
    loaded = optional("datasets", source).load_from_disk(source)
    return sorted(loaded.items()) if isinstance(loaded, dict) else [("", loaded)]


def read_named(unit: Unit, reading: Reading) -> Iterator[Record]:
    """A dataset by name, as it streams in: hf://NAME[:CONFIG][@SPLIT][#REVISION], or of a directory for NAME."""
    source, key, row = unit.source, reading.text_key, [0]
    streamed = _named(source)
    if streamed.column_names is not None:
        _require_column(key, streamed.column_names, source)
        streamed = streamed.select_columns([key])
    if unit.stop is not None:
        streamed = streamed.shard(num_shards=streamed.num_shards, index=unit.start)
        source = f"{source} shard {unit.start}"
    with _damage(source, row, "dataset"):
        for row[0], fields in enumerate(streamed, start=1):
            yield text_field(fields, key, source, row[0])


def shards(whole: Unit, _: int) -> list[Unit]:
    """The shards, mostly files, that the dataset consists of."""
    streamed = _named(whole.source)
    n_bytes = (streamed.info.dataset_size or 0) // streamed.num_shards
    return [replace(whole, start=i, stop=i + 1, bytes=n_bytes) for i in range(streamed.num_shards)]


@lru_cache(maxsize=8)  # to find a dataset's files may take minutes, and each of them is a unit
def _named(source: str) -> Any:
    datasets = optional("datasets", source)
    parts = NAMED.fullmatch(source.removeprefix(HUB))
    if parts is None:
        raise CorpusError(f"{source}: expected {HUB}NAME[:CONFIG][@SPLIT][#REVISION]")
    name, config, split, revision = parts["name"], parts["config"], parts["split"] or "train", parts["revision"]
    try:
        return datasets.load_dataset(name, config, split=split, revision=revision, streaming=True)
    except Exception as error:  # of any package it uses
        raise UnreadableError(f"{source}: datasets.load_dataset cannot load it: {error}") from error


def _column(values: Any, row: list[int], source: str, key: str) -> Iterator[Record]:
    try:
        texts = values.to_pylist()
    except UnicodeDecodeError:
        texts = list(map(_text_or_error, values))
    for text in texts:
        row[0] += 1
        if isinstance(text, UnicodeDecodeError):
            yield Invalid(f"byte {text.object[text.start]:#04x} is not UTF-8", source, row[0])
        else:
            yield string(text, key, source, row[0])


def _text_or_error(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error


def _require_column(key: str, names: list[str], source: str) -> None:
    if key not in names:
        raise UnreadableError(f"{source} has no column {key!r} (--text-key), only {names}")


@contextmanager
def _damage(source: str, row: list[int], what: str) -> Iterator[None]:
    """Whatever pyarrow, datasets and what they use raise over a damaged input, as one error. row[0] is the last row."""
    try:
        yield
    except CorpusError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # the system's, not pyarrow's
            raise
        reason = f"{source} is damaged after row {row[0]} ({error!r}); get the {what} again"
        raise UnreadableError(reason) from error
