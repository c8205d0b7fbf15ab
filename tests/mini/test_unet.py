"""The U-Net stage: which tiles a step sees, and that rare words come more often only where asked."""
from types import SimpleNamespace

import numpy as np

from lesion.mini import loop, unet


def rows():
    """90 light brown tiles on light skin, 9 black ones, 1 on dark skin."""
    return [{"attributes": {"skin_tone": "light", "color": "light brown", "other_colors": []}}] * 90 \
        + [{"attributes": {"skin_tone": "light", "color": "black", "other_colors": ["light brown"]}}] * 9 \
        + [{"attributes": {"skin_tone": "dark", "color": "light brown"}}]


def test_rare_weights():
    """(1 / frequency of the rarest word) ** power, at most ten times the smallest: 91 of 100, 9 of 100, 1 of 100."""
    weights = loop.rare_weights(rows(), 0.5)
    smallest = (100 / 100) ** 0.5  # "light brown" is in every caption but stands beside skin_tone light, 99 of 100
    assert weights[0] >= smallest
    assert weights[95] / weights[0] == np.sqrt(100 / 9) / weights[0]
    assert weights[99] / weights[0] == min(10, np.sqrt(100) / weights[0])
    assert len(set(loop.rare_weights(rows(), 0.0))) == 1


def test_schedule_of_tiles():
    """Power 0: every tile once an epoch. Power .5: the dark tile about ten times as often as its share; a longer plan begins with
    the shorter one."""
    recipe = SimpleNamespace(steps=50, batch_size=20, seed=0, rare_power=0.0)
    tile, views = unet.schedule_of_tiles(rows(), recipe)
    assert np.bincount(tile.ravel(), minlength=100).tolist() == [10] * 100
    assert set(views.ravel()) == set(unet.VIEWS)
    recipe.rare_power = 0.5
    rare, _ = unet.schedule_of_tiles(rows(), recipe)
    assert (rare == 99).mean() > 0.05
    recipe.steps = 80
    assert np.array_equal(unet.schedule_of_tiles(rows(), recipe)[0][:50], rare)


def test_the_most_frequent_pair_is_merged_next():
    """Byte pair encoding by hand: `l o` stands in three words, four pairs in two; of equals the last in the alphabet."""
    assert unet.byte_pairs(["low", "low", "lower", "newer"])[:4] == [("l", "o"), ("w", "e"), ("we", "r</w>"), ("lo", "w</w>")]


def test_tiles_without_attributes():
    """Captions nobody measured: all tiles weigh the same."""
    assert set(loop.rare_weights([{"attributes": None}, {}], 1.0)) == {1.0}
