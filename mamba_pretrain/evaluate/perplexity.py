"""Perplexity and bits per byte of a split, by two protocols.

`evaluate_documents` is the one to publish: every document is read from its first token to its last from zero state,
and no context is lost where a window ends. `evaluate_windows` scores fixed windows as the trainer sees them, each from
zero state: what is watched during training. (Most other systems report the like, the state flowing across documents.)

Bits per byte charge a model for everything a compressor would have to send: each token, the end of each document, and
log2(vocabulary) bits for a first token that nothing predicts (that of documents stored without bos). They do not depend
on the tokenizer, so they compare across models; perplexity per token does not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from mamba_pretrain.data.packing import IGNORE, Windows, n_windows
from mamba_pretrain.data.shards import Shard
from mamba_pretrain.data.tokenizer import Tokenizer
from mamba_pretrain.distributed.env import DTYPES, autocast
from mamba_pretrain.distributed.ranks import ALONE, Ranks
from mamba_pretrain.model.block import MambaState
from mamba_pretrain.model.lm import MambaLM


class EvaluationError(ValueError):
    """There is nothing to evaluate, or model, data and options do not fit each other."""


@dataclass(frozen=True)
class PerplexityResult:
    """Sums over what was evaluated; the figures one quotes are properties. Bytes and words only of whole documents."""

    protocol: str
    tokens: int  # scored
    unscored_tokens: int  # the first of a document or of the split: nothing predicts it
    nats: float  # of the scored tokens
    vocab_size: int
    seconds: float
    documents: int | None = None
    text_bytes: int | None = None  # this and words: None where the tokenizer loses text
    words: int | None = None  # separated by whitespace
    not_round_trip: int | None = None  # documents of the split that do not decode to their own bytes

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """Per scored token; infinite where it exceeds a float."""
        return _exp(self.nats_per_token)

    @property
    def total_nats(self) -> float:
        """Scored tokens, plus log(vocabulary) for each unscored one."""
        return self.nats + self.unscored_tokens * math.log(self.vocab_size)

    @property
    def bits_per_byte(self) -> float | None:
        return self.total_nats / math.log(2) / self.text_bytes if self.text_bytes else None

    @property
    def word_perplexity(self) -> float | None:
        return _exp(self.total_nats / self.words) if self.words else None

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else math.inf

    @property
    def missing(self) -> str | None:
        """Why a result over whole documents has no bits per byte and no word perplexity."""
        if not self.not_round_trip:
            return None
        return (
            "bits per byte and word perplexity are left out, since the tokenizer loses text: "
            f"{self.not_round_trip:,} documents of the split do not decode to their own bytes"
        )

    def to_json(self, **facts: Any) -> str:
        """Every field and figure, after the caller's `facts` (checkpoint, configuration's hash); null if not finite."""
        figures = ("nats_per_token", "perplexity", "total_nats", "bits_per_byte", "word_perplexity", "tokens_per_s")
        values = facts | asdict(self) | {name: getattr(self, name) for name in figures}
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        return json.dumps(finite, indent=1)

    @staticmethod
    def markdown_header() -> str:
        names = "checkpoint | config | protocol | tokens | nats/token | perplexity | bits/byte | word perplexity"
        return f"| {names} |\n|{' --- |' * 3}{' ---: |' * 5}"

    def markdown_row(self, checkpoint: str, config_hash: str) -> str:
        figures = (self.perplexity, self.bits_per_byte, self.word_perplexity)
        perplexity, bits, words = ("-" if f is None else f"{f:.4g}" for f in figures)
        about = f"| {checkpoint} | {config_hash} | {self.protocol} "
        return f"{about}| {self.tokens:,} | {self.nats_per_token:.4f} | {perplexity} | {bits} | {words} |"


def evaluate_documents(
    model: MambaLM,
    shard: Shard,
    *,
    adds_bos: bool,
    tokenizer: Tokenizer,
    not_round_trip: int = 0,
    lanes: int = 32,  # many short rows suit the scan, which works through a window step by step
    window: int = 256,
    max_documents: int | None = None,
    precision: str = "fp32",
    progress: bool = False,
) -> PerplexityResult:
    """Scores whole documents (the split's first `max_documents`), weighted by token.

    The documents lie end to end in `lanes` streams, which are the rows of a batch. Each stream is read window by
    window with the state handed on, so that the result is that of each document alone in one pass (up to rounding),
    at the memory of lanes x window tokens. `adds_bos`: documents begin with a bos, which predicts their first token
    and is no text itself; without it the first token is unscored. `not_round_trip` is the split's: where it is not
    0, the tokens say less than the text, and nothing is measured per byte or word. Raises EvaluationError.
    """
    wanted = shard.n_documents if max_documents is None else min(max_documents, shard.n_documents)
    if wanted < 1 or shard.document_bounds(wanted - 1)[1] == 0:
        raise EvaluationError(f"{shard.path} has no documents to evaluate: {wanted} asked for, {shard.n_tokens} tokens")
    if lanes < 1 or window < 1:
        raise EvaluationError(f"lanes and window must be at least 1: found {lanes} and {window}")
    vocab_size = model.config.need("vocab_size")
    if tokenizer.vocab_size > vocab_size:
        raise EvaluationError(
            f"the tokenizer ({tokenizer.kind}) has {tokenizer.vocab_size} tokens, the model {vocab_size}: it was "
            "trained with another one. Evaluate it on a dataset made with its own tokenizer"
        )

    began = time.perf_counter()
    # Longest first: the lanes that are not at their end yet are always the first rows, and only they are computed.
    spans = sorted(_deal(shard, wanted, lanes), key=lambda span: span[0] - span[1])
    device = next(model.parameters()).device
    nats = torch.zeros((), dtype=torch.float64, device=device)
    tokens = 0
    state = MambaState.zeros(model.config, len(spans), device)
    offsets = range(0, spans[0][1] - spans[0][0], window)
    with _evaluating(model, precision, device):
        for offset in tqdm(offsets, desc="perplexity", unit="window", disable=None if progress else True):
            reading = [span for span in spans if span[0] + offset < span[1]]
            rows = [_lane_window(shard, span, offset, window, vocab_size) for span in reading]
            ids, labels, seq_idx, begins = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
            tokens += int((labels != IGNORE).sum())
            state = state.first(len(reading)).forget(begins[:, 0].to(device))
            loss_sum, _, state = model(ids.to(device), labels.to(device), seq_idx.to(device), state)
            nats += _sum(loss_sum)
    seconds = time.perf_counter() - began

    text_bytes = words = 0
    for text in decoded_documents(shard, tokenizer, wanted):
        text_bytes += len(text)
        words += len(text.decode(errors="replace").split())
    scorable = sum(stop - start for start, stop in spans)
    return PerplexityResult(
        protocol=f"whole documents, state carried ({len(spans)} lanes x {window} tokens, {precision})",
        tokens=tokens,
        unscored_tokens=0 if adds_bos else scorable - tokens,
        nats=nats.item(),
        vocab_size=vocab_size,
        seconds=seconds,
        documents=wanted,
        text_bytes=None if not_round_trip else text_bytes,
        words=None if not_round_trip else words,
        not_round_trip=not_round_trip,
    )


def evaluate_windows(
    model: MambaLM,
    shard: Shard,
    *,
    seq_len: int,
    reset_documents: bool,
    batch: int,
    max_windows: int | None = None,
    precision: str = "fp32",
    device: torch.device | None = None,
    ranks: Ranks = ALONE,
    progress: Callable[[], object] = lambda: None,
) -> PerplexityResult:
    """Scores fixed windows, each from zero state: all, or `max_windows` spread evenly over the split, always the same.

    `device`: where the model computes, if not where its parameters lie. `ranks`, which all must call this, score an
    equal share each; `progress` is called at every batch.

    `reset_documents`: the state starts anew at each document, as in training with the option of that name. The first
    token of a document is never scored. Raises EvaluationError where the split is shorter than a window.
    """
    if seq_len < 1:
        raise EvaluationError(f"windows of {seq_len} tokens: they must have at least 1")
    available = n_windows(shard, seq_len)
    count = available if max_windows is None else min(max_windows, available)
    if count < 1 or batch < 1:
        raise EvaluationError(
            f"{shard.path} has {available} windows of {seq_len} tokens (and one more to predict) in {shard.n_tokens} "
            f"tokens; {max_windows} asked for, in batches of {batch}. Use a shorter data.seq_len or a longer split"
        )
    began = time.perf_counter()
    vocab_size = model.config.need("vocab_size")
    device = next(model.parameters()).device if device is None else device
    nats = torch.zeros((), dtype=torch.float64, device=device)
    tokens = 0
    windows = Windows(shard, seq_len, vocab_size)
    chosen = [i * available // count for i in range(count)]
    mine = chosen[ranks.rank :: ranks.world]
    with _evaluating(model, precision, device):
        # A sharded model is gathered by all ranks together, so each takes as many batches as the one with most windows.
        for first in range(0, -(-count // ranks.world), batch):
            own = mine[first : first + batch]
            block = windows.read(np.array(own or chosen[:1]))
            ids, labels, seq_idx = (torch.from_numpy(part) for part in block[:3])
            if not own:
                labels.fill_(IGNORE)
            progress()
            tokens += int((labels != IGNORE).sum())
            documents = seq_idx.to(device) if reset_documents else None
            nats += _sum(model(ids.to(device), labels.to(device), documents, return_state=False).loss_sum)
    all_nats, all_tokens = ranks.sum(nats.item(), tokens)
    across = "documents reset" if reset_documents else "state flows across documents"
    return PerplexityResult(
        protocol=f"{count} of {available} windows of {seq_len} tokens, each from zero state, {across}, {precision}",
        tokens=int(all_tokens),
        unscored_tokens=count * seq_len - int(all_tokens),
        nats=all_nats,
        vocab_size=vocab_size,
        seconds=time.perf_counter() - began,
    )


def decoded_documents(shard: Shard, tokenizer: Tokenizer, n_documents: int) -> Iterator[bytes]:
    """The text of the first `n_documents`, without bos and eod."""
    for document in range(n_documents):
        yield tokenizer.decode_bytes(shard.tokens(*shard.document_bounds(document)).tolist())


def _deal(shard: Shard, n_documents: int, lanes: int) -> list[tuple[int, int]]:
    """Cuts the first documents into at most `lanes` token spans of about equal length, none empty, at documents."""
    total = shard.document_bounds(n_documents - 1)[1]
    cuts = {0, total}
    for lane in range(1, lanes):
        ideal = lane * total // lanes
        start, stop = shard.document_bounds(shard.document_at(ideal))
        cuts.add(start if ideal - start < stop - ideal else stop)
    return list(pairwise(sorted(cuts)))


def _lane_window(
    shard: Shard, span: tuple[int, int], offset: int, size: int, vocab_size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32], NDArray[np.bool_]]:
    """Tokens [offset, offset + size) of a lane: ids, labels, document numbers and where documents begin, each (size,).

    The last window's rest is padding without labels, read when nothing of the lane is left to score.
    """
    start = span[0] + offset
    stop, beyond = min(start + size, span[1]), min(start + size + 1, span[1])
    tokens = shard.tokens(start, beyond)
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise EvaluationError(
            f"{shard.path}.bin has a token id outside the model's vocabulary of {vocab_size} between positions "
            f"{start} and {beyond}: it is damaged (see python -m data_prep.verify_shards), or of another tokenizer"
        )
    begins = np.zeros(size + 1, np.bool_)
    begins[shard.document_starts(start, beyond) - start] = True
    ids, labels = np.zeros(size, np.int64), np.full(size, IGNORE, np.int64)
    ids[: stop - start] = tokens[: stop - start]
    predicted = max(len(tokens) - 1, 0)
    labels[:predicted] = np.where(begins[1 : predicted + 1], IGNORE, tokens[1:])
    return ids, labels, np.cumsum(begins[:-1], dtype=np.int32), begins[:-1]


@contextmanager
def _evaluating(model: nn.Module, precision: str, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients, matrix products in `precision`; afterwards the model is as it was."""
    if precision not in DTYPES:
        raise EvaluationError(f"precision is {precision!r}: expected one of {', '.join(DTYPES)}")
    was_training = model.training
    model.eval()
    try:
        # Not inference_mode: what it gathers of a sharded model could not be trained on afterwards.
        with torch.no_grad(), autocast(precision, device):
            yield
    finally:
        model.train(was_training)


def _sum(loss_sum: Tensor | None) -> Tensor:
    assert loss_sum is not None, "a model called with labels returns their loss"
    return loss_sum.double()  # a split's sum in fp32 would lose the last of its tokens


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 or math.isnan(nats) else math.inf
