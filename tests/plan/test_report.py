"""The command: its tables, its JSON, its answer, its refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from mamba_pretrain.cli import main
from mamba_pretrain.config import load
from mamba_pretrain.model.flops import parameters_by_part
from mamba_pretrain.plan.gpus import GPUS, peak_flops
from mamba_pretrain.plan.layouts import cheapest, compare
from mamba_pretrain.plan.memory import peak
from mamba_pretrain.plan.roofline import Assumptions, _seconds, step_time
from mamba_pretrain.plan.traffic import Collective, host_copies

RECIPE = ["plan", "--config", "configs/pretrain/1.4b.yaml"]


def test_the_tables_name_every_engine_and_every_assumption(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RECIPE, "--gpus", "16", "--gpu", "h100", "--assume", "matmul=0.5"]) == 0
    printed = capsys.readouterr().out
    names = ["zero stage 1", "zero stage 2", "zero stage 3", "fsdp", "fsdp x 2 replicas", "fsdp, recomputing"]
    for part in (
        *names,
        "matmul=0.5",
        "overlap=0.8",
        "nothing measured",
        "cheapest that fits",
        "train.engine=",
        "bf16, cuda kernels",
    ):
        assert part in printed
    assert max(map(len, printed.splitlines())) <= 160


def test_json_holds_the_same_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    assert main([*RECIPE, "--gpus", "1", "--gpu", "h200", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [layout["options"]["train.engine"] for layout in found["layouts"]] == ["single", "single"]
    memory = found["layouts"][0]["memory_bytes"]
    assert memory["parameters"] == 4 * 1_372_178_432 and memory["optimizer"] == 2 * memory["parameters"]
    assert memory["total"] == sum(size for name, size in memory.items() if name != "total")
    layout = found["layouts"][0]
    assert layout["gpu_hours"] == pytest.approx(layout["days"] * 24)
    assert f"{layout['days']:.2f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--gpus", "8", "--gpu", "h10"], "did you mean h100?"),
        (["--gpus", "0"], "--gpus is 0: it must be at least 1"),
        (["--gpus", "8", "--gpus-per-node", "0"], "--gpus-per-node is 0"),
        (["--gpus", "24"], "sequences a step cannot be divided over 24 GPUs"),
        (["--gpus", "8", "--assume", "matmull=0.5"], "did you mean matmul?"),
        (["--gpus", "8", "--assume", "matmul=1.5"], "expected a fraction"),
        (["--gpus", "8", "--assume", "matmul=fast"], "expected a fraction"),
        (["--gpus", "8", "train.kernels=native"], "train.kernels is native: the memory of GPUs is known for"),
        (["--gpus", "8", "train.kernels=reference"], "train.kernels is reference"),
        (["--gpus", "8", "--json", "nowhere/plan.json"], "there is no directory nowhere"),
        (["--gpus", "8", "model.variant=null", "model.vocab_size=null"], "model.d_model is not set"),
    ],
)
def test_what_cannot_be_planned_is_refused(words: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RECIPE, *words]) == 2
    assert reason in capsys.readouterr().err


def test_a_micro_batch_that_does_not_divide_is_lowered_and_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--config", "configs/pretrain/130m.yaml", "--gpus", "16"]
    assert main([*words, "train.micro_batch_size=32"]) == 0
    said = capsys.readouterr().out
    assert (
        "micro-batch 16: " in said
        and "The configured micro-batch of 32 does not divide the batch on 16 GPUs; the tables are for 16" in said
    )
    assert main([*words, "train.micro_batch_size=4"]) == 0
    assert "does not divide" not in capsys.readouterr().out


def test_an_unknown_gpu_has_no_peak() -> None:
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA GeForce GT 710") is None


def test_the_cheapest_is_the_fastest_of_those_that_fit() -> None:
    assume, roomy = Assumptions(), dataclasses.replace(GPUS["h100"], memory=1e15)
    config = load(["configs/pretrain/2.8b.yaml"])
    best = cheapest(config, 16, roomy, assume)
    assert best is not None and not best.options["train.activation_checkpointing"], "memory is free: nothing runs twice"
    assert best.time.total <= min(layout.time.total for layout in compare(config, 16, roomy, assume))
    tight = dataclasses.replace(roomy, memory=best.bytes * 0.5)
    smaller = cheapest(config, 16, tight, assume)
    assert smaller is not None and smaller.bytes <= tight.memory and smaller.time.total > best.time.total
    assert cheapest(config, 16, dataclasses.replace(roomy, memory=5e9), assume) is None


def test_where_whole_parameters_do_not_fit_they_are_sharded() -> None:
    config = load(
        [
            "configs/pretrain/2.8b.yaml",
        ],
        ["train.micro_batch_size=1"],
    )
    best = cheapest(config, 16, dataclasses.replace(GPUS["a100"], memory=20e9), Assumptions())
    assert best is not None
    assert best.options["train.engine"] == "fsdp" or best.options["zero.stage"] == 3


def test_offloading_frees_the_gpu_and_costs_time() -> None:
    config = load(["configs/pretrain/2.8b.yaml"], ["train.engine=zero", "train.micro_batch_size=1"])
    config.zero.stage = 2
    stays = step_time(config, 8, GPUS["a100"], Assumptions()), peak(config, 8, "cuda")[1]
    config.zero.offload_optimizer = True
    offloaded = step_time(config, 8, GPUS["a100"], Assumptions()), peak(config, 8, "cuda")[1]
    assert offloaded[1]["optimizer"] == 0 < stays[1]["optimizer"]
    assert sum(offloaded[1].values()) < sum(stays[1].values())
    assert offloaded[0].update > stays[0].update


def test_what_is_offloaded_is_copied_for_every_gathering() -> None:
    config = load(["configs/pretrain/2.8b.yaml"], ["train.engine=fsdp", "train.micro_batch_size=1"])
    p = 4 * sum(parameters_by_part(config.model).values())
    assert host_copies(config, 2) == 0
    config.fsdp.offload = True
    assert host_copies(config, 2) == 2 * config.accumulation(2) * p // 2
    slow = dataclasses.replace(GPUS["a100"], host_bandwidth=1e9)
    seconds = step_time(config, 2, slow, Assumptions(overlap=0.0)).exposed
    config.fsdp.offload = False
    assert seconds - step_time(config, 2, slow, Assumptions(overlap=0.0)).exposed == pytest.approx(
        2 * config.accumulation(2) * p / 2 / (1e9 * Assumptions().network)
    )


def test_the_cheapest_layout_is_one_that_trains() -> None:
    """With stages, whose rows a micro-batch must hold."""
    stages = "data.stages=[{}, {from_tokens: 1e9, seq_len: 16384}]"
    config = load(["configs/pretrain/130m.yaml"], [stages, "train.micro_batch_size=8", "data.path=x"])
    best = cheapest(config, 8, GPUS["l40s"], Assumptions())
    assert best is not None and best.options["train.micro_batch_size"] % 8 == 0


def test_a_group_that_straddles_nodes_is_timed_by_the_network() -> None:
    inside, across = (Collective("x", "all-gather", 2**30, ranks, 1, 1, False) for ranks in (4, 6))
    gpu = GPUS["h100"]
    assert _seconds(inside, gpu, Assumptions(), 8) == inside.sent / (gpu.peer_bandwidth * 0.7)
    assert _seconds(across, gpu, Assumptions(), 8) == across.sent / (2 * gpu.network_bandwidth * 0.7)
    assert _seconds(across, gpu, Assumptions(), 6) == across.sent / (gpu.peer_bandwidth * 0.7)


def test_a_slow_network_favours_what_sends_least() -> None:
    config = load(["configs/pretrain/1.4b.yaml"])
    slow = dataclasses.replace(GPUS["h100"], memory=1e15, network_bandwidth=1e8, peer_bandwidth=1e9)
    best = cheapest(config, 16, slow, Assumptions(overlap=0.0))
    assert best is not None
    least = min(layout.time.sent for layout in compare(config, 16, slow, Assumptions()))
    assert best.time.sent <= least


def test_a_roofline_adds_up_and_follows_its_peaks() -> None:
    config = load(["configs/pretrain/130m.yaml"])
    one = step_time(config, 1, GPUS["h100"], Assumptions())
    assert one.exposed == 0 and one.sent == 0
    # 0.783 GFLOP a token, of which the scan's are no matrix products.
    matmul = 3 * (2 * 24 * 3_538_944 + 2 * 24 * (1536 * 80 + 1536 * 48) + 2 * 50_280 * 768) * 524_288
    assert one.products == pytest.approx(matmul / (989e12 * 0.6))
    faster = step_time(config, 1, GPUS["h100"], Assumptions(matmul=1.0))
    assert one.products == pytest.approx(faster.products / 0.6)
    assert one.total - faster.total == pytest.approx(one.products - faster.products)
    eight = step_time(config, 8, GPUS["h100"], Assumptions())
    assert eight.products == pytest.approx(one.products / 8) and eight.mfu <= one.mfu
