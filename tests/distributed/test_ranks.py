"""Which process of how many, as every launcher says it; and the small talk among real ranks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from mamba_pretrain.config import ConfigError
from mamba_pretrain.data.shards import ShardError
from mamba_pretrain.distributed import meeting
from mamba_pretrain.distributed.ranks import ALONE, PeerError, Ranks, connected, find_ranks, first_host
from mamba_pretrain.train import require_shared
from tests.helpers.processes import free_port, in_processes, on_ranks
from tests.helpers.runs import ROOT

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
DEEPSPEED = {
    "RANK": "2",
    "WORLD_SIZE": "5",
    "LOCAL_RANK": "2",
    "LOCAL_SIZE": "3",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_PROCID": "9",
    "SLURM_STEP_NUM_TASKS": "11",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_ID": "3",
    "SLURM_JOB_ID": "123457",
    "SLURM_NTASKS": "11",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
    "SLURM_STEP_NODELIST": "gpu[07-08],login1",
}
# The shell of a batch script: what the whole job has, and no step.
BATCH = {
    "SLURM_JOB_ID": "7",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_TASKS_PER_NODE": "4(x2)",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_NODELIST": "gpu[07-08]",
}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, ALONE),
        (TORCHRUN, Ranks(5, 8, 1, 4, "node0:29400")),
        (DEEPSPEED, Ranks(2, 5, 2, 3, "10.0.0.1:29500")),
        ({**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, "alone"),
        (SRUN, Ranks(9, 11, 1, 3, f"gpu07:{20000 + (123457 + 97 * 3) % 12000}")),
        ({**SRUN, "MASTER_PORT": "29500"}, Ranks(9, 11, 1, 3, "gpu07:29500")),
        ({**SRUN, "MASTER_ADDR": "ib7", "WORLD_SIZE": "11"}, Ranks(9, 11, 1, 3, None)),
        ({**SRUN, "SLURM_PROCID": "7", "SLURM_LOCALID": "3", "SLURM_NODEID": "1"}, Ranks(7, 11, 3, 4, None)),
        ({**SRUN, **TORCHRUN}, Ranks(5, 8, 1, 4, "node0:29400")),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, ALONE),
        (BATCH, ALONE),
        ({**BATCH, "SLURM_STEP_ID": "4294967291"}, ALONE),  # the batch script's own step
        ({**BATCH, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, ALONE),  # salloc's shell
    ],
)
def test_every_launcher_is_understood(environ: dict[str, str], expected: Ranks | str) -> None:
    found = find_ranks(environ)
    if expected == "alone":
        assert (found.rank, found.world, found.local_rank, found.local_world) == (0, 1, 0, 1)
        return
    assert isinstance(expected, Ranks)
    if expected.master is None:
        assert found.master.partition(":")[0] == environ.get("MASTER_ADDR", "gpu07")
        expected = Ranks(expected.rank, expected.world, expected.local_rank, expected.local_world, found.master)
    assert found == expected


def without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, "RANK are set in the environment, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE are set in the environment, RANK, LOCAL_RANK"),
        (without(TORCHRUN, "MASTER_PORT"), "MASTER_ADDR are set in the environment, MASTER_PORT not"),
        ({**TORCHRUN, "RANK": "8"}, r"RANK=8, WORLD_SIZE=8, .*: rank 8 of 8, 1 of 4"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, "LOCAL_RANK=4, LOCAL_WORLD_SIZE=4"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE=9"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK is '-1' in the environment: expected a number"),
        ({**TORCHRUN, "MASTER_PORT": "any"}, "MASTER_PORT is 'any'"),
        (without(SRUN, "SLURM_LOCALID", "SLURM_NODEID"), "SLURM_LOCALID, SLURM_NODEID not"),
        (without(SRUN, "SLURM_STEP_NUM_TASKS"), "SLURM_STEP_NUM_TASKS is ''"),
        ({**SRUN, "SLURM_NODEID": "3"}, "SLURM_NODEID is 3, SLURM_STEP_TASKS_PER_NODE is 4\\(x2\\),3, 3 node"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4x2"}, "SLURM_STEP_TASKS_PER_NODE is '4x2': expected numbers"),
        ({**SRUN, "SLURM_LOCALID": "3"}, "SLURM_LOCALID=3, SLURM_STEP_TASKS_PER_NODE=4\\(x2\\),3: .* 3 of 3"),
        ({**SRUN, "WORLD_SIZE": "8"}, "WORLD_SIZE is 8, and srun started 11 tasks"),
        ({**SRUN, "SLURM_STEP_NODELIST": ","}, "SLURM_STEP_NODELIST is ','"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, "mpirun started this"),
    ],
)
def test_incomplete_and_contradictory_environments_are_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_ranks(environ)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("gpu7", "gpu7"),
        ("gpu7,gpu9", "gpu7"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("gpu[12,14-16]", "gpu12"),
        ("login1,gpu[07-09]", "login1"),
        ("rack[1-2]-ib", "rack1-ib"),
        ("rack[0-1]node[003-120],x", "rack0node003"),
        ("a-b.example.org,c", "a-b.example.org"),
    ],
)
def test_the_first_host_of_a_nodelist(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


def test_alone_all_talk_is_a_no_op() -> None:
    assert ALONE.sum(1.5, True) == [1.5, True]
    assert ALONE.gather("x") == ["x"]
    assert ALONE.broadcast("x") == "x"
    with pytest.raises(OSError, match="mine"), ALONE.together():
        raise OSError("mine")


def _talk(ranks: Ranks) -> dict[str, Any]:
    said: dict[str, Any] = {
        "sum": ranks.sum(ranks.rank, 0.1, 2**52 if ranks.first else 1),
        "gather": ranks.gather({"rank": ranks.rank}),
        "broadcast": ranks.broadcast(f"from {ranks.rank}"),
    }
    with ranks.together():
        said["well"] = True
    try:
        with ranks.together():
            if ranks.rank:
                raise FileNotFoundError(f"no disk on {ranks.rank}")
    except FileNotFoundError as error:
        said["own"] = str(error)
    except PeerError as error:
        said["peer"] = str(error)
    try:
        with ranks.together():
            if ranks.first:
                raise ValueError
    except (ValueError, PeerError) as error:
        said["nameless"] = str(error)
    try:
        with ranks.together():
            if ranks.rank:
                raise ShardError("no shard")
    except ShardError as error:
        said["same"] = str(error)
    except PeerError as error:
        said["same"] = f"peer: {error}"
    return said


def test_ranks_add_up_gather_and_fail_together() -> None:
    told = on_ranks(3, _talk)
    for rank, said in enumerate(told):
        assert said["sum"] == [3.0, pytest.approx(0.3, rel=1e-15), 2**52 + 2]  # in double precision
        assert said["gather"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert said["broadcast"] == "from 0"
        assert said["well"]
        if rank:
            assert said["own"] == f"no disk on {rank}"
            assert said["nameless"] == "rank 0 of 3 failed: ValueError"
    assert told[0]["peer"] == "rank 1 of 3 failed: no disk on 1"
    peer = "peer: rank 1 of 3 failed: no shard"
    assert [said["same"] for said in told] == [peer, "no shard", peer], "the same is said by the first that found it"


def test_a_run_directory_that_is_not_shared_is_found_before_a_step(tmp_path: Path) -> None:
    def work(ranks: Ranks, own: bool) -> str:
        directory = tmp_path / (f"of {ranks.rank}" if own else "shared")
        directory.mkdir(exist_ok=True)
        try:
            require_shared(directory, ranks)
        except (ConfigError, PeerError) as error:
            return str(error)
        return "shared"

    assert on_ranks(2, work, False) == ["shared"] * 2
    assert all("of rank 1" in text and "that all ranks share" in text for text in on_ranks(2, work, True))
    assert [path.name for directory in tmp_path.iterdir() for path in directory.iterdir()] == []


def _meet(port: int, coming: list[int]) -> str:
    os.environ["MASTER_PORT"] = str(port)
    ranks = find_ranks()
    if ranks.rank not in coming:
        return "stays away"
    try:
        with connected(ranks, torch.device("cpu")):
            return "met"
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize("listener", ["silent", "store"])
def test_a_taken_meeting_point_ends_every_rank_soon(listener: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store of an orphan, which knows other ranks' greetings, or a program that never answers."""
    monkeypatch.setattr(meeting, "ANSWER", timedelta(seconds=1))
    port = free_port()
    if listener == "store":
        taken: Any = TCPStore("127.0.0.1", port, 2, True, timedelta(seconds=9), wait_for_workers=False)
        taken.set("greeting/1", "earlier")
        taken.set("welcome/earlier", "")
    else:
        taken = socket.create_server(("127.0.0.1", port))
    for rank, said in enumerate(in_processes(2, _meet, port, [0, 1], timeout_s=30)):
        assert f"rank {rank} on {socket.gethostname()} cannot meet the others at 127.0.0.1:{port}" in said
        assert "another process listens there, perhaps an earlier run: end it, or choose another MASTER_PORT" in said
    del taken


@pytest.mark.slow
def test_a_rank_leaves_with_its_own_code_though_a_thread_of_gloo_still_waits_for_python() -> None:
    """Which would abort it: `sys.exit(75)` in the last line ends this script with SIGABRT."""
    script = (
        "import atexit, os, signal, sys, time, torch, torch.distributed as dist\n"
        "from mamba_pretrain.distributed.env import leave\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "group = dist.group.WORLD\n"
        "sys.setswitchinterval(1000)  # the thread waits until this one waits for something\n"
        "dist.all_reduce(torch.ones(1), async_op=True)\n"
        "end = time.perf_counter() + 0.3\n"
        "while time.perf_counter() < end: pass\n"
        "atexit.register(os.write, 1, b'at exit')\n"
        "print('said', end=' ', flush=True)\n"
        "sys.stdout = None  # as where it was closed before\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGTERM)\n"
        "leave(75)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stdout) == (75, "said at exit"), done.stderr


@pytest.mark.slow
def test_a_rank_that_never_comes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "CONNECT", timedelta(seconds=3))
    said = in_processes(4, _meet, free_port(), [0, 2], timeout_s=60)
    assert "no sign of rank 1, 3 in 3 s" in said[0]
    assert "cannot meet the others" in said[2]
