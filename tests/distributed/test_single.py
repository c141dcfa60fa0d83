from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from mamba_pretrain.config import Config, ModelConfig, OptimConfig, TrainConfig
from mamba_pretrain.distributed.engine import MODEL as MODEL_PART
from mamba_pretrain.distributed.engine import OPTIMIZER
from mamba_pretrain.distributed.single import SingleEngine
from mamba_pretrain.model.lm import MambaLM
from mamba_pretrain.pieces import Pieces, write_pieces

MODEL = ModelConfig(d_model=16, n_layer=2, vocab_size=16)


def make_engine(precision: str = "fp32", seed: int = 0, **optim: float) -> SingleEngine:
    config = Config(model=MODEL, train=TrainConfig(precision=precision), optim=OptimConfig(**optim))
    weights = MambaLM(MODEL, seed=seed).state_dict()
    return SingleEngine(lambda: MambaLM(MODEL), weights.__getitem__, config, torch.device("cpu"))


def loss_of(engine: SingleEngine, seed: int) -> torch.Tensor:
    ids = torch.randint(0, 16, (2, 12), generator=torch.Generator().manual_seed(seed))
    loss = engine.module(ids, ids.roll(-1, dims=1)).loss_sum
    assert loss is not None
    return loss / 24


def hand_over(engine: SingleEngine, other: SingleEngine, directory: Path) -> None:
    """What one saves, the other loads."""
    for part, pieces in engine.state().items():
        write_pieces(directory / part, pieces)
    other.load({part: Pieces([directory / part]) for part in (MODEL_PART, OPTIMIZER)})


def test_a_step_is_adamw_of_the_clipped_gradient() -> None:
    engine, model = make_engine(clip_norm=0.5, weight_decay=0.1), MambaLM(MODEL, seed=0)
    decaying = [p for n, p in model.named_parameters() if n.endswith("weight") and "norm" not in n]
    others = [p for n, p in model.named_parameters() if not (n.endswith("weight") and "norm" not in n)]
    groups = [{"params": decaying, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    for step, lr in enumerate((1e-2, 3e-3)):
        engine.backward(loss_of(engine, step), last_micro_batch=True)
        result = engine.step(lr)
        ids = torch.randint(0, 16, (2, 12), generator=torch.Generator().manual_seed(step))
        loss = model(ids, ids.roll(-1, dims=1)).loss_sum
        assert loss is not None
        (loss / 24).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        assert norm > 0.5, "the test should exercise clipping"
        assert result == pytest.approx((norm.item(), False, 1.0))
    for (name, mine), theirs in zip(engine.module.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7, msg=name)


def test_the_clipped_gradient_has_the_clipping_norm() -> None:
    engine = make_engine(clip_norm=1e-4)
    kept: list[float] = []
    engine.optimizer.register_step_pre_hook(
        lambda *_: kept.append(float(torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters()])))
    )
    engine.backward(loss_of(engine, 0), last_micro_batch=True)
    norm = engine.step(1e-3).grad_norm
    assert kept[0] == pytest.approx(1e-4 * norm / (norm + 1e-6), rel=1e-6)


def test_micro_batches_accumulate_to_the_gradient_of_their_sum() -> None:
    whole, parts = make_engine(), make_engine()
    whole.backward(loss_of(whole, 1) + loss_of(whole, 2), last_micro_batch=True)
    parts.backward(loss_of(parts, 1), last_micro_batch=False)
    parts.backward(loss_of(parts, 2), last_micro_batch=True)
    assert whole.step(1e-3).grad_norm == pytest.approx(parts.step(1e-3).grad_norm, rel=1e-6)
    for a, b in zip(whole.module.parameters(), parts.module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_step_with_anything_not_finite_changes_nothing_and_the_next_one_is_clean(poison: str) -> None:
    engine, clean = make_engine(), make_engine()
    if poison == "loss":
        engine.backward(loss_of(engine, 1) * 0 + math.inf, last_micro_batch=True)
    else:
        loss = loss_of(engine, 1)
        loss.register_hook(lambda g: g * math.nan)
        engine.backward(loss, last_micro_batch=True)
    assert engine.step(1e-2).skipped
    for e in (engine, clean):
        e.backward(loss_of(e, 2), last_micro_batch=True)
        assert not e.step(1e-2).skipped
    for a, b in zip(engine.module.parameters(), clean.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_fp16_scales_the_loss_and_halves_the_scale_on_overflow() -> None:
    engine, plain = make_engine("fp16"), make_engine("fp32")
    for e in (engine, plain):
        e.backward(loss_of(e, 1), last_micro_batch=True)
    result, expected = engine.step(1e-3), plain.step(1e-3)
    assert result.loss_scale == 2**16
    assert result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    for a, b in zip(engine.module.parameters(), plain.module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    engine.backward(loss_of(engine, 2) * 1e38, last_micro_batch=True)
    assert engine.step(1e-3).skipped
    engine.backward(loss_of(engine, 3), last_micro_batch=True)
    assert engine.step(1e-3).loss_scale == 2**15


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_saving_and_loading_goes_on_to_the_bit(precision: str, tmp_path: Path) -> None:
    engine = make_engine(precision)
    for step in range(3):
        engine.backward(
            loss_of(engine, step) * (1e38 if step == 1 and precision == "fp16" else 1), last_micro_batch=True
        )
        engine.step(1e-2)
    other = make_engine(precision, seed=7)
    hand_over(engine, other, tmp_path)
    assert (other.scale.value, other.scale.finite_steps) == (engine.scale.value, engine.scale.finite_steps)
    for step in range(3, 6):
        results = []
        for e in (engine, other):
            e.backward(loss_of(e, step), last_micro_batch=True)
            results.append(e.step(1e-2))
        assert results[0] == results[1]
    for a, b in zip(engine.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_moments_are_saved_under_their_names() -> None:
    engine = make_engine(clip_norm=0.0)
    loss_of(engine, 1).backward()
    gradients = {name: p.grad.clone() for name, p in engine.module.named_parameters() if p.grad is not None}
    engine.optimizer.zero_grad()
    engine.backward(loss_of(engine, 1), last_micro_batch=True)
    engine.step(1e-2)
    saved = {piece.name: piece.data.view(piece.shape) for piece in engine.state()[OPTIMIZER] if piece.shape}
    for name, gradient in gradients.items():
        torch.testing.assert_close(saved[f"exp_avg.{name}"], (1 - 0.9) * gradient)
        torch.testing.assert_close(saved[f"exp_avg_sq.{name}"], (1 - 0.95) * gradient**2)


def test_a_checkpoint_before_the_first_step_loads(tmp_path: Path) -> None:
    engine, other = make_engine(), make_engine(seed=1)
    hand_over(engine, other, tmp_path)
    for e in (engine, other):
        e.backward(loss_of(e, 1), last_micro_batch=True)
        e.step(1e-2)
    for a, b in zip(engine.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(a, b)
