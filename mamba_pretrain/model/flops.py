"""Parameters and floating-point operations of a shape, by formula."""

from __future__ import annotations

from mamba_pretrain.config import ModelConfig


def parameters_by_part(config: ModelConfig) -> dict[str, int]:
    """Trainable parameters of a MambaLM; a tied head costs nothing and is not listed."""
    d, e, n, k = config.need("d_model"), config.d_inner, config.d_state, config.d_conv
    r, v, layers = config.rank, config.padded_vocab_size, config.need("n_layer")
    block = {
        "in_proj": 2 * e * d + 2 * e * config.linear_bias,
        "conv1d": e * k + e * config.conv_bias,
        "x_proj": e * (r + 2 * n),
        "dt_proj": e * r + e,
        "A_log": e * n,
        "D": e,
        "out_proj": e * d + d * config.linear_bias,
        "norm": d,
    }
    parts = {"embedding": v * d} | {name: layers * count for name, count in block.items()} | {"norm_f": d}
    return parts if config.tie_embeddings else parts | {"lm_head": v * d}


def forward_flops_by_part(config: ModelConfig) -> dict[str, int]:
    """Floating-point operations of one token's forward pass; a multiply-add counts two, an exp one.

    The scan's 7 per state element: delta A, its exp, (delta u) B, h' = a h + b (2), C . h (2); and delta u per channel.
    It is linear in length, so a token costs the same at any context.
    """
    d, e, n, k = config.need("d_model"), config.d_inner, config.d_state, config.d_conv
    r, v, layers = config.rank, config.padded_vocab_size, config.need("n_layer")
    return {
        "projections": layers * 2 * (2 * e * d + e * (r + 2 * n) + r * e + e * d),
        "conv1d": layers * 2 * e * k,
        "scan": layers * (7 * e * n + e),
        "head": 2 * v * d,
    }


def training_flops_per_token(config: ModelConfig) -> int:
    """Forward and backward, the backward counted as two forwards; recomputation is not counted."""
    return 3 * sum(forward_flops_by_part(config).values())
