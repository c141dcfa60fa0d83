"""Which backend runs a call: the order, the reasons, what is forced, and what is said about it."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch

from mamba_pretrain.build import build
from mamba_pretrain.config import ConfigError
from mamba_pretrain.ops import dispatch
from mamba_pretrain.ops.call import Call, KernelError, Missing
from tests.helpers import kernels
from tests.helpers.kernels import scan, scan_inputs
from tests.helpers.runs import small_config

CALL = Call("selective_scan", "cpu", torch.float32, size=4)


def backend(name: str, ops: tuple[str, ...] = ("selective_scan",), lack: str = "", refuse: str = "") -> Any:
    asked: list[str] = []

    def missing() -> Missing | None:
        asked.append("missing")
        return Missing(lack, f"get {name}") if lack else None

    def refuses(call: Call) -> str | None:
        asked.append("refuses")
        return refuse or None

    return types.SimpleNamespace(NAME=name, OPS=ops, missing=missing, refuses=refuses, asked=asked)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAMBA_PRETRAIN_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "_decisions", {})
    monkeypatch.setattr(dispatch, "_said", set())
    monkeypatch.setattr(dispatch, "_selected", "auto")


def order(monkeypatch: pytest.MonkeyPatch, *backends: Any) -> None:
    monkeypatch.setattr(dispatch, "ORDER", {"cpu": backends})


def test_the_first_without_a_reason_runs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    absent, picky, other = backend("native", lack="no compiler"), backend("cuda", refuse="too long"), backend("x", ())
    fast, slow = backend("triton"), backend("slow")
    order(monkeypatch, absent, picky, other, fast, slow)
    with caplog.at_level("INFO", logger="mamba_pretrain"):
        assert dispatch.choose(CALL) is fast
    assert caplog.messages == [
        "selective_scan on cpu: triton; native: no compiler; cuda: too long; x: has no selective_scan"
    ]
    assert slow.asked == []
    assert "refuses" not in absent.asked, "a backend that is not there cannot be asked about calls"


def test_the_reference_stands_behind_all(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    order(monkeypatch, backend("native", refuse="too long"))
    with caplog.at_level("INFO", logger="mamba_pretrain"):
        assert dispatch.choose(CALL) is None
        assert dispatch.choose(CALL._replace(device="meta")) is None
    assert caplog.messages == [
        "selective_scan on cpu: reference; native: too long",
        "selective_scan on meta: reference",
    ]


def test_a_decision_is_made_and_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    fast = backend("native")
    order(monkeypatch, fast)
    with caplog.at_level("INFO", logger="mamba_pretrain"):
        for size in (4, 4, 5, 4):
            dispatch.choose(CALL._replace(size=size))
    assert len(caplog.messages) == 1
    assert fast.asked == ["missing", "refuses"] * 2, "once for each kind of call"


@pytest.mark.parametrize(
    ("forced", "lack", "refuse", "why"),
    [
        ("native", "no compiler", "", "no compiler"),
        ("native", "", "wants K <= 4", "wants K <= 4"),
        ("triton", "", "", "it does not run on cpu"),
    ],
)
def test_a_forced_backend_that_cannot_run_is_an_error_with_a_way_out(
    forced: str, lack: str, refuse: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    order(monkeypatch, backend("native", lack=lack, refuse=refuse), backend("other"))
    with dispatch.using(forced):
        for _ in range(2):
            with pytest.raises(
                KernelError, match=f"selective_scan: the {forced} kernels were selected.*: {why}"
            ) as raised:
                dispatch.choose(CALL)
            for way_out in ("train.kernels", "MAMBA_PRETRAIN_KERNELS", "mamba-pretrain doctor"):
                assert way_out in str(raised.value)


def test_an_op_that_the_forced_backend_does_not_have_is_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    order(monkeypatch, backend("native", ops=("causal_conv1d",)))
    with dispatch.using("native"):
        assert dispatch.choose(CALL) is None


def test_what_is_composed_may_always_be_composed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    order(monkeypatch, backend("native", ops=("mamba_inner",), refuse="wants one step"))
    with dispatch.using("native"), caplog.at_level("INFO", logger="mamba_pretrain"):
        assert dispatch.choose(CALL._replace(op="mamba_inner")) is None
    assert caplog.messages == ["mamba_inner on cpu: composed of the ops below it; native: wants one step"]


def test_selecting_and_going_back(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = backend("native")
    order(monkeypatch, fast)
    assert dispatch.select("reference") == "auto"
    assert dispatch.choose(CALL) is None
    assert dispatch.select("auto") == "reference"
    assert dispatch.choose(CALL) is fast, "the decision for the reference must not stick"
    with pytest.raises(ZeroDivisionError), dispatch.using("reference"):
        assert dispatch.selected() == "reference"
        raise ZeroDivisionError
    assert dispatch.selected() == "auto"
    with dispatch.using("reference"), dispatch.using("auto"):
        assert dispatch.choose(CALL) is fast


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        KernelError, match="no kernels named 'fast': expected one of auto, native, cuda, triton, reference"
    ):
        dispatch.select("fast")
    assert dispatch.selected() == "auto"


def test_the_environment_decides_where_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAMBA_PRETRAIN_KERNELS", "reference")
    dispatch.select("auto")
    assert dispatch.selected() == "reference"
    dispatch.select("native")
    assert dispatch.selected() == "native"
    monkeypatch.setattr(dispatch, "_selected", "auto")
    with dispatch.using("native"):
        pass
    assert dispatch.selected() == "auto", "what was selected before comes back, whatever the environment says by now"


def test_an_unknown_name_in_the_environment_stops_a_command_with_one_line() -> None:
    code = "import sys; from mamba_pretrain.cli import main; sys.exit(main(['doctor']))"
    done = kernels.python(code, MAMBA_PRETRAIN_KERNELS="fast")
    assert done.returncode == 2
    assert "there are no kernels named 'fast': expected one of" in done.stderr
    assert "Traceback" not in done.stderr


def test_importing_the_ops_decides_nothing_and_builds_nothing(tmp_path: Path) -> None:
    code = """
import json, mamba_pretrain.model.lm
from mamba_pretrain.ops import dispatch
print(json.dumps([dispatch.selected(), len(dispatch._decisions)]))
"""
    done = kernels.python(code, MAMBA_PRETRAIN_CACHE=str(tmp_path / "cache"), MAMBA_PRETRAIN_KERNELS="native")
    assert kernels.said(done) == ["native", 0]
    assert not (tmp_path / "cache").exists()


def test_a_real_call_tells_its_modes_and_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Call] = []
    monkeypatch.setattr(dispatch, "choose", lambda call: seen.append(call))
    inputs = scan_inputs(2, 9, 5, 3, first=True)
    scan(inputs, torch.zeros(2, 9, dtype=torch.int32), last=False)
    with torch.no_grad():
        scan(kernels.narrow(scan_inputs(2, 1, 5, 3), "u"))
    first = Call(
        "selective_scan", "cpu", torch.float32, 3, packed=True, initial_state=True, grad=True, channels=5, length=2
    )
    assert seen == [first, Call("selective_scan", "cpu", torch.bfloat16, 3, last_state=True, channels=5, length=1)]


def test_the_choice_in_a_config_reaches_the_ops_and_is_announced(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = backend("native", ("selective_scan", "causal_conv1d", "add_rms_norm"))
    order(monkeypatch, fast)
    with caplog.at_level("INFO", logger="mamba_pretrain"):
        build(small_config(dataset, tmp_path / "run"))
    lines = [line for line in caplog.messages if " on cpu: " in line]
    assert {"selective_scan on cpu: native", "causal_conv1d on cpu: native", "add_rms_norm on cpu: native"} <= set(
        lines
    )

    build(small_config(dataset, tmp_path / "run2", "train.kernels=reference"))
    assert dispatch.selected() == "reference"

    order(monkeypatch, backend("native", lack="no compiler"))
    monkeypatch.setattr(dispatch, "_decisions", {})
    with pytest.raises(KernelError, match="the native kernels were selected, and cannot run this call: no compiler"):
        build(small_config(dataset, tmp_path / "run3", "train.kernels=native"))
    assert not (tmp_path / "run3/metrics.jsonl").exists()
    with pytest.raises((KernelError, ConfigError), match="fast"):
        build(small_config(dataset, tmp_path / "run4", "train.kernels=fast"))
