"""A dataset on disk: one directory with a manifest, the tokenizer and a shard for each split.

manifest.json                       what it was made of, and the sha256 of every file
tokenizer.model | .json | .bytes    the tokenizer that made it
{train,validation,test}.bin, .idx   the shards
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from mamba_pretrain.data.manifest import Manifest
from mamba_pretrain.data.packs import packs_beside
from mamba_pretrain.data.scan import Marks, Progress, Scan, read_once, scan, undecodable
from mamba_pretrain.data.shards import Shard, ShardError
from mamba_pretrain.data.tokenizer import TokenizerError, dataset_tokenizer

log = logging.getLogger("mamba_pretrain")

Check = Callable[[], list[str]]


def open_split(directory: str | Path, split: str, *, tokenizer_sha256: str | None = None) -> tuple[Shard, Manifest]:
    """The split's tokens and the dataset's manifest, checked against each other without reading the tokens.

    `tokenizer_sha256`: the tokenizer the caller's model speaks; a dataset made with another one is a ShardError.
    """
    directory = Path(directory)
    manifest = Manifest.read(directory)
    if split not in manifest.splits:
        raise ShardError(f"{directory} has no split {split!r}; it has {', '.join(manifest.splits)}")
    if tokenizer_sha256 is not None and tokenizer_sha256 != manifest.tokenizer.sha256:
        raise ShardError(
            f"{directory} was made with another tokenizer ({manifest.tokenizer.kind}, sha256 "
            f"{manifest.tokenizer.sha256[:12]}) than the one asked for (sha256 {tokenizer_sha256[:12]}): its token ids "
            "mean other text. Use that dataset's tokenizer, or build the dataset again with yours"
        )
    shard, info = Shard(directory / split), manifest.splits[split]
    for name, file in info.files.items():
        found = (directory / name).stat().st_size
        if found != file.bytes:
            raise ShardError(f"{directory / name} has {found:,} bytes, the manifest says {file.bytes:,}")
    if (shard.n_documents, shard.n_tokens, shard.dtype.name) != (info.documents, info.tokens, manifest.dtype):
        raise ShardError(
            f"{shard.path} has {shard.n_documents:,} documents, {shard.n_tokens:,} tokens of {shard.dtype.name}; the "
            f"manifest says {info.documents:,}, {info.tokens:,} of {manifest.dtype}"
        )
    return shard, manifest


def verify(
    directory: str | Path,
    splits: Sequence[str] | None = None,
    progress: Progress = lambda _: None,
    workers: int = 1,
) -> list[str]:
    """Reads everything, once, and returns every problem found; none is a sound dataset.

    `progress` is told the bytes of each block read. Raises ShardError only where there is no readable manifest.
    """
    with ThreadPoolExecutor(workers) as pool:
        return [problem for found in pool.map(run_check, checks(directory, splits, progress)) for problem in found]


def run_check(check: Check) -> list[str]:
    """Its problems; a file that the system does not let it read is one."""
    try:
        return check()
    except OSError as error:
        return [f"{error.filename or 'a file'} cannot be read: {error.strerror or error}"]


def checks(
    directory: str | Path, splits: Sequence[str] | None = None, progress: Progress = lambda _: None
) -> list[Check]:
    """What `verify` does, in parts that may run at the same time: threads do, hashlib and numpy release the lock."""
    directory = Path(directory)
    manifest = Manifest.read(directory)
    chosen = list(manifest.splits if splits is None else splits)
    missing = [f"{directory} has no split {split!r}" for split in chosen if split not in manifest.splits]
    parts: list[Check] = [lambda: missing, partial(_check_tokenizer, directory, manifest, progress)]
    return parts + [
        partial(_check_split, directory, manifest, split, progress) for split in chosen if split in manifest.splits
    ]


def _check_tokenizer(directory: Path, manifest: Manifest, progress: Progress) -> list[str]:
    path, expected = directory / manifest.tokenizer.file, manifest.tokenizer.sha256
    if not path.is_file():
        return [f"{path} is missing"]
    if (found := read_once(path, progress).sha256) != expected:
        return [
            f"{path} has sha256 {found[:12]}, the manifest says {expected[:12]}: it changed, or is another tokenizer"
        ]
    try:
        dataset_tokenizer(directory, manifest)
    except TokenizerError as error:
        return [str(error)]
    return []


def _check_split(directory: Path, manifest: Manifest, split: str, progress: Progress) -> list[str]:
    info = manifest.splits[split]
    shard: Shard | None = None
    try:
        shard, _ = open_split(directory, split)
        found = scan(shard, manifest.tokenizer, progress)
    except (ShardError, FileNotFoundError) as error:
        present = (name for name in info.files if (directory / name).is_file())
        found = Scan({name: read_once(directory / name, progress) for name in present}, [str(error)], Marks())
    problems, marks, tokenizer = list[str](), found.marks, manifest.tokenizer
    for name, expected in info.files.items():
        if name not in found.files:
            problems.append(f"{directory / name} is missing")
        elif (sha256 := found.files[name].sha256) != expected.sha256:
            problems.append(
                f"{directory / name} has sha256 {sha256[:12]}, the manifest says {expected.sha256[:12]}: it changed"
            )
    problems += found.problems
    try:
        for pack in packs_beside(directory, split, info.files[f"{split}.idx"].sha256):
            problems += pack.problems()
    except ShardError as error:
        problems.append(str(error))
    for promised, count, first, what in (
        (manifest.adds_bos, marks.with_bos, marks.first_without_bos, f"begin with the bos, id {tokenizer.bos_id}"),
        (manifest.adds_eod, marks.with_eod, marks.first_without_eod, f"end with the eod, id {tokenizer.eod_id}"),
    ):
        if promised and count < marks.documents:
            problems.append(
                f"{directory / split}: {marks.documents - count:,} documents do not {what}, as the manifest says all "
                f"do; the first is document {first:,}"
            )
    if shard is None or problems:  # else how documents decode adds noise
        return problems
    try:
        no_text = list(undecodable(shard, dataset_tokenizer(directory, manifest)))
        return no_text if len(no_text) > info.not_round_trip else []  # so many may be no text any more
    except TokenizerError:  # _check_tokenizer names it
        return []


def verify_up_to(directory: str | Path, splits: Sequence[str], gib: float) -> None:
    """Verifies each split of at most `gib` GiB, and warns about a larger one. Raises ShardError for a damaged one."""
    manifest = Manifest.read(directory)
    for split in splits:
        size = sum(file.bytes for file in manifest.splits[split].files.values()) / 2**30
        if size > gib:
            how = "run python -m data_prep.verify_shards once"
            log.warning("%s: %.1f GiB, more than %g, are not hashed; %s", split, size, gib, how)
        elif problems := verify(directory, [split]):
            raise ShardError(f"{directory} is damaged:\n" + "\n".join(f"- {p}" for p in problems))
