"""Tells ranks apart that were started differently, before they take a step together."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mamba_pretrain.config import ConfigError
from mamba_pretrain.distributed.ranks import PeerError, Ranks


def agree(ranks: Ranks, facts: dict[str, Any]) -> None:
    """Raises, on all ranks, where any of these facts differs between them; the message names fact, values and ranks."""
    told = ranks.gather((socket.gethostname(), facts))
    problems = []
    for name in dict.fromkeys(name for _, theirs in told for name in theirs):
        held: dict[str, list[int]] = {}
        for rank, (_, theirs) in enumerate(told):
            held.setdefault(repr(theirs.get(name)), []).append(rank)
        if len(held) > 1:
            sides = (f"{value} on {_named(which, told)}" for value, which in held.items())
            problems.append(f"the ranks disagree about {name}: {'; '.join(sides)}")
    if problems:
        raise ConfigError(problems) if ranks.first else PeerError("\n".join(problems))


def code_digest() -> str:
    """Twelve hex digits that change with any file of this package's code."""
    root, digest = Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".h", ".cpp")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _named(which: list[int], told: list[tuple[str, Any]]) -> str:
    hosts: Iterable[str] = dict.fromkeys(told[rank][0] for rank in which)
    shown = ", ".join(map(str, which[:8])) + (", ..." if len(which) > 8 else "")
    return f"rank{'s' if len(which) > 1 else ''} {shown} ({', '.join(list(hosts)[:4])})"
