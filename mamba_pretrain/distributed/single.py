"""The engine for one process: everything whole, on one device."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mamba_pretrain.config import Config
from mamba_pretrain.distributed.adam import MOMENTS, GradientEngine, Shard
from mamba_pretrain.distributed.engine import Values
from mamba_pretrain.distributed.ranks import Ranks
from mamba_pretrain.model.lm import MambaLM
from mamba_pretrain.optim import AdamW, param_groups


class SingleEngine(GradientEngine):
    """AdamW over whole fp32 parameters."""

    def __init__(
        self, make_model: Callable[[], MambaLM], values: Values | None, config: Config, device: torch.device
    ) -> None:
        super().__init__(config, Ranks())
        with torch.device(device):
            self.module: MambaLM = make_model()
        self.optimizer = AdamW(param_groups(self.module.named_parameters(), config.model, config.optim), config.optim)
        self.make_moments()
        self.ready(values)

    def backward(self, loss: Tensor, *, last_micro_batch: bool) -> None:
        self.guarded(loss, factor=self.scale.value).backward()  # type: ignore[no-untyped-call]

    def shards(self) -> Iterator[Shard]:
        for name, parameter in self.module.named_parameters():
            state = self.optimizer.state[parameter]
            moments = (state[MOMENTS[0]].view(-1), state[MOMENTS[1]].view(-1))
            yield Shard(name, tuple(parameter.shape), 0, parameter.detach().view(-1), moments, (0, 1))
