"""Runs as a user of DeepSpeed has them: plain deepspeed.initialize, a MambaLMHeadModel, torch's AdamW in two groups."""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import numpy as np
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn

from mamba_pretrain.config import Config
from mamba_pretrain.data.dataset import open_split
from mamba_pretrain.data.loader import WindowDataset, batches
from mamba_pretrain.data.packing import IGNORE
from mamba_pretrain.distributed.ranks import Ranks
from mamba_pretrain.model.block import Block
from mamba_pretrain.model.law import decays
from mamba_pretrain.model.lm import MambaLM
from tests.helpers.processes import on_ranks
from tests.helpers.runs import small_config

LR, DECAY, CLIP = 1e-2, 0.3, 0.5  # in one step, a decay where none is due would move a weight by 3e-3 of itself
RUN = [f"optim.lr={LR}", f"optim.min_lr={LR}", "optim.warmup_fraction=0", f"optim.weight_decay={DECAY}"]
RUN += [f"optim.clip_norm={CLIP}", "data.validation_split=null"]


class HeadModel(MambaLM):
    """mamba_ssm's MambaLMHeadModel by its names: the tied head is a parameter of its own name, too."""

    def __init__(self, config: Any) -> None:
        super().__init__(config, seed=0)
        self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False)
        self.lm_head.weight = self.backbone.embedding.weight


class Within(nn.Module):
    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__()
        self.add_module(name, model)
        self.name = name

    def forward(self, *values: Any) -> Any:
        return getattr(self, self.name)(*values)


def train_with_deepspeed(ranks: Ranks, config: Config, directory: Path, cases: dict[str, dict[str, Any]]) -> Any:
    """Three steps, a checkpoint and one step more of each case; what DeepSpeed says of its state, before and after."""
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__ = {}  # else it compiles an operation for inference
    deepspeed.init_distributed(dist_backend="gloo")
    return {name: train_case(ranks, config, directory / name, **case) for name, case in cases.items()}


def train_case(
    ranks: Ranks, config: Config, save: Path, stage: int, bf16: bool = False, prefix: str = "", options: Any = None
) -> Any:
    inner = HeadModel(config.model)
    model = Within(prefix[:-1], inner) if prefix else inner
    deepspeed.utils.set_z3_leaf_modules(model, [Block])
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": DECAY}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in model.named_parameters():
        groups[0 if decays(name, config.model) else 1]["params"].append(parameter)
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(config.optim.beta1, config.optim.beta2), eps=config.optim.eps)
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "sub_group_size": 2000}
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": CLIP,
        "zero_optimization": zero,
        "bf16": {"enabled": bf16},
        "steps_per_print": 10**9,
        **(options or {}),
    }
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
    train, _ = open_split(str(config.data.path), "train")
    windows = WindowDataset(train, config.data.seq_len, config.train.seed, config.model.need("vocab_size"))
    loader = batches(windows, micro_batch_size=4, first_sample=0, rank=ranks.rank, world=ranks.world, workers=0)

    def step() -> None:
        batch = next(loader)
        targets = ranks.sum(int((batch["labels"] != IGNORE).sum()))[0]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = engine(batch["input_ids"], batch["labels"], batch["seq_idx"]).loss_sum
        engine.backward(loss * ranks.world / targets)
        engine.step()

    def state() -> dict[str, Tensor]:
        found = {}
        if (
            stage < 3
        ):  # DeepSpeed 0.19.8 links moments after the first group's first step: the other groups have none yet
            engine.optimizer._hp_optimizer_states_linked = False
            engine.optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in model.named_parameters():
            name = name.removeprefix(prefix)
            found[name] = safe_get_full_fp32_param(parameter).clone()
            for kind in ("exp_avg", "exp_avg_sq"):
                found[f"{kind}.{name}"] = safe_get_full_optimizer_state(parameter, kind).clone()
        return found

    for _ in range(3):
        step()
    rng = {"np": np.random.get_state(), "random": random.getstate()}
    engine.save_checkpoint(str(save), client_state={"rng": rng, "args": argparse.Namespace(lr=1), "iteration": 3})
    saved = state()
    step()
    return saved, state()


def run_cases(dataset: Path, directory: Path, cases: dict[str, dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    config = small_config(dataset, directory, *RUN, "model.vocab_size=257")
    return directory, on_ranks(2, train_with_deepspeed, config, directory, cases)[0]
