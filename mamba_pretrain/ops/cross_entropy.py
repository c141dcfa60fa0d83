"""Cross entropy of a linear head, without ever holding the logits of all positions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba_pretrain.ops import dispatch
from mamba_pretrain.ops.call import Call, KernelError, expect, expect_floats, expect_rank

# Logits alive at once. Of 8 x 2048 positions and 50,280 tokens they would be 1.5 GiB in bf16; 128 MiB are 1,334 rows of
# that vocabulary, so that the gradient of the head, summed up once a chunk, costs little beside the products.
CHUNK_BYTES = 128 * 2**20


def linear_cross_entropy(hidden_BLD: Tensor, weight_VD: Tensor, labels_BL: Tensor, vocab_size: int) -> Tensor:
    """Sum over positions of -log softmax(hidden weight^T)[label], over the first `vocab_size` rows of the head.

    The other rows pad the matrix product: they are no tokens, get probability zero and gradient zero. Positions with
    label -100 count nothing. The products run in the ambient autocast dtype, softmax and sums in fp32. Returns an fp32
    (float64 for float64 inputs) scalar. Raises KernelError, naming the argument, for a wrong shape, dtype or device.

    Chunk by chunk, the forward also makes the gradient: the loss is a scalar, so the backward has only to scale it.
    That takes three products for each chunk, as many as holding all logits, where recomputing them would take four.
    """
    expect_rank("linear_cross_entropy", 2, weight=weight_VD)
    expect(
        "linear_cross_entropy",
        hidden_BLD.device,
        weight=(weight_VD, (weight_VD.shape[0], hidden_BLD.shape[-1])),
        labels=(labels_BL, tuple(hidden_BLD.shape[:-1])),
    )
    expect_floats("linear_cross_entropy", hidden=hidden_BLD, weight=weight_VD)
    if labels_BL.dtype != torch.int64:
        raise KernelError(f"linear_cross_entropy: labels have dtype {labels_BL.dtype}, expected torch.int64")
    if not 0 < vocab_size <= weight_VD.shape[0]:
        raise KernelError(f"linear_cross_entropy: vocab_size is {vocab_size}, weight has {weight_VD.shape[0]} rows")
    device = hidden_BLD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_BLD.dtype
    with torch.autocast(device, enabled=False):
        loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden_BLD.flatten(0, -2).to(dtype),
            weight_VD,
            labels_BL.flatten(),
            vocab_size,
            torch.promote_types(hidden_BLD.dtype, torch.float32),
            torch.is_grad_enabled(),
        )
    return loss


def cross_entropy_(logits_TV: Tensor, labels_T: Tensor, vocab_size: int, gradient: bool) -> Tensor:
    """The loss of each row (T,) in fp32 (float64); with `gradient`, the logits become softmax - onehot in place."""
    backend = dispatch.choose(Call.of("cross_entropy_", logits_TV))
    loss = cross_entropy_reference_ if backend is None else backend.cross_entropy_
    loss_T: Tensor = loss(logits_TV, labels_T, vocab_size, gradient)
    return loss_T


def cross_entropy_reference_(logits_TV: Tensor, labels_T: Tensor, vocab_size: int, gradient: bool) -> Tensor:
    """In PyTorch's own operations, on any device."""
    wide_TV = logits_TV[:, :vocab_size].to(torch.promote_types(logits_TV.dtype, torch.float32))
    log_TV = F.log_softmax(wide_TV, dim=-1)
    loss_T = F.nll_loss(log_TV, labels_T, ignore_index=-100, reduction="none")
    if gradient:
        counts_T1 = (labels_T != -100).unsqueeze(-1)
        slope_TV = log_TV.exp_()
        slope_TV.scatter_add_(1, labels_T.clamp(min=0).unsqueeze(-1), -torch.ones_like(slope_TV[:, :1]))
        logits_TV[:, :vocab_size] = slope_TV.mul_(counts_T1)
        logits_TV[:, vocab_size:] = 0
    return loss_T


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        vocab_size: int,
        wide: torch.dtype,
        grad_enabled: bool,
    ) -> Tensor:
        dtype = hidden_TD.dtype
        narrow_VD = weight_VD.to(dtype)
        wants_hidden, wants_weight = (grad_enabled and ctx.needs_input_grad[i] for i in (0, 1))
        dhidden_TD = torch.empty_like(hidden_TD) if wants_hidden else None
        dweight_VD = None
        total = hidden_TD.new_zeros((), dtype=wide)
        most = max(1, CHUNK_BYTES // (dtype.itemsize * len(weight_VD)))
        chunks = -(-len(labels_T) // most)
        for chunk in range(chunks):
            rows = slice(len(labels_T) * chunk // chunks, len(labels_T) * (chunk + 1) // chunks)
            logits_TV = hidden_TD[rows] @ narrow_VD.t()
            total += cross_entropy_(logits_TV, labels_T[rows], vocab_size, wants_hidden or wants_weight).sum(dtype=wide)
            if dhidden_TD is not None:
                torch.mm(logits_TV, narrow_VD, out=dhidden_TD[rows])
            if wants_weight:
                part_VD = logits_TV.t() @ hidden_TD[rows]
                dweight_VD = part_VD.to(wide) if dweight_VD is None else dweight_VD.add_(part_VD)
        if wants_weight and dweight_VD is None:
            dweight_VD = torch.zeros_like(weight_VD, dtype=wide)
        ctx.save_for_backward(None if dhidden_TD is None else dhidden_TD.to(wide), dweight_VD)
        ctx.dtypes = hidden_TD.dtype, weight_VD.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        # In the dtype of the sums: rounding 1 / tokens to bf16 would make all gradients of the blocks up to 0.4% wrong.
        dhidden_TD, dweight_VD = (None if g is None else g * dloss for g in ctx.saved_tensors)
        hidden_dtype, weight_dtype = ctx.dtypes
        return (
            None if dhidden_TD is None else dhidden_TD.to(hidden_dtype),
            None if dweight_VD is None else dweight_VD.to(weight_dtype),
            *[None] * 4,
        )
