"""The Mamba-1 mixer (Mamba paper, figure 3 and Algorithm 2; mamba_ssm/modules/mamba_simple.py)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_pretrain.config import ModelConfig
from mamba_pretrain.ops.causal_conv1d import causal_conv1d
from mamba_pretrain.ops.selective_scan import selective_scan


class Mixer(nn.Module):
    """D -> E twice (x and gate z), convolution, input-dependent (delta, B, C), selective scan, E -> D.

    Submodules hold parameters under mamba_ssm's names. Their initial values are set by `model.law`, not here.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d_model, inner, rank = config.need("d_model"), config.d_inner, config.rank
        self.rank, self.d_state = rank, config.d_state
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=config.linear_bias)
        self.conv1d = nn.Conv1d(inner, inner, config.d_conv, groups=inner, bias=config.conv_bias)
        self.x_proj = nn.Linear(inner, rank + 2 * config.d_state, bias=False)
        self.dt_proj = nn.Linear(rank, inner, bias=True)
        self.A_log = nn.Parameter(torch.empty(inner, config.d_state))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, d_model, bias=config.linear_bias)

    def forward(
        self, hidden_BLD: Tensor, seq_idx_BL: Tensor | None, conv_state_BSE: Tensor | None, ssm_state_BEN: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the output (B, L, D) and the convolution's and the scan's state after the last step.

        Matrix products run in the ambient autocast dtype. dt_proj's bias is added inside the scan, in fp32.
        """
        x_BLE, z_BLE = self.in_proj(hidden_BLD).chunk(2, dim=-1)
        x_BLE, conv_state_BSE = causal_conv1d(
            x_BLE, self.conv1d.weight.squeeze(1), self.conv1d.bias, seq_idx_BL, conv_state_BSE
        )
        delta_BLR, B_BLN, C_BLN = self.x_proj(x_BLE).split([self.rank, self.d_state, self.d_state], dim=-1)
        y_BLE, ssm_state_BEN = selective_scan(
            x_BLE,
            F.linear(delta_BLR, self.dt_proj.weight),
            -torch.exp(self.A_log),
            B_BLN,
            C_BLN,
            self.D,
            z_BLE,
            self.dt_proj.bias,
            seq_idx_BL,
            ssm_state_BEN,
        )
        return self.out_proj(y_BLE), conv_state_BSE, ssm_state_BEN
