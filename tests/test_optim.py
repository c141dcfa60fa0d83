from __future__ import annotations

import math

import pytest
import torch

from mamba_pretrain.config import ModelConfig, OptimConfig
from mamba_pretrain.model.lm import MambaLM
from mamba_pretrain.optim import AdamW, lr_at, padding_rows, param_groups

MODEL = ModelConfig(d_model=16, n_layer=2, vocab_size=13)
DECAYING = ("embedding.weight", "in_proj.weight", "conv1d.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight")


def test_cosine_warms_up_to_the_peak_and_ends_at_the_minimum() -> None:
    config = OptimConfig(lr=1.0, min_lr=0.1, warmup_fraction=0.1)
    rates = [lr_at(step, 100, config) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == pytest.approx(1.0) and rates[-1] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    middle = 10 + 89 // 2
    assert rates[middle] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * (89 // 2) / 89)))


def test_wsd_is_flat_between_warm_up_and_decay() -> None:
    config = OptimConfig(lr=1.0, min_lr=0.0, schedule="wsd", warmup_fraction=0.1, decay_fraction=0.2)
    rates = [lr_at(step, 100, config) for step in range(100)]
    assert rates[9:80] == pytest.approx([1.0] * 71)
    assert rates[79:] == pytest.approx([1 - i / 20 for i in range(21)])


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_short_runs_have_finite_rates_within_bounds(schedule: str, steps: int) -> None:
    config = OptimConfig(lr=1.0, min_lr=0.1, schedule=schedule)
    assert all(0.1 - 1e-9 <= lr_at(step, steps, config) <= 1.0 for step in range(steps))


def test_only_matrices_decay() -> None:
    model = MambaLM(MODEL, seed=0)
    groups = param_groups(model.named_parameters(), MODEL, OptimConfig())
    decay = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert set(decay) == {name for name, _ in model.named_parameters()}
    for name, value in decay.items():
        assert (value == 0.1) == name.endswith(DECAYING), name


def test_padding_rows_of_the_vocabulary_never_move() -> None:
    model = MambaLM(MODEL, seed=0)
    assert MODEL.padded_vocab_size == 16
    before = model.backbone.embedding.weight.detach().clone()
    optimizer = AdamW(param_groups(model.named_parameters(), MODEL, OptimConfig()), OptimConfig(lr=0.1))
    flat = model.backbone.embedding.weight.detach().view(-1)
    optimizer.frozen = [padding_rows("backbone.embedding.weight", (16, 16), 0, flat, MODEL)]
    for _ in range(3):
        ids = torch.randint(0, 13, (2, 8))
        loss = model(ids, ids).loss_sum
        assert loss is not None
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model.backbone.embedding.weight.detach()
    assert torch.equal(after[13:], before[13:])
    assert not torch.isclose(after[:13], before[:13]).all(dim=1).any()
