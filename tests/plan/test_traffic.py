"""Bytes sent in a step: by hand, and as the engines' own collectives count them."""

from __future__ import annotations

import pytest

from mamba_pretrain.config import Config
from mamba_pretrain.plan.traffic import collectives
from tests.helpers.memory import ENGINES, PRECISION, counted_collectives, step_config
from tests.helpers.processes import on_ranks

SHAPE = ["model.d_model=64", "model.n_layer=4", "model.vocab_size=1000"]
# By hand: 4 blocks of in_proj 2*128*64, conv 128*4 + 128, x_proj 128*(4 + 32), dt_proj 128*4 + 128, A_log 128*16,
# D 128, out_proj 128*64, norm 64; embedding 1000*64; final norm 64.
BLOCKS = 4 * 4 * (16384 + 640 + 4608 + 640 + 2048 + 128 + 8192 + 64)
ROOT = 4 * (64_000 + 64)
WHOLE = BLOCKS + ROOT


def config_of(engine: str, world: int, micro_batches: int, *options: str) -> Config:
    return step_config(world, 1, 32, *SHAPE, *ENGINES[engine][1], PRECISION, *options, micro_batches=micro_batches)


@pytest.mark.parametrize(
    ("engine", "world", "sent"),
    [
        ("single", 1, 0),
        # Reduce to the owners once, gather once: 2 (n - 1) / n of all.
        ("zero-1", 4, 2 * WHOLE * 3 // 4),
        # Reduce for each of 3 micro-batches, gather once.
        ("zero-2", 4, (3 + 1) * WHOLE * 3 // 4),
        # Gathered twice a micro-batch but for the embedding and the last two blocks, which stay; scattered each time.
        ("zero-3", 4, 3 * (3 * WHOLE - ROOT - BLOCKS // 2) * 3 // 4),
        # Embedding once, blocks twice a micro-batch; scattered once.
        ("fsdp", 4, (3 * (ROOT + 2 * BLOCKS) + WHOLE) * 3 // 4),
        # The same within pairs, and an all-reduce of each half between the two pairs.
        ("hsdp", 4, (3 * (ROOT + 2 * BLOCKS) + WHOLE) // 2 + WHOLE // 2),
    ],
)
def test_bytes_sent_by_a_rank(engine: str, world: int, sent: int) -> None:
    assert sum(c.sent for c in collectives(config_of(engine, world, 3), world)) == sent


def test_parameters_that_stay_are_gathered_once() -> None:
    stays = config_of("fsdp", 4, 3, "fsdp.reshard_after_forward=false")
    assert sum(c.sent for c in collectives(stays, 4)) == (3 * WHOLE + WHOLE) * 3 / 4


@pytest.mark.parametrize("engine", ["fsdp", *(pytest.param(e, marks=pytest.mark.slow) for e in ("zero-3", "hsdp"))])
def test_the_engines_move_what_the_formula_says(engine: str) -> None:
    world = ENGINES[engine][0]
    config = config_of(engine, world, 2)
    due: dict[str, int] = {}
    for c in collectives(config, world):
        due[c.kind] = due.get(c.kind, 0) + c.tensor_bytes * c.times
    found = on_ranks(world, counted_collectives, config)[0]
    for kind, moved in due.items():
        assert found[kind] == pytest.approx(moved, rel=0.01), kind  # shards are padded
