"""datasets: load_dataset("json") and a batched map, as its documentation shows them; the ids stay in its Arrow cache.

    python -m benchmarks.tokenize_datasets TOKENIZER PROCESSES OUTPUT FILE.jsonl ...

The map calls the tokenizer's library itself and adds the end of a document, without the attention mask and the
conversions of transformers' wrapper: less work than what users of the pair do.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from datasets import load_dataset

from benchmarks.tokenize_library import Library


class Encode:
    def __init__(self, tokenizer: str) -> None:
        self.library = Library(tokenizer)

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": [[*ids, self.library.eod] for ids in self.library.encode_batch(rows["text"])]}


def main(tokenizer: str, processes: str, output: str, *files: str) -> None:
    workers = int(processes) if int(processes) > 1 else None  # None: in this process, 1 would begin another
    dataset = load_dataset("json", data_files=list(files), split="train", cache_dir=output, num_proc=workers)
    mapped = dataset.map(Encode(tokenizer), batched=True, num_proc=workers, remove_columns=dataset.column_names)
    column = mapped.data.column("input_ids")
    print(json.dumps({"tokens": sum(len(chunk.values) for chunk in column.chunks)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
