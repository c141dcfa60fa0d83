"""Where the ranks of a run find each other: a store that rank 0, or torchrun's agent, serves.

Sockets of an earlier run's orphans, or of another program, may listen at that address. TCPStore would wait for the
first for minutes and for the second for ever, and this rank must not: where no launcher does it, nobody ends it.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from datetime import timedelta

from torch.distributed import (  # type: ignore[attr-defined]
    DistNetworkError,
    HashStore,
    PrefixStore,
    Store,
    TCPStore,
)

CONNECT = timedelta(minutes=5)  # for all ranks to find each other
ANSWER = timedelta(seconds=15)  # for rank 0 to answer a greeting, which it does at once
UNKNOWN = timedelta(seconds=30)  # for the host's name to get an address
SOMEONE_ELSE = "what listens there is not rank 0 of this run"


def meet(rank: int, world: int, master: str) -> Store:
    """Raises DistNetworkError where the meeting point (HOST:PORT) is taken, unreachable, or ranks are missing."""
    if world == 1:
        return HashStore()
    host, _, port = master.rpartition(":")
    # torchrun's agent serves a store that outlives the ranks, so attempts are told apart in it. With
    # TORCH_DISABLE_SHARE_RDZV_TCP_STORE it does not, and agents that joined later count other attempts: as without
    # torchrun, rank 0 then serves a new store each time.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store: Store = TCPStore(host, int(port), world, False, timeout=CONNECT, wait_for_workers=False)
        store = PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    elif rank == 0:
        store = TCPStore(host, int(port), world, True, timeout=CONNECT, wait_for_workers=False)
        _welcome(store, set(range(1, world)))
    else:
        _wait_for_listener(host, int(port))
        store = _greeted(rank, host, int(port), world)
    return store


def _welcome(store: Store, missing: set[int]) -> None:
    """Answers every other rank's greeting, which shows it that this store is not an earlier run's."""
    deadline = time.monotonic() + CONNECT.total_seconds()
    while missing:
        for rank in sorted(missing):
            if store.check([f"greeting/{rank}"]):
                store.set(f"welcome/{store.get(f'greeting/{rank}').decode()}", "")
                missing.discard(rank)
        if missing and time.monotonic() > deadline:
            who = ", ".join(map(str, sorted(missing)[:20]))
            raise DistNetworkError(f"no sign of rank {who} in {CONNECT.total_seconds():g} s")
        time.sleep(0.02)


def _greeted(rank: int, host: str, port: int, world: int) -> TCPStore:
    """The store of a rank 0 that has answered."""
    found: list[TCPStore | Exception] = []

    def greet() -> None:
        try:
            store = TCPStore(host, port, world, False, timeout=ANSWER, wait_for_workers=False)
            word = uuid.uuid4().hex
            store.set(f"greeting/{rank}", word)
            store.wait([f"welcome/{word}"], ANSWER)
            store.set_timeout(CONNECT)
            found.append(store)
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=greet, daemon=True)  # in it TCPStore may wait for ever
    thread.start()
    thread.join(1.5 * ANSWER.total_seconds())
    if not found or isinstance(found[0], Exception):
        raise DistNetworkError(f"{SOMEONE_ELSE}: {found[0] if found else 'it never answers'}")
    return found[0]


def _wait_for_listener(host: str, port: int) -> None:
    deadline = time.monotonic() + CONNECT.total_seconds()
    while True:
        try:
            socket.create_connection((host, port), timeout=ANSWER.total_seconds()).close()
            return
        except OSError as error:
            if isinstance(error, socket.gaierror):  # a name may appear late, but not that late
                deadline = min(deadline, time.monotonic() + UNKNOWN.total_seconds())
            if time.monotonic() > deadline:
                raise DistNetworkError(f"nobody listened for {CONNECT.total_seconds():g} s: {error}") from error
        time.sleep(0.2)
