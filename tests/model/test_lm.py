"""The language model: equal to the plain one, one step at a time or all at once, however it is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_pretrain.config import ConfigError, ModelConfig
from mamba_pretrain.model.block import MambaState
from mamba_pretrain.model.lm import Mamba, MambaLM
from tests.helpers import reference


def tiny(**options: Any) -> ModelConfig:
    return ModelConfig(**{"d_model": 16, "n_layer": 3, "vocab_size": 29, "d_state": 4, **options})


def text(batch: int, length: int, vocab: int = 29, seed: int = 0) -> Tensor:
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "options",
    [{}, {"d_model": 15, "d_state": 1, "d_conv": 2, "expand": 1, "dt_rank": 3}, {"pad_vocab_to_multiple_of": 16}],
)
@pytest.mark.parametrize("length", [1, 2, 33])
def test_equals_the_plain_model(options: dict[str, Any], length: int) -> None:
    config = tiny(**options)
    model = MambaLM(config, seed=1).double()
    ids, labels = text(2, length), text(2, length, seed=1)
    found = model(ids).logits
    parameters = dict(model.named_parameters())
    due = reference.logits(parameters, config, ids)
    torch.testing.assert_close(found, due, rtol=1e-11, atol=1e-12)

    loss = model(ids, labels).loss_sum
    due_loss = F.cross_entropy(due[..., :29].flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss, due_loss, rtol=1e-12, atol=1e-12)
    found_grads = torch.autograd.grad(loss, list(parameters.values()))
    due_grads = torch.autograd.grad(due_loss, list(parameters.values()))
    for name, grad, due_grad in zip(parameters, found_grads, due_grads, strict=True):
        torch.testing.assert_close(grad, due_grad, rtol=1e-10, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


def test_one_step_at_a_time_equals_all_at_once() -> None:
    model = MambaLM(tiny(), seed=0).double()
    ids = text(3, 40)
    with torch.no_grad():
        due = model(ids)
        state, logits = MambaState.zeros(model.config, batch=3), []
        for t in range(40):
            logits_BV, state = model.step(ids[:, t], state)
            logits.append(logits_BV)
    torch.testing.assert_close(torch.stack(logits, dim=1), due.logits, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close([*state.conv, *state.ssm], [*due.state.conv, *due.state.ssm], rtol=1e-12, atol=1e-13)


def test_a_text_in_parts_with_gradients_through_the_state() -> None:
    model = MambaLM(tiny(), seed=0).double()
    ids, labels = text(2, 50), text(2, 50, seed=1)
    whole = model(ids, labels).loss_sum
    first = model(ids[:, :33], labels[:, :33])
    second = model(ids[:, 33:], labels[:, 33:], state=first.state)
    parameters = list(model.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(first.loss_sum + second.loss_sum, parameters),
        torch.autograd.grad(whole, parameters),
        rtol=1e-11,
        atol=1e-12,
    )


def test_forgotten_rows_start_afresh_and_the_others_go_on() -> None:
    model = MambaLM(tiny(), seed=0).double()
    ids = text(2, 20)
    with torch.no_grad():
        state = model(ids[:, :12]).state.forget(torch.tensor([True, False]))
        found = model(ids[:, 12:], state=state).logits
        torch.testing.assert_close(found[0], model(ids[:1, 12:]).logits[0], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(found[1], model(ids[1:]).logits[0, 12:], rtol=1e-12, atol=1e-13)


def test_zero_state_is_no_state() -> None:
    model = MambaLM(tiny(), seed=0)
    ids = text(2, 9)
    with torch.no_grad():
        assert torch.equal(model(ids, state=MambaState.zeros(model.config, 2)).logits, model(ids).logits)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_activation_checkpointing_changes_no_bit(autocast: bool) -> None:
    """The recomputed forward is the same one, so that a run may switch it on midway."""
    model = MambaLM(tiny(), seed=0)
    ids, labels = text(2, 70), text(2, 70, seed=1)
    seq_idx = reference.layouts(2, 70)
    results = []
    for model.backbone.activation_checkpointing in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(ids, labels, seq_idx).loss_sum
        loss.backward()
        results.append((loss.detach(), [p.grad for p in model.parameters()]))
    (loss, grads), (loss_again, grads_again) = results
    assert torch.equal(loss, loss_again)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))


def test_bf16_autocast_leaves_parameters_gradients_and_stream_in_fp32() -> None:
    model = MambaLM(tiny(), seed=0)
    ids, labels = text(2, 20), text(2, 20, seed=1)
    exact = model(ids, labels).loss_sum
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, labels)
    out.loss_sum.backward()
    assert out.loss_sum.dtype == torch.float32
    assert {s.dtype for s in (*out.state.conv, *out.state.ssm)} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    assert all(p.grad is not None for p in model.parameters())
    assert out.loss_sum.item() == pytest.approx(exact.item(), rel=2e-3)


def test_an_untied_head_is_a_parameter_of_its_own() -> None:
    model = MambaLM(tiny(tie_embeddings=False), seed=0)
    assert "lm_head.weight" in dict(model.named_parameters())
    assert model.head_weight_VD is model.lm_head.weight
    tied = MambaLM(tiny(), seed=0)
    assert tied.head_weight_VD is tied.backbone.embedding.weight


def test_parameter_names_are_those_of_mamba_ssm() -> None:
    names = set(MambaLM(tiny(n_layer=1)).state_dict())
    mixer = ["A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight"]
    mixer += ["dt_proj.bias", "out_proj.weight"]
    due = {f"backbone.layers.0.mixer.{name}" for name in mixer}
    assert names == due | {"backbone.layers.0.norm.weight", "backbone.embedding.weight", "backbone.norm_f.weight"}


def test_variant_errors_name_what_is_known() -> None:
    with pytest.raises(ConfigError, match=r"unknown variant '131m'.*130m"):
        Mamba.from_variant("131m")
    with pytest.raises(ConfigError, match=r"unknown field 'd_modle'.*d_model"):
        Mamba.from_variant("130m", d_modle=3)
    with pytest.raises(ConfigError, match="d_conv is 9"):
        Mamba.from_variant("130m", d_conv=9)
    with pytest.raises(ConfigError, match="vocab_size is not set"):
        Mamba(ModelConfig(d_model=8, n_layer=1))
