"""A dataset on disk: one directory with a manifest, the tokenizer and a shard for each split.

manifest.json                       what it was made of, and the sha256 of every file
tokenizer.model | .json | .bytes    the tokenizer that made it
{train,validation,test}.bin, .idx   the shards
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from mamba_pretrain.data.manifest import Manifest
from mamba_pretrain.data.shards import Shard, ShardError
from mamba_pretrain.files import sha256_of

log = logging.getLogger("mamba_pretrain")


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
    directory: str | Path, splits: Sequence[str] | None = None, progress: Callable[[int], object] = lambda _: None
) -> list[str]:
    """Reads everything, twice (hashes, then contents), and returns every problem found; none is a sound dataset.

    `progress` is told the bytes of each block hashed. Raises ShardError only where there is no readable manifest.
    """
    directory = Path(directory)
    manifest = Manifest.read(directory)
    chosen = list(manifest.splits if splits is None else splits)
    problems = [f"{directory} has no split {split!r}" for split in chosen if split not in manifest.splits]
    chosen = [split for split in chosen if split in manifest.splits]
    hashes = {manifest.tokenizer.file: manifest.tokenizer.sha256}
    for split in chosen:
        hashes |= {name: file.sha256 for name, file in manifest.splits[split].files.items()}
    for name, expected in hashes.items():
        if not (directory / name).is_file():
            problems.append(f"{directory / name} is missing")
        elif (found := sha256_of(directory / name, progress)) != expected:
            problems.append(
                f"{directory / name} has sha256 {found[:12]}, the manifest says {expected[:12]}: it changed"
            )
    for split in chosen:
        try:
            shard, _ = open_split(directory, split)
        except (ShardError, FileNotFoundError) as error:
            problems.append(str(error))
        else:
            problems.extend(shard.problems(manifest.tokenizer.vocab_size))
    return problems


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
