"""The eight symmetries of the square: a group of eight, with one meaning for numpy and torch and for every user of
them."""
import numpy as np
import pytest
import torch

from lesion.classify import augment
from lesion.stats import memorisation
from lesion.tiles.views import VIEWS, dihedral

TILE = np.random.default_rng(0).integers(0, 256, (1, 6, 6, 3), dtype=np.uint8)


def test_the_eight_are_a_group():
    """Eight different pictures of the same pixels; view 0 is the tile; any view of a view is one of the eight."""
    square = TILE[0, :, :, 0]
    seen = [dihedral(square, view).tobytes() for view in range(VIEWS)]
    assert len(set(seen)) == VIEWS == 8
    assert (dihedral(square, 0) == square).all()
    assert {dihedral(dihedral(square, a), b).tobytes() for a in range(8) for b in range(8)} == set(seen)


@pytest.mark.parametrize("view", range(8))
def test_every_user_means_the_same_view(view):
    """numpy, torch, the classifier's augmentation and the search for copies give the same picture for the same number:
    quarter turns counter-clockwise, then a mirror left to right."""
    expected = np.rot90(TILE[0], view % 4)
    expected = expected[:, ::-1] if view >= 4 else expected
    pixels = torch.from_numpy(TILE).permute(0, 3, 1, 2)
    assert (dihedral(TILE, view, (1, 2))[0] == expected).all()
    assert (dihedral(pixels, view)[0].permute(1, 2, 0).numpy() == expected).all()
    assert (augment.dihedral(pixels, torch.tensor([view]))[0].permute(1, 2, 0).numpy() == expected).all()
    assert (memorisation.views(TILE)[view][0] == expected).all()
