"""The engine for one process: everything whole, on one device."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mamba_pretrain.config import Config
from mamba_pretrain.distributed.engine import MODEL, OPTIMIZER, StepResult
from mamba_pretrain.model.lm import MambaLM
from mamba_pretrain.optim import AdamW, param_groups

MOMENTS = ("exp_avg", "exp_avg_sq")


class SingleEngine:
    """AdamW over whole fp32 parameters; fp16 runs scale the loss."""

    def __init__(self, model: MambaLM, config: Config) -> None:
        self.module = model
        self.device = next(model.parameters()).device
        self.clip_norm = config.optim.clip_norm
        groups = param_groups(model.named_parameters(), model.config, config.optim.weight_decay)
        self.optimizer = AdamW(groups, model.config, config.optim)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.train.precision == "fp16")
        self._losses_finite = torch.ones((), dtype=torch.bool, device=self.device)

    @property
    def decay_of(self) -> dict[str, float]:
        decay = {id(p): group["weight_decay"] for group in self.optimizer.param_groups for p in group["params"]}
        return {name: decay[id(p)] for name, p in self.module.named_parameters() if id(p) in decay}

    def backward(self, loss: Tensor, *, last_micro_batch: bool) -> None:
        self._losses_finite &= torch.isfinite(loss.detach())
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def step(self, lr: float) -> StepResult:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss_scale = self.scaler.get_scale()
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        finite = bool(torch.isfinite(norm) & self._losses_finite)
        if finite:
            if self.clip_norm and (shrink := self.clip_norm / (float(norm) + 1e-6)) < 1:
                torch._foreach_mul_(gradients, shrink)
            self.scaler.step(self.optimizer)
        if self.scaler.is_enabled():
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._losses_finite.fill_(True)
        return StepResult(float(norm), not finite, loss_scale)

    def save(self, directory: Path) -> None:
        """optimizer.safetensors holds "exp_avg.NAME", "exp_avg_sq.NAME", and scalars: "step", for fp16 the scale."""
        save_file(self.full_state_dict(), directory / MODEL)
        tensors: dict[str, Tensor] = {}
        steps = 0.0
        for name, parameter in self.module.named_parameters():
            if state := self.optimizer.state.get(parameter):
                steps = float(state["step"])
                tensors |= {f"{moment}.{name}": state[moment].cpu().contiguous() for moment in MOMENTS}
        tensors["step"] = torch.tensor(steps)
        if self.scaler.is_enabled():
            scaler = self.scaler.state_dict()
            tensors["loss_scale"] = torch.tensor(scaler["scale"])
            tensors["finite_steps"] = torch.tensor(scaler["_growth_tracker"])
        save_file(tensors, directory / OPTIMIZER)

    def load(self, directory: Path) -> None:
        self.module.load_state_dict(load_file(directory / MODEL))
        with safe_open(directory / OPTIMIZER, framework="pt") as file:
            names = set(file.keys())
            steps = file.get_tensor("step")
            for name, parameter in self.module.named_parameters():
                if f"{MOMENTS[0]}.{name}" in names:
                    state = {moment: file.get_tensor(f"{moment}.{name}").to(self.device) for moment in MOMENTS}
                    self.optimizer.state[parameter] = {"step": steps.clone().to(self.device), **state}
            if self.scaler.is_enabled() and "loss_scale" in names:
                restored = {"scale": file.get_tensor("loss_scale").item(), "_growth_tracker": 0}
                restored["_growth_tracker"] = int(file.get_tensor("finite_steps").item())
                self.scaler.load_state_dict(self.scaler.state_dict() | restored)

    def full_state_dict(self) -> dict[str, Tensor]:
        return {name: p.detach().to("cpu", torch.float32) for name, p in self.module.named_parameters()}
