"""Builds of a small corpus, and what they make."""

from __future__ import annotations

import gzip
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep import build_shards
from data_prep.corpus import Corpus
from data_prep.parts import Task
from data_prep.plan import Plan
from data_prep.store import Store
from tests.helpers.corpora import make_documents, write_jsonl

OPTIONS = ["--tokenizer", "bytes", "--split-fractions", "0.7", "0.2", "0.1", "--unit-bytes", "4000"]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def several_inputs(tmp_path: Path) -> list[Path]:
    """A file of many units, a compressed one, and small ones that share a part."""
    documents = make_documents(400)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(
        gzip.compress(write_jsonl(tmp_path / "plain", documents[:300]).read_bytes(), mtime=0)
    )
    for i in range(5):
        write_jsonl(tmp_path / "in" / f"c{i}.jsonl", documents[100 + i : 101 + i])
    return [write_jsonl(tmp_path / "in" / "a.jsonl", documents), tmp_path / "in" / "b.jsonl.gz"] + [
        tmp_path / "in" / f"c{i}.jsonl" for i in range(5)
    ]


def command(inputs: list[Path], output: Path, *options: str) -> int:
    return build_shards.main([*map(str, inputs), "--output", str(output), *OPTIONS, *options])


def mortal_worker(died: Path, corpus: Corpus, plan: Plan, store: Store) -> Callable[[Task, Callable[[Any], None]], Any]:
    """A build's worker; the first of all that begins the fourth part makes the file `died`, and is killed."""
    write = build_shards._worker(corpus, plan, store)

    def write_part(task: Task, report: Callable[[Any], None]) -> Any:
        def reporting(progress: Any) -> None:
            report(progress)
            if task.part == 3 and not died.exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)

        return write(task, reporting)

    return write_part
