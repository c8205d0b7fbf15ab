"""Colour normalisation: published vectors, no wrap-around, and a reference variant that leaves skin tone in order."""
import zipfile

import numpy as np
import pytest
from scipy.stats import spearmanr
from skimage.color import rgb2lab

from lesion.tiles import colour, decode, srgb

VECTOR = np.array([[[200, 150, 100], [180, 140, 90]], [[60, 40, 30], [220, 170, 130]]], np.uint8)
MONK = ["f6ede4", "f3e7db", "f7ead0", "eadaba", "d7bd96", "a07e56", "825c43", "604134", "3a312a", "292420"]
REFERENCE = {"mean": [0.62, -0.39], "direction": [0.695, -0.719]}  # near that of the ISIC 2024 tiles


@pytest.mark.parametrize(("p", "gains"), [
    (1, (0.786372, 1.038011, 1.482873)), (6, (0.795682, 1.037342, 1.426831)), (np.inf, (0.805457, 1.042356, 1.363080))])
def test_gains_equal_the_published_vector(p, gains):
    """Grey world, Shades of Gray and max-RGB gains of a 2x2 tile, to 1e-6."""
    assert colour.minkowski_gains(VECTOR, p) == pytest.approx(gains, abs=1e-6)


def test_the_first_pixel_of_the_vector():
    """p = 6: 159.136483 155.601240 142.683133 before rounding, and rounded by `normalise`."""
    first = VECTOR[0, 0] * colour.minkowski_gains(VECTOR, 6)
    assert first == pytest.approx((159.136483, 155.601240, 142.683133), abs=1e-6)
    assert colour.normalise(VECTOR, "shades-of-gray")[0, 0].tolist() == [159, 156, 143]


@pytest.mark.parametrize("p", [1, 2, 6, 40, np.inf])
def test_a_constant_colour_turns_grey(p):
    """(200, 150, 100) everywhere gives 155.456318 in every channel for every p: why the family destroys skin tone."""
    flat = np.full((5, 5, 3), (200, 150, 100), np.uint8)
    assert flat[0, 0] * colour.minkowski_gains(flat, p) == pytest.approx(155.456318, abs=1e-6)


def test_values_over_255_are_clipped_not_wrapped():
    """A gain over 1 on a bright channel saturates; a plain cast would make 300 into 44."""
    tile = np.full((8, 8, 3), (250, 120, 60), np.uint8)
    tile[0, 0] = 255
    for name in colour.NAMES[1:4]:
        assert colour.normalise(tile, name)[0, 0].tolist()[1:] == [255, 255]
    assert colour.to_u8(np.array([-3.0, 300.0, 127.5, 128.5])).tolist() == [0, 255, 128, 128]


def test_black_tiles_and_black_channels_stay_as_they_are():
    """No division by zero: a tile without any blue keeps its values."""
    for value in ((0, 0, 0), (90, 40, 0)):
        tile = np.full((6, 6, 3), value, np.uint8)
        for name in colour.NAMES:
            assert np.isfinite(colour.normalise(tile, name, REFERENCE).astype(float)).all()
        assert colour.normalise(tile, "shades-of-gray").tolist() == tile.tolist()


def test_none_and_unknown():
    """none gives the tile itself; an unknown name or skin-locus without its reference is refused."""
    assert colour.normalise(VECTOR, "none") is VECTOR
    with pytest.raises(ValueError, match="'grey' is unknown: allowed are none, grey-world"):
        colour.normalise(VECTOR, "grey")
    with pytest.raises(ValueError, match="needs the data set's reference"):
        colour.normalise(VECTOR, "skin-locus")


# --- skin-locus ------------------------------------------------------------------------------------------------------

def skin_tile(colour_hex: str, side: int = 60, seed: int = 0) -> np.ndarray:
    """Skin of one colour with a brown spot in the middle and a little noise."""
    rng = np.random.default_rng(seed)
    base = np.array([int(colour_hex[i:i + 2], 16) for i in (0, 2, 4)], float)
    y, x = np.mgrid[:side, :side] / side - 0.5
    spot = np.exp(-(x ** 2 + y ** 2) / 0.01)[..., None]
    return (base * (1 - 0.6 * spot) + rng.normal(0, 1.5, (side, side, 3))).clip(0, 255).round().astype(np.uint8)


def lit(tile: np.ndarray, gains=(1, 1, 1), slope: float = 0.0) -> np.ndarray:
    """The tile under another light: von Kries gains and a left-to-right fall-off, in linear light."""
    side = tile.shape[1]
    fall = np.exp(slope * (np.arange(side) - (side - 1) / 2) / side)[None, :, None]
    return colour.to_u8(255 * srgb.encode(srgb.LINEAR[tile] * gains * fall))


def ita(tile: np.ndarray) -> float:
    lab = rgb2lab(srgb.encode(colour.skin_light(tile))[None, None])[0, 0]
    return np.degrees(np.arctan2(lab[0] - 50, lab[2]))


def test_srgb_round_trip():
    """`encode` undoes `LINEAR` for all 256 codes."""
    assert colour.to_u8(255 * srgb.encode(srgb.LINEAR)).tolist() == list(range(256))


def test_monk_skins_keep_their_order_and_the_grey_world_family_does_not_keep_their_tone():
    """Ten Monk swatches: under skin-locus ITA keeps its rank exactly and moves 8 degrees at most; under grey world the
    light and the tan ones all end above 55 degrees (the trap of evaluation: 60/32/2 become 90/90/72)."""
    skins = [skin_tile(code, seed=k) for k, code in enumerate(MONK)]
    raw = [ita(tile) for tile in skins]
    kept = [ita(colour.normalise(tile, "skin-locus", REFERENCE)) for tile in skins]
    assert spearmanr(raw, kept).statistic == pytest.approx(1)
    assert np.abs(np.subtract(raw, kept)).max() < 8
    grey = [ita(colour.normalise(tile, "grey-world")) for tile in skins[:6]]
    assert min(grey) > 55 > min(raw[:6])


def test_skin_locus_takes_a_magenta_cast_back():
    """A light off the skin line (magenta or green) is undone to a fifth; the lesion follows its skin."""
    tile = skin_tile("c69a7e")
    clean = colour.normalise(tile, "skin-locus", REFERENCE).astype(float)
    for gains in ((1.1, 0.95, 1.1), (0.93, 1.04, 0.93)):
        cast = lit(tile, gains)
        error = np.abs(colour.normalise(cast, "skin-locus", REFERENCE) - clean).mean()
        assert error < 0.2 * np.abs(cast - tile.astype(float)).mean()


def test_skin_locus_levels_shading():
    """A fall-off of 40 % across the tile is gone to within 3 %; a tile without one stays as it is."""
    tile = skin_tile("c69a7e")
    levelled = colour.normalise(lit(tile, slope=0.5), "skin-locus", REFERENCE).astype(float)
    left, right = levelled[:, :8].mean(), levelled[:, -8:].mean()
    assert abs(left / right - 1) < 0.03
    assert colour.shading_gain(tile) == pytest.approx(1, abs=0.02)


def test_skin_locus_keeps_place_along_the_line_and_luminance():
    """A shift along the line and a change of exposure are skin's or the camera's own: both survive within 3 %."""
    tile = skin_tile("c69a7e")
    before = colour.skin_light(colour.normalise(tile, "skin-locus", REFERENCE))
    along = np.exp(0.15 * np.array([REFERENCE["direction"][0], 0, REFERENCE["direction"][1]]))
    for gains in (along, (0.7, 0.7, 0.7)):
        after = colour.skin_light(colour.normalise(lit(tile, gains), "skin-locus", REFERENCE))
        assert after / before == pytest.approx(np.array(gains), rel=0.03)


def test_inflamed_skin_stays_red():
    """Far off the line the correction is capped: of a distance of 0.5, CAST_LIMIT is taken off and the rest stays."""
    tile = lit(skin_tile("c69a7e"), (1.25, 0.75, 1.05))
    distances = []
    for image in (tile, colour.normalise(tile, "skin-locus", REFERENCE)):
        excess = colour.chromaticity(colour.skin_light(image)) - REFERENCE["mean"]
        distances.append(abs(excess @ (-REFERENCE["direction"][1], REFERENCE["direction"][0])))
    assert distances[0] > 0.4
    assert distances[1] == pytest.approx(distances[0] - colour.CAST_LIMIT, abs=0.03)


def test_the_reference_is_the_first_principal_axis():
    """Skins drawn on a known line give that line back, pointing to brown; rounding makes it the same in every run."""
    rng, images = np.random.default_rng(0), []
    for place in rng.normal(0, 0.2, 40):
        chroma = np.array([0.6, -0.4]) + place * np.array([0.6, -0.8])
        rgb = 0.3 * np.exp([chroma[0], 0, chroma[1]])
        images.append(np.broadcast_to(colour.to_u8(255 * srgb.encode(rgb)), (12, 12, 3)))
    found = colour.skin_reference(images)
    assert found["mean"] == pytest.approx([0.6, -0.4], abs=0.05)
    assert found["direction"] == pytest.approx([0.6, -0.8], abs=0.02)
    assert found == colour.skin_reference(images)


def test_skin_tone_order_on_real_tiles(shared):
    """On 150 real tiles skin-locus keeps the order of ITA (Spearman at least 0.98); grey world does not (under 0.7)."""
    with zipfile.ZipFile(shared / "isic2024" / "ISIC_2024_Permissive_Training_Input.zip") as archive:
        images = [decode.tile(archive.read(name), 64) for name in archive.namelist()[::60]]
    reference = colour.skin_reference(images)
    raw = [ita(image) for image in images]
    kept = [ita(colour.normalise(image, "skin-locus", reference)) for image in images]
    grey = [ita(colour.normalise(image, "grey-world")) for image in images]
    assert spearmanr(raw, kept).statistic > 0.98
    assert spearmanr(raw, grey).statistic < 0.7
