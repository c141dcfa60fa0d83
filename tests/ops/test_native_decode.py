"""The decoding kernel against the model's own step in float64: logits and states, over several tokens."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mamba_pretrain.config import ModelConfig
from mamba_pretrain.model.block import MambaState
from mamba_pretrain.model.generate import generate
from mamba_pretrain.model.lm import MambaLM
from mamba_pretrain.ops import dispatch
from mamba_pretrain.ops.backends.native_decode import DecodeStep
from mamba_pretrain.ops.call import KernelError
from mamba_pretrain.ops.decode import decode_step
from tests.helpers.hf import lively

BASE = ModelConfig(d_model=40, n_layer=3, vocab_size=51)
SHAPES = {
    "published": BASE,
    "all biases, untied head": dataclasses.replace(BASE, linear_bias=True, tie_embeddings=False),
    "no biases": dataclasses.replace(BASE, conv_bias=False),
    "three taps, one state": dataclasses.replace(BASE, d_conv=3, d_state=1),
    "two taps, 17 states, odd widths": dataclasses.replace(BASE, d_model=33, d_conv=2, d_state=17, dt_rank=5, expand=3),
    "one channel": dataclasses.replace(BASE, d_model=1, expand=1),
}


def walk(model: MambaLM, token_TB: torch.Tensor) -> list[torch.Tensor]:
    """Logits of each step and the last states, by the model's own step."""
    dtype = next(model.parameters()).dtype
    state = MambaState.zeros(model.config, token_TB.shape[1])
    state = MambaState([s.to(dtype) for s in state.conv], [s.to(dtype) for s in state.ssm])
    logits = []
    with dispatch.using("reference"):
        for token_B in token_TB:
            logits_BV, state = model.step(token_B, state)
            logits.append(logits_BV)
    return [torch.stack(logits), *state.conv, *state.ssm]


def fast_walk(kernel: DecodeStep, model: MambaLM, token_TB: torch.Tensor) -> list[torch.Tensor]:
    state = MambaState.zeros(model.config, token_TB.shape[1])
    conv, ssm = state.conv, state.ssm
    logits = []
    for token_B in token_TB:
        before = [s.clone() for s in (*conv, *ssm)]
        logits_BV, new_conv, new_ssm = kernel(token_B, conv, ssm)
        assert all(torch.equal(a, b) for a, b in zip(before, (*conv, *ssm), strict=True)), "a given state was changed"
        logits.append(logits_BV)
        conv, ssm = new_conv, new_ssm
    return [torch.stack(logits), *conv, *ssm]


def tokens(steps: int, batch: int) -> torch.Tensor:
    return torch.randint(51, (steps, batch), generator=torch.Generator().manual_seed(batch))


@pytest.mark.parametrize("batch", [1, 3, 4, 9])
@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
@torch.no_grad()
def test_equals_the_models_own_step(config: ModelConfig, batch: int) -> None:
    model, token_TB = lively(config), tokens(6, batch)
    kernel = decode_step(model.decode_weights())
    assert isinstance(kernel, DecodeStep)
    found = fast_walk(kernel, model, token_TB)
    due = walk(lively(config).double(), token_TB)
    for a, b in zip(found, due, strict=True):
        if b.numel():
            assert (a.double() - b).abs().max() <= 3e-6 * b.abs().max()


@torch.no_grad()
def test_narrow_matrices_are_read_as_they_are_and_nothing_else_is_rounded() -> None:
    model, token_TB = lively(BASE), tokens(5, 2)
    matrices = ("proj.weight", "embedding.weight")
    exact = lively(BASE).double()
    for (name, narrow), wide in zip(model.named_parameters(), exact.parameters(), strict=True):
        if name.endswith(matrices):
            narrow.data = narrow.data.bfloat16()
            wide.data = narrow.data.double()
    kernel = decode_step(model.decode_weights())
    assert isinstance(kernel, DecodeStep)
    for a, b in zip(fast_walk(kernel, model, token_TB), walk(exact, token_TB), strict=True):
        assert (a.double() - b).abs().max() <= 3e-6 * b.abs().max()


@torch.no_grad()
def test_any_number_of_threads_gives_the_same_bits() -> None:
    model, token_TB = lively(dataclasses.replace(BASE, d_model=128)), tokens(4, 3)
    kernel = decode_step(model.decode_weights())
    assert isinstance(kernel, DecodeStep)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(fast_walk(kernel, model, token_TB))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("token", [-1, 56])
def test_a_token_outside_the_vocabulary_is_refused(token: int) -> None:
    model = lively(BASE)
    kernel = decode_step(model.decode_weights())
    assert kernel is not None
    state = MambaState.zeros(BASE, 1)
    with pytest.raises(KernelError, match=rf"token ids \[{token}\] are outside the vocabulary of 56"):
        kernel(torch.tensor([token]), state.conv, state.ssm)


@pytest.mark.parametrize("wrong", ["one row too few", "one block too few", "other channels"])
def test_states_of_another_shape_are_refused(wrong: str) -> None:
    kernel = decode_step(lively(BASE).decode_weights())
    assert kernel is not None
    state = MambaState.zeros(BASE, 2)
    if wrong == "one row too few":
        state.ssm[1] = state.ssm[1][:1]
    elif wrong == "one block too few":
        del state.conv[-1]
    else:
        state.conv[0] = state.conv[0][:, :, 1:]
    with pytest.raises(KernelError, match=r"decode_step: (a|there are 2) (ssm|conv) state"):
        kernel(torch.tensor([1, 2]), state.conv, state.ssm)


def test_a_row_that_is_not_finite_does_not_reach_the_others() -> None:
    model = lively(BASE)
    kernel = decode_step(model.decode_weights())
    assert kernel is not None
    clean, damaged = MambaState.zeros(BASE, 3), MambaState.zeros(BASE, 3)
    damaged.ssm[0][1] = torch.nan
    token_B = torch.tensor([5, 6, 7])
    found, due = kernel(token_B, damaged.conv, damaged.ssm)[0], kernel(token_B, clean.conv, clean.ssm)[0]
    assert torch.isnan(found[1]).all()
    assert torch.equal(found[::2], due[::2])


def test_one_wide_matrix_keeps_all_of_them_wide() -> None:
    model, token_TB = lively(BASE), tokens(3, 1)
    due = decode_step(model.decode_weights())
    weights = model.decode_weights()
    kernel = decode_step(weights._replace(head=weights.head.bfloat16().detach()))
    assert isinstance(due, DecodeStep) and isinstance(kernel, DecodeStep)
    _, *states = fast_walk(kernel, model, token_TB)
    _, *due_states = fast_walk(due, model, token_TB)
    assert all(torch.equal(a, b) for a, b in zip(states, due_states, strict=True))


def test_other_dtypes_are_left_to_the_model() -> None:
    assert decode_step(lively(BASE).double().decode_weights()) is None
    assert decode_step(lively(BASE).half().decode_weights()) is None


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_generated_text_is_that_of_the_reference(autocast: bool) -> None:
    model = lively(BASE)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = list(generate(model, [1, 2, 3], max_tokens=20, temperature=0))
        with dispatch.using("reference"):
            due = list(generate(model, [1, 2, 3], max_tokens=20, temperature=0))
    assert found == due
