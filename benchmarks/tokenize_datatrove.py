"""datatrove: JsonlReader and DocumentTokenizer under LocalPipelineExecutor, a task for each file.

    python -m benchmarks.tokenize_datatrove TOKENIZER PROCESSES OUTPUT FILE.jsonl ...

It reads a tokenizer.json only. Without its shuffling of documents, which is a second copy of the tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer

from benchmarks.tokenize_library import EOD


def main(tokenizer: str, processes: str, output: str, *files: str) -> None:
    (folder,) = {str(Path(file).parent) for file in files}
    tokens = Path(output) / "tokens"
    writer = DocumentTokenizer(str(tokens), tokenizer, eos_token=EOD, shuffle_documents=False)
    LocalPipelineExecutor(
        pipeline=[JsonlReader(folder, glob_pattern="*.jsonl"), writer],
        tasks=len(files),
        workers=int(processes),
        logging_dir=str(Path(output) / "logs"),
    ).run()
    written = sum(file.stat().st_size for file in tokens.glob("*.ds"))
    print(json.dumps({"tokens": written // writer.token_size}))


if __name__ == "__main__":
    main(*sys.argv[1:])
