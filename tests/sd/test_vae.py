"""Pixels, uint8 and latents: the small steps around the autoencoder, each with its exact numbers."""
import types

import numpy as np
import pytest
import torch

from lesion.sd import checkpoint, pipeline
from lesion.sd.vae import VAE, VAEConfig, to_images_u8, to_pixels


def test_uint8_is_rounded():
    """To uint8 by rounding to the nearest, never by truncating (which darkens every picture by half a level), and
    clamped."""
    levels = torch.tensor([-1.5, -1.0, -1.0 + 0.9 / 127.5, 0.49 / 127.5, 0.51 / 127.5, 1.0 - 0.4 / 127.5, 1.0, 1.7])
    got = to_images_u8(levels.view(1, 1, 1, -1).expand(1, 3, 1, -1))
    assert got.dtype == np.uint8
    assert got[0, 0, :, 0].tolist() == [0, 0, 1, 128, 128, 255, 255, 255]
    assert to_images_u8(torch.full((1, 3, 1, 1), -1 + 10.6 / 127.5))[0, 0, 0].tolist() == [11, 11, 11]


def test_uint8_there_and_back():
    """Every level survives, 0 is -1 and 255 is 1, and the axes go from [B,H,W,3] to [B,3,H,W] and back."""
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    images[..., 1] = 255 - images[..., 1]
    pixels = to_pixels(images)
    assert pixels.shape == (1, 3, 16, 16)
    assert (pixels[0, 0, 0, 0], pixels[0, 1, 0, 0]) == (-1, 1)
    assert (to_images_u8(pixels) == images).all()


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return VAE(VAEConfig(block_out_channels=(8, 8, 8, 8), norm_num_groups=4)).eval()


@torch.no_grad()
def test_the_log_variance_is_clamped(vae):
    """logvar stays within [-30, 20], as in CompVis: a weight that is far off would give infinite or zero noise."""
    pixels = torch.zeros(1, 3, 16, 16)
    vae.quant_conv.bias[4:] = torch.tensor([1e3, -1e3, 20.5, -30.5])
    mean, logvar = vae.encode(pixels)
    assert logvar[0, :, 0, 0].tolist()[:2] == [20.0, -30.0]
    assert logvar.min() == -30
    assert logvar.max() == 20
    vae.quant_conv.bias[:4] = 1e3
    assert vae.encode(pixels)[0].max() > 500  # the mean is not


@torch.no_grad()
def test_latents_are_unscaled_before_decoding(vae):
    """decode(latents) is the VAE's decoder on latents / scale, whatever the scale is: a picture from unscaled latents
    is another one."""
    latents = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    sd = types.SimpleNamespace(vae=vae, latent_scale=0.18215)
    got = pipeline.decode(sd, latents)
    assert torch.equal(got, vae.decode(latents / 0.18215))
    assert (got - vae.decode(latents)).abs().max() > 1e-3


def test_the_scale_is_the_checkpoints(tiny):
    """StableDiffusion.latent_scale is what the VAE's config says, 0.18215 for SD 1.5."""
    assert checkpoint.load(tiny / "folder").latent_scale == 0.18215
