"""What one micro-batch holds, by formula, against traces of the real step and of single blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mamba_pretrain.config import Config
from mamba_pretrain.model.block import Block
from mamba_pretrain.ops import dispatch
from mamba_pretrain.ops.backends import cuda, triton
from mamba_pretrain.ops.cross_entropy import linear_cross_entropy
from mamba_pretrain.plan.activations import micro_batch
from mamba_pretrain.plan.memory import peak
from tests.helpers import stubs
from tests.helpers.memory import LiveBytes, fake_live_peak, step_config
from tests.helpers.triton import interpreted  # noqa: F401

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.get_autocast_gpu_dtype:DeprecationWarning"),  # mamba_ssm's question
    pytest.mark.filterwarnings("ignore:CUDA is not available:UserWarning"),  # its custom_bwd
]

slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("variant", "rows", "length", "micro_batches", "options"),
    [
        ("130m", 8, 2048, 1, ["train.activation_checkpointing=true", "model.n_layer=6"]),
        pytest.param("130m", 1, 2048, 2, ["train.precision=fp32"], marks=slow),
        pytest.param("130m", 4, 512, 1, ["train.precision=fp32", "train.activation_checkpointing=true"], marks=slow),
        pytest.param("370m", 8, 1024, 1, ["train.activation_checkpointing=true"], marks=slow),
        pytest.param("790m", 1, 512, 2, ["data.reset_documents=false"], marks=slow),
        pytest.param("1.4b", 16, 2048, 1, ["train.activation_checkpointing=true"], marks=slow),
        pytest.param("2.8b", 1, 2048, 2, [], marks=slow),
    ],
)
def test_the_peak_is_that_of_the_traced_step(
    variant: str, rows: int, length: int, micro_batches: int, options: list[str]
) -> None:
    config = step_config(1, rows, length, f"model.variant={variant}", *options, micro_batches=micro_batches)
    assert sum(peak(config, 1, "native")[1].values()) == pytest.approx(fake_live_peak(config), rel=0.04)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(("kernels", "chosen"), [("native", "auto"), ("cuda", "reference")])
def test_the_loss_holds_what_the_formula_says(kernels: str, chosen: str, precision: str, rows: int) -> None:
    """On GPUs the softmax is the reference's."""
    config = step_config(1, rows, 1024, "model.variant=130m", f"train.precision={precision}")
    dtype, live = torch.float32 if precision == "fp32" else torch.bfloat16, LiveBytes()
    with FakeTensorMode(), live, dispatch.using(chosen), torch.autocast("cpu", torch.bfloat16, precision == "bf16"):
        hidden_BLD = torch.empty(rows, 1024, 768, dtype=dtype, requires_grad=True)
        weight_VD = torch.empty(50280, 768, requires_grad=True)
        labels_BL = torch.zeros(rows, 1024, dtype=torch.int64)
        given = hidden_BLD.nbytes + weight_VD.nbytes + labels_BL.nbytes
        linear_cross_entropy(hidden_BLD, weight_VD, labels_BL, 50277)
    assert micro_batch(config, kernels).loss_forward == pytest.approx(live.peak - given, rel=0.01)


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A GPU's kernels on the CPU: stand-ins for mamba_ssm's compiled parts, Triton's interpreter."""
    name: str = request.param
    monkeypatch.setattr(dispatch, "ORDER", {"cpu": (cuda, triton) if name == "cuda" else (triton,)})
    monkeypatch.setattr(dispatch, "_decisions", {})
    monkeypatch.setattr(cuda, "missing", lambda: None)
    with stubs.installed():
        yield name


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "one document"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["cuda", pytest.param("triton", marks=slow)], indirect=True)
def test_a_block_keeps_on_a_gpu_what_the_formula_says(backend: str, precision: str, packed: bool) -> None:
    words = ["model.d_model=32", "model.n_layer=2", "model.vocab_size=32", "model.d_state=8"]
    config = step_config(1, 2, 64, *words, f"train.precision={precision}", f"data.reset_documents={packed}")
    held = micro_batch(config, backend)
    assert held.block + held.states + held.casts == pytest.approx(kept_by_block(config), rel=0.03)


def kept_by_block(config: Config) -> int:
    """Bytes that autograd keeps between forward and backward, parameters and the number of documents aside."""
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    block = Block(config.model)
    for parameter in block.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    shape = (config.train.micro_batch_size, config.data.seq_len)
    hidden_BLD: Any = torch.randn(*shape, config.model.need("d_model"))
    seq_idx_BL = torch.zeros(shape, dtype=torch.int32)
    seq_idx_BL[:, 30:] = 1
    hidden_BLD = hidden_BLD.to(torch.float32 if config.train.precision == "fp32" else torch.bfloat16).requires_grad_()
    dtype = None if config.train.precision == "fp32" else torch.bfloat16
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), stubs.autocast(dtype):
        residual_BLD = torch.zeros_like(hidden_BLD, dtype=torch.float32)
        block(hidden_BLD, residual_BLD, seq_idx_BL if config.data.reset_documents else None, return_state=False)
    own = {p.untyped_storage().data_ptr() for p in block.parameters()}
    return sum(s.nbytes() for key, s in storages.items() if key not in own)
