"""The KL autoencoder of Stable Diffusion 1.5: pixels [B,3,H,W] in [-1,1] <-> latents [B,4,H/8,W/8] (arXiv:2112.10752, appendix G).

Two details that ports get wrong: GroupNorm eps is 1e-6 everywhere, and the encoder's downsampling pads right and bottom only
(CompVis `model.py`, `Normalize` and `Downsample`). Proven by tests/parity/test_networks.py.
"""
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lesion.sd.blocks import ResnetBlock2D, Upsample2D, attention

LATENT_SCALE = 0.18215  # latents = LATENT_SCALE * sample, so that the U-Net sees about unit variance (CompVis v1-inference.yaml)
EPS = 1e-6


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the autoencoder; the defaults are SD 1.5's."""
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = LATENT_SCALE


class Downsample2D(nn.Module):
    """Pad (left 0, right 1, top 0, bottom 1), then 3x3 convolution with stride 2 and no padding."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class SelfAttention(nn.Module):
    """One head over the pixels, residual: [B,C,H,W] -> same."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, eps=EPS)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # [B,HW,C]
        h = self.to_out[0](attention(self.to_q(h), self.to_k(h), self.to_v(h), heads=1))
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])


class Level(nn.Module):
    """Residual blocks, then a change of size (or none): one level of the encoder or of the decoder."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, resample: str | None):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock2D(out_channels if j else in_channels, out_channels, None, groups, EPS) for j in range(layers))
        self.downsamplers = nn.ModuleList([Downsample2D(out_channels)]) if resample == "down" else None
        self.upsamplers = nn.ModuleList([Upsample2D(out_channels)]) if resample == "up" else None

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        for resample in (self.downsamplers, self.upsamplers):
            x = x if resample is None else resample[0](x)
        return x


class MidBlock(nn.Module):
    def __init__(self, width: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock2D(width, width, None, groups, EPS) for _ in range(2))
        self.attentions = nn.ModuleList([SelfAttention(width, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], width, config.layers_per_block, groups, "down" if i < len(widths) - 1 else None)
            for i, width in enumerate(widths))
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], width, config.layers_per_block + 1, groups, "up" if i < len(widths) - 1 else None)
            for i, width in enumerate(widths))
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """q(z|x) = N(mean, exp(logvar)); `encode` and `decode` work on unscaled latents, as in the papers."""

    def __init__(self, config: VAEConfig = VAEConfig()):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels [B,3,H,W] in [-1,1] -> mean, logvar [B,4,H/8,W/8]; logvar clamped to [-30, 20] as in CompVis."""
        mean, logvar = self.quant_conv(self.encoder(pixels)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, latents: Tensor) -> Tensor:
        """Unscaled latents [B,4,h,w] -> pixels [B,3,8h,8w], about [-1,1], not clamped."""
        return self.decoder(self.post_quant_conv(latents))


def to_pixels(images_u8: np.ndarray | Tensor) -> Tensor:
    """uint8 [B,H,W,3] -> float32 pixels [B,3,H,W]: x / 127.5 - 1."""
    return torch.as_tensor(np.array(images_u8)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images_u8(pixels: Tensor) -> np.ndarray:
    """pixels [B,3,H,W] -> uint8 [B,H,W,3]: round((x + 1) * 127.5), clamped to 0..255 (never truncated)."""
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
