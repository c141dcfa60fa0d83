"""Two hosts on this machine: network namespaces joined by a cable, each with its own name and addresses."""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ADDRESSES = ("10.77.0.1", "10.77.0.2")
_numbers = itertools.count()


class Hosts:
    """node0 and node1: 10.77.0.1 and .2. They share files and process numbers, and nothing of the network."""

    def __init__(self) -> None:
        self.names = [f"mp{os.getpid()}-{next(_numbers)}-{node}" for node in range(2)]

    def on(self, node: int, *words: object) -> list[str]:
        """The command that runs `words` on a node, which also has a hostname of its own."""
        become = f'echo node{node} > /proc/sys/kernel/hostname && exec "$@"'
        inside = ["ip", "netns", "exec", self.names[node], "unshare", "--uts", "sh", "-c", become, "sh"]
        return [*inside, *map(str, words)]

    def power_off(self, node: int) -> None:
        """Kills all that runs there, without a word to the other node's programs."""
        while pids := _run("ip", "netns", "pids", self.names[node]).split():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.05)

    def stand_ins(self, directory: Path) -> Path:
        """A directory for PATH with `ssh` that knows the nodes, and `pdsh` over it where there is none.

        Like sshd, the stand-in gives a command nothing of the caller's environment.
        """
        directory.mkdir()
        clean = 'exec env -i HOME="$HOME" USER=root PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin'
        cases = [
            f'node{node}|{address}) {clean} {shlex.join(self.on(node, "sh", "-c"))} "$*" ;;'
            for node, address in enumerate(ADDRESSES)
        ]
        _script(
            directory / "ssh",
            'while true; do case "$1" in -[opliF]) shift 2 ;; -*) shift ;; *) break ;; esac; done',
            'host=$1; shift; case "$host" in',
            *cases,
            "esac; exit 255",
        )
        if shutil.which("pdsh") is None:
            _script(
                directory / "pdsh",
                "while true; do",
                'case "$1" in -w) hosts=$2; shift 2 ;; -f) shift 2 ;; -S) shift ;; *) break ;; esac; done',
                'number=0; for host in $(echo "$hosts" | tr , " "); do',
                'ssh "$host" "$(echo "$*" | sed "s/%n/$number/g")" & started="$started $!"; number=$((number + 1))',
                'done; worst=0; for one in $started; do wait "$one" || worst=$?; done; exit "$worst"',
            )
        return directory


@contextlib.contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Makes them, and takes them away with all that runs on them. Skips where that is not possible."""
    missing = [name for name in ("ip", "unshare") if shutil.which(name) is None]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"two hosts need {' and '.join(missing) if missing else 'root'} (network namespaces)")
    hosts = Hosts()
    with contextlib.ExitStack() as stack:
        for name in hosts.names:
            done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"two hosts need network namespaces, which are not allowed here: {done.stderr.strip()}")
            stack.callback(_run, "ip", "netns", "delete", name)
            resolved = Path("/etc/netns", name)
            resolved.mkdir(parents=True)
            stack.callback(shutil.rmtree, resolved)
            lines = [f"{address} node{node}" for node, address in enumerate(ADDRESSES)]
            (resolved / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        first, second = hosts.names
        _run("ip", "link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second)
        for name, address in zip(hosts.names, ADDRESSES, strict=True):
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            for interface in ("lo", "eth0"):
                _run("ip", "-n", name, "link", "set", interface, "up")
        stack.callback(hosts.power_off, 1)
        stack.callback(hosts.power_off, 0)
        yield hosts


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout


def _script(path: Path, *lines: str) -> None:
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
