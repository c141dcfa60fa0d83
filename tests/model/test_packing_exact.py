"""Packed documents give what each gives alone: convolution, scan and whole model, in values and in all gradients.

So do the rows of a pack, with their padding and with documents that are longer than a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mamba_pretrain.config import ModelConfig
from mamba_pretrain.model.lm import MambaLM
from mamba_pretrain.ops.causal_conv1d import causal_conv1d
from mamba_pretrain.ops.selective_scan import CHUNK, selective_scan
from tests.helpers.rows import numbered, packed, shard_of

LAYOUTS = {
    "shorter than the convolution": [1, 2, 3, 1, 1, 5, 3, 2, 1],
    "boundaries at the scan's chunks": [CHUNK, CHUNK, 1, CHUNK - 1, 2],
    "boundaries beside them": [CHUNK - 1, 2, CHUNK - 2, CHUNK + 1, 3],
    "single tokens": [1] * 7,
    "one document": [40],
}
IGNORE = -100


def documents_of(lengths: Sequence[int], seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(23, (n,), generator=g) for n in lengths]


def numbers(lengths: Sequence[int]) -> Tensor:
    """Row (1, L): the documents' numbers, neither contiguous nor from 0, as nothing promises that they are."""
    return torch.tensor([[7 + 3 * j for j, n in enumerate(lengths) for _ in range(n)]], dtype=torch.int32)


def targets(document: Tensor) -> Tensor:
    return torch.cat([document[1:], torch.tensor([IGNORE])])


def compare(lengths: Sequence[int], dtype: torch.dtype, tolerance: float) -> None:
    model = MambaLM(ModelConfig(d_model=12, n_layer=3, vocab_size=23, d_state=4), seed=0).to(dtype)
    parameters = dict(model.named_parameters())
    documents = documents_of(lengths)
    ids, labels = torch.cat(documents)[None], torch.cat([targets(d) for d in documents])[None]

    with torch.no_grad():
        packed_logits = model(ids, seq_idx_BL=numbers(lengths)).logits
        alone_logits = torch.cat([model(d[None]).logits for d in documents], dim=1)
    torch.testing.assert_close(packed_logits, alone_logits, rtol=tolerance, atol=tolerance)

    packed = model(ids, labels, numbers(lengths)).loss_sum
    alone = torch.stack([model(d[None], targets(d)[None]).loss_sum for d in documents]).sum()
    torch.testing.assert_close(packed, alone, rtol=tolerance, atol=tolerance)

    packed_grads = torch.autograd.grad(packed, list(parameters.values()))
    alone_grads = torch.autograd.grad(alone, list(parameters.values()))
    for name, grad, due in zip(parameters, packed_grads, alone_grads, strict=True):
        scale = due.abs().max().item() + 1e-3
        torch.testing.assert_close(
            grad, due, rtol=tolerance, atol=4 * tolerance * scale, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_model(layout: str, dtype: torch.dtype, tolerance: float) -> None:
    compare(LAYOUTS[layout], dtype, tolerance)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_model_with_any_layout(lengths: list[int]) -> None:
    compare(lengths, torch.float64, 1e-12)


def test_rows_of_different_layouts() -> None:
    model = MambaLM(ModelConfig(d_model=12, n_layer=2, vocab_size=23, d_state=4), seed=0).double()
    layouts = [[40], [1, 2, 3, 34], [32, 8], [1] * 40]
    rows = [documents_of(lengths, seed) for seed, lengths in enumerate(layouts)]
    with torch.no_grad():
        packed = model(
            torch.stack([torch.cat(row) for row in rows]), seq_idx_BL=torch.cat([numbers(n) for n in layouts])
        ).logits
        alone = torch.stack([torch.cat([model(d[None]).logits[0] for d in row]) for row in rows])
    torch.testing.assert_close(packed, alone, rtol=1e-12, atol=1e-13)


def test_state_after_a_packed_row_is_that_of_its_last_document() -> None:
    model = MambaLM(ModelConfig(d_model=12, n_layer=2, vocab_size=23, d_state=4), seed=0).double()
    for lengths in ([30, 1], [30, 2], [5, 33]):
        documents = documents_of(lengths)
        with torch.no_grad():
            packed = model(torch.cat(documents)[None], seq_idx_BL=numbers(lengths)).state
            alone = model(documents[-1][None]).state
        torch.testing.assert_close([*packed.conv, *packed.ssm], [*alone.conv, *alone.ssm], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_convolution_and_scan(layout: str) -> None:
    """Each op alone, with a state handed in: it belongs to the first document, the others start from nothing."""
    lengths = LAYOUTS[layout]
    length, inner, n = sum(lengths), 6, 4
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x, weight, bias, conv_state = normal(1, length, inner), normal(inner, 4), normal(inner), normal(1, 3, inner)
    delta, z, B, C = normal(1, length, inner), normal(1, length, inner), normal(1, length, n), normal(1, length, n)
    A, D, delta_bias, ssm_state = -normal(inner, n).exp(), normal(inner), normal(inner), normal(1, inner, n)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    spans = [slice(end - size, end) for size, end in zip(lengths, ends, strict=True)]

    def states(j: int) -> tuple[Tensor | None, Tensor | None]:
        return (conv_state, ssm_state) if j == 0 else (None, None)

    packed, _ = causal_conv1d(x, weight, bias, numbers(lengths), conv_state)
    alone = [causal_conv1d(x[:, s], weight, bias, None, states(j)[0])[0] for j, s in enumerate(spans)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-13, atol=1e-13)

    packed, _ = selective_scan(x, delta, A, B, C, D, z, delta_bias, numbers(lengths), ssm_state)
    alone = [
        selective_scan(x[:, s], delta[:, s], A, B[:, s], C[:, s], D, z[:, s], delta_bias, None, states(j)[1])[0]
        for j, s in enumerate(spans)
    ]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("how", ["best_fit", "documents"])
def test_rows_of_a_pack(tmp_path: Path, how: str) -> None:
    """Loss and gradients are those of the pieces alone, and do not depend on what the padding holds."""
    length, lengths = 16, [5, 16, 1, 17, 40, 3, 2, 12, 33, 9]
    documents = numbered(lengths)
    rows = packed(shard_of(tmp_path, documents, 200), length, how, 200)
    block = rows.read(np.arange(rows.n_rows))
    assert block.padding.any()
    model = MambaLM(ModelConfig(d_model=12, n_layer=3, vocab_size=200, d_state=4), seed=0).double()
    parameters = list(model.parameters())
    ids, labels, seq_idx = (torch.from_numpy(part) for part in block[:3])

    due = []
    for tokens in documents:
        for first in range(0, len(tokens), length):
            piece, after = tokens[first : first + length], tokens[first + length : first + length + 1] or [IGNORE]
            due.append(model(torch.tensor([piece]), torch.tensor([[*piece[1:], *after]])).loss_sum)
    alone = torch.stack(due).sum()
    assert int((labels != IGNORE).sum()) == sum(n - 1 for n in lengths)
    alone_grads = torch.autograd.grad(alone, parameters)

    gradients = []
    for filler in (0, 199):
        filled = ids.clone()
        for row, padding in enumerate(block.padding.tolist()):
            filled[row, length - padding :] = filler
        loss = model(filled, labels, seq_idx).loss_sum
        torch.testing.assert_close(loss, alone, rtol=1e-12, atol=1e-12)
        gradients.append(torch.autograd.grad(loss, parameters))
        torch.testing.assert_close(gradients[-1], alone_grads, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-13)
