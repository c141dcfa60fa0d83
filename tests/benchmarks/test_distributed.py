"""Bytes are counted where every caller passes, by hand and by the system; times are taken apart as they are said to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks import disk
from benchmarks.distributed import ENGINES, WORLD, share_of
from benchmarks.shapes import shape
from benchmarks.traffic import Meter, minimum, tcp_bytes_sent, tensor_bytes
from mamba_pretrain.distributed.ranks import Ranks
from mamba_pretrain.model.flops import parameters_by_part
from tests.helpers.processes import on_ranks

N = 250_000  # floats: a million bytes


def operations(ranks: Ranks) -> dict[str, tuple[int, int, float, int]]:
    """Each operation once: its calls, its tensors' bytes, what was sent by count and by TCP."""
    whole, part = torch.zeros(N), torch.zeros(N // 2)
    calls = {
        "all-reduce": lambda: dist.all_reduce(whole),
        "all-gather": lambda: dist.all_gather_into_tensor(whole, part),
        "all-gather of a list": lambda: dist.all_gather(list(torch.zeros(N).chunk(2)), part),
        "reduce-scatter": lambda: dist.reduce_scatter_tensor(part, whole),
        "reduce-scatter of a list": lambda: dist.reduce_scatter(part, list(whole.chunk(2))),
        "asynchronous": lambda: dist.all_reduce(whole, async_op=True).wait(),
        "broadcast": lambda: dist.broadcast(whole, 0),
    }
    told = {}
    with Meter() as meter:
        for name, call in calls.items():
            dist.barrier()
            meter.take()
            before = tcp_bytes_sent()
            call()
            taken = meter.take()
            assert taken.seconds > 0
            (count,) = taken.operations.values()
            dist.barrier()
            told[name] = (count.calls, count.tensor_bytes, taken.sent, tcp_bytes_sent() - before)
    assert dist.ProcessGroup.allreduce.__name__ == "allreduce"  # all is as it was
    return told


def test_operations_are_counted_as_by_hand_and_as_by_the_system() -> None:
    by_rank = on_ranks(2, operations)
    for told in by_rank:
        assert {name: one[:3] for name, one in told.items()} == {
            "all-reduce": (1, 1_000_000, 1_000_000),
            "all-gather": (1, 1_000_000, 500_000),
            "all-gather of a list": (1, 1_000_000, 500_000),
            "reduce-scatter": (1, 1_000_000, 500_000),
            "reduce-scatter of a list": (1, 1_000_000, 500_000),
            "asynchronous": (1, 1_000_000, 1_000_000),
            "broadcast": (1, 1_000_000, 500_000),  # rank 0 sends all of it, rank 1 nothing
        }
    sent = {name: sum(told[name][3] for told in by_rank) / 2 for name in by_rank[0]}
    if not any(sent.values()):
        pytest.skip("this system does not count what a connection sends")
    for name in ("all-reduce", "all-gather", "all-gather of a list", "asynchronous", "broadcast"):
        assert sent[name] == pytest.approx(by_rank[0][name][2], rel=0.02), name


def test_the_bytes_of_nested_lists_are_added_up() -> None:
    assert tensor_bytes([[torch.zeros(3), torch.zeros(2, dtype=torch.bfloat16)], torch.zeros(1)]) == 20
    assert tensor_bytes(None) == 0


@pytest.mark.parametrize(
    ("engine", "micro_batches", "gathers", "reductions"),
    [("zero-1", 2, 1, 1), ("zero-2", 1, 1, 1), ("zero-2", 3, 1, 3), ("hsdp", 2, 1, 1)],
)
def test_the_least_of_engines_with_whole_parameters(
    engine: str, micro_batches: int, gathers: int, reductions: int
) -> None:
    """Half of the bytes for each gather and each reduce-scatter; an all-reduce is one of each."""
    options = ["model.n_layer=2", "model.vocab_size=64", "train.micro_batch_size=1", *ENGINES[engine]]
    config = shape("130m", 32, WORLD * micro_batches, options)
    whole = 4 * sum(parameters_by_part(config.model).values())
    assert minimum(config, WORLD) == (gathers + reductions) * whole / 2


@pytest.mark.parametrize(("engine", "reductions"), [("zero-3", 2), ("fsdp", 1)])
def test_the_least_of_engines_with_sharded_parameters(engine: str, reductions: int) -> None:
    """Two micro-batches: blocks are gathered four times, embedding and last norm twice."""
    options = ["model.n_layer=2", "model.vocab_size=64", "train.micro_batch_size=1", *ENGINES[engine]]
    config = shape("130m", 32, 2 * WORLD, options)
    whole = 4 * sum(parameters_by_part(config.model).values())
    root = 4 * (64 * 768 + 768)
    assert minimum(config, WORLD) == (4 * (whole - root) + 2 * root + reductions * whole) / 2


def test_a_single_process_sends_nothing() -> None:
    assert minimum(shape("130m", 32, 2, ["model.vocab_size=64"]), 1) == 0


def test_a_share_has_its_part_of_a_sharded_update() -> None:
    rounds: list[dict[str, Any]] = [
        {"seconds": 10.0, "updating": 4.0, "processor": 5.0},
        {"seconds": 12.0, "updating": 2.0, "processor": 6.0},
    ]
    assert share_of(rounds, 1) == 11.0
    assert share_of(rounds, 2) == 11.0 - 1.5
    assert share_of(rounds, 2, "processor") == (11.0 - 1.5) / 2


def test_dd_writes_and_reads_what_it_is_given(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    disk.make_source(source, 100_000)
    assert disk.write(source, target) > 0
    assert target.read_bytes() == source.read_bytes()
    disk.evict(source, tmp_path)
    assert disk.read(target) > 0
