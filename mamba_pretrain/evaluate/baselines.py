"""What general compressors make of the same bytes: the figures a language model has to beat.

xz (LZ77 with a range coder) knows repetition only. PPMd of order 5 is a byte 5-gram model with escape smoothing, that
of order 16 the strongest classic text model in common use. "Primed" means that the compressor has read training text
first, as the model has: size(training + evaluation) - size(training).

The documents' bytes are simply joined. A model's bits per byte also pay for the ends of documents; these do not, which
is in the compressors' favour.
"""

from __future__ import annotations

import lzma
from collections.abc import Callable
from dataclasses import dataclass

from mamba_pretrain.data.shards import Shard
from mamba_pretrain.data.tokenizer import Tokenizer
from mamba_pretrain.evaluate.perplexity import EvaluationError, decoded_documents

# xz -9's dictionary: what lies further back, xz cannot use. PPMd gets as much. At this size all of `measure` takes less
# than four minutes (most of them xz; PPMd 9 s and 26 s a pass, on one core) and 1.5 GiB.
PRIMING_BYTES = 64 * 2**20
PPMD_MEMORY_BYTES = 1 << 30
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Baseline:
    name: str
    bits_per_byte: float
    how: str


def measure(evaluation: bytes, training: bytes) -> list[Baseline]:
    """Bits per byte of `evaluation` for each compressor, alone and primed with the end of `training`.

    Raises EvaluationError without evaluation text, or without the pyppmd package.
    """
    if not evaluation:
        raise EvaluationError("there is no evaluation text to compress: the split's documents are empty")
    training = training[-PRIMING_BYTES:]
    compressors: list[tuple[str, Callable[[bytes], int]]] = [
        ("xz -9", _xz_bytes),
        ("PPMd order 5", lambda data: _ppmd_bytes(data, order=5)),
        ("PPMd order 16", lambda data: _ppmd_bytes(data, order=16)),
    ]
    found = []
    for name, size in compressors:
        how = f"{len(evaluation):,} bytes of evaluation text"
        found.append(Baseline(name, 8 * size(evaluation) / len(evaluation), how))
        if training:
            extra = size(training + evaluation) - size(training)
            how += f" after the last {len(training):,} bytes of training text"
            found.append(Baseline(f"{name}, primed", 8 * extra / len(evaluation), how))
    return found


def texts(
    evaluation: Shard, training: Shard, tokenizer: Tokenizer, *, max_documents: int | None = None
) -> tuple[bytes, bytes]:
    """What `measure` takes: the documents that `evaluate_documents` scores, and the end of the training split."""
    wanted = evaluation.n_documents if max_documents is None else min(max_documents, evaluation.n_documents)
    tail: list[bytes] = []
    document, size = training.n_documents, 0
    while document > 0 and size < PRIMING_BYTES:
        document -= 1
        tail.append(tokenizer.decode_bytes(training.tokens(*training.document_bounds(document)).tolist()))
        size += len(tail[-1])
    return b"".join(decoded_documents(evaluation, tokenizer, wanted)), b"".join(reversed(tail))[-PRIMING_BYTES:]


def _xz_bytes(data: bytes) -> int:
    return len(lzma.compress(data, preset=9))


def _ppmd_bytes(data: bytes, *, order: int) -> int:
    try:
        import pyppmd
    except ImportError as error:
        raise EvaluationError(
            "the PPMd baselines need the pyppmd package: pip install 'mamba-pretrain[report]'"
        ) from error
    encoder = pyppmd.Ppmd7Encoder(order, PPMD_MEMORY_BYTES)
    written = sum(len(encoder.encode(data[i : i + BLOCK_BYTES])) for i in range(0, len(data), BLOCK_BYTES))
    return written + len(encoder.flush())
