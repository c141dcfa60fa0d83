"""The three directory forms a model can have on disk, and the translation of its shape between them.

    native      config.yaml, model.safetensors, manifest.json (see mamba_pretrain.checkpoint)
    hf          what transformers.MambaForCausalLM reads: config.json with model_type "mamba", model.safetensors
    mamba_ssm   what mamba_ssm's MambaLMHeadModel reads: config.json with d_model, pytorch_model.bin

Parameters have the same names in all three, but for the embedding in hf (`backbone.embeddings.weight`) and for
`lm_head.weight`, which mamba_ssm's state dict also holds where it is the embedding itself.

Sources: transformers/models/mamba/configuration_mamba.py (5.23), mamba_ssm/models/config_mamba.py (2.3.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from mamba_pretrain.config import ConfigError, ModelConfig

NATIVE, HF, MAMBA_SSM = "native", "hf", "mamba_ssm"
FORMATS = (NATIVE, HF, MAMBA_SSM)

CONFIG_JSON = "config.json"
# Our exact ModelConfig and tokenizer facts. In hf a key of config.json: unknown keys are kept there, even when
# transformers saves the model again. In mamba_ssm a file of its own: MambaConfig(**config.json) takes no unknown key.
EXTRA_KEY, EXTRA_FILE = "mamba_pretrain", "mamba_pretrain.json"

HEAD, EMBEDDING, HF_EMBEDDING = "lm_head.weight", "backbone.embedding.weight", "backbone.embeddings.weight"
MAMBA_SSM_NORM_EPS = 1e-5  # a default argument of its RMSNorm, in no config

_HF_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layer",
    "state_size": "d_state",
    "conv_kernel": "d_conv",
    "expand": "expand",
    "time_step_rank": "dt_rank",
    "time_step_min": "dt_min",
    "time_step_max": "dt_max",
    "time_step_floor": "dt_init_floor",
    "use_conv_bias": "conv_bias",
    "use_bias": "linear_bias",
    "layer_norm_epsilon": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
_MAMBA_SSM_NAMES = {
    "d_model": "d_model",
    "n_layer": "n_layer",
    "vocab_size": "vocab_size",
    "pad_vocab_size_multiple": "pad_vocab_to_multiple_of",
    "tie_embeddings": "tie_embeddings",
}
_SSM_CFG_NAMES = {
    "d_state": "d_state",
    "d_conv": "d_conv",
    "expand": "expand",
    "dt_rank": "dt_rank",
    "dt_min": "dt_min",
    "dt_max": "dt_max",
    "dt_init_floor": "dt_init_floor",
    "conv_bias": "conv_bias",
    "bias": "linear_bias",
}
_SSM_CFG_IRRELEVANT = {"layer", "dt_init", "dt_scale", "use_fast_path"}  # initial values and kernels, no equation

_DEFAULT = ModelConfig()
_TYPES = {f.name: type(getattr(_DEFAULT, f.name)) for f in fields(ModelConfig)}
_TYPES |= {"d_model": int, "n_layer": int, "vocab_size": int, "dt_rank": int}  # None by default
_REQUIRED = ("d_model", "n_layer", "vocab_size")


class FormatError(ValueError):
    """A directory is no model this program reads, or a model is none a format can hold. `problems`: all reasons."""

    def __init__(self, subject: object, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__(f"{subject}:\n" + "\n".join(f"- {p}" for p in self.problems))


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The keys of transformers' config.json that shape a Mamba model, and those of its initial values."""
    said = {theirs: getattr(config, ours) for theirs, ours in _HF_NAMES.items()}
    return {
        "model_type": "mamba",
        "architectures": ["MambaForCausalLM"],
        **said,
        "vocab_size": config.padded_vocab_size,  # transformers pads nothing: it has to be told the rows
        "intermediate_size": config.d_inner,
        "time_step_rank": config.rank,
        "hidden_act": "silu",
        "residual_in_fp32": True,
        "initializer_range": config.embedding_std,
        # Our out_proj is so rescaled, but "true" makes transformers 5 divide the weights it has just LOADED by
        # sqrt(layers): in-place arithmetic escapes its guard against initialising loaded parameters.
        "rescale_prenorm_residual": False,
    }


def from_hf(found: dict[str, Any]) -> ModelConfig:
    """The shape that transformers' config.json describes; FormatError with every reason why it is not ours."""
    problems = []
    if (kind := found.get("model_type")) != "mamba":
        problems.append(f"model_type is {kind!r}: expected 'mamba'. Only Mamba-1 is read, no variant of it")
    if (act := found.get("hidden_act", "silu")) != "silu":
        problems.append(f"hidden_act is {act!r}: expected 'silu'")
    values = _translate(found, _HF_NAMES, problems)
    rows = values.get("vocab_size", 0)
    return _model(values | {"pad_vocab_to_multiple_of": 1 if rows % 8 else 8}, problems)


def to_mamba_ssm(config: ModelConfig) -> dict[str, Any]:
    """All keys of mamba_ssm's MambaConfig; FormatError where that cannot say what the model is."""
    if config.norm_eps != MAMBA_SSM_NORM_EPS:
        reason = f"model.norm_eps is {config.norm_eps}: mamba_ssm's norm always has {MAMBA_SSM_NORM_EPS}"
        raise FormatError("the model cannot be written as mamba_ssm", [reason])
    different = {
        theirs: getattr(config, ours)
        for theirs, ours in _SSM_CFG_NAMES.items()
        if getattr(config, ours) != getattr(_DEFAULT, ours)
    }
    return {
        **{theirs: getattr(config, ours) for theirs, ours in _MAMBA_SSM_NAMES.items()},
        "d_intermediate": 0,
        "ssm_cfg": different,
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
    }


def from_mamba_ssm(found: dict[str, Any]) -> ModelConfig:
    """The shape that mamba_ssm's config.json describes; FormatError with every reason why it is not ours."""
    problems = []
    ssm_cfg = found.get("ssm_cfg") or {}
    if not isinstance(ssm_cfg, dict):
        problems.append(f"ssm_cfg is {ssm_cfg!r}: expected a mapping")
        ssm_cfg = {}
    if (layer := ssm_cfg.get("layer", "Mamba1")) != "Mamba1":
        problems.append(f"ssm_cfg.layer is {layer!r}: expected 'Mamba1', the only one read")
    elif unknown := sorted(set(ssm_cfg) - set(_SSM_CFG_NAMES) - _SSM_CFG_IRRELEVANT):
        problems.append(f"ssm_cfg has unknown keys {', '.join(unknown)}: mamba_ssm's Mamba-1 has none of these")
    if found.get("d_intermediate", 0) != 0:
        problems.append(f"d_intermediate is {found['d_intermediate']}: models with MLPs are not read")
    if found.get("attn_layer_idx"):
        problems.append(f"attn_layer_idx is {found['attn_layer_idx']}: models with attention are not read")
    if found.get("rms_norm", True) is not True:
        problems.append(f"rms_norm is {found['rms_norm']!r}: models with LayerNorm are not read")
    values = _translate(found, _MAMBA_SSM_NAMES, problems) | _translate(ssm_cfg, _SSM_CFG_NAMES, problems, "ssm_cfg.")
    return _model(values, problems)


def _translate(found: dict[str, Any], names: dict[str, str], problems: list[str], prefix: str = "") -> dict[str, Any]:
    """Values by ModelConfig's names. What the file leaves out has the same default in all three programs."""
    values: dict[str, Any] = {}
    for theirs, ours in names.items():
        if theirs not in found:
            if ours in _REQUIRED:
                problems.append(f"{prefix}{theirs} is missing")
            continue
        value, due = found[theirs], _TYPES[ours]
        if ours == "dt_rank" and value == "auto":
            continue
        if due is float and type(value) is int:
            value = float(value)
        if type(value) is due:
            values[ours] = value
        else:
            problems.append(f"{prefix}{theirs} is {value!r}: expected a value of type {due.__name__}")
    return values


def _model(values: dict[str, Any], problems: list[str]) -> ModelConfig:
    if values.get("dt_rank") == math.ceil(values.get("d_model", 0) / 16):
        values = values | {"dt_rank": None}  # the rank that is derived anyway
    config = ModelConfig(**values)
    missing = [name for name in _REQUIRED if getattr(config, name) is None]
    problems += [p for p in config.problems() if not any(p.startswith(f"model.{name} is not set") for name in missing)]
    if problems:
        raise FormatError("not a Mamba-1 model of a supported shape", problems)
    return config


def own_config(values: Any) -> ModelConfig:
    """The ModelConfig that an earlier export of ours left beside the format's own; ConfigError where it is not one."""
    try:
        config = ModelConfig(**values)
        problems = list(config.problems())
    except TypeError as error:
        raise ConfigError([str(error)]) from error
    if problems:
        raise ConfigError(problems)
    return config
