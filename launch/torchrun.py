"""torchrun as production needs it: `python -m launch.torchrun [torchrun's options] -m launch.train ...`.

Exit codes: 0 finished; 75 every rank of this host saved itself on a signal and left, or had not begun: start it again
to go on; 2 the hosts cannot meet; else the code of the first rank that failed, 1 where it was killed. torchrun itself
says 1 to all of these.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)

if __name__ == "__main__":  # loading torch takes seconds, in which there is no rank yet that would have to be told
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's
            signal.signal(number, lambda *_: os._exit(os.EX_TEMPFAIL))

from torch.distributed import DistNetworkError
from torch.distributed import run as torchrun
from torch.distributed.elastic.agent.server.api import RunResult
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher import api

from mamba_pretrain.distributed.env import EXIT_PREEMPTED

DEFAULTS = (
    # SIGUSR1, which Slurm can send before a time limit, would end torchrun alone and leave the ranks training.
    "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    # Ranks that save are killed after so many seconds; torchrun's own 30 are too few for a large model.
    "--shutdown-timeout=600",
)
LATER = SIGNALS[:3]  # a second Ctrl-C is for someone who does not want to wait


class Agent(LocalElasticAgent):
    """torchrun's agent, which knows how its ranks ended."""

    codes: list[int | None] = []  # noqa: RUF012 - of the ranks that were stopped last; there is one agent in a process
    fixed = True  # the number of hosts: then no restart can do without those that were preempted

    def _monitor_workers(self, worker_group: Any) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if self.fixed and preempted([failure.exitcode for failure in result.failures.values()]):
            self._remaining_restarts = 0  # --max-restarts is for failures; these would go on training
        return result

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        """Also waits as long for ranks that end because other hosts come or go, and through further signals."""
        handlers = list(getattr(self._pcontext, "subprocess_handlers", {}).values())
        late: list[int] = []
        earlier = {number: signal.signal(number, lambda number, frame: late.append(number)) for number in LATER}
        try:
            super()._shutdown(death_sig, max(timeout, self._shutdown_timeout))
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)
        Agent.codes = [handler.proc.returncode for handler in handlers]
        if late:
            signal.raise_signal(late[0])


def preempted(codes: Sequence[int | None], forwarded: int = signal.SIGTERM) -> bool:
    """Whether a rank saved itself, and the others too, or died of the signal while they had nothing to lose."""
    return EXIT_PREEMPTED in codes and all(code in (EXIT_PREEMPTED, -forwarded) for code in codes)


def main(argv: Sequence[str]) -> int:
    arguments = torchrun.parse_args([*DEFAULTS, *argv])  # type: ignore[no-untyped-call]
    low, high = torchrun.parse_min_max_nnodes(arguments.nnodes)
    # Agents that share a store cannot take back a host that left: both die a minute later (torch 2.13).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    # torchrun's own default is 1, which leaves a CPU idle; all cores for every rank would be far worse.
    cores = len(os.sched_getaffinity(0)) // torchrun.determine_local_world_size(arguments.nproc_per_node)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores)))
    Agent.fixed = low == high
    api.LocalElasticAgent = Agent  # type: ignore[attr-defined]
    for number in SIGNALS:  # torchrun's own handlers come with the first rank; before that a signal would kill it
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _raise)
    caught: Exception | None = None
    try:
        torchrun.run(arguments)  # type: ignore[no-untyped-call]
    except (SignalException, DistNetworkError, RendezvousError, ChildFailedError) as error:
        caught = error
    for number in SIGNALS:  # what comes now, as schedulers signal more than once, can only spoil the exit code
        signal.signal(number, signal.SIG_IGN)
    return _code(caught)


def _code(error: Exception | None) -> int:
    """The exit code of what torchrun ended with, and a line that explains it."""
    match error:
        case SignalException():
            if all(code == 0 for code in Agent.codes) and Agent.codes:
                return 0
            calm = all(code in (0, EXIT_PREEMPTED, -error.sigval) for code in Agent.codes)
            print(f"launch.torchrun: {error.sigval.name}; the ranks ended with {Agent.codes}", file=sys.stderr)
            return EXIT_PREEMPTED if calm else 1
        case DistNetworkError() | RendezvousError():
            reason = " ".join(str(error).split())[:300]
            print(
                f"launch.torchrun: the hosts cannot meet: {reason}. See that the address is right and that nothing "
                "else listens at its port, perhaps an earlier run; or choose another --master-port or --rdzv-endpoint",
                file=sys.stderr,
            )
            return 2
        case ChildFailedError():
            if preempted([failure.exitcode for failure in error.failures.values()]):
                return EXIT_PREEMPTED
            print(error, file=sys.stderr)
            return max(1, error.get_first_failure()[1].exitcode)
    return 0


def _raise(number: int, frame: Any) -> None:
    raise SignalException(f"got {signal.Signals(number).name} before the ranks began", signal.Signals(number))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
