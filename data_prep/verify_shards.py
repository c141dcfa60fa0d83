"""Checks datasets from end to end."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from data_prep.command import available_cores, local_directory, new_parser, reading, run
from mamba_pretrain.data.dataset import checks, run_check
from mamba_pretrain.data.manifest import SPLITS, Manifest
from mamba_pretrain.data.shards import ShardError

DESCRIPTION = """\
Read whole datasets and compare them with their manifests: every file's hash, every document's place, beginning and
end, every token's range, the tokenizer, and whether a sample of documents decodes to text. Each file is read once.
Lists every problem and exits with 1 if there are any. Worth a run after each copy to another disk. Example:

    python -m data_prep.verify_shards data/sotu
    python -m data_prep.verify_shards --workers 8 data/pile-*
"""


def parser() -> ArgumentParser:
    result = new_parser("data_prep.verify_shards", DESCRIPTION)
    result.add_argument(
        "datasets", type=local_directory, nargs="+", metavar="DATASET", help="directory made by build_shards"
    )
    result.add_argument("--split", action="append", choices=SPLITS, help="only this one; may be repeated")
    result.add_argument(
        "--workers",
        type=int,
        default=available_cores(),
        metavar="N",
        help="splits read at a time, each by one thread that reads and one that hashes (default: the cores, here "
        "%(default)s)",
    )
    return result


def body(arguments: Namespace) -> int:
    if arguments.workers < 1:
        raise ShardError(f"--workers {arguments.workers}: expected 1 or more")
    manifests = [Manifest.read(dataset) for dataset in arguments.datasets]
    splits = (m.splits[name] for m in manifests for name in arguments.split or m.splits if name in m.splits)
    total = sum(file.bytes for split in splits for file in split.files.values())
    with reading(total, arguments.workers) as (pool, progress):
        parts = [
            [pool.submit(run_check, check) for check in checks(dataset, arguments.split, progress)]
            for dataset in arguments.datasets
        ]
        results = [[problem for part in dataset for problem in part.result()] for dataset in parts]
    for dataset, problems in zip(arguments.datasets, results, strict=True):
        for problem in problems:
            print(problem)
        print(f"{dataset}: {len(problems)} problems" if problems else f"{dataset}: sound")
    return 1 if any(results) else 0


def main(argv: Sequence[str] | None = None) -> int:
    return run(parser(), body, argv)


if __name__ == "__main__":
    sys.exit(main())
