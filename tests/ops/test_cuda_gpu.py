"""The kernels themselves, at the sizes of a 130m model: `pytest -m gpu` where there are a GPU and both packages."""

from __future__ import annotations

import pytest
import torch

from mamba_pretrain.config import VARIANTS, ModelConfig
from mamba_pretrain.model.lm import MambaLM
from mamba_pretrain.ops import dispatch
from mamba_pretrain.ops.backends import cuda
from mamba_pretrain.ops.selfcheck import TOLERANCE, self_check
from tests.helpers import mixers, reference
from tests.helpers.mixers import Shape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
REAL = Shape(batch=2, length=2048, inner=1536, state=16, taps=4, model=768, rank=48)


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    if (lack := cuda.missing()) is not None:
        pytest.fail(f"{lack.reason}; mend it with: {lack.mend}")


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [REAL, REAL._replace(length=1999, batch=3), Shape(), Shape(state=64, taps=2)])
def test_mixer(shape: Shape, autocast: torch.dtype | None, packed: bool) -> None:
    arguments = mixers.draw(shape)
    seq_idx = reference.layouts(shape.batch, shape.length, density=0.01) if packed else None
    due = mixers.run(arguments, "reference", seq_idx, dtype=torch.float64, device="cuda")
    found = mixers.run(arguments, "cuda", seq_idx, autocast=autocast, device="cuda")
    usual = mixers.deviations(mixers.run(arguments, "reference", seq_idx, autocast=autocast, device="cuda"), due)
    floor = 1e-4 if autocast is None else 2**-6
    for of, error in mixers.deviations(found, due).items():
        assert error < 2 * usual[of] + floor, of


def test_self_check() -> None:
    found = {checked.op: checked for checked in self_check("cuda")}
    assert {found[op].backend for op in cuda.OPS} == {"cuda"}
    assert all(checked.error <= TOLERANCE for checked in found.values())


def test_a_prompt_and_steps_after_it_equal_the_text_at_once() -> None:
    model = MambaLM(ModelConfig(vocab_size=97, **VARIANTS["130m"] | {"n_layer": 2}), seed=0).cuda()
    ids = torch.randint(97, (3, 70), generator=torch.Generator().manual_seed(0)).cuda()
    with torch.no_grad():
        with dispatch.using("reference"):
            due = model(ids).logits
        with dispatch.using("cuda"):
            _, logits, state = model(ids[:, :40])
            rows = [logits]
            for t in range(40, 70):
                next_logits, state = model.step(ids[:, t], state)
                rows.append(next_logits[:, None])
    torch.testing.assert_close(torch.cat(rows, dim=1), due, rtol=1e-3, atol=1e-3)
