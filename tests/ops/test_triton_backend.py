"""What the Triton backend says about machines and calls, and that its kernels pass the compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mamba_pretrain.ops.backends import triton as backend
from mamba_pretrain.ops.call import Call

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_the_backend_loads_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from mamba_pretrain.ops.backends import triton\n"
        "lack = triton.missing()\n"
        "assert 'triton' in lack.reason and lack.mend.startswith('pip install'), lack"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_only_the_interpreter_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.missing.__wrapped__() is None
    monkeypatch.delenv("TRITON_INTERPRET")
    lack = backend.missing.__wrapped__()
    assert lack is not None
    assert "no CUDA device" in lack.reason


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (Call("selective_scan", "cuda", torch.bfloat16, size=256), None),
        (Call("selective_scan", "cuda", torch.bfloat16, size=257), "256 states, 257"),
        (Call("selective_scan", "cuda", torch.float64, size=16), "float64"),
        (Call("causal_conv1d", "cuda", torch.float32, size=8, packed=True, initial_state=True, last_state=True), None),
        (Call("causal_conv1d", "cuda", torch.float32, size=17), "16 taps, 17"),
        (Call("add_rms_norm", "cuda", torch.bfloat16, size=2560, deterministic=True), None),
    ],
)
def test_refusals_name_what_was_given(call: Call, reason: str | None) -> None:
    said = backend.refuses(call)
    assert said is None if reason is None else said is not None and reason in said


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "length"), [(80, 128), (90, 1)])  # sizes of 1 are constants to the compiler
def test_kernels_compile_for_gpus_and_hardly_spill(capability: int, length: int, tmp_path: Path) -> None:
    """For A100 and H100, at N = 16 in bf16: spilled registers are a sign of block sizes too large.

    Releases of Triton differ by a few: 44 bytes for an A100 with 3.7.1, none with 3.9.0.
    """
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-m", "tests.helpers.triton_compile"),
            *(str(capability), "16", "bfloat16", str(length)),
        ],
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert len({k["kernel"] for k in kernels}) == 9
    assert [k for k in kernels if k["spilled"] > 64] == []
