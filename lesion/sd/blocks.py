"""The three pieces that U-Net and VAE share: residual block, nearest-neighbour upsampling, attention.

Follows CompVis/stable-diffusion `openaimodel.py` and `model.py`; module names are diffusers'.
Proven by tests/parity/test_networks.py.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResnetBlock2D(nn.Module):
    """h = conv2(silu(norm2(conv1(silu(norm1(x))) + W silu(temb)))); returns shortcut(x) + h.

    x [B,C_in,H,W], temb [B,T] or None (VAE) -> [B,C_out,H,W]. eps: 1e-5 in the U-Net, 1e-6 in the VAE.
    """

    def __init__(self, in_channels: int, out_channels: int, temb_channels: int | None, groups: int, eps: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if temb_channels is not None:
            self.time_emb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if temb is not None:
            h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class Upsample2D(nn.Module):
    """Nearest-neighbour x2, then a 3x3 convolution: [B,C,H,W] -> [B,C,2H,2W]."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, causal: bool = False) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V per head (arXiv:1706.03762, eq. 1); query [B,N,heads*d], key and value [B,M,heads*d]."""
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))  # [B,heads,N,d]
    out = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    return out.transpose(1, 2).flatten(2)


def timestep_embedding(timesteps: Tensor, width: int) -> Tensor:
    """[cos(t w_i), sin(t w_i)], w_i = 10000^(-i / (width/2)), i = 0..width/2-1: [B] -> float32 [B,width].

    Cosine first, exponent i/(width/2): guided-diffusion's `timestep_embedding`, not CompVis' other one (sine first, i/(width/2-1)).
    """
    half = width // 2
    frequencies = torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(half, dtype=torch.float32) / half)
    angles = timesteps.float()[:, None] * frequencies.to(timesteps.device)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
