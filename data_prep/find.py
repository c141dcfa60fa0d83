"""Where a string stands in a split's text: documents are decoded one after the other, the longest in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from mamba_pretrain.data.shards import Shard
from mamba_pretrain.data.tokenizer import Tokenizer

CONTEXT: Final = 60  # bytes shown on either side
PIECE_TOKENS: Final = 1 << 18  # decoded at a time


@dataclass(frozen=True)
class Hit:
    document: int
    at: int  # byte in the document's UTF-8 text
    before: str
    found: str
    after: str

    def __str__(self) -> str:
        shown = (repr(part)[1:-1] for part in (self.before, self.found, self.after))
        return "document {:,}, byte {:,}: {}>>>{}<<<{}".format(self.document, self.at, *shown)


def find(
    shard: Shard,
    tokenizer: Tokenizer,
    text: str,
    first_document: int = 0,
    progress: Callable[[int], object] = lambda _: None,
) -> Iterator[Hit]:
    """Every place of `text`, in order, across tokens but not across documents. `progress` is told the tokens read."""
    needle = text.encode()
    for document in range(first_document, shard.n_documents):
        start, stop = shard.document_bounds(document)
        joined, base, searched = b"", 0, 0  # base: the byte of the document that joined begins with
        for position in range(start, stop, PIECE_TOKENS):
            end = min(position + PIECE_TOKENS, stop)
            joined += _decoded(shard, tokenizer, start, position, end)
            while (at := joined.find(needle, searched)) >= 0:
                after = at + len(needle)
                if end < stop and after + CONTEXT > len(joined):
                    break  # with the next piece, what follows it is known
                yield Hit(
                    document,
                    base + at,
                    joined[max(at - CONTEXT, 0) : at].decode(errors="ignore"),
                    text,
                    joined[after : after + CONTEXT].decode(errors="ignore"),
                )
                searched = after
            searched = max(searched, len(joined) - len(needle) + 1) if at < 0 else at
            kept = max(searched - CONTEXT, 0)
            joined, base, searched = joined[kept:], base + kept, searched - kept
            progress(end - position)


def _decoded(shard: Shard, tokenizer: Tokenizer, start: int, position: int, end: int) -> bytes:
    """Tokens [position, end) of the document that begins at `start`: how they decode depends on there being others."""
    if position == start:
        return tokenizer.decode_bytes(shard.tokens(start, end).tolist())
    before = tokenizer.decode_bytes(shard.tokens(position - 1, position).tolist())
    return tokenizer.decode_bytes(shard.tokens(position - 1, end).tolist())[len(before) :]
