"""The autoencoder stage: its losses and its measures, by hand."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lesion.mini import loop, vae
from lesion.run.devices import generator

RECIPE = SimpleNamespace(chroma_weight=3.0, square_weight=5.0, texture_weight=0.5, kl_weight=0.1)


def test_measures():
    """PSNR of a constant error e is 20 log10(255 / e); the high-frequency ratio of a picture with itself is 1, of its blur small."""
    image = np.full((1, 64, 64, 3), 100, np.uint8)
    assert vae.psnr(image, image + 10) == pytest.approx(20 * np.log10(25.5))
    noise = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3)).astype(np.uint8)
    assert vae.high_frequency_ratio(noise, noise) == pytest.approx(1)
    blurred = np.stack([np.asarray(Image.fromarray(i).resize((8, 8)).resize((64, 64))) for i in noise])
    assert vae.high_frequency_ratio(noise, blurred) < 0.05


def test_loss_of_a_perfect_picture_is_its_kl():
    """No error: what is left is the KL term, 0.5 (m^2 + v - 1 - log v): 0 of N(0, 1), .5 of N(1, 1)."""
    pixels = torch.rand(2, 3, 32, 32, generator=generator(0)) * 2 - 1
    mean, logvar = torch.ones(2, 4, 4, 4), torch.zeros(2, 4, 4, 4)
    assert vae.vae_loss(pixels, pixels, 0 * mean, logvar, RECIPE)["loss"].item() == pytest.approx(0)
    assert vae.vae_loss(pixels, pixels, mean, logvar, RECIPE)["loss"].item() == pytest.approx(0.05)


def test_color_errors_count_more_than_brightness():
    """A grey error e costs (e + 5 e^2) / 2, for Y alone; the same step in blue costs more, by the weight of Cb and Cr."""
    grey = torch.full((1, 3, 16, 16), 0.1)
    assert vae.color_loss(grey, RECIPE).item() == pytest.approx((0.1 + 5 * 0.01) / 2, rel=1e-3)
    blue = torch.zeros(1, 3, 16, 16)
    blue[:, 2] = 0.1
    assert vae.color_loss(blue, RECIPE) > vae.color_loss(grey, RECIPE)


def test_texture_energy_is_of_fine_grain():
    """Of a checkerboard +-a: a (1 - 1/9), wherever it begins; of a ramp nearly nothing."""
    board = 0.2 * (2.0 * ((torch.arange(32)[:, None] + torch.arange(32)) % 2) - 1).expand(1, 3, 32, 32)
    assert vae.texture_energy(board)[..., 2:-2, 2:-2].mean().item() == pytest.approx(0.2 * 8 / 9, rel=1e-3)
    assert torch.allclose(vae.texture_energy(board), vae.texture_energy(-board))
    assert vae.texture_energy((torch.arange(32) / 32.0).expand(1, 3, 32, 32))[..., 2:-2, 2:-2].max() < 0.002


def test_crops_are_keyed_and_leave_the_held_back_tiles_alone(monkeypatch):
    """The same step gives the same crops, another one others; values stay in [-1, 1]; the last tiles are never seen."""
    monkeypatch.setattr(loop, "CHECK_TILES", 4)
    images = np.zeros((8, 128, 128, 3), np.uint8)
    images[4:] = 255  # held back
    recipe = SimpleNamespace(seed=0, batch_size=16, crop=64, chroma_field=0.0)
    first, again, other = (vae.augmented_crops(images, recipe, step) for step in (3, 3, 4))
    assert first.shape == (16, 3, 64, 64)
    assert torch.equal(first, again)
    assert first.max() == other.max() == -1
    recipe.chroma_field = 0.3
    colored = vae.augmented_crops(images + 100, recipe, 3)
    assert not torch.equal(colored, vae.augmented_crops(images + 100, recipe, 4))
    assert colored.abs().max() <= 1
