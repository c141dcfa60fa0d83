"""The engine for PyTorch's FSDP2: parameters, gradients and optimizer in shards of rows, gathered block by block.

Parameters are gathered and gradients reduced in fp32, twice the bytes of bf16: FSDP2 gives all parameters of a group
one dtype, a block's are read by one fused operation, and A_log, D, dt_proj.bias and norms must be fp32 in it. Autocast
makes the bf16 copies after the gather.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

from mamba_pretrain.config import Config
from mamba_pretrain.distributed.adam import MOMENTS, GradientEngine, Shard
from mamba_pretrain.distributed.engine import Values
from mamba_pretrain.distributed.ranks import Ranks
from mamba_pretrain.model.lm import MambaLM
from mamba_pretrain.optim import AdamW, param_groups


class FsdpEngine(GradientEngine):
    """FSDP2 over all ranks, or (HSDP) over groups of them that hold the same shards."""

    def __init__(
        self,
        make_model: Callable[[], MambaLM],
        values: Values | None,
        config: Config,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        super().__init__(config, ranks)
        self.device, options = device, config.fsdp
        shards = ranks.world // options.replicas
        self.mesh = init_device_mesh(device.type, (options.replicas, shards), mesh_dim_names=("replicate", "shard"))
        with torch.device("meta"):
            model = make_model()
        offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if options.offload else OffloadPolicy()
        units: list[nn.Module] = [*model.sharding_units(), model]
        for unit in units:
            if options.compile_blocks and unit is not model:
                unit.compile()  # in place: names stay
            fully_shard(
                unit,
                mesh=self.mesh if options.replicas > 1 else self.mesh["shard"],
                # The root's parameters (embedding, final norm) are used at both ends: they stay for the backward.
                reshard_after_forward=options.reshard_after_forward and unit is not model,
                offload_policy=offload,
            )
        sharded = cast(list[FSDPModule], units)
        for module in sharded:
            module.set_gradient_divide_factor(1.0)  # the sum over ranks, not the mean ...
            module.set_force_sum_reduction_for_comms(True)  # ... by an operation that gloo has, too
        prefetch(sharded[:-1], options.prefetch)
        model.to_empty(device="cpu" if options.offload else device)
        self.module = model
        self.optimizer = AdamW(param_groups(model.named_parameters(), config.model, config.optim), config.optim)
        self.make_moments()
        self.ready(values)

    def backward(self, loss: Tensor, *, last_micro_batch: bool) -> None:
        cast(FSDPModule, self.module).set_requires_gradient_sync(last_micro_batch)
        self.guarded(loss, factor=self.scale.value).backward()  # type: ignore[no-untyped-call]

    def total_norm(self, gradients: list[Tensor]) -> Tensor:
        norm: Any = super().total_norm(gradients)
        return cast(Tensor, norm.full_tensor())

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in super().full_parameters():
            yield name, cast(Any, parameter.to(self.device)).full_tensor()

    def shards(self) -> Iterator[Shard]:
        copy = (self.mesh.get_local_rank("replicate"), self.mesh.size(0))
        index, count = self.mesh.get_local_rank("shard"), self.mesh.size(1)
        for name, parameter in self.module.named_parameters():
            shape = tuple(parameter.shape)
            rows = -(-shape[0] // count)  # as torch.chunk deals them out
            start = min(index * rows, shape[0]) * (parameter.numel() // shape[0])
            state = self.optimizer.state[parameter]
            views = [_local(t) for t in (parameter, state[MOMENTS[0]], state[MOMENTS[1]])]
            yield Shard(name, shape, start, views[0], (views[1], views[2]), copy)


def prefetch(blocks: Sequence[FSDPModule], ahead: int) -> None:
    """Gathers the next `ahead` blocks while one computes, in either direction."""
    for i, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(list(blocks[i + 1 : i + 1 + ahead]))
        block.set_modules_to_backward_prefetch(list(blocks[max(0, i - ahead) : i][::-1]))


def _local(tensor: Any) -> Tensor:
    """This rank's rows of a DTensor, which fully_shard makes of every parameter."""
    return cast(Tensor, tensor.detach().to_local().view(-1))
