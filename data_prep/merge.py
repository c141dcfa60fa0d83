"""Parts into a dataset: the shards of its splits in the plan's order, the tokenizer, and the manifest last."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from data_prep.duplicates import find_duplicates
from data_prep.parts import Checked, Counts, DamagedError, rows_of
from data_prep.plan import PLAN, Plan, planned_tokenizer, work_of
from data_prep.store import RemoteStore, Store
from data_prep.streams import CorpusError, as_os_errors, is_url
from mamba_pretrain.data.manifest import MANIFEST, Manifest, Selection, SplitInfo
from mamba_pretrain.data.shards import ShardError
from mamba_pretrain.data.tokenizer import Tokenizer
from mamba_pretrain.data.writer import ShardWriter, token_dtype
from mamba_pretrain.files import atomic_directory, require_replaceable

SHOWN: Final = 10  # damaged parts that a message lists


class UselessError(CorpusError):
    """The parts are whole, and what they make is no dataset."""


def require_room(output: str | Path, overwrite: bool) -> None:
    """Raises ShardError where the output exists and may not be replaced: before the work, not after it."""
    if not is_url(str(output)):
        try:
            require_replaceable(Path(output), error=ShardError, overwrite=overwrite)
        except ShardError as error:
            if overwrite or PLAN not in (work := work_of(output)).names():
                raise
            message = f"{error}. {work} holds parts of a build of it: if that was killed at its very end, remove them"
            raise ShardError(message) from None
    elif MANIFEST in RemoteStore(str(output)).names() and not overwrite:
        raise ShardError(f"{output} exists; choose another output, or pass --overwrite to replace it")


def merge(
    output: str | Path,
    store: Store,
    plan: Plan,
    parts: dict[int, Counts],
    *,
    overwrite: bool = False,
    progress: Callable[[int], object] = lambda _: None,
) -> Manifest:
    """Writes the dataset and returns its manifest; `progress` is told the bytes copied. The parts stay.

    Memory does not grow with the corpus. Raises ShardError, CorpusError; then an output that was there is untouched (a
    remote one that was to be overwritten has lost its manifest, and does not open).
    """
    parts, damaged = dict(sorted(parts.items())), list[str]()
    tokenizer = planned_tokenizer(store, plan)
    with _target(output, overwrite, plan, parts) as target:
        with tempfile.TemporaryDirectory(dir=target.scratch) as temporary:
            duplicates, flags = find_duplicates(
                (
                    rows["hash"]
                    for part, counts in parts.items()
                    for rows in _whole(rows_of(store, part, counts), damaged)
                ),
                sum(counts.documents for counts in parts.values()),
                Path(temporary),
            )
            _require_none(damaged, store)
            with contextlib.ExitStack() as stack:
                splits = [
                    _Split(name, stack.enter_context(target.writer(name, tokenizer))) for name in plan.split_rule.splits
                ]
                for begin, (part, counts) in zip(_begins(parts), parts.items(), strict=True):
                    repeats = np.fromfile(flags, np.uint8, counts.documents, offset=begin)
                    try:
                        _copy(store, plan, part, counts, splits, repeats, progress)
                    except DamagedError as error:  # go on, to name all of them at once
                        damaged.append(str(error))
                _require_none(damaged, store)
                _require_training_data(plan, parts, {split.name: split.writer.n_documents for split in splits})
        manifest = Manifest(
            tokenizer=plan.tokenizer,
            dtype=splits[0].writer.dtype.name,
            adds_bos=plan.adds_bos,
            splits={
                split.name: SplitInfo(
                    split.writer.n_documents,
                    split.writer.n_tokens,
                    split.text_bytes,
                    split.words,
                    split.writer.files,
                    split.lossy,
                )
                for split in splits
            },
            split_rule=plan.split_rule,
            sources=plan.inputs,
            skipped_records=sum(counts.skipped for counts in parts.values()),
            empty_documents=sum(counts.empty for counts in parts.values()),
            command=plan.choices.command,
            versions=plan.versions,
            selection=Selection(
                normalization=plan.reading.normalization,
                min_bytes=plan.min_bytes,
                max_bytes=plan.max_bytes,
                too_short=sum(counts.too_short for counts in parts.values()),
                too_long=sum(counts.too_long for counts in parts.values()),
                duplicates=duplicates,
                duplicates_dropped=plan.choices.drop_duplicates,
                left_out=[reason for counts in parts.values() for reason in counts.left_out],
            ),
        )
        target.publish(tokenizer, manifest)
    return manifest


def _whole(rows: Iterator[NDArray[np.void]], damaged: list[str]) -> Iterator[NDArray[np.void]]:
    """The rows of a part; what is wrong with it goes to `damaged`."""
    try:
        yield from rows
    except DamagedError as error:
        damaged.append(str(error))


def _require_none(damaged: Sequence[str], store: Store) -> None:
    if damaged:
        raise ShardError(
            f"{len(damaged)} parts in {store} are not what was written, and count as missing from now on: "
            f"{'; '.join(damaged[:SHOWN])}{'; ...' if len(damaged) > SHOWN else ''}. Start build_shards again as "
            "before, which makes them anew (of several tasks those that merge_shards then names)"
        )


def _begins(parts: dict[int, Counts]) -> Iterator[int]:
    """The number of each part's first document."""
    yield from accumulate((counts.documents for counts in list(parts.values())[:-1]), initial=0)


def _copy(
    store: Store,
    plan: Plan,
    part: int,
    counts: Counts,
    splits: list[_Split],
    repeats: NDArray[np.uint8],
    progress: Callable[[int], object],
) -> None:
    """Every document of the part that is taken, in order, to its split."""
    itemsize = splits[0].writer.dtype.itemsize
    with contextlib.closing(Checked(store, part, "tokens", counts)) as tokens:
        for rows in rows_of(store, part, counts):
            here, repeats = np.split(repeats, [rows.size])
            taken = here == 0 if plan.choices.drop_duplicates else np.ones(rows.size, np.bool_)
            kind = 2 * rows["split"].astype(np.int64) + taken
            for run in np.split(np.arange(rows.size), np.flatnonzero(np.diff(kind)) + 1):
                begin, end = int(run[0]), int(run[-1]) + 1
                size = int(rows["tokens"][begin:end].sum(dtype=np.int64)) * itemsize
                if taken[begin]:
                    splits[rows["split"][begin]].add(rows[begin:end], tokens.blocks(size))
                else:
                    for _ in tokens.blocks(size):  # for its checksum
                        pass
                progress(size)
        tokens.require_end()


@dataclass
class _Split:
    name: str
    writer: ShardWriter
    text_bytes: int = 0
    words: int = 0
    lossy: int = 0

    def add(self, rows: NDArray[np.void], blocks: Iterator[bytes]) -> None:
        self.writer.extend(rows["tokens"], blocks)
        self.text_bytes += int(rows["text_bytes"].sum())
        self.words += int(rows["words"].sum())
        self.lossy += int(rows["lossy"].sum(dtype=np.int64))


@dataclass
class _Target:
    """Where the result goes: a new directory on this machine, or a store."""

    scratch: Path
    store: RemoteStore | None = None
    size: int = 0  # of the largest file, or more

    def writer(self, split: str, tokenizer: Tokenizer) -> ShardWriter:
        create = partial(self.store.create, size=self.size) if self.store else None
        return ShardWriter(self.scratch / split, vocab_size=tokenizer.vocab_size, create=create)

    def publish(self, tokenizer: Tokenizer, manifest: Manifest) -> None:
        tokenizer.save(self.scratch)
        manifest.write(self.scratch)
        if self.store:
            for path in sorted(self.scratch.iterdir(), key=lambda path: path.name == MANIFEST):  # last
                self.store.write(path.name, path.read_bytes())


@contextlib.contextmanager
def _target(output: str | Path, overwrite: bool, plan: Plan, parts: dict[int, Counts]) -> Iterator[_Target]:
    require_room(output, overwrite)
    if not is_url(str(output)):
        with atomic_directory(Path(output), error=ShardError, overwrite=overwrite) as scratch:
            yield _Target(scratch)
        return
    store = RemoteStore(str(output))
    store.remove(MANIFEST)
    itemsize = token_dtype(plan.tokenizer.vocab_size).itemsize
    documents, tokens = (sum(getattr(counts, name) for counts in parts.values()) for name in ("documents", "tokens"))
    with tempfile.TemporaryDirectory() as scratch, as_os_errors():  # those of streams that are open, too
        yield _Target(Path(scratch), store, max(tokens * itemsize, 20 * documents))


def _require_training_data(plan: Plan, parts: dict[int, Counts], documents: dict[str, int]) -> None:
    if not any(documents.values()):
        n_empty, n_skipped, n_short, n_long, n_left_out = (
            sum(value if isinstance(value, int) else len(value) for value in values)
            for values in zip(
                *((c.empty, c.skipped, c.too_short, c.too_long, c.left_out) for c in parts.values()), strict=True
            )
        )
        raise UselessError(
            f"no documents in the input ({len(plan.inputs)} files): {n_empty} records are empty, {n_skipped} invalid, "
            f"{n_short} shorter and {n_long} longer than the bounds; {n_left_out} files could not be read"
        )
    if documents.get("train") == 0:
        raise UselessError(
            f"the train split is empty, the documents fell like this: {documents}. Use more documents (--txt-documents "
            "line or blank-line makes more of a .txt), other --split-fractions, or another --seed"
        )
