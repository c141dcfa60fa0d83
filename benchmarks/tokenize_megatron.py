"""Megatron-LM's published procedure (tools/preprocess_data.py, in no package) with megatron-core's builder.

    python -m benchmarks.tokenize_megatron TOKENIZER PROCESSES OUTPUT FILE.jsonl ...

Lines go to a pool of encoders, 32 at a time and in order, and come back as lists of ids, which this process writes:
beside PROCESSES workers it is one more. The encoders call the tokenizer's library itself, not a wrapper of it.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from benchmarks.tokenize_library import Library

LINES = 32  # of one request to a worker, as there


class Encoder:
    library: ClassVar[Library]

    def __init__(self, tokenizer: str) -> None:
        self.tokenizer = tokenizer

    def begin(self) -> None:
        Encoder.library = Library(self.tokenizer)

    def encode(self, line: str) -> tuple[list[int], list[int], int]:
        ids = Encoder.library.encode(json.loads(line)["text"])
        ids.append(Encoder.library.eod)
        return ids, [len(ids)], len(line)


def lines_of(files: Sequence[str]) -> Iterator[str]:
    for file in files:
        with open(file, encoding="utf-8") as stream:
            yield from stream


def main(tokenizer: str, processes: str, output: str, *files: str) -> None:
    encoder, pieces = Encoder(tokenizer), Library(tokenizer).pieces
    Path(output).mkdir(parents=True)
    with multiprocessing.Pool(int(processes), initializer=encoder.begin) as pool:
        builder = IndexedDatasetBuilder(f"{output}/text.bin", dtype=DType.optimal_dtype(pieces))
        tokens = 0
        for ids, lengths, _ in pool.imap(encoder.encode, lines_of(files), LINES):
            builder.add_document(ids, lengths)
            tokens += len(ids)
        builder.finalize(f"{output}/text.idx")
        pool.close()
        pool.join()
    print(json.dumps({"tokens": tokens}))


if __name__ == "__main__":
    main(*sys.argv[1:])
