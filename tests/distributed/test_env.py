from __future__ import annotations

import os
import signal

import pytest
import torch

from mamba_pretrain.config import ConfigError
from mamba_pretrain.distributed import env
from mamba_pretrain.distributed.env import Preemption, autocast, check_precision, resolve_device, resolve_precision

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


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_bf16_where_the_device_multiplies_in_it(
    native: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(env, "bf16_is_native", lambda device: native)
    assert resolve_precision("auto", CPU) == expected
    assert resolve_precision("bf16", CPU) == "bf16", "what is asked for by name is not changed"


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
