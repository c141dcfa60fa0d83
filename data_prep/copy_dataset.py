"""A dataset directory from any fsspec URL to local disk: training maps its shards into memory."""

from __future__ import annotations

import hashlib
import os
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from data_prep.registries import FetchError
from data_prep.streams import filesystem, has_ranges, open_raw
from data_prep.workspace import reveal, sweep, workspace
from mamba_pretrain.data.manifest import MANIFEST, Manifest
from mamba_pretrain.data.tokenizer import SETTINGS, HuggingFaceTokenizer, TokenizerError, dataset_tokenizer
from mamba_pretrain.files import BLOCK_BYTES, sha256_of, sync

REQUESTS: Final = 8  # at a time: object stores give one request a fraction of the line. 128 MB of blocks are in flight


def copy_dataset(url: str, output: Path) -> Manifest:
    """Copies what the manifest at `url` names to the directory `output`, which appears when every hash is right.

    A file that is not whole goes on where it broke off, if the server gives parts of files. An `output` that is the
    same dataset is left as it is: by manifest, tokenizer and the sizes of the files (verify_shards reads them).
    Raises FetchError.
    """
    remote, root = filesystem(url.rstrip("/"))
    raw = _read(remote, f"{root}/{MANIFEST}", url)
    if output.exists():
        if (output / MANIFEST).is_file() and (output / MANIFEST).read_bytes() == raw:
            manifest = Manifest.read(output)
            for name, size in {n: f.bytes for s in manifest.splits.values() for n, f in s.files.items()}.items():
                if not (output / name).is_file() or (output / name).stat().st_size != size:
                    raise FetchError(
                        f"{output} is there, but {name} is missing or not of {size:,} bytes: remove {output}"
                    )
            kept = output / manifest.tokenizer.file
            if not kept.is_file() or sha256_of(kept) != manifest.tokenizer.sha256:
                raise FetchError(f"{output} is there, but {kept.name} is missing or another: remove {output}")
            sweep(output)
            print(f"{output}: was complete already")
            return manifest
        raise FetchError(f"{output} exists and is not the dataset at {url}: choose another directory")
    with workspace(output, FetchError) as part:
        result = part / "result"
        result.mkdir(exist_ok=True)
        if (result / MANIFEST).is_file() and (result / MANIFEST).read_bytes() != raw:
            print(f"warning: the dataset at {url} changed since the copy began: it begins anew", file=sys.stderr)
            for path in result.iterdir():
                path.unlink()
        (result / MANIFEST).write_bytes(raw)
        manifest = Manifest.read(result)
        for name, sha256 in _files(manifest, url).items():
            if not (result / name).is_file():
                _copy(remote, f"{root}/{name}", result / name, sha256, f"{url.rstrip('/')}/{name}")
        _copy_settings(remote, root, url, result, manifest)
        reveal(result, output)
    print(f"{output}: complete, every file had its sha256 as it came")
    return manifest


def _copy_settings(remote: Any, root: str, url: str, result: Path, manifest: Manifest) -> None:
    """What names a tokenizer.json's special tokens: the manifest has no hash of it, but the ids that come of it."""
    if manifest.tokenizer.file == HuggingFaceTokenizer.file:
        found = _reported(remote.exists, f"{url}/{SETTINGS}", f"{root}/{SETTINGS}")
        if found:  # else the tokenizer itself has to tell enough
            content = _reported(remote.cat_file, f"{url}/{SETTINGS}", f"{root}/{SETTINGS}")
            (result / SETTINGS).write_bytes(content)
    try:
        dataset_tokenizer(result, manifest)
    except TokenizerError as error:
        raise FetchError(f"the tokenizer at {url} is not what its manifest says: {error}") from error


def _files(manifest: Manifest, url: str) -> dict[str, str]:
    files = {name: file.sha256 for split in manifest.splits.values() for name, file in split.files.items()}
    files[manifest.tokenizer.file] = manifest.tokenizer.sha256
    for name in files:
        if name != os.path.basename(name) or name in ("", ".", "..", MANIFEST):
            raise FetchError(f"the manifest at {url} names the file {name!r}, which is not one of its directory")
    return files


def _copy(remote: Any, source: str, path: Path, sha256: str, url: str) -> None:
    begun = path.with_name(path.name + ".begun")
    size, in_parts = _reported(remote.size, source, source), _reported(has_ranges, url, url)
    if not in_parts:  # from the beginning, then, and by one request
        begun.unlink(missing_ok=True)
    done = begun.stat().st_size if begun.exists() else 0
    digest = hashlib.sha256()
    with tqdm(total=size, unit="B", unit_scale=True, disable=None, desc=path.name) as bar, begun.open("ab+") as stream:
        stream.seek(0)
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
        bar.update(done)
        for block in _blocks(remote, source, done, size) if in_parts else _stream(url):
            digest.update(block)
            stream.write(block)
            bar.update(len(block))
    if digest.hexdigest() != sha256:
        begun.unlink()
        raise FetchError(
            f"{source} has sha256 {digest.hexdigest()[:12]}, its manifest says {sha256[:12]}: it changed after the "
            "manifest was written, or the copy was damaged on the way. Run the command again; if that gives the same, "
            "the dataset at the source is damaged"
        )
    sync(begun)  # before it has the name by which a later run takes it for whole
    begun.rename(path)


def _stream(url: str) -> Iterator[bytes]:
    """The bytes of a file whose server gives it from the beginning only."""
    with _reported(partial(open_raw, seekable=False), url, url) as stream:
        while block := _reported(stream.read, url, BLOCK_BYTES):
            yield block


def _blocks(remote: Any, source: str, first: int, size: int) -> Iterator[bytes]:
    """The bytes from `first` on, in order, with several requests under way and no more blocks than these in memory."""
    starts = iter(range(first, size, BLOCK_BYTES))
    with ThreadPoolExecutor(REQUESTS) as pool:
        ahead: deque[Future[bytes]] = deque()
        try:
            while True:
                while len(ahead) < REQUESTS and (start := next(starts, None)) is not None:
                    stop = min(start + BLOCK_BYTES, size)
                    ahead.append(pool.submit(remote.cat_file, source, start=start, end=stop))
                if not ahead:
                    return
                yield _reported(ahead.popleft().result, source)
        finally:
            pool.shutdown(cancel_futures=True)


def _read(remote: Any, path: str, url: str) -> bytes:
    try:
        return bytes(remote.cat_file(path))
    except FileNotFoundError as error:
        raise FetchError(f"there is no dataset at {url}: it would hold a {MANIFEST}") from error
    except Exception as error:  # each file system has its own
        raise FetchError(f"{url} cannot be read: {error!r}") from error


def _reported(call: Any, source: str, *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except Exception as error:  # each file system has its own
        raise FetchError(
            f"{source} cannot be read: {error!r}. What is here so far is kept; run the command again to go on"
        ) from error
