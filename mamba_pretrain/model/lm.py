"""Mamba as a backbone, and as a language model with a tied head and its loss.

Parameter names are mamba_ssm's (`backbone.layers.0.mixer.A_log`), so that a checkpoint of one is a checkpoint of the
other. Shape suffixes: see `mamba_pretrain.ops`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mamba_pretrain.config import VARIANTS, ConfigError, ModelConfig
from mamba_pretrain.model.block import Block, MambaState, RMSNorm
from mamba_pretrain.model.law import initialize
from mamba_pretrain.ops.call import BlockWeights, ModelWeights
from mamba_pretrain.ops.cross_entropy import linear_cross_entropy


class BackboneOutput(NamedTuple):
    last_hidden_state: Tensor  # (B, L, D) fp32, after the final norm
    state: MambaState | None  # after the last position; when it was wanted


class LMOutput(NamedTuple):
    loss_sum: Tensor | None  # nats, summed over the target tokens; when labels were given
    logits: Tensor | None  # (B, L, padded V); when they were not
    state: MambaState | None  # after the last position; when it was wanted


class Mamba(nn.Module):
    """Embedding, blocks, final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        problems = list(config.problems())
        if config.vocab_size is None:
            problems.append("model.vocab_size is not set, and there is no dataset here to take it from")
        if problems:
            raise ConfigError(problems)
        d_model = config.need("d_model")
        self.config = config
        self.activation_checkpointing = False
        self.embedding = nn.Embedding(config.padded_vocab_size, d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.need("n_layer")))
        self.norm_f = RMSNorm(d_model, config.norm_eps)

    @classmethod
    def from_variant(cls, variant: str, *, seed: int = 0, **overrides: Any) -> Mamba:
        """A freshly initialised backbone of a published shape, e.g. `Mamba.from_variant("130m", d_state=32)`.

        `overrides` are fields of ModelConfig. Raises ConfigError for an unknown variant or field.
        """
        if variant not in VARIANTS:
            raise ConfigError([f"unknown variant {variant!r}: expected one of {', '.join(VARIANTS)}"])
        names = {f.name for f in dataclasses.fields(ModelConfig)}
        if unknown := sorted(set(overrides) - names):
            raise ConfigError(
                [f"unknown field {name!r}: ModelConfig has {', '.join(sorted(names))}" for name in unknown]
            )
        model = cls(ModelConfig(**{"variant": variant, **VARIANTS[variant], **overrides}))
        initialize(model, model.config, seed)
        return model

    def forward(
        self,
        input_ids_BL: Tensor,
        seq_idx_BL: Tensor | None = None,
        state: MambaState | None = None,
        return_state: bool = True,
    ) -> BackboneOutput:
        """`seq_idx` numbers the documents in each row (see ops.selective_scan); `state` continues an earlier text.

        Without `return_state` more kernels can run, and memory is saved.
        """
        hidden_BLD, residual_BLD = self.embedding(input_ids_BL), None
        conv, ssm = [], []
        for i, block in enumerate(self.layers):
            states = (state.conv[i], state.ssm[i]) if state else (None, None)
            inputs = (hidden_BLD, residual_BLD, seq_idx_BL, *states, return_state)
            if self.activation_checkpointing and self.training:
                outputs = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                outputs = block(*inputs)
            hidden_BLD, residual_BLD, conv_state, ssm_state = outputs
            conv.append(conv_state)
            ssm.append(ssm_state)
        hidden_BLD, _ = self.norm_f(hidden_BLD, residual_BLD)
        return BackboneOutput(hidden_BLD, MambaState(conv, ssm) if return_state else None)


class MambaLM(nn.Module):
    """The backbone with a head that shares the embedding's weight (unless `tie_embeddings` is false)."""

    def __init__(self, config: ModelConfig, *, seed: int | None = None) -> None:
        """With a `seed`, parameters get their initial values; without, they are left for a checkpoint to fill."""
        super().__init__()
        self.config = config
        self.backbone = Mamba(config)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.need("d_model"), config.padded_vocab_size, bias=False)
        if seed is not None:
            initialize(self, config, seed)

    def sharding_units(self) -> list[nn.Module]:
        """The modules whose parameters are best gathered together, in the order in which they compute."""
        return list(self.backbone.layers)

    @property
    def head_weight_VD(self) -> Tensor:
        return self.backbone.embedding.weight if self.config.tie_embeddings else self.lm_head.weight

    def forward(
        self,
        input_ids_BL: Tensor,
        labels_BL: Tensor | None = None,
        seq_idx_BL: Tensor | None = None,
        state: MambaState | None = None,
        return_state: bool = True,
    ) -> LMOutput:
        """With labels (-100 where there is none) the summed loss, computed without all logits; else the logits."""
        hidden_BLD, state = self.backbone(input_ids_BL, seq_idx_BL, state, return_state)
        if labels_BL is None:
            return LMOutput(None, F.linear(hidden_BLD, self.head_weight_VD), state)
        loss = linear_cross_entropy(hidden_BLD, self.head_weight_VD, labels_BL, self.config.need("vocab_size"))
        return LMOutput(loss, None, state)

    def step(self, token_B: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """One token for each row: logits (B, padded V) of the next, and the new state. Constant time and memory."""
        _, logits_B1V, state = self(token_B[:, None], state=state)
        return logits_B1V[:, 0], state

    def decode_weights(self) -> ModelWeights:
        """What `ops.decode` needs."""
        blocks = [
            BlockWeights(block.norm.weight, *block.mixer.weights())
            for block in cast(Iterable[Block], self.backbone.layers)
        ]
        norm_f = self.backbone.norm_f
        return ModelWeights(
            self.backbone.embedding.weight, blocks, norm_f.weight, self.head_weight_VD, self.config.norm_eps
        )
