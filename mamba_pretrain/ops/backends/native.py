"""To be filled."""

from __future__ import annotations

from mamba_pretrain.ops.call import Call, Missing

NAME = "native"
OPS: tuple[str, ...] = ()


def missing() -> Missing | None:
    return None


def refuses(call: Call) -> str | None:
    return None
