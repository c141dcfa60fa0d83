from __future__ import annotations

import os
import signal

import pytest
import torch

from mamba_pretrain.config import ConfigError
from mamba_pretrain.distributed import env
from mamba_pretrain.distributed.env import Preemption, autocast, check_precision, resolve_device

CPU = torch.device("cpu")


def test_auto_takes_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert resolve_device("auto").type == expected
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        resolve_device("cuda")
    assert resolve_device("cpu") == CPU


def test_a_precision_without_matrix_products_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "fp16_is_native", lambda device: False)
    with pytest.raises(ConfigError, match="fp16, which this CPU does not multiply in"):
        check_precision("fp16", CPU)
    monkeypatch.setattr(env, "fp16_is_native", lambda device: True)
    for precision in ("fp32", "bf16", "fp16"):
        check_precision(precision, CPU)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_sets_the_dtype_of_matrix_products(precision: str, dtype: torch.dtype) -> None:
    x = torch.ones(4, 4)
    with autocast(precision, CPU):
        assert (x @ x).dtype == dtype
        assert (x + x).dtype == torch.float32


@pytest.mark.parametrize("number", env.SIGNALS)
def test_a_signal_sets_the_flag_and_earlier_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Preemption() as preemption:
        assert preemption.reason is None
        os.kill(os.getpid(), number)
        assert preemption.reason == number.name
    assert signal.getsignal(number) == before


def test_a_second_interrupt_does_not_wait() -> None:
    with Preemption(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
