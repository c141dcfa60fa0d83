"""Fixed windows over a split's token stream: what the model reads, what it predicts, and where documents begin."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from mamba_pretrain.data.shards import Shard, ShardError

IGNORE: Final = -100  # the label that torch's cross entropy leaves out


def n_windows(shard: Shard, seq_len: int) -> int:
    """Whole windows in the split. The last token is only ever a label; up to seq_len - 1 before it are unused."""
    return max(shard.n_tokens - 1, 0) // seq_len


def window(
    shard: Shard, index: int, seq_len: int, *, vocab_size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """Window `index`, L = seq_len tokens from index * L on, as (input_ids (L,), labels (L,), seq_idx (L,)).

    labels[t] is the token after input_ids[t], or IGNORE where that token belongs to another document. seq_idx[t] counts
    the documents of the window from 0; the model's state starts anew where it changes. Raises ShardError for a token
    outside the vocabulary: on the GPU it would be an illegal memory access without a name.
    """
    assert 0 <= index < n_windows(shard, seq_len)
    start = index * seq_len
    stop = start + seq_len
    tokens = shard.tokens(start, stop + 1)
    if tokens.max() >= vocab_size or tokens.min() < 0:
        at = int(np.argmax((tokens >= vocab_size) | (tokens < 0)))
        raise ShardError(
            f"{shard.path}.bin has token id {tokens[at]} at position {start + at:,}, the vocabulary has "
            f"{vocab_size:,}: the file is damaged (see python -m data_prep.verify_shards), or the model "
            "is for another tokenizer"
        )
    begins = np.zeros(seq_len + 1, np.bool_)  # whether a document, not the window's first, begins at each token
    begins[shard.document_starts(start + 1, stop + 1) - start] = True
    labels = np.where(begins[1:], IGNORE, tokens[1:])
    return tokens[:-1], labels, np.cumsum(begins[:-1], dtype=np.int32)
