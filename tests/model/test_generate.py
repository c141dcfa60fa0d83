"""Generation: what is sampled, from which tokens, and when it ends."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from mamba_pretrain.config import ModelConfig
from mamba_pretrain.model import generate as generate_module
from mamba_pretrain.model.generate import GenerationError, generate
from mamba_pretrain.model.lm import MambaLM
from mamba_pretrain.ops import dispatch

CONFIG = ModelConfig(d_model=16, n_layer=2, vocab_size=11, d_state=4, embedding_std=0.5, tie_embeddings=False)
PROMPT = [1, 5, 2, 7, 3]


@pytest.fixture(scope="module")
def model() -> MambaLM:
    return MambaLM(CONFIG, seed=0)


def memoryless(logits_V: torch.Tensor) -> MambaLM:
    """A model that predicts `logits` (padded V) whatever it has read, so that its samples are independent draws."""
    model = MambaLM(ModelConfig(d_model=16, n_layer=1, vocab_size=11, d_state=1, tie_embeddings=False), seed=0)
    with torch.no_grad():
        model.backbone.layers[0].mixer.out_proj.weight.zero_()
        model.backbone.embedding.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, 0] = logits_V
    return model


def test_greedy_tokens_are_the_argmax_of_a_forward_pass_from_scratch(model: MambaLM) -> None:
    text = list(PROMPT)
    for token in generate(model, PROMPT, max_tokens=20, temperature=0):
        logits_V = model(torch.tensor([text])).logits[0, -1, :11]
        assert token == int(logits_V.argmax())
        text.append(token)
    assert len(text) == len(PROMPT) + 20


def test_a_prompt_read_in_parts_gives_the_same_text(model: MambaLM, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(generate(model, PROMPT, max_tokens=20))
    monkeypatch.setattr(generate_module, "PREFILL_TOKENS", 2)
    assert list(generate(model, PROMPT, max_tokens=20)) == whole


def test_the_seed_alone_decides_the_text(model: MambaLM) -> None:
    first = list(generate(model, PROMPT, max_tokens=30, seed=3))
    torch.rand(5)  # the global generator plays no part
    assert list(generate(model, PROMPT, max_tokens=30, seed=3)) == first
    assert list(generate(model, PROMPT, max_tokens=30, seed=4)) != first


@pytest.mark.parametrize(
    "limits", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-6}, {"temperature": 1e-50}], ids=str
)
def test_the_narrowest_limits_are_greedy(model: MambaLM, limits: dict[str, Any]) -> None:
    greedy = list(generate(model, PROMPT, max_tokens=20, temperature=0))
    assert list(generate(model, PROMPT, max_tokens=20, seed=1, **limits)) == greedy


@pytest.mark.parametrize(
    ("options", "kept"),
    [({}, 11), ({"temperature": 2.0}, 11), ({"top_k": 4}, 4), ({"top_p": 0.7}, 5), ({"top_k": 4, "top_p": 0.7}, 3)],
    ids=str,
)
def test_samples_follow_the_distribution_the_options_ask_for(options: dict[str, Any], kept: int) -> None:
    """Chi-square over 1,000 draws; a true sampler exceeds its bound, for this fixed seed, with probability 1e-4."""
    probabilities_V = torch.tensor([3.0, 2, 9, 4, 1, 12, 5, 6, 2, 7, 8]) / 59
    logits_V = torch.cat([probabilities_V.log(), torch.full((5,), 50.0)])
    draws = torch.tensor(list(generate(memoryless(logits_V), [0], max_tokens=1000, seed=5, **options)))
    expected_V = probabilities_V ** (1 / options.get("temperature", 1.0))
    expected_V[expected_V.argsort(descending=True)[kept:]] = 0
    expected_V = 1000 * expected_V / expected_V.sum()
    found_V = draws.bincount(minlength=11)
    assert found_V[expected_V == 0].sum() == 0
    alive = expected_V > 0
    chi_square = ((found_V[alive] - expected_V[alive]).square() / expected_V[alive]).sum().item()
    assert chi_square < {11: 35.6, 5: 23.5, 4: 21.1, 3: 18.4}[kept]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_pad_the_head_are_never_chosen(temperature: float) -> None:
    likely_padding_V = torch.cat([torch.zeros(11), torch.full((5,), 50.0)])
    text = list(generate(memoryless(likely_padding_V), [0], max_tokens=100, temperature=temperature))
    assert len(text) == 100
    assert max(text) < 11


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_token_are_never_chosen(temperature: float) -> None:
    """As released models have them: more rows than the tokenizer has tokens."""
    likely_end_V = torch.cat([torch.zeros(8), torch.full((8,), 50.0)])
    text = list(generate(memoryless(likely_end_V), [0], max_tokens=100, temperature=temperature, vocab_size=8))
    assert len(text) == 100
    assert max(text) < 8


def test_top_p_keeps_no_more_than_the_fewest_tokens_that_hold_it() -> None:
    four_V = torch.cat([torch.zeros(4), torch.full((12,), -1e4)])  # a quarter each, exactly; the first come first
    for top_p, kept in ((0.25, 1), (0.5, 2), (0.51, 3), (0.75, 3), (0.76, 4)):
        assert set(generate(memoryless(four_V), [0], max_tokens=50, top_p=top_p)) == set(range(kept))


def test_it_ends_before_a_stop_id_and_otherwise_at_max_tokens(model: MambaLM) -> None:
    whole = list(generate(model, PROMPT, max_tokens=30))
    stop = whole[10]
    assert list(generate(model, PROMPT, max_tokens=30, stop_ids=[stop])) == whole[: whole.index(stop)]
    assert list(generate(model, PROMPT, max_tokens=0)) == []


def test_the_last_token_costs_no_step_and_tokens_come_one_by_one(
    model: MambaLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    original = MambaLM.step
    monkeypatch.setattr(MambaLM, "step", lambda self, *inputs: steps.append(1) or original(self, *inputs))
    with dispatch.using("reference"):  # elsewhere the step may be a kernel's
        tokens = generate(model, PROMPT, max_tokens=3)
        assert inspect.isgenerator(tokens)
        assert next(tokens) is not None
        assert steps == []
        assert len(list(tokens)) == 2
        assert len(steps) == 2


def test_gradients_stay_on_for_the_caller_between_two_tokens(model: MambaLM) -> None:
    tokens = generate(model, PROMPT, max_tokens=2)
    next(tokens)
    assert torch.is_grad_enabled()


def test_it_runs_under_autocast(model: MambaLM) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert len(list(generate(model, PROMPT, max_tokens=5))) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_ids": []}, "prompt is empty: pass the tokenizer's bos id"),
        ({"prompt_ids": [3, 11, -1]}, r"ids \[-1, 11\] are outside the vocabulary: expected 0 to 10"),
        ({"stop_ids": [15]}, r"ids \[15\] are outside"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"seed": -1}, "seed is -1: it must be 0 or more"),
        ({"seed": 2**63}, r"seed is 9223372036854775808: .* below 2\*\*63"),
        ({"vocab_size": 12}, "vocab_size is 12: it must be 1 to 11"),
    ],
    ids=str,
)
def test_impossible_arguments_are_refused_at_the_call(model: MambaLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        generate(model, **({"prompt_ids": PROMPT, "max_tokens": 5} | options))


def test_logits_that_are_not_finite_stop_it() -> None:
    with pytest.raises(GenerationError, match="not finite"):
        next(generate(memoryless(torch.full((16,), float("nan"))), [0], max_tokens=1))
