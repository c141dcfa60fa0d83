"""Text from a trained model, one token at a time, at a cost per token that does not grow with the text."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import mmap
from collections.abc import Callable, Collection, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_pretrain.model.block import MambaState
from mamba_pretrain.model.lm import MambaLM
from mamba_pretrain.ops.decode import decode_step

# Prompt tokens read at once: their activations, not the prompt's, bound the memory of the prefill.
PREFILL_TOKENS = 2048


class GenerationError(ValueError):
    """An impossible argument, or a model whose predictions are not finite."""


def generate(
    model: MambaLM,
    prompt_ids: list[int],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Collection[int] = (),
    vocab_size: int | None = None,
) -> Iterator[int]:
    """Yields up to `max_tokens` ids that continue `prompt_ids`, and ends before the first of `stop_ids`.

    The prompt is read in parallel, then every token is one `MambaLM.step`. Of the real tokens (the first `vocab_size`,
    by default the model's; a model may have more rows than its tokenizer has tokens, and rows that pad the head are
    never sampled) the `top_k` likeliest stay (0: all), of these the fewest that hold `top_p` of the
    probability, after division of the logits by `temperature` (0: always the likeliest). Runs in the ambient autocast
    dtype; sampling is fp64 on the CPU from a generator of its own, so that `seed` decides alone.

    Raises GenerationError at the call for an impossible argument, and while generating where the logits are not finite.
    """
    rows = model.config.need("vocab_size")
    vocab_size = rows if vocab_size is None else vocab_size
    problems = []
    if not 1 <= vocab_size <= rows:
        problems.append(f"vocab_size is {vocab_size}: it must be 1 to {rows}, the model's")
    if not prompt_ids:
        problems.append("the prompt is empty: pass the tokenizer's bos id to start from nothing")
    if unknown := sorted({i for i in (*prompt_ids, *stop_ids) if not 0 <= i < vocab_size}):
        problems.append(f"ids {unknown} are outside the vocabulary: expected 0 to {vocab_size - 1}")
    if max_tokens < 0:
        problems.append(f"max_tokens is {max_tokens}: it must be 0 or more")
    if not temperature >= 0:
        problems.append(f"temperature is {temperature}: it must be 0 (the likeliest token) or more")
    if top_k < 0:
        problems.append(f"top_k is {top_k}: it must be 0 (no limit) or more")
    if not 0 < top_p <= 1:
        problems.append(f"top_p is {top_p}: it must be above 0 and at most 1 (no limit)")
    if not 0 <= seed < 2**63:
        problems.append(f"seed is {seed}: it must be 0 or more, and below 2**63")
    if problems:
        raise GenerationError("; ".join(problems))
    return _tokens(model, prompt_ids, max_tokens, temperature, top_k, top_p, seed, frozenset(stop_ids), vocab_size)


@torch.no_grad()
def _tokens(
    model: MambaLM,
    prompt_ids: list[int],
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    stop_ids: frozenset[int],
    vocab_size: int,
) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    device = model.head_weight_VD.device
    if torch.is_autocast_enabled(device.type):
        model = _narrowed(model, torch.get_autocast_dtype(device.type))
    step = _stepper(model)
    logits_V, state = _prefill(model, torch.tensor(prompt_ids, device=device))
    for count in range(1, max_tokens + 1):
        token = _sample(logits_V[:vocab_size].float().cpu(), temperature, top_k, top_p, generator)
        if token in stop_ids:
            return
        yield token
        if count < max_tokens:
            logits_BV, state = step(torch.tensor([token], device=device), state)
            logits_V = logits_BV[0]


def _prefill(model: MambaLM, prompt_L: Tensor) -> tuple[Tensor, MambaState]:
    """Logits (padded V) after the last prompt token, and the state. The head runs once, not at every position."""
    state = None
    for part_L in torch.split(prompt_L, PREFILL_TOKENS):
        hidden_BLD, state = model.backbone(part_L[None], state=state)
    assert state is not None, "prompts are not empty"
    return F.linear(hidden_BLD[0, -1], model.head_weight_VD), state


def _stepper(model: MambaLM) -> Callable[[Tensor, MambaState], tuple[Tensor, MambaState]]:
    """`model.step`, on a backend's kernel for it where there is one."""
    kernel = decode_step(model.decode_weights())
    if kernel is None:
        return model.step

    def step(token_B: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        logits_BV, conv, ssm = kernel(token_B, state.conv, state.ssm)
        return logits_BV, MambaState(conv, ssm)

    return step


def _narrowed(model: MambaLM, dtype: torch.dtype) -> MambaLM:
    """The model with its matrices in `dtype`, as autocast would round them at every step; the rest is shared.

    Reading the matrices is most of a step's cost. Embeddings are looked up in fp32, as under autocast: the head gets a
    matrix of its own.
    """
    weights: dict[str, Tensor] = dict(model.named_parameters()) | {"lm_head.weight": model.head_weight_VD}
    matrices = [name for name in weights if name.endswith(("proj.weight", "lm_head.weight"))]
    block = _block(sum(weights[name].numel() for name in matrices), dtype, model.head_weight_VD.device)
    for name, part in zip(matrices, torch.split(block, [weights[name].numel() for name in matrices]), strict=True):
        weights[name] = part.view_as(weights[name]).copy_(weights[name])
    with torch.device("meta"):
        narrow = MambaLM(dataclasses.replace(model.config, tie_embeddings=False)).requires_grad_(False)
    narrow.load_state_dict(weights, assign=True)
    return narrow.train(model.training)


def _block(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for all matrices; on a CPU in pages of 2 MiB, if the system has them: it is read a third faster."""
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)


def _sample(logits_V: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    if not math.isfinite(logits_V.sum().item()) and not torch.isfinite(logits_V).all():  # the sum costs a tenth
        raise GenerationError("the logits are not finite: the weights are damaged, or the model needs bf16 or fp32")
    if temperature == 0:
        return int(logits_V.argmax())
    # Largest first, ties by id as argmax has them. The maximum becomes 0, which stays 0 over any temperature that fp64
    # tells from 0; the others go to -inf at worst, and to a probability of 0.
    sorted_V, ids_V = (logits_V - logits_V.max()).sort(descending=True, stable=True)
    if top_k:
        sorted_V = sorted_V[:top_k]
    probabilities_V = F.softmax(sorted_V.double() / temperature, dim=-1)
    mass_before_V = probabilities_V.cumsum(0) - probabilities_V
    probabilities_V = probabilities_V * (mass_before_V < top_p)
    return int(ids_V[torch.multinomial(probabilities_V, 1, generator=generator)])
