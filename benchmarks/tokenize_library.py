"""The bare tokenizer libraries on documents in memory: the limit of what preparing data can be, and what peers call."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence, Sized
from functools import partial
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

EOD = "<|endoftext|>"  # of GPT-NeoX's tokenizer


class Library:
    """A tokenizer.json or a .model as its library gives it; pickles, as peers hand it to their processes."""

    def __init__(self, path: str | Path) -> None:
        if Path(path).suffix == ".json":
            self.model: Any = tokenizers.Tokenizer.from_file(str(path))
            self.pieces, eod = int(self.model.get_vocab_size()), self.model.token_to_id(EOD)
            if eod is None:
                raise ValueError(f"{path} has no {EOD}: it is not GPT-NeoX's tokenizer")
            self.eod = int(eod)
        else:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
            self.pieces, self.eod = int(self.model.get_piece_size()), int(self.model.eos_id())
        self.is_json = Path(path).suffix == ".json"

    def encode(self, text: str) -> list[int]:
        ids: list[int] = (
            self.model.encode(text, add_special_tokens=False).ids if self.is_json else self.model.encode(text)
        )
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if self.is_json:
            return [one.ids for one in self.model.encode_batch(texts, add_special_tokens=False)]
        ids: list[list[int]] = self.model.encode(list(texts), num_threads=1)
        return ids


class Loop:
    """A process that has its documents in memory and encodes one after the other."""

    def __init__(self, tokenizer: str, files: list[str]) -> None:
        self.library, self.texts = Library(tokenizer), texts_of(files)

    def run(self, fast: bool = False) -> dict[str, float]:
        """`fast`: by the call that gives ids alone, without places in the text, or as an array, not as a list."""
        encode = self._encode(fast)
        began, tokens = time.perf_counter(), 0
        for text in self.texts:
            tokens += len(encode(text))
        return {"seconds": time.perf_counter() - began, "tokens": tokens}

    def _encode(self, fast: bool) -> Callable[[str], Sized]:
        model = self.library.model
        if not self.library.is_json:
            return partial(model.encode, return_type="numpy") if fast else model.encode
        if fast:
            return lambda text: model.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return lambda text: model.encode(text, add_special_tokens=False).ids


def texts_of(files: Sequence[str]) -> list[str]:
    """The texts of .jsonl files, in order."""
    texts = []
    for file in files:
        with open(file, encoding="utf-8") as stream:
            texts += [json.loads(line)["text"] for line in stream]
    return texts
