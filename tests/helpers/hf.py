"""Hugging Face's Mamba on its plain torch path, and ours beside it with equal weights."""

from __future__ import annotations

import sys
from typing import Any

# transformers takes CUDA kernels from these packages wherever they can be imported, even for CPU tensors.
sys.modules["mamba_ssm"] = None  # type: ignore[assignment]
sys.modules["causal_conv1d"] = None  # type: ignore[assignment]

import torch  # noqa: E402
from transformers import AutoTokenizer, MambaConfig, MambaForCausalLM  # noqa: E402, F401

from mamba_pretrain.config import ModelConfig  # noqa: E402
from mamba_pretrain.model.lm import MambaLM  # noqa: E402


def hf_twin(model: MambaLM) -> Any:
    """transformers' model of the same shape and with the same weights, written without the code under test."""
    config = model.config
    twin = MambaForCausalLM(
        MambaConfig(
            vocab_size=config.padded_vocab_size,
            hidden_size=config.need("d_model"),
            num_hidden_layers=config.need("n_layer"),
            state_size=config.d_state,
            conv_kernel=config.d_conv,
            expand=config.expand,
            time_step_rank=config.rank,
            layer_norm_epsilon=config.norm_eps,
            use_bias=config.linear_bias,
            use_conv_bias=config.conv_bias,
            tie_word_embeddings=config.tie_embeddings,
        )
    )
    weights = {name.replace("embedding.", "embeddings."): value for name, value in model.state_dict().items()}
    if config.tie_embeddings:
        weights["lm_head.weight"] = weights["backbone.embeddings.weight"]
    twin.load_state_dict(weights, strict=True)
    return twin


def lively(config: ModelConfig, seed: int = 0) -> MambaLM:
    """A model whose every parameter differs from its initial constant, so that no term of the equations is trivial."""
    model = MambaLM(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model
