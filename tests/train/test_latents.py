"""The plan of tiles and views, and the latent cache: encoded once, never wrong, never in the way."""

import numpy as np
import pytest
import torch

from lesion.run.state import save_state
from lesion.sd.vae import VAE, VAEConfig, to_pixels
from lesion.tiles.views import dihedral
from lesion.train import latents
from lesion.train.step import posterior_sample

CPU = torch.device("cpu")


# --- the plan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tiles", "batch"), [(10, 4), (3, 8), (7, 7), (237, 8)])
def test_each_tile_once_an_epoch(tiles, batch):
    """Cut into epochs, the plan shows every tile once in each, in another order each time."""
    steps = 4 * tiles // batch + 2
    chosen, views = latents.plan(tiles, batch, steps, seed=3)
    assert chosen.shape == views.shape == (steps, batch)
    stream = chosen.ravel()
    epochs = [stream[start : start + tiles] for start in range(0, len(stream), tiles)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(range(tiles))
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs) or tiles < 5


def test_a_longer_plan_begins_with_the_shorter():
    """--steps may be raised on --resume: the steps done stay what they were."""
    for views in (1, 8):
        short, long = (latents.plan(13, 4, steps, seed=5, views=views) for steps in (9, 200))
        for a, b in zip(short, long):
            assert np.array_equal(a, b[:9])


def test_seeds_and_views():
    """Another seed gives another plan; all eight views come equally often (4 standard errors); one view is view 0."""
    one, views = latents.plan(50, 8, 1000, seed=0)
    assert not np.array_equal(one, latents.plan(50, 8, 1000, seed=1)[0])
    counts = np.bincount(views.ravel(), minlength=8)
    assert len(counts) == 8
    assert np.abs(counts - 1000).max() < 4 * (8000 * 7 / 64) ** 0.5
    assert not latents.plan(50, 8, 10, seed=0, views=1)[1].any()


def test_dihedral():
    """The eight views are the eight different symmetries of the square, the first is none."""
    x = torch.arange(9.0).reshape(1, 1, 3, 3)
    seen = [dihedral(x, view) for view in range(8)]
    assert torch.equal(seen[0], x)
    assert len({tuple(view.ravel().tolist()) for view in seen}) == 8
    for view in seen:  # corners stay corners, the centre the centre, neighbours neighbours
        assert view[0, 0, 1, 1] == 4
        assert {view[0, 0, i, j].item() for i in (0, 2) for j in (0, 2)} == {0, 2, 6, 8}


# --- the cache -------------------------------------------------------------------------------------------------------


class Counting(VAE):
    """A small VAE with random weights that counts the tiles it encodes."""

    def __init__(self, seed: int = 0):
        super().__init__(VAEConfig(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4))
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=g))
        self.eval().requires_grad_(False)
        self.count = 0

    def encode(self, pixels):
        self.count += len(pixels)
        return super().encode(pixels)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(256, size=(3, 64, 64, 3), dtype=np.uint8)


def close(ours, expected):
    """Equal up to the memory layout's choice of convolution."""
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def latent_files(folder):
    return list(folder.glob("latents-*.safetensors"))


def test_encode_fills_what_is_asked(images, tmp_path):
    """The asked (tile, view) pairs hold what the VAE says of the turned tile, each encoded once; the others are NaN."""
    vae = Counting()
    pairs = np.array([[0, 0], [2, 5], [0, 0], [1, 7], [2, 3]])
    mean, logvar = latents.encode(vae, images, pairs, tmp_path, CPU)
    assert mean.shape == logvar.shape == (3, 8, 4, 8, 8)
    assert mean.dtype == logvar.dtype == torch.float32
    assert vae.count == 4
    asked = {tuple(pair) for pair in pairs.tolist()}
    for tile in range(3):
        for view in range(8):
            if (tile, view) in asked:
                turned = np.rot90(images[tile], view % 4)
                turned = turned[:, ::-1] if view >= 4 else turned
                expected = vae.encode(to_pixels(turned[None]))
                close(mean[tile, view], expected[0][0])
                close(logvar[tile, view], expected[1][0])
            else:
                assert mean[tile, view].isnan().all()
                assert logvar[tile, view].isnan().all()


def test_a_second_run_encodes_only_what_is_new(images, tmp_path):
    """The file of the first run serves the second; a larger plan adds to it and loses nothing."""
    first = latents.encode(Counting(), images, np.array([[0, 0], [1, 1]]), tmp_path, CPU)
    vae = Counting()
    second = latents.encode(vae, images, np.array([[1, 1], [0, 0]]), tmp_path, CPU)
    assert vae.count == 0
    assert all(torch.allclose(a, b, equal_nan=True, rtol=0, atol=0) for a, b in zip(first, second))
    mean, _ = latents.encode(vae, images, np.array([[0, 0], [2, 2]]), tmp_path, CPU)
    assert vae.count == 1
    assert mean[[0, 1, 2], [0, 1, 2]].isfinite().all()
    assert len(latent_files(tmp_path)) == 1


@pytest.mark.parametrize("change", ["vae", "pixel", "resolution"])
def test_the_key_holds_what_decides_the_latents(images, tmp_path, change):
    """Another VAE, one other pixel or another resolution never meets the old file."""
    latents.encode(Counting(), images, np.array([[0, 0]]), tmp_path, CPU)
    vae, other = Counting(seed=1 if change == "vae" else 0), images.copy()
    if change == "pixel":
        other[2, 63, 63, 2] ^= 1
    if change == "resolution":
        other = images.repeat(2, axis=1).repeat(2, axis=2)
    mean, _ = latents.encode(vae, other, np.array([[0, 0]]), tmp_path, CPU)
    assert vae.count == 1
    close(mean[0, 0], vae.encode(to_pixels(other[:1]))[0][0])
    assert len(latent_files(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "foreign", "flipped", "another set's"])
def test_a_damaged_cache_is_rebuilt(images, tmp_path, damage):
    """A cache that a disk or another program spoilt costs time only."""
    pairs = np.array([[0, 0], [1, 6]])
    good = latents.encode(Counting(), images, pairs, tmp_path, CPU)
    file = latent_files(tmp_path)[0]
    whole = file.read_bytes()
    if damage == "foreign":
        save_state(file, {"something": torch.ones(2)}, {})
    elif damage == "another set's":
        latents.encode(Counting(), images[:, ::-1].copy(), pairs, tmp_path / "other", CPU)
        latent_files(tmp_path / "other")[0].replace(file)
    else:
        flipped = bytearray(whole)
        flipped[-len(whole) // 4] ^= 1  # one bit of a log-variance
        file.write_bytes({"cut": whole[:-9], "empty": b"", "garbage": b"\xff" * 200, "flipped": flipped}[damage])
    vae = Counting()
    again = latents.encode(vae, images, pairs, tmp_path, CPU)
    assert vae.count == 2
    assert all(torch.allclose(a, b, equal_nan=True, rtol=0, atol=0) for a, b in zip(good, again))
    assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written(images, tmp_path, monkeypatch):
    """A data set in a read-only place is used without a cache."""

    def refuse(*_):
        raise PermissionError(13, "Read-only file system")

    monkeypatch.setattr(latents, "save_state", refuse)
    mean, _ = latents.encode(Counting(), images, np.array([[0, 0]]), tmp_path, CPU)
    assert mean[0, 0].isfinite().all()
    assert latent_files(tmp_path) == []


@pytest.mark.parametrize("half", [0, 1])
def test_nan_is_an_error(images, tmp_path, half):
    """A VAE that gives NaN, in mean or log-variance, for one tile of several stops the run and names the tile; nothing
    is cached."""

    class Broken(Counting):
        def encode(self, pixels):
            moments = super().encode(pixels)
            moments[half][(pixels == to_pixels(images[1:2])).flatten(1).all(1)] = torch.nan
            return moments

    with pytest.raises(ValueError, match="NaN or infinity for tile number 1"):
        latents.encode(Broken(), images, np.array([[0, 0], [1, 0], [2, 0]]), tmp_path, CPU)
    assert latent_files(tmp_path) == []


# --- the posterior ---------------------------------------------------------------------------------------------------


def test_posterior_sample():
    """Samples have mean scale * mean and variance scale^2 exp(logvar), within 5 standard errors."""
    count, scale = 20_000, 0.18215
    mean, logvar = torch.tensor([-2.0, 0.0, 3.0]), torch.tensor([-3.0, 0.0, 1.5])
    noise = torch.randn(count, 3, generator=torch.Generator().manual_seed(0))
    drawn = posterior_sample(mean, logvar, noise, scale)
    std = scale * torch.exp(logvar / 2)
    assert ((drawn.mean(0) - scale * mean).abs() < 5 * std / count**0.5).all()
    assert ((drawn.std(0) / std - 1).abs() < 5 / (2 * count) ** 0.5).all()
    assert torch.equal(posterior_sample(mean, logvar, torch.zeros(3), scale), scale * mean)
    far = posterior_sample(torch.zeros(1), torch.tensor([20.0]), torch.ones(1), 1.0)
    assert far.item() == pytest.approx(np.exp(10), rel=1e-6)
