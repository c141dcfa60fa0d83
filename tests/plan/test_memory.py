"""The memory of a rank by formula, against what real engines hold.

Two measures. Bytes of tensors alive are exact, the same on every machine and at any size: most cases compare those.
Resident memory is what the system counts, an operation's own buffers included; it takes large models, and minutes.
Both are taken in bf16, and in fp32 where bf16 is emulated.
"""

from __future__ import annotations

import pytest

from mamba_pretrain.plan.memory import moments, peak
from tests.helpers.memory import ENGINES, PRECISION, live_peak, resident_peak, step_config
from tests.helpers.processes import on_ranks

SIZES = {
    "small": (2, 256, ["model.d_model=256", "model.n_layer=4", "model.vocab_size=8000"]),
    "middle": (2, 256, ["model.d_model=512", "model.n_layer=8", "model.vocab_size=16000"]),
    "large": (1, 128, ["model.d_model=1024", "model.n_layer=8", "model.vocab_size=50277"]),
}
AGAIN = "train.activation_checkpointing=true"
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("engine", "size", "micro_batches", "options"),
    [
        ("single", "small", 2, []),
        pytest.param("zero-2", "small", 2, [], marks=slow),
        pytest.param("zero-3", "small", 1, [AGAIN], marks=slow),
        pytest.param("fsdp", "small", 2, [AGAIN], marks=slow),
        *(
            pytest.param(engine, size, micro_batches, options, marks=slow)
            for engine in ENGINES
            for size, micro_batches, options in (("small", 1, []), ("small", 2, [AGAIN]), ("middle", 1, []))
        ),
        pytest.param("fsdp", "middle", 1, ["fsdp.reshard_after_forward=false"], marks=slow),
        pytest.param("zero-3", "middle", 1, ["train.precision=fp32"], marks=slow),
    ],
)
def test_the_peak_is_that_of_the_tensors_alive(engine: str, size: str, micro_batches: int, options: list[str]) -> None:
    world, words = ENGINES[engine]
    rows, length, shape = SIZES[size]
    config = step_config(world, rows, length, *shape, *words, PRECISION, *options, micro_batches=micro_batches)
    found = max(on_ranks(world, live_peak, config, timeout_s=600))
    assert sum(peak(config, world, "native")[1].values()) == pytest.approx(found, rel=0.06), moments(
        config, world, "native"
    )


@slow
@pytest.mark.parametrize(
    ("engine", "micro_batches", "options"),
    [*((engine, 1, []) for engine in ("single", "zero-2", "zero-3", "fsdp")), ("zero-1", 2, [AGAIN])],
)
def test_the_peak_is_that_of_the_process(engine: str, micro_batches: int, options: list[str]) -> None:
    world, words = ENGINES[engine]
    rows, length, shape = SIZES["large"]
    config = step_config(world, rows, length, *shape, *words, PRECISION, *options, micro_batches=micro_batches)
    found = max(on_ranks(world, resident_peak, config, timeout_s=900))
    # One of the embedding's two gradients is zeros but for the rows of the batch's tokens: pages that nobody touches.
    untouched = {"end": 4 * config.model.padded_vocab_size * config.model.need("d_model")}
    planned = moments(config, world, "native")
    expected = max(sum(parts.values()) - untouched.get(name, 0) for name, parts in planned.items())
    assert expected == pytest.approx(found, rel=0.1), planned
