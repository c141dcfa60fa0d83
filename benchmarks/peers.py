"""transformers' Mamba, with our weights, on its plain PyTorch path."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import torch

# transformers takes CUDA kernels from these packages wherever they can be imported, even for CPU tensors.
for _package in ("mamba_ssm", "causal_conv1d"):
    sys.modules[_package] = None  # type: ignore[assignment]
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from transformers import MambaConfig, MambaForCausalLM  # noqa: E402

from benchmarks.shapes import shape  # noqa: E402
from mamba_pretrain.export.formats import EMBEDDING, HEAD, HF_EMBEDDING, to_hf  # noqa: E402
from mamba_pretrain.model.lm import MambaLM  # noqa: E402


def hugging_face(model: MambaLM, *, use_mambapy: bool = False) -> Any:
    """The same shape and weights. With `use_mambapy` the scan is mambapy's parallel one, in training only."""
    if use_mambapy:
        importlib.import_module("mambapy.pscan")  # without it transformers silently takes its slow loop
    keys = {k: v for k, v in to_hf(model.config).items() if k not in ("model_type", "architectures")}
    twin = MambaForCausalLM(MambaConfig(**keys, use_mambapy=use_mambapy))
    weights = model.state_dict()
    weights[HF_EMBEDDING] = weights.pop(EMBEDDING)
    weights.setdefault(HEAD, weights[HF_EMBEDDING])
    twin.load_state_dict(weights, strict=True)
    return twin


class TrainingStep:
    """What a user of transformers runs: autocast, the loss by way of `labels`, clipping, torch's fused AdamW."""

    def __init__(self, preset: str, length: int, overrides: list[str]) -> None:
        config = shape(preset, length, 1, overrides)
        ours = MambaLM(config.model, seed=0)
        self.model = hugging_face(ours, use_mambapy=True).train()
        optim = config.optim
        self.clip_norm = optim.clip_norm
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), optim.lr, (optim.beta1, optim.beta2), optim.eps, optim.weight_decay, fused=True
        )
        self.ids_BL = torch.randint(config.model.need("vocab_size"), (1, length))

    def step(self) -> float:
        """Returns the loss: a step that does not learn from numbers is none."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = self.model(input_ids=self.ids_BL, labels=self.ids_BL, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())
