"""The engine for DeepSpeed's ZeRO: stages 1, 2 and 3, with parameters in fp32 and autocast around the model.

DeepSpeed's own bf16 and fp16 modes cast every parameter, A_log, D and dt_proj.bias among them, and start from rounded
master weights. So DeepSpeed runs in its fp32 mode here, and precision is autocast's, as in the other engines.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from mamba_pretrain.config import Config
from mamba_pretrain.distributed.adam import MOMENTS, AdamEngine, Shard, new_moments
from mamba_pretrain.distributed.engine import StepResult, Values
from mamba_pretrain.distributed.ranks import Ranks
from mamba_pretrain.model.flops import parameters_by_part
from mamba_pretrain.model.lm import MambaLM
from mamba_pretrain.optim import AdamW, param_groups


def deepspeed_config(config: Config, world: int) -> dict[str, Any]:
    """DeepSpeed's configuration: all of it follows from ours.

    Buckets, in elements, go by the size of a block: two are in flight at most, whatever the model's size.
    """
    parts = parameters_by_part(config.model)
    root = sum(parts.get(name, 0) for name in ("embedding", "norm_f", "lm_head"))
    block = (sum(parts.values()) - root) // config.model.need("n_layer")
    zero: dict[str, Any] = {
        "stage": config.zero.stage,
        "contiguous_gradients": True,
        # Each part of a bucket is reduced to its owner: two thirds of the bytes of an all-reduce and a gather.
        "use_multi_rank_bucket_allreduce": False,
        "reduce_bucket_size": 2 * block,
        "allgather_bucket_size": 2 * block,
    }
    if config.zero.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.zero.stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": block,
            "stage3_max_live_parameters": 3 * block + root,
            # The last block waits gathered for its backward. At DeepSpeed's default, 1e9, all blocks of most models do.
            "stage3_max_reuse_distance": 2 * block,
            # A block is gathered in one operation, small parameters with it: none need stay behind on every rank.
            "stage3_param_persistence_threshold": 0,
        }
        if config.zero.offload_parameters:
            zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_batch_size": config.sequences_per_step,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.accumulation(world),
        "gradient_clipping": config.optim.clip_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # optim.AdamW
        "zero_force_ds_cpu_optimizer": False,  # else offloading demands DeepSpeed's, which has to be compiled
        "steps_per_print": 10**12,
    }


class _Wrapped(nn.Module):
    """DeepSpeed's engine, which must be called in the model's place, with the model's configuration."""

    def __init__(self, engine: nn.Module, model: MambaLM) -> None:
        super().__init__()
        self.engine, self.config = engine, model.config

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.engine(*arguments, **named)


class ZeroEngine(AdamEngine):
    """ZeRO-1, 2 or 3 over all ranks."""

    def __init__(
        self,
        make_model: Callable[[], MambaLM],
        values: Values | None,
        config: Config,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        super().__init__(config, ranks)
        os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))  # DeepSpeed asks for it, and srun sets no such name
        deepspeed = import_deepspeed(device)
        derived, self.stage = deepspeed_config(config, ranks.world), config.zero.stage
        if self.stage == 3:
            with deepspeed.zero.Init(config_dict_or_path=derived):  # each parameter is cut up as soon as it is made
                model = make_model()
            deepspeed.utils.set_z3_leaf_modules(model, list({type(unit) for unit in model.sharding_units()}))
        else:
            with torch.device(device):
                model = make_model()
        self.model = model
        optimizer = AdamW(param_groups(model.named_parameters(), config.model, config.optim), config.optim)
        self.engine: Any = deepspeed.initialize(model=model, optimizer=optimizer, config=derived)[0]
        self.module = cast(MambaLM, _Wrapped(self.engine, model))
        self.zero: Any = self.engine.optimizer
        self.optimizer = self.zero.optimizer
        for flat in self._flat_groups():
            self.optimizer.state[flat] = new_moments(flat)
        self.gathered = deepspeed.zero.GatheredParameters
        self.ready(values)

    def _flat_groups(self) -> list[Tensor]:
        """The flat fp32 tensors that Adam works on."""
        groups = (
            self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups
        )
        return list(groups)

    def backward(self, loss: Tensor, *, last_micro_batch: bool) -> None:
        self.zero.override_loss_scale(self.scale.value)
        # DeepSpeed takes the mean over ranks; the contract asks for the sum.
        self.engine.backward(self.guarded(loss, factor=self.ranks.world), scale_wrt_gas=False)
        if not last_micro_batch:
            self.engine.step()  # only counts the micro-batch

    def step(self, lr: float) -> StepResult:
        self.set_lr(lr)
        self.engine.step()
        result = StepResult(float(self.engine.get_global_grad_norm()), bool(self.zero.overflow), self.scale.value)
        self.scale.update(not result.skipped)
        return result

    def shards(self) -> Iterator[Shard]:
        return self._stage3_shards() if self.stage == 3 else self._flat_shards()

    def _flat_shards(self) -> Iterator[Shard]:
        """Stages 1 and 2 cut the concatenation of a group's parameters into equal ranges, one a rank."""
        zero, names = self.zero, {id(parameter): name for name, parameter in self.model.named_parameters()}
        for group, flat in enumerate(self._flat_groups()):
            low = self.ranks.rank * zero.partition_size[group]
            offsets = zero.round_robin_bit16_offsets[group]
            for parameter, offset in zip(zero.round_robin_bit16_groups[group], offsets, strict=True):
                start, stop = max(offset, low), min(offset + parameter.numel(), low + zero.partition_size[group])
                if start < stop:
                    yield self._shard(
                        names[id(parameter)], parameter.shape, start - offset, flat, slice(start - low, stop - low)
                    )

    def _stage3_shards(self) -> Iterator[Shard]:
        """Stage 3 cuts every parameter into equal ranges, one a rank; the last is padded."""
        flats = self._flat_groups()
        named: Iterator[tuple[str, Any]] = self.model.named_parameters()
        for name, parameter in named:
            group, offset, size = self.zero.grad_position[self.zero.get_param_id(parameter)]
            start = min(self.ranks.rank * size, parameter.ds_numel)
            stop = min(start + size, parameter.ds_numel)
            yield self._shard(name, parameter.ds_shape, start, flats[group], slice(offset, offset + stop - start))

    def _shard(self, name: str, shape: torch.Size, start: int, flat: Tensor, at: slice) -> Shard:
        state = self.optimizer.state[flat]
        moments = (state[MOMENTS[0]][at], state[MOMENTS[1]][at])
        return Shard(name, tuple(shape), start, flat.detach()[at], moments, (0, 1))

    def parameters_changed(self) -> None:
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        for group in range(len(self._flat_groups())):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            if self.stage < 3:
                yield name, parameter.detach()
                continue
            with self.gathered([parameter]):
                whole = parameter.detach().clone()
            yield name, whole


def import_deepspeed(device: torch.device) -> Any:
    """deepspeed, connected to the process group that there is. ImportError names the extra that holds it."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # else it looks for one, and warns that there is only a CPU
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise ImportError(
            "train.engine=zero needs deepspeed, which is not installed: pip install 'mamba-pretrain[deepspeed]'"
        ) from error
    # Of its own calls, for each of them in each step.
    warnings.filterwarnings("ignore", "`torch.distributed.*deprecated", FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns of our optimizer, and of what we report ourselves
    if device.type == "cpu":
        # It would compile an operation for inference: minutes, and a kill then leaves a lock that hangs later runs.
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl")
    return deepspeed
