"""Bytes that one micro-batch of B rows and L steps holds on one rank, by formula.

What autograd keeps is counted from the code of the backends; tests compare it with traces of the real step. M = B L
positions; D, E, N, R, V as in `mamba_pretrain.ops`; n = 2 bytes in bf16 and fp16, 4 in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

from mamba_pretrain.config import Config
from mamba_pretrain.ops.cross_entropy import CHUNK_BYTES

KERNELS = ("native", "cuda", "triton")
# Steps between two states that the scan keeps for its backward, and the channels it pads to: ops/csrc/scan.h, which
# ops/backends/native_ops.py repeats; selective_scan's kChunkSize; ops/backends/triton_scan.py.
_STATES = {"native": (32, 16), "cuda": (2048, 1), "triton": (64, 32)}


@dataclass(frozen=True)
class MicroBatch:
    """Bytes of one forward and backward pass."""

    block: int  # kept by one block for its backward, the next two apart
    states: int  # of the scan, kept by one block
    casts: int  # narrow copies of one block's matrices: autocast's, whole on every rank, whatever the engine shards
    boundary: int  # kept by a checkpointed block: its two inputs
    working: int  # more than a block keeps, while its backward runs
    final: int  # kept by the final norm
    loss_forward: int  # the most that the loss holds, above what blocks keep
    loss_kept: int  # from its forward to its backward: the gradients of the head and of its input
    head: int  # one whole fp32 gradient of the embedding


def micro_batch(config: Config, kernels: str) -> MicroBatch:
    model, train = config.model, config.train
    d, e, n_state, r = config.model.need("d_model"), model.d_inner, model.d_state, model.rank
    rows, length = train.micro_batch_size, config.data.seq_len
    m, n = rows * length, 4 if train.precision == "fp32" else 2
    packed = config.data.reset_documents
    x_dbl = n * (r + 2 * n_state)

    # Norm: the residual stream and a scale, fp32, and its output, which the products take.
    kept = 4 * d + 4 + n * d
    if kernels == "cuda" and packed:  # x, z, u, its copy in the scan's layout, delta, y before and after the gate
        kept += n * 7 * e + x_dbl
    elif kernels == "cuda":  # mamba_inner_fn: x and z, y before the gate, B and C again; the rest is recomputed
        kept += n * 3 * e + x_dbl + n * 2 * n_state
    else:  # x and z, u, delta, y; where documents begin, for convolution and scan
        kept += n * 5 * e + x_dbl + (2 * packed if kernels == "native" else 0)
    chunk, lanes = _STATES[kernels]
    per_channel = 2 * n_state if kernels == "cuda" else n_state
    states = 4 * rows * -(-length // chunk) * (-(-e // lanes) * lanes * per_channel + (e if kernels == "triton" else 0))
    matrices = 2 * e * d + e * (r + 2 * n_state) + r * e + e * d
    working = m * (n * 3 * e + (4 + n) * d) + _scratch(kernels, rows, length, e, n_state, n)

    head = model.padded_vocab_size * d
    return MicroBatch(
        block=m * kept + 8 * e * n_state,  # exp(A_log) and its negative
        states=states,
        casts=n * matrices if n == 2 else 0,
        boundary=m * (4 + n) * d,
        working=working,
        final=m * (4 + 4 + n) * d,
        loss_forward=_loss(kernels, m, d, model.padded_vocab_size, n),
        loss_kept=4 * head + 4 * m * d,
        head=4 * head,
    )


def _loss(kernels: str, m: int, d: int, vocabulary: int, n: int) -> int:
    """The most that ops/cross_entropy.py holds: a chunk's logits, the narrow head, the gradients of head and input."""
    chunks = -(-m // max(1, CHUNK_BYTES // (n * vocabulary)))
    logits, head = n * -(-m // chunks) * vocabulary, vocabulary * d
    narrow, product, total = (n * head if n == 2 else 0), n * head, 4 * head
    # The softmax of the reference, which is what runs on GPUs: the logits and their logarithms in fp32.
    softmax = 0 if kernels == "native" else logits // n * (8 if n == 2 else 4)
    if chunks == 1:
        most = logits + max(softmax, product + (total if n == 2 else 0))
    else:  # the last chunk's logits, and its product, are there until this one's are
        held = total + (product if n == 2 or chunks > 2 else 0)
        most = held + logits + max(logits, softmax, product)
    return most + narrow + m * n * d


def _scratch(kernels: str, rows: int, length: int, e: int, n_state: int, n: int) -> int:
    """What the scan's backward allocates beside gradients."""
    if kernels == "native":  # sums over groups of 128 channels, for B and C
        return 4 * rows * length * -(-e // 128) * 2 * n_state
    if kernels == "triton":  # page's head of ops/backends/triton_scan.py: states every 4 steps, sums over 32 channels
        return 4 * rows * length * e * n_state * 1 // 4 + 4 * rows * length * e * n_state * 2 // 32
    return n * rows * length * 2 * e  # mamba_inner_fn makes u and delta again
