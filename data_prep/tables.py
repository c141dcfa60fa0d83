"""Documents out of tables: .parquet files by row groups, datasets on disk by rows."""

from __future__ import annotations

from collections.abc import Iterator

from data_prep.readers import string, text_field
from data_prep.records import Invalid, Reading, Record, Unit
from data_prep.streams import CorpusError, optional


def read_parquet(unit: Unit, reading: Reading) -> Iterator[Record]:
    path, key = unit.source, reading.text_key
    parquet = optional("pyarrow.parquet", path)
    arrow_error = optional("pyarrow", path).ArrowException
    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if key not in names:
                raise CorpusError(f"{path} has no column {key!r} (--text-key), only {names}")
            for batch in file.iter_batches(batch_size=1024, columns=[key]):
                for scalar in batch.column(0):
                    row += 1
                    try:
                        yield string(scalar.as_py(), key, path, row)
                    except UnicodeDecodeError as error:
                        yield Invalid(f"byte {error.object[error.start]:#04x} is not UTF-8", path, row)
    except (arrow_error, OSError) as error:
        if getattr(error, "errno", None):  # the system's, not pyarrow's
            raise
        raise CorpusError(f"{path} is damaged after row {row} ({error}); get the file again") from error


def read_dataset(unit: Unit, reading: Reading) -> Iterator[Record]:
    path, key = unit.source, reading.text_key
    datasets = optional("datasets", path)
    row = 0
    try:
        loaded = datasets.load_from_disk(path)
        parts = loaded if isinstance(loaded, dict) else {"": loaded}
        for name in sorted(parts):
            names = parts[name].column_names
            if key not in names:
                raise CorpusError(f"{path}: no column {key!r} (--text-key), only {names}")
            for row, fields in enumerate(parts[name].select_columns([key]), start=1):
                yield text_field(fields, key, f"{path}/{name}" if name else path, row)
    except (CorpusError, PermissionError):
        raise
    except Exception as error:  # of pyarrow, json, fsspec, or a bare KeyError
        raise CorpusError(f"{path} is damaged after row {row} ({error!r}); get the dataset again") from error
