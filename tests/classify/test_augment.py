"""lesion.classify.augment: exact dihedral views, affine and colour matrices against torchvision, keyed randomness."""
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF

from lesion.classify import augment
from lesion.run.devices import generator


def pixels(count=8, side=24):
    return torch.rand(count, 3, side, side, generator=generator(1)) * 255


def resample(images, matrix):
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)


def test_dihedral_views_are_eight_and_exact():
    """The eight views of an asymmetric tile are all different, hold the same pixels, and view 0 is the tile itself."""
    tile = pixels(1).repeat(8, 1, 1, 1)
    views = augment.dihedral(tile, torch.arange(8))
    assert torch.equal(views[0], tile[0])
    assert torch.equal(views[1], torch.rot90(tile[1], 1, (1, 2)))
    assert torch.equal(views[4], tile[4].flip(2))
    assert len({tuple(view.flatten().tolist()) for view in views}) == 8
    assert all(torch.equal(view.flatten().sort().values, tile[0].flatten().sort().values) for view in views)


def test_affine_matrix_without_spread_is_the_dihedral_view():
    """With no angle, scale, shift or shear the resampling gives the exact views (to interpolation's rounding)."""
    tile, view = pixels(), torch.arange(8)
    assert torch.allclose(resample(tile, augment.affine_matrix(view, torch.zeros(8, 5))), augment.dihedral(tile, view),
                          atol=0.01)


@pytest.mark.parametrize(("spread", "angle", "scale", "shift"), [
    ([1, 0, 0, 0, 0], augment.ANGLE, 1, 0), ([0, 1, 0, 0, 0], 0, 1 + augment.SCALE, 0),
    ([0, 0, -1, 0, 0], 0, 1, augment.SHIFT), ([-0.5, -0.5, 0, 0, 0], -augment.ANGLE / 2, 1 - augment.SCALE / 2, 0)])
def test_affine_equals_torchvision(spread, angle, scale, shift):
    """Angle, scale and shift have the documented sizes: torchvision's affine of the same tile, inside the border."""
    tile = F.interpolate(pixels(1, 6), size=40, mode="bicubic")  # smooth, so that the two interpolations agree
    ours = resample(tile, augment.affine_matrix(torch.tensor([0]), torch.tensor([spread], dtype=torch.float32)))
    theirs = TF.affine(tile, angle=-angle, translate=[shift * 40, 0], scale=scale, shear=[0.0, 0.0],
                       interpolation=TF.InterpolationMode.BILINEAR)
    assert (ours - theirs)[..., 10:30, 10:30].abs().max() < 3
    assert (theirs - tile)[..., 10:30, 10:30].abs().max() > 10


def test_jitter_equals_torchvision_where_it_is_linear():
    """Brightness, contrast, saturation are torchvision's (unclipped); hue keeps grey and is undone by its opposite."""
    tile = pixels(1) / 4 + 90  # the middle of the range, where torchvision does not clip
    mean, std = (torch.tensor(v)[:, None, None] * 255 for v in (augment.MEAN, augment.STD))
    theirs = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation
    for place, amount in enumerate((augment.BRIGHTNESS, augment.CONTRAST, augment.SATURATION)):
        spread = torch.zeros(1, 4)
        spread[0, place] = 1.0
        ours = augment.jitter(tile, spread) * std + mean
        # torchvision's grey has three digits less and BT.601 luma: .2989, .587, .114
        assert (ours / 255 - theirs[place](tile / 255, 1 + amount)).abs().max() < 2e-3
    grey = torch.full((1, 3, 4, 4), 120.0)
    assert torch.allclose(augment.jitter(grey, torch.tensor([[0.0, 0, 0, 1]])) * std + mean, grey, atol=0.01)
    turned = augment.jitter(tile, torch.tensor([[0.0, 0, 0, 1]])) * std + mean
    assert (turned - tile).abs().max() > 2
    assert torch.allclose(augment.jitter(turned, torch.tensor([[0.0, 0, 0, -1]])) * std + mean, tile, atol=0.01)


@pytest.mark.parametrize("name", augment.NAMES)
def test_keyed_and_normalised(name):
    """The same generator gives the same batch, another one another (but for `none`); normalised, channels-last."""
    images = torch.randint(0, 256, (16, 16, 16, 3), dtype=torch.uint8, generator=generator(2))
    first, again, other = (augment.augment(images, name, generator(key)) for key in (3, 3, 4))
    assert first.shape == (16, 3, 16, 16)
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (name == "none")
    expected = (images[0, 0, 0].float() / 255 - torch.tensor(augment.MEAN)) / torch.tensor(augment.STD)
    assert torch.allclose(augment.normalise(images)[0, :, 0, 0], expected, atol=1e-5)


def test_all_views_are_equally_likely():
    """Over many draws each of the eight views comes an eighth of the time."""
    tile = torch.arange(16 * 16 * 3, dtype=torch.uint8).reshape(1, 16, 16, 3).repeat(4000, 1, 1, 1)
    seen = augment.augment(tile, "dihedral", generator(5))[:, 0].flatten(1)
    _, counts = torch.unique(seen, dim=0, return_counts=True)
    assert len(counts) == 8
    assert counts.min() > 500 - 4 * math.sqrt(500)


def test_constants_of_imagenet():
    """Mean and deviation that torchvision's weights expect: those of its own presets."""
    from torchvision.transforms._presets import ImageClassification
    preset = ImageClassification(crop_size=224)
    assert (list(augment.MEAN), list(augment.STD)) == (preset.mean, preset.std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    grey = augment.normalise(torch.full((1, 2, 2, 3), 128, dtype=torch.uint8))[0, :, 0, 0]
    assert grey.tolist() == pytest.approx([(128 / 255 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (128 / 255 - 0.406) / 0.225], abs=1e-5)


def test_shear_is_five_degrees():
    """The largest shear by hand: [[1, tan 5 degrees], [0, 1]]; nothing else moves."""
    found = augment.affine_matrix(torch.tensor([0]), torch.tensor([[0.0, 0, 0, 0, 1]]))[0]
    assert torch.allclose(found, torch.tensor([[1.0, math.tan(math.radians(5)), 0], [0, 1, 0]]), atol=1e-6)


def test_hue_turns_the_chroma_by_its_share_of_a_circle():
    """Hue at its largest turns the chroma plane of YIQ by .03 of a circle, whatever the colour."""
    tile = pixels(1)
    mean, std = (torch.tensor(v)[:, None, None] * 255 for v in (augment.MEAN, augment.STD))
    turned = augment.jitter(tile, torch.tensor([[0.0, 0, 0, 1]])) * std + mean
    before, after = (torch.tensor(augment.TO_YIQ) @ image[0].flatten(1) for image in (tile, turned))
    angle = torch.atan2(after[2], after[1]) - torch.atan2(before[2], before[1])
    assert torch.allclose(torch.remainder(angle, 2 * math.pi), torch.tensor(0.03 * 2 * math.pi), atol=1e-2)


def test_what_traditional_draws(monkeypatch):
    """All eight views; nine numbers a tile, of both signs and each for itself; a white tile has no black corner."""
    seen, matrix, jitter = {}, augment.affine_matrix, augment.jitter
    monkeypatch.setattr(augment, "affine_matrix", lambda view, spread: seen.update(view=view, affine=spread) or matrix(view, spread))
    monkeypatch.setattr(augment, "jitter", lambda tiles, spread: seen.update(tiles=tiles, colour=spread) or jitter(tiles, spread))
    augment.augment(torch.full((1600, 8, 8, 3), 255, dtype=torch.uint8), "traditional", generator(6))
    assert torch.bincount(seen["view"], minlength=8).min() > 140
    spread = torch.cat([seen["affine"], seen["colour"]], 1)
    assert spread.shape == (1600, 9)
    assert spread.mean(0).abs().max() < 0.06
    assert torch.corrcoef(spread.T).fill_diagonal_(0).abs().max() < 0.12
    assert seen["tiles"].min() > 254
