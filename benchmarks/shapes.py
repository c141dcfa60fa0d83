"""The presets' shapes as the benchmarks run them, our training step on them, and the matrix products in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mamba_pretrain.config import Config, ModelConfig, load
from mamba_pretrain.data.packing import IGNORE
from mamba_pretrain.distributed.env import autocast, keep_freed_memory
from mamba_pretrain.distributed.single import SingleEngine
from mamba_pretrain.model.lm import MambaLM

OVERRIDES = "changes of the preset, before all options: model.n_layer=2"
PRESETS = Path(__file__).parent.parent / "configs" / "pretrain"


def shape(preset: str, length: int, batch: int, overrides: list[str]) -> Config:
    """configs/pretrain/PRESET.yaml for windows of `length` tokens, `batch` of them a step, and what else is changed."""
    sizes = [f"data.seq_len={length}", f"train.batch_tokens={length * batch}", f"train.micro_batch_size={batch}"]
    return load([PRESETS / f"{preset}.yaml"], [*sizes, *overrides])


class TrainingStep:
    """One optimizer step on one micro-batch, as `mamba_pretrain.train` takes it.

    `keep` its memory from step to step, as training does; blocks that are kept leave gaps whose size is chance.
    """

    def __init__(self, preset: str, length: int, overrides: list[str], batch: int = 1, keep: bool = True) -> None:
        if keep:
            keep_freed_memory()
        self.config = shape(preset, length, batch, overrides)
        weights = MambaLM(self.config.model, seed=0).state_dict()
        self.engine = SingleEngine(
            lambda: MambaLM(self.config.model), weights.__getitem__, self.config, torch.device("cpu")
        )
        self.model = self.engine.module.train()
        generator = torch.Generator().manual_seed(0)
        self.ids_BL = torch.randint(self.config.model.need("vocab_size"), (batch, length), generator=generator)
        self.labels_BL = self.ids_BL.roll(-1, dims=1)
        self.labels_BL[:, -1] = IGNORE

    def step(self) -> float:
        """Returns the loss before the step, in nats a token."""
        with autocast(self.config.train.precision, self.ids_BL.device, cache=False):
            output = self.model(self.ids_BL, self.labels_BL, return_state=False)
        loss: Tensor = output.loss_sum / (self.labels_BL != IGNORE).sum()
        self.engine.backward(loss, last_micro_batch=True)
        result = self.engine.step(self.config.optim.lr)
        assert not result.skipped, "the loss is finite"
        return float(loss.detach())


class Product(NamedTuple):
    """y (T, outputs) = x (T, inputs) weight^T, `times` in a step."""

    name: str
    inputs: int
    outputs: int
    times: int


def products(model: ModelConfig) -> Iterator[Product]:
    d_model, inner, rank, blocks = model.need("d_model"), model.d_inner, model.rank, model.need("n_layer")
    yield Product("in_proj", d_model, 2 * inner, blocks)
    yield Product("x_proj", inner, rank + 2 * model.d_state, blocks)
    yield Product("dt_proj", rank, inner, blocks)
    yield Product("out_proj", inner, d_model, blocks)
    yield Product("head", d_model, model.padded_vocab_size, 1)


class MatrixProducts:
    """Nothing but a training step's products: of each forward one, of its backward the two for input and weight.

    Plain tensors in the step's dtype, no autograd, no casts; one set of operands for each shape.
    """

    def __init__(self, preset: str, length: int, overrides: list[str]) -> None:
        keep_freed_memory()  # as the step it stands beside
        config = shape(preset, length, 1, overrides)
        generator = torch.Generator().manual_seed(0)

        def random(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator).bfloat16()

        self.operands = [
            (p.times, random(length, p.inputs), random(p.outputs, p.inputs), random(length, p.outputs))
            for p in products(config.model)
        ]

    def step(self) -> None:
        for times, x_TI, weight_OI, dy_TO in self.operands:
            for _ in range(times):
                torch.mm(x_TI, weight_OI.t())
                torch.mm(dy_TO, weight_OI)
                torch.mm(dy_TO.t(), x_TI)
