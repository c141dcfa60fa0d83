"""Perplexity is that of each document alone, however the split is dealt to lanes and windows; every byte is paid."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_pretrain.config import ModelConfig
from mamba_pretrain.data.shards import Shard
from mamba_pretrain.data.tokenizer import BytesTokenizer
from mamba_pretrain.data.writer import ShardWriter
from mamba_pretrain.evaluate.perplexity import (
    EvaluationError,
    PerplexityResult,
    decoded_documents,
    evaluate_documents,
    evaluate_windows,
)
from mamba_pretrain.model.lm import MambaLM

TEXTS = [
    "",
    "a",
    "ab c",
    "the river carries sand to the sea, slowly and by night " * 2,
    "x",
    "gr\u00fc\u00df dich",
    "wind",
]
TOKENIZER = BytesTokenizer()
VOCAB = TOKENIZER.vocab_size


def make_shard(directory: Path, texts: list[str], *, bos: bool = True) -> Shard:
    with ShardWriter(directory / "validation", vocab_size=VOCAB) as writer:
        for text in texts:
            ids = [TOKENIZER.bos_id] * bos + TOKENIZER.encode(text) + [TOKENIZER.eod_id]
            writer.append(np.array(ids, dtype=np.int64))
    return Shard(directory / "validation")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors of a few hundred numbers take twice as long on two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> MambaLM:
    return MambaLM(ModelConfig(d_model=12, n_layer=2, vocab_size=VOCAB, d_state=4), seed=0).double()


@torch.no_grad()
def nats_of(model: MambaLM, ids: Tensor, targets: Tensor) -> float:
    logits = model(ids[None]).logits[0, :, :VOCAB]
    return F.cross_entropy(logits, targets, reduction="sum", ignore_index=-100).item()


def naive(model: MambaLM, shard: Shard, n_documents: int) -> tuple[float, int]:
    """Nats and tokens of the documents, one after the other, from all their logits."""
    nats, tokens = 0.0, 0
    for document in range(n_documents):
        ids = torch.from_numpy(shard.tokens(*shard.document_bounds(document)))
        if len(ids) > 1:
            nats += nats_of(model, ids[:-1], ids[1:])
        tokens += len(ids) - 1
    return nats, tokens


@pytest.mark.parametrize("bos", [True, False], ids=["bos", "no bos"])
@pytest.mark.parametrize("window", [1, 5, 64])
@pytest.mark.parametrize("lanes", [1, 2, 3, 7])
def test_equals_each_document_alone(tmp_path: Path, model: MambaLM, lanes: int, window: int, bos: bool) -> None:
    shard = make_shard(tmp_path, TEXTS, bos=bos)
    found = evaluate_documents(model, shard, adds_bos=bos, tokenizer=TOKENIZER, lanes=lanes, window=window)
    nats, tokens = naive(model, shard, len(TEXTS))
    assert found.tokens == tokens
    assert found.nats == pytest.approx(nats, rel=1e-12)
    assert found.nats_per_token == pytest.approx(nats / tokens, rel=1e-12)
    assert found.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-12)


@pytest.mark.parametrize("wanted", [1, 3, 4, 100])
def test_the_first_documents_only(tmp_path: Path, model: MambaLM, wanted: int) -> None:
    shard = make_shard(tmp_path, TEXTS)
    found = evaluate_documents(
        model, shard, adds_bos=True, tokenizer=TOKENIZER, lanes=3, window=7, max_documents=wanted
    )
    due = TEXTS[:wanted]
    assert (found.nats, found.tokens) == pytest.approx(naive(model, shard, len(due)), rel=1e-12)
    assert found.documents == len(due)
    assert found.text_bytes == sum(len(text.encode()) for text in due)


def test_bytes_words_and_what_they_are_charged(tmp_path: Path, model: MambaLM) -> None:
    """With a bos every byte and every end of a document is predicted; nothing is left over."""
    shard = make_shard(tmp_path, TEXTS)
    found = evaluate_documents(model, shard, adds_bos=True, tokenizer=TOKENIZER)
    assert found.documents == 7
    assert found.text_bytes == 0 + 1 + 4 + 110 + 1 + 11 + 4
    assert found.words == 0 + 1 + 2 + 22 + 1 + 2 + 1
    assert found.tokens == found.text_bytes + found.documents
    assert found.unscored_tokens == 0
    assert found.bits_per_byte == pytest.approx(found.nats / math.log(2) / 131)
    assert found.word_perplexity == pytest.approx(math.exp(found.nats / 29))


def test_a_first_token_that_nothing_predicts_costs_a_uniform_guess(tmp_path: Path, model: MambaLM) -> None:
    shard = make_shard(tmp_path, TEXTS, bos=False)
    found = evaluate_documents(model, shard, adds_bos=False, tokenizer=TOKENIZER)
    assert found.unscored_tokens == len(TEXTS)
    assert found.tokens + found.unscored_tokens == shard.n_tokens
    assert found.total_nats == pytest.approx(found.nats + 7 * math.log(257))
    assert found.bits_per_byte == pytest.approx((found.nats / math.log(2) + 7 * math.log2(257)) / 131)


def test_a_tokenizer_that_loses_text_gives_no_figure_per_byte_or_word(tmp_path: Path, model: MambaLM) -> None:
    """Few tokens for much text would look like a better model."""
    shard = make_shard(tmp_path, TEXTS)
    whole = evaluate_documents(model, shard, adds_bos=True, tokenizer=TOKENIZER)
    lossy = evaluate_documents(model, shard, adds_bos=True, tokenizer=TOKENIZER, not_round_trip=3)
    assert (lossy.nats, lossy.documents) == (whole.nats, whole.documents)
    assert (lossy.text_bytes, lossy.words, lossy.bits_per_byte, lossy.word_perplexity) == (None, None, None, None)
    assert lossy.markdown_row("x", "y").endswith("| - | - |")
    assert json.loads(lossy.to_json())["not_round_trip"] == 3
    assert whole.missing is None
    assert "3 documents of the split do not decode to their own bytes" in (lossy.missing or "")


def test_a_uniform_model_pays_for_every_token_alike(tmp_path: Path) -> None:
    """No choice of bos makes the figure smaller than what the tokens cost."""
    uniform = MambaLM(ModelConfig(d_model=8, n_layer=1, vocab_size=VOCAB), seed=0)
    torch.nn.init.zeros_(uniform.head_weight_VD)
    found = []
    for bos in (True, False):
        directory = tmp_path / str(bos)
        directory.mkdir()
        shard = make_shard(directory, TEXTS, bos=bos)
        found.append(evaluate_documents(uniform, shard, adds_bos=bos, tokenizer=TOKENIZER).bits_per_byte)
    assert found == pytest.approx([(131 + 7) * math.log2(257) / 131] * 2, rel=1e-6)


def test_fp32_and_bf16_agree_with_fp64_and_runs_repeat_to_the_bit(tmp_path: Path, model: MambaLM) -> None:
    shard = make_shard(tmp_path, TEXTS)
    exact = evaluate_documents(model, shard, adds_bos=True, tokenizer=TOKENIZER).nats
    single = MambaLM(model.config, seed=0)
    for precision, tolerance in (("fp32", 1e-6), ("bf16", 2e-3)):
        found, again = (
            evaluate_documents(single, shard, adds_bos=True, tokenizer=TOKENIZER, precision=precision).nats
            for _ in range(2)
        )
        assert found == pytest.approx(exact, rel=tolerance)
        assert found == again


@pytest.mark.parametrize("reset", [True, False], ids=["reset", "flow"])
@pytest.mark.parametrize(("batch", "wanted"), [(1, None), (4, None), (3, 5), (8, 100)])
def test_windows_by_hand(tmp_path: Path, model: MambaLM, batch: int, wanted: int | None, reset: bool) -> None:
    """Every token but the first of each document is scored, from its window's start or its document's."""
    seq_len = 10
    shard = make_shard(tmp_path, TEXTS)
    stream = torch.from_numpy(shard.tokens(0, shard.n_tokens))
    starts = {shard.document_bounds(j)[0] for j in range(shard.n_documents)}
    available = (len(stream) - 1) // seq_len
    windows = range(available) if wanted is None or wanted > available else [0, 2, 5, 8, 11]
    assert available == 14

    nats, tokens = 0.0, 0
    for i in windows:
        span = range(i * seq_len, (i + 1) * seq_len)
        targets = torch.tensor([-100 if t + 1 in starts else int(stream[t + 1]) for t in span])
        tokens += int((targets != -100).sum())
        cuts = [0, *[t - span[0] for t in span[1:] if reset and t in starts], seq_len]
        for a, b in pairwise(cuts):
            nats += nats_of(model, stream[span[0] + a : span[0] + b], targets[a:b])

    found = evaluate_windows(model, shard, seq_len=seq_len, reset_documents=reset, batch=batch, max_windows=wanted)
    assert found.tokens == tokens
    assert found.tokens + found.unscored_tokens == seq_len * len(windows)
    assert found.nats == pytest.approx(nats, rel=1e-12)
    assert (found.text_bytes, found.bits_per_byte, found.word_perplexity) == (None, None, None)


def test_one_long_window_is_the_document_protocol(tmp_path: Path, model: MambaLM) -> None:
    shard = make_shard(tmp_path, TEXTS)
    windows = evaluate_windows(model, shard, seq_len=shard.n_tokens - 1, reset_documents=True, batch=1)
    documents = evaluate_documents(model, shard, adds_bos=True, tokenizer=TOKENIZER)
    assert (windows.nats, windows.tokens) == pytest.approx((documents.nats, documents.tokens), rel=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(tmp_path: Path, training: bool) -> None:
    """The trainer calls this between two steps."""
    shard = make_shard(tmp_path, TEXTS)
    trained = MambaLM(ModelConfig(d_model=8, n_layer=1, vocab_size=VOCAB), seed=0).train(training)
    evaluate_windows(trained, shard, seq_len=8, reset_documents=True, batch=2, precision="bf16")
    assert trained.training == training
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        loss = trained(ids, ids).loss_sum
    loss.backward()
    assert all(p.grad is not None for p in trained.parameters())
    with pytest.raises(EvaluationError, match="precision is 'fp8'"):
        evaluate_windows(trained, shard, seq_len=8, reset_documents=True, batch=2, precision="fp8")
    assert trained.training == training


def test_nothing_to_evaluate(tmp_path: Path, model: MambaLM) -> None:
    shard = make_shard(tmp_path, [])
    with pytest.raises(EvaluationError, match="no documents"):
        evaluate_documents(model, shard, adds_bos=True, tokenizer=TOKENIZER)
    with pytest.raises(EvaluationError, match="0 windows of 8 tokens"):
        evaluate_windows(model, shard, seq_len=8, reset_documents=True, batch=1)
    with pytest.raises(EvaluationError, match="windows of 0 tokens"):
        evaluate_windows(model, shard, seq_len=0, reset_documents=True, batch=1)


def test_progress_is_shown_on_terminals_only(
    tmp_path: Path, model: MambaLM, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate_documents(model, make_shard(tmp_path, TEXTS), adds_bos=True, tokenizer=TOKENIZER, progress=True)
    assert capsys.readouterr().err == ""


def test_what_does_not_fit_together_is_refused(tmp_path: Path, model: MambaLM) -> None:
    shard = make_shard(tmp_path, TEXTS)
    small = MambaLM(ModelConfig(d_model=8, n_layer=1, vocab_size=100), seed=0)
    with pytest.raises(EvaluationError, match=r"tokenizer \(bytes\) has 257 tokens, the model 100"):
        evaluate_documents(small, shard, adds_bos=True, tokenizer=TOKENIZER)
    with pytest.raises(EvaluationError, match="lanes and window must be at least 1: found 0 and 5"):
        evaluate_documents(model, shard, adds_bos=True, tokenizer=TOKENIZER, lanes=0, window=5)
    with ShardWriter(tmp_path / "foreign", vocab_size=1000) as writer:
        writer.append(np.array([1, 2, 700]))
    with pytest.raises(EvaluationError, match="outside the model's vocabulary of 257"):
        evaluate_documents(model, Shard(tmp_path / "foreign"), adds_bos=True, tokenizer=TOKENIZER)


def test_decoded_documents(tmp_path: Path) -> None:
    shard = make_shard(tmp_path, TEXTS)
    assert list(decoded_documents(shard, TOKENIZER, 3)) == [b"", b"a", b"ab c"]


def test_json_and_markdown() -> None:
    result = PerplexityResult("p", tokens=10, unscored_tokens=2, nats=20.0, vocab_size=8, seconds=2.0, text_bytes=9)
    read = json.loads(result.to_json(checkpoint="step_1", config_hash="abc"))
    assert (read["checkpoint"], read["tokens"], read["tokens_per_s"]) == ("step_1", 10, 5.0)
    assert read["perplexity"] == pytest.approx(math.exp(2))
    assert read["bits_per_byte"] == pytest.approx((20 / math.log(2) + 2 * 3) / 9)
    header, rule = PerplexityResult.markdown_header().splitlines()
    row = result.markdown_row("step_1", "abc")
    assert header.count("|") == rule.count("|") == row.count("|")
    assert row == "| step_1 | abc | p | 10 | 2.0000 | 7.389 | 3.873 | - |"


def test_figures_beyond_a_float_are_infinite_and_null_in_json() -> None:
    huge = PerplexityResult("p", tokens=1, unscored_tokens=0, nats=1e5, vocab_size=8, seconds=1.0, words=1)
    assert huge.perplexity == huge.word_perplexity == math.inf
    assert json.loads(huge.to_json())["perplexity"] is None
    diverged = PerplexityResult("p", tokens=1, unscored_tokens=0, nats=math.nan, vocab_size=8, seconds=1.0)
    assert math.isnan(diverged.perplexity)
