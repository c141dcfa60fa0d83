"""Cross entropy of a linear head, without ever holding the logits of all positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# fp32 logits alive at once. 8 x 2048 positions of 50,280 tokens would be 3.07 GiB; 64 MiB are 333 rows of that
# vocabulary, enough for a matrix product of fair shape. The price is one more product in the backward.
CHUNK_BYTES = 64 * 2**20


def linear_cross_entropy(hidden_BLD: Tensor, weight_VD: Tensor, labels_BL: Tensor, vocab_size: int) -> Tensor:
    """Sum over positions of -log softmax(hidden weight^T)[label], over the first `vocab_size` rows of the head.

    The other rows pad the matrix product: they are no tokens, get probability zero and gradient zero. Positions with
    label -100 count nothing. The product runs in the ambient autocast dtype, softmax and sum in fp32; the backward
    recomputes the logits chunk by chunk. Returns an fp32 (float64 for float64 inputs) scalar.
    """
    wide = torch.promote_types(hidden_BLD.dtype, torch.float32)
    hidden_TD, labels_T = hidden_BLD.flatten(0, -2), labels_BL.flatten()
    rows = max(1, CHUNK_BYTES // (4 * weight_VD.shape[0]))
    total = hidden_TD.new_zeros((), dtype=wide)
    for start in range(0, labels_T.numel(), rows):
        chunk = (hidden_TD[start : start + rows], weight_VD, labels_T[start : start + rows], vocab_size, wide)
        if torch.is_grad_enabled():
            total = total + checkpoint(_chunk, *chunk, use_reentrant=False, preserve_rng_state=False)
        else:
            total = total + _chunk(*chunk)
    return total


def _chunk(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, vocab_size: int, wide: torch.dtype) -> Tensor:
    logits_TV = F.linear(hidden_TD, weight_VD).to(wide)[:, :vocab_size]
    with torch.autocast(hidden_TD.device.type, enabled=False):
        return F.cross_entropy(logits_TV, labels_T, ignore_index=-100, reduction="sum")
