"""Why the cuda kernels are not there: each reason by its name, with the command that mends it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mamba_pretrain.ops.backends import cuda_packages
from mamba_pretrain.ops.backends.cuda_packages import install_command, missing
from tests.helpers import stubs

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with a GPU and, so far, nothing else."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in [n for n in sys.modules if n.split(".")[0] in stubs.PACKAGES]:
        monkeypatch.delitem(sys.modules, name)
    missing.cache_clear()
    yield
    missing.cache_clear()


def installed(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)


def reason_and_mend() -> tuple[str, str]:
    found = missing()
    assert found is not None
    return found


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA" in reason_and_mend()[0]
    missing.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert reason_and_mend()[0] == "torch finds no NVIDIA GPU"


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, {})
    reason, mend = reason_and_mend()
    assert reason == "mamba-ssm is not installed"
    assert "MAMBA_KEEP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE" in mend
    assert "pip install --no-build-isolation --no-deps" in mend
    assert "CUDA_HOME" in mend


def test_installed_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, {"mamba-ssm": "2.3.2.post1"})
    assert reason_and_mend()[0] == "mamba-ssm 2.3.2.post1 is installed without its CUDA extension selective_scan_cuda"
    missing.cache_clear()
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", types.ModuleType("selective_scan_cuda"))
    reason, mend = reason_and_mend()
    assert reason == "causal-conv1d is not installed"
    assert mend.partition("  #")[0].endswith("--force-reinstall --no-cache-dir causal-conv1d==1.7.0")


def test_compiled_for_another_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "selective_scan_cuda.py").write_text(
        "raise ImportError('selective_scan_cuda.so: undefined symbol: _ZN3c105ErrorC2E\\nmore')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    reason, _ = reason_and_mend()
    assert "undefined symbol: _ZN3c105ErrorC2E. Most often it was compiled against another torch" in reason
    assert torch.__version__ in reason


def test_extensions_without_what_their_packages_import(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("selective_scan_cuda", "causal_conv1d_cuda"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)
    reason, mend = reason_and_mend()
    assert reason.startswith("causal_conv1d.causal_conv1d_interface does not load: ModuleNotFoundError")
    assert mend == "pip install -e '.[cuda]', in the checkout"


def test_nothing_is_missing_where_both_packages_work() -> None:
    with stubs.installed():
        assert missing() is None


@pytest.mark.parametrize("version", ["2.14.1+cu130", "3.0.0"])
def test_newer_torch_needs_another_standard_of_cpp(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    command = install_command("mamba-ssm")
    assert "sed -i s/-std=c++17/-std=c++20/ mamba_ssm-2.3.2.post1/setup.py" in command
    assert subprocess.run(["bash", "-n", "-c", command], timeout=30).returncode == 0
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    assert "c++20" not in install_command("mamba-ssm")


def test_the_releases_are_those_that_the_tests_install() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert {f"{name}=={release}" for name, release in cuda_packages.RELEASES.items()} <= set(lines)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("selective_scan_cuda") is not None, reason="of an installation without extensions"
)
def test_packages_without_extensions_do_not_reach_transformers() -> None:
    """transformers takes kernels from both wherever they can be imported; without extensions they cannot."""
    code = (
        "import importlib.metadata as m, torch\n"
        "from transformers import MambaConfig, MambaForCausalLM\n"
        "assert m.version('mamba-ssm') and m.version('causal-conv1d')\n"
        "model = MambaForCausalLM(MambaConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, state_size=2))\n"
        "loss = model(torch.arange(5)[None], labels=torch.arange(5)[None]).loss\n"
        "loss.backward()\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0
