"""What a dataset is and where it came from: `manifest.json`, field for field."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from mamba_pretrain.data.shards import ShardError

SPLITS: Final = ("train", "validation", "test")
MANIFEST: Final = "manifest.json"


@dataclass(frozen=True)
class FileInfo:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SplitInfo:
    """Counts of one split. `text_bytes` is the UTF-8 text alone; it and `words` are None if only tokens were seen."""

    documents: int
    tokens: int  # with the bos and eod of each document
    text_bytes: int | None
    words: int | None  # separated by whitespace
    files: dict[str, FileInfo]
    not_round_trip: int = 0  # documents that do not decode back to their own bytes; of adopted tokens, in a sample


@dataclass(frozen=True)
class TokenizerInfo:
    kind: str
    sha256: str
    vocab_size: int
    bos_id: int
    eod_id: int
    file: str


@dataclass(frozen=True, slots=True)
class SourceInfo:
    path: str
    bytes: int


@dataclass(frozen=True)
class SplitRule:
    seed: int
    fractions: dict[str, float]
    how: str
    inputs: dict[str, str] = field(default_factory=dict)  # the split of each input that is all of one

    @property
    def splits(self) -> list[str]:
        return [split for split in SPLITS if split in self.fractions or split in self.inputs.values()]


@dataclass(frozen=True)
class Selection:
    """Which documents were taken, and how many were not. None of it is silent."""

    normalization: str = "none"  # of the text before it was tokenized: none, or one of Unicode's NFC, NFD, NFKC, NFKD
    min_bytes: int = 0  # of a document's UTF-8 text; 0: no bound
    max_bytes: int = 0
    too_short: int = 0  # documents left out by the bounds
    too_long: int = 0
    duplicates: int = 0  # documents whose text another one before them has, too
    duplicates_dropped: bool = False  # else they are in
    left_out: list[str] = field(default_factory=list)  # inputs that could not be read, each with the reason


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`, field for field. Version 1 had no `selection`, `origin` and `adds_eod`, version 2 no inputs in
    its split rule, version 3 one `not_round_trip` for all splits, which each of them has then."""

    tokenizer: TokenizerInfo
    dtype: str
    adds_bos: bool
    splits: dict[str, SplitInfo]
    split_rule: SplitRule
    sources: list[SourceInfo]
    skipped_records: int  # invalid, left out because the command was told to
    empty_documents: int  # valid, without text, left out
    command: list[str]
    versions: dict[str, str]
    selection: Selection = field(default_factory=Selection)
    origin: str = "build_shards"  # or the program whose tokens were adopted: megatron, datatrove
    adds_eod: bool = True  # whether every document ends with the eod; adopted ones may not
    format: str = "megatron-indexed-dataset"
    version: int = 4

    def fingerprint(self, split: str) -> str:
        """16 hex digits that identify what a run trains on: this split's tokens and documents, and their meaning."""
        files = self.splits[split].files
        parts = files[f"{split}.bin"].sha256, files[f"{split}.idx"].sha256, self.tokenizer.sha256
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    def write(self, directory: Path) -> None:
        (directory / MANIFEST).write_text(self.to_json())

    @classmethod
    def read(cls, directory: str | Path) -> Manifest:
        """Raises ShardError where there is no manifest, or one with unknown, missing or mistyped fields."""
        path = Path(directory) / MANIFEST
        if not path.is_file():
            reason = "the directory has none" if path.parent.is_dir() else "the directory does not exist"
            raise ShardError(f"no dataset in {path.parent}: it would hold a {MANIFEST}, and {reason}")
        try:
            fields = json.loads(path.read_bytes())
        except ValueError as error:
            raise ShardError(f"{path} is not JSON ({error}); make the dataset again") from error
        found = {name: fields.get(name) for name in ("format", "version")} if isinstance(fields, dict) else fields
        versions = range(1, cls.version + 1)
        if found not in [{"format": cls.format, "version": version} for version in versions]:
            raise ShardError(
                f"{path} is {found}; this reader knows format {cls.format!r}, versions 1 to {cls.version}: a newer "
                "version of this program may have made it"
            )
        if fields["version"] == 1:
            fields |= {"selection": dataclasses.asdict(Selection()), "origin": cls.origin, "adds_eod": True}
        if fields["version"] < 3 and isinstance(fields.get("split_rule"), dict):
            fields["split_rule"].setdefault("inputs", {})
        if fields["version"] < 4 and isinstance(fields.get("splits"), dict) and "not_round_trip" in fields:
            lossy = fields.pop("not_round_trip")
            for split in filter(lambda split: isinstance(split, dict), fields["splits"].values()):
                split["not_round_trip"] = lossy
        fields["version"] = cls.version
        manifest = from_json(cls, fields, str(path))
        assert isinstance(manifest, Manifest)
        for split, info in manifest.splits.items():
            if info.files.keys() != {f"{split}.bin", f"{split}.idx"}:
                raise ShardError(
                    f"{path}: the files of {split} are {sorted(info.files)}, expected its .bin and its .idx"
                )
        return manifest


def from_json(kind: Any, value: Any, where: str) -> Any:
    """`value` out of JSON as the annotated type `kind`: dataclasses, lists, dicts with string keys, scalars.

    Raises ShardError, with `where` in front, for unknown, missing or mistyped fields.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:  # X | None
        if value is None:
            return None
        return from_json(arguments[0], value, where)
    is_record = isinstance(kind, type) and dataclasses.is_dataclass(kind)
    expected = dict if is_record else origin or kind
    # By type(), as True is an instance of int. JSON does not tell 1.0 from 1.
    if type(value) not in ((float, int) if expected is float else (expected,)):
        raise ShardError(f"{where}: {value!r} is not a {expected.__name__}")
    if is_record:
        hints = typing.get_type_hints(kind)
        if hints.keys() != value.keys():
            unknown, missing = sorted(value.keys() - hints.keys()), sorted(hints.keys() - value.keys())
            raise ShardError(f"{where}: unknown fields {unknown}, missing {missing}: another program's, or damaged")
        return kind(**{name: from_json(hints[name], value[name], f"{where}: {name}") for name in hints})
    if origin is list:
        return [from_json(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        return {name: from_json(arguments[1], item, f"{where}.{name}") for name, item in value.items()}
    return value
