"""What each engine owes the model: live dtypes, decay by name, initial values, memory; and its own options."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mamba_pretrain.build import Run, build
from mamba_pretrain.config import Config, DataConfig, ModelConfig, TrainConfig, ZeroConfig
from mamba_pretrain.data.packing import IGNORE
from mamba_pretrain.distributed import env
from mamba_pretrain.distributed.engines import make_engine
from mamba_pretrain.distributed.ranks import ALONE, Ranks
from mamba_pretrain.distributed.zero import deepspeed_config
from mamba_pretrain.model.law import decays, initial_value
from mamba_pretrain.model.lm import MambaLM
from mamba_pretrain.train import steps
from tests.helpers.engines import CURVE, ENGINES, Curve, alone, relative, train
from tests.helpers.marks import slow_but
from tests.helpers.memory import LiveBytes
from tests.helpers.processes import on_ranks
from tests.helpers.runs import small_config

FP32_KINDS = ("A_log", ".D", "dt_proj.bias", "norm.weight", "norm_f.weight")


def names(engine: str) -> tuple[int, list[str]]:
    return (1, []) if engine == "single" else ENGINES[engine]


def live_dtypes(ranks: Ranks, dataset: Path, run_dir: Path, options: list[str]) -> dict[str, Any]:
    """What the mixers and norms compute with in a bf16 step, seen from within the forward pass."""
    torch.set_num_threads(1)
    run = build(small_config(dataset, run_dir, *CURVE, "train.precision=bf16", *options), ranks)
    seen: dict[str, set[str]] = {}
    products: set[torch.dtype] = set()

    def look(module: Any, inputs: Any) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            seen.setdefault(f"{type(module).__name__}.{name}", set()).add(f"{parameter.dtype} {parameter.ndim}d")
        for child, parameter in module.named_parameters():
            seen.setdefault(child, set()).add(str(parameter.dtype))

    from mamba_pretrain.ops import mamba_inner as inner

    original = inner.mamba_inner

    def watched(hidden: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        products.add(hidden.dtype)
        for place, tensor in zip(("dt_proj.bias", "A", "D"), arguments[6:9], strict=True):
            seen.setdefault(f"computed {place}", set()).add(str(tensor.dtype))
        return original(hidden, *arguments, **named)

    from mamba_pretrain.model import mixer

    mixer.mamba_inner = watched
    for module in run.engine.module.modules():
        if type(module).__name__ in ("Mixer", "RMSNorm", "FSDPRMSNorm"):
            module.register_forward_pre_hook(look)
    next(steps(run))
    return {"seen": {key: sorted(value) for key, value in seen.items()}, "products": {str(p) for p in products}}


@pytest.mark.parametrize("engine", slow_but(["single", "fsdp-2"], ["single", *ENGINES]))
def test_in_bf16_what_must_be_fp32_is_fp32_within_the_forward_pass(engine: str, dataset: Path, tmp_path: Path) -> None:
    world, options = names(engine)
    arguments = (dataset, tmp_path, options)
    found = on_ranks(world, live_dtypes, *arguments)[0] if world > 1 else live_dtypes(ALONE, *arguments)
    seen = found["seen"]
    assert found["products"] == {"torch.bfloat16"}, "the rest is really mixed precision"
    assert seen["Mixer.A_log"] == ["torch.float32 2d"], "gathered, and fp32"
    assert seen["Mixer.D"] == ["torch.float32 1d"]
    assert seen["RMSNorm.weight"] == ["torch.float32 1d"]
    assert seen["dt_proj.bias"] == ["torch.float32"]
    for kind in ("dt_proj.bias", "A", "D"):
        assert seen[f"computed {kind}"] == ["torch.float32"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_bf16_curves_lie_in_a_narrow_band_around_one_process(
    name: str, dataset: Path, tmp_path: Path, bf16_reference: Curve
) -> None:
    world, options = ENGINES[name]
    curve = on_ranks(world, train, dataset, tmp_path, *options, "train.precision=bf16")[0]
    apart = curve.apart(bf16_reference)
    print(f"{name}, bf16: {apart}")
    assert apart.losses < 1e-4 and apart.norms < 1e-3 and apart.weights < 2e-3, apart


@pytest.fixture(scope="module")
def bf16_reference(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Curve:
    return alone(dataset, tmp_path_factory.mktemp("bf16"), "train.precision=bf16")


def decay_only(ranks: Ranks, dataset: Path, run_dir: Path, options: list[str]) -> dict[str, float]:
    """By how much a step with zero gradients shrinks each parameter."""
    run = build(small_config(dataset, run_dir, *CURVE, *options), ranks)
    before = {name: p.clone() for name, p in run.engine.full_parameters()}
    config = run.config
    ids = torch.zeros(config.train.micro_batch_size, 32, dtype=torch.long)
    labels = torch.full_like(ids, 1)
    for i in range(config.accumulation(ranks.world)):
        loss = run.engine.module(ids, labels, return_state=False).loss_sum * 0.0
        run.engine.backward(loss, last_micro_batch=i == config.accumulation(ranks.world) - 1)
    assert not run.engine.step(1e-1).skipped
    vocab = config.model.need("vocab_size")
    found = {}
    for name, after in run.engine.full_parameters():
        rows = slice(0, vocab) if name.endswith("embedding.weight") else slice(None)
        if name.endswith("embedding.weight"):
            assert torch.equal(after[vocab:], before[name][vocab:]), "padding rows of the vocabulary never move"
            assert vocab < config.model.padded_vocab_size
        found[name] = 1 - float(after[rows].norm() / before[name][rows].norm())
    assert run.engine.decay_of.keys() == found.keys()
    return found


@pytest.mark.parametrize("engine", slow_but(["single", "fsdp-2"], ["single", *ENGINES]))
def test_decay_goes_by_name_and_padding_rows_stay(engine: str, dataset: Path, tmp_path: Path) -> None:
    world, options = names(engine)
    arguments = (dataset, tmp_path, options)
    found = on_ranks(world, decay_only, *arguments)[0] if world > 1 else decay_only(ALONE, *arguments)
    model = ModelConfig(d_model=32, n_layer=3, vocab_size=257)
    for name, shrunk in found.items():
        assert shrunk == pytest.approx(0.1 * 0.3 if decays(name, model) else 0.0, abs=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fsdp-2", ["fsdp.offload=true"]),
        ("fsdp-2", ["fsdp.reshard_after_forward=false", "fsdp.prefetch=0"]),
        ("fsdp-2", ["train.activation_checkpointing=true", "fsdp.prefetch=2"]),
        ("fsdp-2", ["model.tie_embeddings=false"]),
        ("zero-1", ["zero.offload_optimizer=true"]),
        ("zero-2", ["zero.offload_optimizer=true", "train.activation_checkpointing=true"]),
        ("zero-3", ["zero.offload_optimizer=true", "zero.offload_parameters=true"]),
        ("zero-3", ["zero.offload_parameters=true"]),
        ("zero-3", ["train.activation_checkpointing=true"]),
        ("zero-3", ["model.tie_embeddings=false"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_options_change_where_things_lie_and_not_the_curve(
    name: str, options: list[str], dataset: Path, tmp_path: Path
) -> None:
    world, engine = ENGINES[name]
    shared = [o for o in options if o.startswith(("model.", "train."))] + ["train.steps=6"]
    expected = alone(dataset, tmp_path / "alone", *shared)
    found = on_ranks(world, train, dataset, tmp_path / "ranks", *engine, *options, "train.steps=6")[0]
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.norms == pytest.approx(expected.norms, rel=1e-5)
    assert all(relative(found.weights[key], whole) < 1e-5 for key, whole in expected.weights.items())


@pytest.mark.slow
def test_compiled_blocks_follow_the_curve(dataset: Path, tmp_path: Path) -> None:
    small = ["train.steps=3", "model.n_layer=1"]
    expected = alone(dataset, tmp_path / "alone", *small)
    options = ["train.engine=fsdp", "fsdp.compile_blocks=true", *small]
    found = on_ranks(2, train, dataset, tmp_path / "ranks", *options, timeout_s=400)[0]
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert all(relative(found.weights[key], whole) < 1e-5 for key, whole in expected.weights.items())


def test_targets_are_spread_unevenly_over_ranks(dataset: Path, tmp_path: Path) -> None:
    """Else the parity of the curves would not show that the loss is normalised by the global number of targets."""

    def counts(ranks: Ranks) -> list[int]:
        run = build(small_config(dataset, tmp_path, *CURVE, *ENGINES["fsdp-2"][1]), ranks)
        found: list[int] = []
        from mamba_pretrain import train as trainer

        original = trainer._loss_sum

        def counting(run: Run, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            found.append(int((batch["labels"] != IGNORE).sum()))
            return original(run, batch)

        trainer._loss_sum = counting
        list(itertools.islice(steps(run), 5))
        return found

    first, second = on_ranks(2, counts)
    assert sum(a != b for a, b in zip(first, second, strict=True)) >= len(first) / 4


def fp16_steps(ranks: Ranks, dataset: Path, run_dir: Path, options: list[str]) -> list[tuple[float, bool, float]]:
    """Steps of which the second overflows on the last rank, as they were told."""
    env.fp16_is_native = lambda device: True
    from mamba_pretrain import train as trainer

    torch.set_num_threads(1)
    run = build(small_config(dataset, run_dir, *CURVE, "train.precision=fp16", "train.steps=4", *options), ranks)
    original = trainer._loss_sum

    def loss_sum(run: Run, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        big = run.state.step == 1 and ranks.rank == ranks.world - 1
        return original(run, batch) * (1e38 if big else 1.0)

    trainer._loss_sum = loss_sum
    return [(step.loss, step.result.skipped, step.result.loss_scale) for step in steps(run)]


@pytest.mark.parametrize("name", slow_but(["fsdp-2"], ["zero-1", "zero-2", "zero-3", "fsdp-2"]))
def test_fp16_scales_the_loss_and_halves_the_scale_together(name: str, dataset: Path, tmp_path: Path) -> None:
    world, options = ENGINES[name]
    expected = fp16_in_a_process(dataset, tmp_path / "alone")
    found = on_ranks(world, fp16_steps, dataset, tmp_path / "ranks", options)
    for told in found:
        assert [step[1:] for step in told] == [step[1:] for step in expected]
        assert [skipped for _, skipped, _ in told] == [False, True, False, False]
        assert [scale for _, _, scale in told] == [2.0**16, 2.0**16, 2.0**15, 2.0**15]
        for mine, theirs in zip(told, expected, strict=True):
            assert math.isclose(mine[0], theirs[0], rel_tol=2e-4) or mine[1]


def fp16_in_a_process(dataset: Path, run_dir: Path) -> list[tuple[float, bool, float]]:
    """One rank in a process of its own: the changes it makes to modules end with it."""
    return on_ranks(1, fp16_steps, dataset, run_dir, ["train.engine=single"])[0]


DEEP = ModelConfig(d_model=32, n_layer=20, vocab_size=64)  # many parameters, none of them large


@pytest.mark.parametrize(
    ("name", "made", "ready"),
    [
        # Bytes a parameter on each of four ranks. FSDP2 makes the model on the meta device; a quarter of 12 bytes
        # (parameter and moments) is made after. ZeRO-3 cuts each parameter up as it is made: a quarter of 4; then come
        # moments, partitions of gradients, and a flat copy. A whole model would add 4 to any of these.
        ("fsdp", 0.0, 3.0),
        pytest.param("zero-3", 1.0, 5.0, marks=pytest.mark.slow),
    ],
)
def test_a_sharded_model_never_exists_whole_on_one_rank(name: str, made: float, ready: float) -> None:
    def peaks(ranks: Ranks) -> tuple[int, int]:
        train = TrainConfig(steps=1, engine="fsdp" if name == "fsdp" else "zero")
        config = Config(model=DEEP, data=DataConfig(seq_len=32), train=train, zero=ZeroConfig(stage=3))
        with torch.device("meta"):
            shapes = {key: p.shape for key, p in MambaLM(DEEP).named_parameters()}
        at = []

        def make_model() -> MambaLM:
            model = MambaLM(DEEP)
            at.append(live.peak)
            return model

        def value(key: str) -> torch.Tensor:
            return initial_value(key, shapes[key], DEEP, 0)

        with LiveBytes() as live:
            engine = make_engine(make_model, value, config, torch.device("cpu"), ranks)
            for key, whole in engine.full_parameters():
                assert torch.equal(whole, value(key)), key
        return at[0], live.peak

    with torch.device("meta"):
        n_parameters = sum(p.numel() for p in MambaLM(DEEP).parameters())
    for after_making, in_all in on_ranks(4, peaks):
        assert after_making / n_parameters == pytest.approx(made, abs=0.7)
        assert in_all / n_parameters == pytest.approx(ready, abs=0.7)


def test_deepspeeds_configuration_follows_from_ours() -> None:
    train = TrainConfig(steps=1, batch_tokens=64 * 512, micro_batch_size=4)
    config = Config(model=DEEP, train=train, data=DataConfig(seq_len=512))
    config.zero = ZeroConfig(stage=3, offload_optimizer=True, offload_parameters=True)
    derived = deepspeed_config(config, 8)
    assert derived["train_batch_size"] == 64
    assert derived["train_micro_batch_size_per_gpu"] * derived["gradient_accumulation_steps"] * 8 == 64
    assert derived["zero_optimization"]["stage"] == 3
    assert derived["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert "bf16" not in derived, "DeepSpeed's own modes round A_log and D"
    assert "fp16" not in derived
