"""The launchers across two hosts, which are network namespaces; and a host that goes away and comes back."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mamba_pretrain.checkpoint import checkpoints
from mamba_pretrain.distributed.env import EXIT_PREEMPTED
from mamba_pretrain.train import run
from tests.helpers.hosts import Hosts, two_hosts
from tests.helpers.launchers import BIN, ENVIRONMENT, Launched, train_words
from tests.helpers.runs import ROOT, losses, records, small_config

ELASTIC = [
    *("--rdzv-backend=c10d", "--rdzv-endpoint=node0:29400", "--rdzv-id=test", "--monitor-interval=0.2"),
    # A host that is silent for three seconds is gone; the others wait one second for more to come.
    "--rdzv-conf=keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=1,join_timeout=120",
]


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with two_hosts() as hosts:
        yield hosts


def on_both(hosts: Hosts, commands: list[list[object]], directory: Path, *environs: dict[str, str]) -> None:
    """Runs one command on each host, to success."""
    with contextlib.ExitStack() as stack:
        launched = [
            stack.enter_context(
                Launched(hosts.on(node, *command), directory / f"log{node}", environs[node] if environs else None)
            )
            for node, command in enumerate(commands)
        ]
        codes = [one.wait(200) for one in launched]
        assert codes == [0, 0], "\n".join(one.said[-3000:] for one in launched)


def test_hosts_have_their_names_and_reach_each_other_only(hosts: Hosts) -> None:
    serve = (
        "import socket; s = socket.create_server(('0.0.0.0', 999)); print(flush=True)\n"
        "c, (a, _) = s.accept(); c.sendall(f'{socket.gethostname()} {a}'.encode())"
    )
    ask = "import socket; print(socket.gethostname(), socket.create_connection(('node0', 999)).recv(99).decode())"
    with subprocess.Popen(hosts.on(0, sys.executable, "-c", serve), stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        server.stdout.readline()
        said = subprocess.run(hosts.on(1, sys.executable, "-c", ask), capture_output=True, text=True, timeout=30)
    assert said.stdout.split() == ["node1", "node0", "10.77.0.2"]
    with two_hosts() as others:
        apart = subprocess.run(others.on(1, sys.executable, "-c", ask), capture_output=True, text=True, timeout=30)
        assert "refused" in apart.stderr


@pytest.mark.slow
def test_torchrun(hosts: Hosts, dataset: Path, finished: Path, tmp_path: Path) -> None:
    """Who meet at the first host's address; two shards on each host, which are copies of the other's."""
    words = train_words(dataset, tmp_path / "run", "train.engine=fsdp", "fsdp.replicas=2", "train.micro_batch_size=2")
    start: list[object] = [sys.executable, "-m", "launch.torchrun", "--nnodes=2", "--nproc-per-node=2"]
    where: list[list[object]] = [["--node-rank", node, "--master-addr", "10.77.0.1"] for node in range(2)]
    on_both(hosts, [[*start, *where[node], "-m", "launch.train", *words] for node in range(2)], tmp_path)
    assert losses(tmp_path / "run") == pytest.approx(losses(finished), rel=1e-6)


@pytest.mark.slow
def test_the_deepspeed_cli_started_on_each_host(hosts: Hosts, dataset: Path, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("node0 slots=1\nnode1 slots=1\n")
    words = train_words(dataset, tmp_path / "run", "train.engine=zero", "zero.stage=3")
    cli: list[object] = [BIN / "deepspeed", "--hostfile", tmp_path / "hostfile", "--no_ssh"]
    cli += ["--master_addr", "10.77.0.1", "--master_port", 29500]
    on_both(hosts, [[*cli, "--node_rank", node, "launch/train.py", *words] for node in range(2)], tmp_path)
    assert losses(tmp_path / "run") == pytest.approx(losses(finished), rel=1e-6)


@pytest.mark.slow
def test_the_deepspeed_cli_over_ssh(hosts: Hosts, dataset: Path, finished: Path, tmp_path: Path) -> None:
    """From one host; `ssh`, and `pdsh` where it is not installed, are stand-ins."""
    (tmp_path / "hostfile").write_text("node0 slots=1\nnode1 slots=1\n")
    (tmp_path / "environment").write_text("".join(f"{name}={value}\n" for name, value in ENVIRONMENT.items()))
    words = train_words(dataset, tmp_path / "run", "train.engine=zero", "zero.stage=2")
    environ = {
        "PATH": f"{hosts.stand_ins(tmp_path / 'bin')}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "DS_ENV_FILE": str(tmp_path / "environment"),
    }
    cli = [BIN / "deepspeed", "--hostfile", tmp_path / "hostfile", "--master_port", 29500, "launch/train.py", *words]
    with Launched(hosts.on(0, *cli), tmp_path / "log", environ) as launched:
        assert launched.wait(200) == 0, launched.said
    assert losses(tmp_path / "run") == pytest.approx(losses(finished), rel=1e-6)


@pytest.mark.slow
def test_the_environment_of_srun(hosts: Hosts, dataset: Path, finished: Path, tmp_path: Path) -> None:
    """The first host of SLURM_STEP_NODELIST is where all meet."""
    words = train_words(dataset, tmp_path / "run", "train.engine=fsdp")
    common = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}
    common |= {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NODELIST": "node[0-1]", "SLURM_LOCALID": "0"}
    environs = [{**common, "SLURM_PROCID": node, "SLURM_NODEID": node} for node in ("0", "1")]
    on_both(hosts, [[sys.executable, "launch/train.py", *words]] * 2, tmp_path, *environs)
    assert losses(tmp_path / "run") == pytest.approx(losses(finished), rel=1e-6)


@pytest.mark.slow
def test_a_preemption_of_one_host_ends_both(hosts: Hosts, dataset: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = train_words(dataset, run_dir, "train.engine=fsdp", "train.steps=100000", "checkpoint.every_steps=0")
    start = [sys.executable, "-m", "launch.torchrun", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3"]
    command = [*start, *ELASTIC, "-m", "launch.train", *words]
    with (
        Launched(hosts.on(0, *command), tmp_path / "log0") as first,
        Launched(hosts.on(1, *command), tmp_path / "log1") as second,
    ):
        first.until(lambda: (run_dir / "metrics.jsonl").exists() and len(losses(run_dir)) > 2)
        second.process.send_signal(signal.SIGUSR1)
        assert [first.wait(), second.wait()] == [EXIT_PREEMPTED] * 2, first.said[-3000:] + second.said[-3000:]
    assert len(checkpoints(run_dir / "checkpoints")) == 1


@pytest.mark.slow
def test_a_host_goes_away_and_comes_back(hosts: Hosts, dataset: Path, tmp_path: Path) -> None:
    """The other one goes on alone from the last checkpoint, then both do; the loss curve shows nothing of it."""
    run_dir, pace, script = tmp_path / "run", tmp_path / "seconds", tmp_path / "paced.py"
    script.write_text(  # the same training, with a rest after each step
        "import pathlib, runpy, time\n"
        "from mamba_pretrain.saver import Saver\n"
        f"due, pace = Saver.due_by_step, pathlib.Path({str(pace)!r})\n"
        "Saver.due_by_step = lambda self: time.sleep(float(pace.read_text() or 0)) or due(self)\n"
        f"runpy.run_path({str(ROOT / 'launch/train.py')!r}, run_name='__main__')\n"
    )
    options = ["train.steps=120", "checkpoint.keep_last=3", "data.validation_split=null"]
    words = train_words(dataset, run_dir, "train.engine=fsdp", "checkpoint.resume=auto", *options)
    start = [sys.executable, "-m", "launch.torchrun", "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=9"]
    command = [*start, *ELASTIC, script, *words]

    def step() -> int:
        return max(records(run_dir), default=0) if (run_dir / "metrics.jsonl").exists() else 0

    pace.write_text("0.2")
    with (
        Launched(hosts.on(0, *command), tmp_path / "log0") as first,
        Launched(hosts.on(1, *command), tmp_path / "log1") as second,
    ):
        first.until(lambda: step() > 9)
        pace.write_text("1")
        hosts.power_off(1)
        second.wait(10)
        # Only rank 0 logs, and it is on either host.
        first.until(lambda: "resuming on 1 ranks what was saved on 2" in first.said)
        alone_from = step()
        first.until(lambda: step() > alone_from + 1)
        with Launched(hosts.on(1, *command), tmp_path / "log2") as third:
            first.until(lambda: "resuming on 2 ranks what was saved on 1" in first.said + third.said)
            pace.write_text("0")
            assert [first.wait(), third.wait()] == [0, 0], first.said[-3000:] + third.said[-3000:]
    undisturbed = tmp_path / "undisturbed"
    assert run(small_config(dataset, undisturbed, *options)) == 0
    assert losses(run_dir) == pytest.approx(losses(undisturbed), rel=1e-5)
