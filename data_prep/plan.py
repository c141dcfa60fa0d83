"""What a build is to do, written down before it starts: every process, machine and later start must mean the same.

The inputs are cut into units (whole files, or ranges of large ones), and consecutive units of together about
`unit_bytes` make a part, which one worker does. Parts, and so the dataset, follow from the plan alone.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import platform
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import xxhash

import mamba_pretrain
from data_prep.corpus import ON_ERROR, Corpus
from data_prep.records import Reading, Unit
from data_prep.store import DRAFT, Store, store_at
from data_prep.streams import modified_ns
from mamba_pretrain.data.manifest import SourceInfo, SplitRule, TokenizerInfo, from_json
from mamba_pretrain.data.shards import ShardError
from mamba_pretrain.data.tokenizer import Tokenizer, TokenizerError, load_tokenizer
from mamba_pretrain.data.writer import token_dtype

log = logging.getLogger("mamba_pretrain")

PLAN: Final = "plan.json"
PLAN_LOCK: Final = "plan.lock"
OWN_NAME: Final = re.compile(rf"{re.escape(PLAN)}|\w[\w-]*\.lock|(tokenizer\w*|\d{{6}})\.\w+|.+{re.escape(DRAFT)}.+")
MIN_UNIT_BYTES: Final = 2 << 20  # so that the processes end together; a part costs a millisecond
MAX_UNITS: Final = 1000  # small files in a part
MAX_PARTS: Final = 4096  # about so many, whatever the corpus: a few thousand files are no burden to a file system


@dataclass(frozen=True)
class Choices:
    """What a later start may change, and a task only so far as all tasks may then differ: see `agree`."""

    on_error: str
    drop_duplicates: bool
    command: list[str]


@dataclass(frozen=True)
class Plan:
    inputs: list[SourceInfo]
    reading: Reading
    split_rule: SplitRule
    adds_bos: bool
    min_bytes: int
    max_bytes: int
    tokenizer: TokenizerInfo
    unit_bytes: int
    units: list[Unit]
    parts: list[int]  # the first unit of each
    versions: dict[str, str]
    choices: Choices
    modified: list[int]  # of each input, as streams.modified_ns
    version: int = 5

    @classmethod
    def make(
        cls,
        corpus: Corpus,
        tokenizer: Tokenizer,
        *,
        rule: SplitRule,
        add_bos: bool = True,
        min_bytes: int = 0,
        max_bytes: int = 0,
        drop_duplicates: bool = False,
        unit_bytes: int | None = None,
        command: Sequence[str] = (),
    ) -> Plan:
        """Bounds are of a document's UTF-8 text, 0 none; `command` is for the manifest."""
        if min_bytes < 0 or max_bytes < 0 or (max_bytes and max_bytes < min_bytes):
            raise ShardError(f"bounds of {min_bytes} to {max_bytes} bytes a document: no document is within them")
        if unit_bytes is not None and unit_bytes < 1:
            raise ShardError(f"units of {unit_bytes} bytes: expected 1 or more")
        token_dtype(tokenizer.vocab_size)  # or an error, now rather than in each worker
        inputs = corpus.sources()
        unit_bytes = unit_bytes or max(MIN_UNIT_BYTES, -(-sum(source.bytes for source in inputs) // MAX_PARTS))
        units = corpus.units(unit_bytes)
        return cls(
            inputs=inputs,
            reading=corpus.reading,
            split_rule=rule,
            adds_bos=add_bos,
            min_bytes=min_bytes,
            max_bytes=max_bytes,
            tokenizer=tokenizer.info,
            unit_bytes=unit_bytes,
            units=units,
            parts=_parts([unit.bytes for unit in units], unit_bytes),
            versions=versions(),
            choices=Choices(corpus.on_error, drop_duplicates, list(command)),
            modified=[modified_ns(source.path) for source in inputs],
        )

    @classmethod
    def read(cls, store: Store) -> Plan:
        where = f"{store}/{PLAN}"
        try:
            fields = json.loads(store.read(PLAN))
        except FileNotFoundError as error:
            message = f"{where} does not exist: no build was started with this output, or it has ended"
            raise ShardError(message) from error
        except ValueError as error:
            raise ShardError(f"{where} is damaged ({error}): remove {store} and build again") from error
        if not isinstance(fields, dict) or fields.get("version") != cls.version:
            raise ShardError(f"{where} is of another version of this program: finish with that one, or remove {store}")
        plan = from_json(cls, fields, where)
        assert isinstance(plan, Plan)
        return plan

    @cached_property
    def digest(self) -> str:
        """Of all that a part depends on: the same for plans whose parts are the same."""
        fields = _fields(self)
        del fields["choices"], fields["modified"]
        return xxhash.xxh3_128_hexdigest(json.dumps(fields, default=_fields).encode())

    def units_of(self, part: int) -> range:
        return range(self.parts[part], self.parts[part + 1] if part + 1 < len(self.parts) else len(self.units))

    def bytes_of(self, part: int) -> int:
        return sum(self.units[u].bytes for u in self.units_of(part))

    def name_of(self, part: int) -> str:
        units = self.units_of(part)
        more = f" and {len(units) - 1} more" if len(units) > 1 else ""
        return f"part {part} ({name_of(self.units[units[0]])}{more})"


def _parts(sizes: Sequence[int], unit_bytes: int) -> list[int]:
    firsts, held = list[int](), 0
    for i, size in enumerate(sizes):
        if not firsts or held + size > unit_bytes or i - firsts[-1] == MAX_UNITS:
            firsts.append(i)
            held = 0
        held += size
    return firsts


def name_of(unit: Unit) -> str:
    if not unit.start and unit.stop is None:
        return unit.source
    return f"{unit.source} [{unit.start:,} to {'the end' if unit.stop is None else f'{unit.stop:,}'}]"


def versions() -> dict[str, str]:
    """Of what a dataset is made with, for its manifest."""
    libraries = {name: importlib.metadata.version(name) for name in ("numpy", "sentencepiece", "tokenizers")}
    return {"mamba_pretrain": mamba_pretrain.__version__, "python": platform.python_version(), **libraries}


def work_of(output: str | Path) -> Store:
    """Where the parts of `output` are until they are merged."""
    return store_at(f"{str(output).rstrip('/')}.work")


def has_parts(store: Store) -> bool:
    return any(name.endswith(".json") and name.partition(".")[0].isdecimal() for name in store.names())


def agree(store: Store, plan: Plan, tokenizer: Tokenizer, *, alone: bool) -> None:
    """Writes the plan, or finds the same one there. Raises ShardError that names what differs.

    `alone`: nobody else works in the store, so that a plan of which no part was finished may be replaced, and choices
    are this start's. Of tasks, which may start in any order, the most forgiving `on_error` stands, and all must want
    duplicates dropped or none.
    """
    with store.lock(PLAN_LOCK, wait=True):
        names = store.names()
        if PLAN not in names or (alone and not has_parts(store)):
            # What is there is of a build that ended before it began, or while it cleaned up; or it is not ours.
            if foreign := sorted(name for name in names if not OWN_NAME.fullmatch(name)):
                raise ShardError(
                    f"{store} holds {', '.join(foreign[:5])}, which no build made: move that away, or choose another "
                    "output"
                )
            store.remove(PLAN)
            for name in names:
                if not name.endswith(".lock"):
                    store.remove(name)
            with tempfile.TemporaryDirectory() as scratch:
                tokenizer.save(Path(scratch))
                for path in sorted(Path(scratch).iterdir()):
                    store.write(path.name, path.read_bytes())
            store.write(PLAN, _to_json(plan))
            return
        before = Plan.read(store)
        if differences := _differences(before, plan):
            raise ShardError(
                f"{store} holds the parts of another build with this output: {'; '.join(differences)}. Finish that one "
                "with the same inputs and options, or remove the directory"
            )
        warn_of_changes(store, before)
        choices = plan.choices if alone else _common(store, before.choices, plan.choices)
        if before.choices != choices:
            store.write(PLAN, _to_json(dataclasses.replace(before, choices=choices)))


def _common(store: Store, before: Choices, now: Choices) -> Choices:
    if before.drop_duplicates != now.drop_duplicates:
        was, is_now = ("with" if choices.drop_duplicates else "without" for choices in (before, now))
        raise ShardError(
            f"{store} was begun {was} --drop-duplicates, this task is {is_now}: start all tasks alike. To change it, "
            f"start build_shards without --task, which takes the parts that are there, or remove {store} and begin anew"
        )
    return max(before, now, key=lambda choices: ON_ERROR.index(choices.on_error))


def warn_of_changes(store: Store, plan: Plan) -> None:
    """Names inputs that may not be what finished parts were made of, though their sizes are the same."""
    known = ((source.path, was) for source, was in zip(plan.inputs, plan.modified, strict=True) if was)
    changed = [path for path, was in known if modified_ns(path) not in (0, was)]
    if changed:
        log.warning(
            "inputs have another time of modification than when %s was begun: %s. If their text changed, remove that "
            "directory and begin anew: finished parts hold the text of before",
            store,
            ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else ""),
        )


def planned_tokenizer(store: Store, plan: Plan) -> Tokenizer:
    """The plan's tokenizer, from the copy beside it."""
    with tempfile.TemporaryDirectory() as scratch:
        for name in store.names():
            if name.startswith("tokenizer"):
                (Path(scratch) / name).write_bytes(store.read(name))
        try:
            tokenizer = load_tokenizer(scratch)
        except TokenizerError as error:
            raise ShardError(f"the copy of the tokenizer in {store} is damaged: remove {store}, build again") from error
    if tokenizer.sha256 != plan.tokenizer.sha256:
        raise ShardError(f"{store}/{tokenizer.file} changed since the build began: remove {store} and build again")
    return tokenizer


def _to_json(plan: Plan) -> bytes:
    return (json.dumps(plan, default=_fields) + "\n").encode()


def _fields(record: Any) -> dict[str, Any]:
    """As json wants it, one record at a time: `asdict` makes all of them at once, of as many as there are inputs."""
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


def _differences(before: Plan, now: Plan) -> list[str]:
    differences = []
    old, new = ({source.path: source.bytes for source in plan.inputs} for plan in (before, now))
    for path in list(dict.fromkeys([*old, *new])):
        if old.get(path) != new.get(path):
            was, is_now = (f"{sizes[path]:,} bytes" if path in sizes else "not there" for sizes in (old, new))
            differences.append(f"{path} was {was}, is {is_now}")
    if not differences and list(old) != list(new):
        differences.append("the inputs come in another order")
    if len(differences) > 3:
        differences[3:] = [f"and {len(differences) - 3} other inputs"]
    for name in (one.name for one in dataclasses.fields(Plan)):
        was, is_now = getattr(before, name), getattr(now, name)
        if was != is_now and name not in ("inputs", "units", "parts", "choices", "modified"):
            differences.append(f"{name} was {_short(was)}, is {_short(is_now)}")
    if not differences and (before.units, before.parts) != (now.units, now.parts):
        differences.append("the inputs are cut into other units")
    return differences


def _short(value: object) -> str:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    return repr(value)
