"""One token through a whole model: decoding, where reading the matrices once is the least that it can cost."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mamba_pretrain.ops import dispatch
from mamba_pretrain.ops.call import Call, ModelWeights

# Token ids (B,) and the states of convolutions (B, S, E) and scans (B, E, N), one of each a block, all fp32, to the
# logits (B, V) in fp32 and the new states. The given states stay as they are.
DecodeStep = Callable[[Tensor, list[Tensor], list[Tensor]], tuple[Tensor, list[Tensor], list[Tensor]]]


def decode_step(weights: ModelWeights) -> DecodeStep | None:
    """A function that takes single steps with these weights, or None where no backend has one.

    The four projections of a block and the head may be narrower than fp32; arithmetic is fp32. The function reads the
    weights as they are now: make it anew after they change.
    """
    backend = dispatch.choose(Call.of("decode_step", weights.head))
    if backend is None:
        return None
    step: DecodeStep = backend.decode_step(weights)
    return step
