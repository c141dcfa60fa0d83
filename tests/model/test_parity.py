"""Our Mamba against Hugging Face's with equal weights: logits, every gradient, and decoding token by token.

Tolerances are relative to the largest value of the compared tensor. Two fp32 programs that sum in another order differ
by 3e-7 in the logits and 2e-6 in the gradients here.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_pretrain.config import ModelConfig
from tests.helpers.hf import hf_twin, lively

SHAPES = {
    "published": ModelConfig(d_model=32, n_layer=3, vocab_size=56),
    "padded vocabulary": ModelConfig(d_model=32, n_layer=2, vocab_size=51),
    "untied head": ModelConfig(d_model=32, n_layer=2, vocab_size=56, tie_embeddings=False),
    "all biases": ModelConfig(d_model=32, n_layer=2, vocab_size=56, linear_bias=True),
    "no biases": ModelConfig(d_model=32, n_layer=2, vocab_size=56, conv_bias=False),
    "own rank, small state": ModelConfig(
        d_model=24, n_layer=2, vocab_size=56, d_state=8, dt_rank=5, expand=1, d_conv=3
    ),
    "other eps, wide": ModelConfig(d_model=16, n_layer=2, vocab_size=56, d_state=5, expand=3, d_conv=2, norm_eps=1e-3),
}


def distance(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def tokens(config: ModelConfig, batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(config.need("vocab_size"), (batch, length), generator=generator)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_logits_and_all_gradients_equal_hugging_face(config: ModelConfig) -> None:
    ours, ids_BL = lively(config), tokens(config, batch=2, length=67)
    theirs = hf_twin(ours)
    assert distance(ours(ids_BL).logits, theirs(ids_BL).logits) < 1e-6

    labels_BL = torch.cat([ids_BL[:, 1:], torch.full((2, 1), -100)], dim=1)
    ours(ids_BL, labels_BL).loss_sum.backward()
    logits_BLV = theirs(ids_BL).logits[..., : config.need("vocab_size")]  # they know no padding rows, we predict none
    F.cross_entropy(logits_BLV.flatten(0, 1), labels_BL.flatten(), reduction="sum").backward()
    their_gradients = {name.replace("embeddings.", "embedding."): p.grad for name, p in theirs.named_parameters()}
    assert their_gradients.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert distance(parameter.grad, their_gradients[name]) < 5e-6, name


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
@torch.no_grad()
def test_a_step_equals_hugging_faces_cached_decoding(config: ModelConfig) -> None:
    ours, ids_BL = lively(config), tokens(config, batch=2, length=14)
    theirs = hf_twin(ours).eval()
    state = ours(ids_BL[:, :9]).state
    output = theirs(ids_BL[:, :9], use_cache=True)
    for t in range(9, 14):
        logits_BV, state = ours.step(ids_BL[:, t], state)
        output = theirs(ids_BL[:, t : t + 1], cache_params=output.cache_params, use_cache=True)
        assert distance(logits_BV, output.logits[:, 0]) < 1e-6
