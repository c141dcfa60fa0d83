"""What `mamba-pretrain doctor` says of a machine, and its exit code."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_pretrain import doctor
from mamba_pretrain.cli import main
from mamba_pretrain.ops import dispatch
from mamba_pretrain.ops.backends import native, native_build
from mamba_pretrain.ops.causal_conv1d import causal_conv1d_reference
from tests.helpers import kernels

needs_native = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU lacks")
COMMAND = "import sys; from mamba_pretrain.cli import main; sys.exit(main({words}))"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SCAN", (1, 40, 16, 4))


def entry(report: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = (k for k in report["kernels"] if k["backend"] == name)
    return found


@needs_native
@no_gpu
def test_text_names_what_works_and_what_would_mend_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line and not line.startswith(" ")] == ["versions", "cpu", "gpu", "kernels"]
    assert "  native on cpu: works" in lines
    for name in ("cuda", "triton"):
        at = lines.index(f"  {name} on cuda: does not work")
        assert lines[at + 1].startswith("    why:  ") and lines[at + 2].startswith("    mend: ")
    assert any(line.split() == ["torch", torch.__version__] for line in lines)
    assert any("times as fast as the reference" in line for line in lines)


@needs_native
@no_gpu
def test_json_holds_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    before = dispatch.selected()
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report.keys() == {"versions", "cpu", "gpu", "kernels"}
    assert report["versions"]["torch"] == torch.__version__
    assert {"model", "cores", "threads", "instructions", "compiler"} <= report["cpu"].keys()
    assert report["gpu"]["devices"] == []
    works = entry(report, "native")
    assert works["usable"] and works["scan_ms"] > 0 and works["times_reference"] > 0
    assert {"selective_scan", "causal_conv1d", "add_rms_norm", "cross_entropy_"} <= works["deviation"].keys()
    assert all(error < 1e-4 for error in works["deviation"].values())
    for name in ("cuda", "triton"):
        lacking = entry(report, name)
        assert not lacking["usable"] and lacking["reason"] and lacking["mend"]
    assert dispatch.selected() == before


@no_gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_what_is_required_and_does_not_work_is_named(name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert main(["doctor", "--require", name]) == 1
    (line,) = (m for m in caplog.messages if "is required" in m)
    assert line.startswith(f"{name} is required: ") and len(line) > len(f"{name} is required: ")
    with pytest.raises(SystemExit):
        main(["doctor", "--require", "fast"])


def test_a_machine_without_compiler_is_unhealthy(tmp_path: Path) -> None:
    code = COMMAND.format(words=["doctor", "--json"])
    done = kernels.python(code, CXX="/nonexistent", MAMBA_PRETRAIN_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 1
    lacking = entry(json.loads(done.stdout), "native")
    assert lacking["reason"] == "no C++ compiler: CXX is '/nonexistent', which is no command"
    assert "unset CXX" in lacking["mend"]
    assert "on cpu only the reference runs: native: no C++ compiler" in done.stderr
    assert "Traceback" not in done.stderr


@needs_native
def test_a_machine_that_uses_anothers_build_needs_no_compiler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "/nonexistent")
    assert main(["doctor", "--json"]) == 0
    cpu = json.loads(capsys.readouterr().out)["cpu"]
    assert cpu["compiler"] == "no C++ compiler: CXX is '/nonexistent', which is no command"
    assert cpu["native kernels"].endswith(".so") and cpu["cores"]


def test_a_wrong_instruction_set_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MAMBA_PRETRAIN_ISA", "avx1024")
    monkeypatch.setattr(native, "missing", native.missing.__wrapped__)
    monkeypatch.setattr(native_build, "load", native_build.load.__wrapped__)
    assert main(["doctor"]) == 2
    assert "MAMBA_PRETRAIN_ISA is 'avx1024': this CPU runs " in capsys.readouterr().err


def stand_in(monkeypatch: pytest.MonkeyPatch, **ops: Any) -> None:
    module = types.SimpleNamespace(
        NAME="native", OPS=tuple(ops), missing=lambda: None, refuses=lambda call: None, **ops
    )
    monkeypatch.setattr(dispatch, "ORDER", {"cpu": (module,)})
    monkeypatch.setattr(dispatch, "_decisions", {})


def off_by_a_thousandth(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    y, last = causal_conv1d_reference(*arguments)
    return y * 1.001, last


def crashing(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    raise RuntimeError("illegal instruction")


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [(off_by_a_thousandth, "output 0 is off by .*e-04"), (crashing, "fail on this cpu: illegal instruction")],
    ids=["wrong", "crashing"],
)
def test_a_backend_that_is_wrong_does_not_work(
    kernel: Any, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stand_in(monkeypatch, causal_conv1d=kernel)
    report = doctor.examine()
    (found,) = report.kernels
    assert not found.usable
    assert found.mend is not None and "MAMBA_PRETRAIN_KERNELS=reference" in found.mend
    (failure,) = report.failures()
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(failure)
    assert "native on cpu: does not work" in str(report)
    assert main(["doctor"]) == 1
    assert failure in caplog.messages


def test_a_backend_that_is_right_works(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, causal_conv1d=causal_conv1d_reference)
    report = doctor.examine()
    assert report.kernels[0].usable
    assert report.kernels[0].deviation == {"causal_conv1d": 0.0}
    assert report.failures(("native",)) == []
    assert "native on cpu: works" in str(report)
