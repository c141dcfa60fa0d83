"""Checks a dataset from end to end."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from data_prep.command import new_parser, run
from mamba_pretrain.data.dataset import verify
from mamba_pretrain.data.manifest import SPLITS, Manifest

DESCRIPTION = """\
Read a whole dataset and compare it with its manifest: every file's hash, every document's place, every token's range.
Lists every problem and exits with 1 if there are any. Worth a run after each copy to another disk. Example:

    python -m data_prep.verify_shards data/sotu
"""


def parser() -> ArgumentParser:
    result = new_parser("data_prep.verify_shards", DESCRIPTION)
    result.add_argument("dataset", type=Path, help="directory made by build_shards")
    result.add_argument("--split", action="append", choices=SPLITS, help="only this one; may be repeated")
    return result


def body(arguments: Namespace) -> int:
    splits = Manifest.read(arguments.dataset).splits
    total = sum(
        file.bytes for name in arguments.split or splits if name in splits for file in splits[name].files.values()
    )
    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
        problems = verify(arguments.dataset, arguments.split, bar.update)
    for problem in problems:
        print(problem)
    print(f"{arguments.dataset}: {len(problems)} problems" if problems else f"{arguments.dataset}: sound")
    return 1 if problems else 0


def main(argv: Sequence[str] | None = None) -> int:
    return run(parser(), body, argv)


if __name__ == "__main__":
    sys.exit(main())
