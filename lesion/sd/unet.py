"""The noise-predicting U-Net of Stable Diffusion 1.5 (arXiv:2112.10752; CompVis `v1-inference.yaml`).

Four levels of two residual blocks, cross-attention on the first three, a mid block, four levels of three residual blocks.
Module names are diffusers' (`down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q`): a folder checkpoint loads without a map.
Proven by tests/parity/test_networks.py; sizes by tests/parity/test_full_size.py.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lesion.sd.blocks import ResnetBlock2D, Upsample2D, attention, timestep_embedding

EPS, TRANSFORMER_EPS = 1e-5, 1e-6  # GroupNorm: residual blocks and output; transformer input


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of the U-Net; the defaults are SD 1.5's. `heads` is what diffusers' config calls `attention_head_dim`."""
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    cross_attention_dim: int = 768
    heads: int = 8
    in_channels: int = 4
    out_channels: int = 4
    norm_num_groups: int = 32


class Attention(nn.Module):
    """Multi-head attention; keys and values come from `context` [B,M,C] if given, else from x [B,N,D]."""

    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        return self.to_out[0](attention(self.to_q(x), self.to_k(context), self.to_v(context), self.heads))


class GEGLU(nn.Module):
    """value * gelu(gate), exact (erf) GELU (arXiv:2002.05202); the projection's first half is the value."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each pre-normed and residual."""

    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, context_width, heads)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nn.Module):
    """A transformer block over the pixels of a feature map, between two 1x1 convolutions, residual: [B,C,H,W] -> same."""

    def __init__(self, width: int, context_width: int, heads: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=TRANSFORMER_EPS)
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([BasicTransformerBlock(width, context_width, heads)])
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        height, width = x.shape[2:]
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # [B,HW,C]
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, (height, width)))


class Downsample2D(nn.Module):
    """3x3 convolution, stride 2, padding 1 on every side (the VAE's pads right and bottom only)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class DownBlock(nn.Module):
    def __init__(self, config: UNetConfig, level: int, temb: int):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        width, before = widths[level], widths[max(level - 1, 0)]
        last = level == len(widths) - 1
        layers = range(config.layers_per_block)
        self.resnets = nn.ModuleList(ResnetBlock2D(width if j else before, width, temb, groups, EPS) for j in layers)
        self.attentions = None if last else nn.ModuleList(
            Transformer2DModel(width, config.cross_attention_dim, config.heads, groups) for _ in layers)
        self.downsamplers = None if last else nn.ModuleList([Downsample2D(width)])

    def forward(self, x: Tensor, temb: Tensor, context: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for j, resnet in enumerate(self.resnets):
            x = resnet(x, temb)
            if self.attentions is not None:
                x = self.attentions[j](x, context)
            skips.append(x)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    def __init__(self, config: UNetConfig, temb: int):
        super().__init__()
        width, groups = config.block_out_channels[-1], config.norm_num_groups
        self.resnets = nn.ModuleList(ResnetBlock2D(width, width, temb, groups, EPS) for _ in range(2))
        self.attentions = nn.ModuleList([Transformer2DModel(width, config.cross_attention_dim, config.heads, groups)])

    def forward(self, x: Tensor, temb: Tensor, context: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x, temb), context), temb)


class UpBlock(nn.Module):
    """One more residual block than on the way down, each fed the matching skip; `level` counts from the bottom."""

    def __init__(self, config: UNetConfig, level: int, temb: int):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        width, before, after = widths[level], widths[max(level - 1, 0)], widths[min(level + 1, len(widths) - 1)]
        layers = config.layers_per_block + 1
        skip_widths = [width] * (layers - 1) + [after]
        self.resnets = nn.ModuleList(
            ResnetBlock2D((width if j else before) + skip_widths[j], width, temb, groups, EPS) for j in range(layers))
        self.attentions = None if level == 0 else nn.ModuleList(
            Transformer2DModel(width, config.cross_attention_dim, config.heads, groups) for _ in range(layers))
        self.upsamplers = None if level == len(widths) - 1 else nn.ModuleList([Upsample2D(width)])

    def forward(self, x: Tensor, skips: list[Tensor], temb: Tensor, context: Tensor) -> Tensor:
        for j, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), temb)
            if self.attentions is not None:
                x = self.attentions[j](x, context)
        return x if self.upsamplers is None else self.upsamplers[0](x)


class TimestepEmbedding(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.linear_1 = nn.Linear(width, hidden)
        self.linear_2 = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class UNet(nn.Module):
    """noise_pred = UNet(noisy_latents [B,4,h,w], timesteps [B] int64 0..999, context [B,77,C]); h, w multiples of 8."""

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        temb = 4 * widths[0]
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], temb)
        self.down_blocks = nn.ModuleList(DownBlock(config, i, temb) for i in range(len(widths)))
        self.mid_block = MidBlock(config, temb)
        self.up_blocks = nn.ModuleList(UpBlock(config, i, temb) for i in range(len(widths)))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=EPS)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        embedding = timestep_embedding(timesteps, self.config.block_out_channels[0])
        temb = self.time_embedding(embedding.to(self.conv_in.weight.dtype))
        x = self.conv_in(noisy_latents)
        skips = [x]
        for block in self.down_blocks:
            x, new = block(x, temb, context)
            skips += new
        x = self.mid_block(x, temb, context)
        for block in self.up_blocks:
            x = block(x, skips, temb, context)
        return self.conv_out(F.silu(self.conv_norm_out(x)))
