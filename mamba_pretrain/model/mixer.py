"""The Mamba-1 mixer (Mamba paper, figure 3 and Algorithm 2; mamba_ssm/modules/mamba_simple.py)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mamba_pretrain.config import ModelConfig
from mamba_pretrain.ops.mamba_inner import mamba_inner


class Mixer(nn.Module):
    """D -> E twice (x and gate z), convolution, input-dependent (delta, B, C), selective scan, E -> D.

    Submodules hold parameters under mamba_ssm's names. Their initial values are set by `model.law`, not here.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d_model, inner, rank = config.need("d_model"), config.d_inner, config.rank
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=config.linear_bias)
        self.conv1d = nn.Conv1d(inner, inner, config.d_conv, groups=inner, bias=config.conv_bias)
        self.x_proj = nn.Linear(inner, rank + 2 * config.d_state, bias=False)
        self.dt_proj = nn.Linear(rank, inner, bias=True)
        self.A_log = nn.Parameter(torch.empty(inner, config.d_state))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, d_model, bias=config.linear_bias)

    def forward(
        self,
        hidden_BLD: Tensor,
        seq_idx_BL: Tensor | None,
        conv_state_BSE: Tensor | None,
        ssm_state_BEN: Tensor | None,
        return_state: bool = True,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns the output (B, L, D) and the convolution's and the scan's state after the last step, if wanted."""
        return mamba_inner(
            hidden_BLD, *self.weights(), seq_idx_BL, conv_state_BSE, ssm_state_BEN, return_last_state=return_state
        )

    def weights(
        self,
    ) -> tuple[
        Tensor, Tensor | None, Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None
    ]:
        """The parameters in the order in which `ops` takes them, A in place of its logarithm."""
        return (
            self.in_proj.weight,
            self.in_proj.bias,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.x_proj.weight,
            self.dt_proj.weight,
            self.dt_proj.bias,
            -torch.exp(self.A_log),
            self.D,
            self.out_proj.weight,
            self.out_proj.bias,
        )
