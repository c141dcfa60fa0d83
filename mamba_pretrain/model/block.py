"""Pre-norm residual block, and the recurrent state that a stack of blocks carries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mamba_pretrain.config import ModelConfig
from mamba_pretrain.model.mixer import Mixer
from mamba_pretrain.ops.add_norm import add_rms_norm


class RMSNorm(nn.Module):
    """Holds the weight of `add_rms_norm`, which adds to the residual stream in the same step."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_model))
        self.eps = eps

    def forward(self, x_BLD: Tensor, residual_BLD: Tensor | None) -> tuple[Tensor, Tensor]:
        device = x_BLD.device.type
        narrow = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return add_rms_norm(x_BLD, residual_BLD, self.weight, self.eps, narrow)


class Block(nn.Module):
    """Add -> norm -> mixer (mamba_ssm's order): takes the last mixer's output and the residual stream, gives both.

    The unit of sharding and of activation checkpointing.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.need("d_model"), config.norm_eps)
        self.mixer = Mixer(config)

    def forward(
        self,
        hidden_BLD: Tensor,
        residual_BLD: Tensor | None,
        seq_idx_BL: Tensor | None = None,
        conv_state_BSE: Tensor | None = None,
        ssm_state_BEN: Tensor | None = None,
        return_state: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Returns the mixer's output, the fp32 residual stream (both (B, L, D)), and the two states, if wanted."""
        hidden_BLD, residual_BLD = self.norm(hidden_BLD, residual_BLD)
        hidden_BLD, conv_state_BSE, ssm_state_BEN = self.mixer(
            hidden_BLD, seq_idx_BL, conv_state_BSE, ssm_state_BEN, return_state
        )
        return hidden_BLD, residual_BLD, conv_state_BSE, ssm_state_BEN


@dataclass
class MambaState:
    """All that a model remembers of a text: constant in size, whatever the text's length.

    conv: per block the last S = d_conv - 1 inputs of the convolution, (B, S, E) fp32.
    ssm: per block the scan's state, (B, E, N) fp32.
    """

    conv: list[Tensor]
    ssm: list[Tensor]

    @classmethod
    def zeros(cls, config: ModelConfig, batch: int, device: torch.device | str = "cpu") -> MambaState:
        """The state before any text."""
        inner, layers = config.d_inner, range(config.need("n_layer"))
        return cls(
            conv=[torch.zeros(batch, config.d_conv - 1, inner, device=device) for _ in layers],
            ssm=[torch.zeros(batch, inner, config.d_state, device=device) for _ in layers],
        )

    def forget(self, rows_B: Tensor) -> MambaState:
        """A state in which the batch rows where `rows_B` (bool) is true start afresh."""
        keep_B11 = (~rows_B)[:, None, None]
        return MambaState([s * keep_B11 for s in self.conv], [s * keep_B11 for s in self.ssm])

    def first(self, rows: int) -> MambaState:
        """The state of the first rows of the batch."""
        return MambaState([s[:rows] for s in self.conv], [s[:rows] for s in self.ssm])
