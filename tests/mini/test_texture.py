"""The texture stage: the critic's losses by hand, and a decoder's loss that falls as its grain looks real."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lesion.mini import texture
from lesion.run.devices import generator


def test_hinge_losses():
    """Scores 2 and 0 of real, -3 and 1 of drawn: (0 + 1)/2 + (0 + 2)/2 = 1.5."""
    assert texture.critic_loss(torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])).item() == pytest.approx(1.5)


def test_decoder_loss():
    """No error: minus the weighted score alone. A higher score is a lower loss, by the weight."""
    recipe = SimpleNamespace(chroma_weight=3.0, square_weight=5.0, texture_weight=1.0, adversarial_weight=0.1)
    pixels = torch.rand(1, 3, 64, 64, generator=generator(0))
    parts = texture.decoder_loss(pixels, pixels, torch.tensor([2.0, 4.0]), recipe)
    assert parts["loss"].item() == pytest.approx(-0.3)
    worse = texture.decoder_loss(pixels + 0.1, pixels, torch.tensor([2.0, 4.0]), recipe)
    assert worse["l1"].item() == pytest.approx(0.1)
    assert worse["loss"] > parts["loss"]


def board(square: int, rgb: tuple[float, float, float]) -> torch.Tensor:
    """Checks of `square` pixels, +rgb and -rgb."""
    line = torch.arange(64) // square
    sign = 1.0 - 2.0 * ((line[:, None] + line) % 2)
    return torch.tensor(rgb)[None, :, None, None] * sign


def test_octaves_loss_tells_grain_by_size_and_colour():
    """Grain elsewhere is no error; no grain is. Checks of 1 px are gone at octave 1: error 8/9 of their height at octave 0 alone, and
    chroma counts three times. Checks of 8 px are seen at octave 3, where those of 1 px are not."""
    recipe, flat = SimpleNamespace(chroma_weight=3.0), torch.zeros(1, 3, 64, 64)
    grey, blue = (0.1, 0.1, 0.1), (0.0, 0.0, 0.1)
    fine = board(1, grey)
    assert texture.octaves_loss(-fine, fine, recipe).item() == pytest.approx(0, abs=1e-6)
    assert texture.octaves_loss(flat, fine, recipe).item() == pytest.approx(0.1 * 8 / 9 / 2, rel=0.05)
    in_chroma = 0.1 * (0.114 + 3 * (0.5 + 0.081))
    assert texture.octaves_loss(flat, board(1, blue), recipe).item() == pytest.approx(in_chroma * 8 / 9 / 2, rel=0.05)
    assert texture.octaves_loss(flat, board(8, grey), recipe) > 2 * texture.octaves_loss(flat, fine, recipe)


def test_critic_sees_fine_grain_and_little_of_it_is_enough():
    """A patch's score answers to grain of one grey level; shapes as documented; the same seed the same critic."""
    critic, again = texture.build_critic(3).eval(), texture.build_critic(3).eval()
    pixels = torch.zeros(2, 3, 128, 128)
    assert critic(pixels).shape == (2, 1, 30, 30)
    grain = pixels + torch.randn(pixels.shape, generator=generator(1)) / 127.5
    assert torch.equal(critic(grain), again(grain))
    assert (critic(grain) - critic(pixels)).abs().max() > 0.01


def test_draws_are_keyed():
    """The same step draws the same tiles, views and noise; another step others; the held-back tiles never."""
    recipe = SimpleNamespace(seed=0, batch_size=64)
    first, again, other = (texture.draw(recipe, step, np.ones(10)) for step in (5, 5, 6))
    assert first[0] == again[0]
    assert torch.equal(first[2], again[2])
    assert not torch.equal(first[2], other[2])
    assert set(first[0]) == set(range(10))
    assert set(first[1]) == set(range(8))
    rare = texture.draw(recipe, 5, np.array([0.0, 9.0, 1.0]))[0]
    assert 0 not in rare
    assert 48 < rare.count(1) < 64
