"""Colour normalisation of tiles: one recorded choice per prepared data set, the same for real, synthetic, test tiles.

Grey world, Shades of Gray (Finlayson & Trezzi, Color and Imaging Conference 2004) and max-RGB are one family (van de
Weijer, Gevers & Gijsenij, IEEE TIP 2007, equation 6 without derivatives): the light is the Minkowski mean of the tile,

    e_c = (mean over pixels of x_c ** p) ** (1 / p),        gain_c = |e| / (sqrt(3) e_c),

p = 1 grey world, p = 6 Shades of Gray, p = infinity max-RGB; a neutral light gives gain 1. A tile is mostly skin, which
the family takes for the light: skin turns grey, and its tone is lost.

`skin-locus` is this project's reference variant: it corrects what cannot be skin tone and keeps the rest.
1. Shading: a robust plane through log luminance over the tile (a body curves away from the lamp) is divided out.
2. Colour cast: the skin around the lesion, as (log R/G, log B/G) of linear light, is compared with the line on which
   the data set's skins lie (first principal axis: the way from pale to brown). Its distance from that line, up to
   CAST_LIMIT, is taken for the light's and removed by von Kries gains; its place along it, and its luminance, are kept.
A tile's general redness lies off that line too: what exceeds the limit (inflamed skin) stays, a slight flush is lost;
redness against the skin around it is kept.
Proven by tests/tiles/test_colour.py; why the default is none: docs/RESULTS.md.
"""
import numpy as np

from lesion.tiles.srgb import LINEAR, encode

NAMES = ("none", "grey-world", "shades-of-gray", "max-rgb", "skin-locus")
MINKOWSKI = {"grey-world": 1.0, "shades-of-gray": 6.0, "max-rgb": np.inf}
LUMINANCE = np.array([0.2126, 0.7152, 0.0722])  # of linear sRGB, BT.709
RING = 1 / 3  # skin is looked for further from the centre than this fraction of the side: outside 10 of 15 mm
CAST_LIMIT = 0.25  # log units; two standard deviations of the ISIC 2024 tiles' distances from the line
GAIN_LIMITS = 0.5, 2.0


def normalise(image: np.ndarray, name: str, reference: dict | None = None) -> np.ndarray:
    """`image` [S,S,3] uint8 RGB under the named normalisation, uint8. `reference`: `skin_reference`'s, for skin-locus.

    Raises ValueError on an unknown name, and for skin-locus without its reference.
    """
    if name == "none":
        return image
    if name == "skin-locus":
        if not reference:
            raise ValueError("colour normalisation skin-locus needs the data set's reference: run prepare again")
        return skin_locus(image, reference)
    return to_u8(image * minkowski_gains(image, MINKOWSKI[check(name)]))


def check(name: str) -> str:
    """`name` if it is a normalisation; ValueError otherwise."""
    if name not in NAMES:
        raise ValueError(f"colour normalisation {name!r} is unknown: allowed are {', '.join(NAMES)}")
    return name


def check_reference(reference: object, place: str) -> None:
    """ValueError, naming `place`, for what is no line of `skin_reference`."""
    try:
        numbers = np.array([[float(v) for v in reference[name]] for name in ("mean", "direction")])
        whole = numbers.shape == (2, 2) and np.isfinite(numbers).all() and all(
            type(v) in (int, float) for name in ("mean", "direction") for v in reference[name])  # not "1_0", which float() reads
    except (TypeError, ValueError, KeyError, OverflowError):
        whole = False
    if not whole:
        raise ValueError(f"{place}: color_norm_reference {reference!r} is not two numbers each of mean and direction: "
                         f"run prepare again")


def minkowski_gains(image: np.ndarray, p: float) -> np.ndarray:
    """Gains [3] (float64) of the light of `image` [H,W,3] (0..255), by the Minkowski mean of order p >= 1.

    float64 throughout: 255 ** 6 overflows half precision. A tile with an all-black channel gets gains 1.
    """
    pixels = image.reshape(-1, 3).astype(np.float64) / 255.0
    light = pixels.max(0) if np.isinf(p) else (pixels ** p).mean(0) ** (1.0 / p)
    if (light == 0).any():
        return np.ones(3)
    return np.linalg.norm(light) / (np.sqrt(3.0) * light)


def to_u8(values: np.ndarray) -> np.ndarray:
    """Round, clip to 0..255, then cast: a cast alone wraps 256 round to 0."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


# --- skin-locus ------------------------------------------------------------------------------------------------------

def skin_light(image: np.ndarray) -> np.ndarray:
    """Median linear RGB [3] of the skin around the lesion of `image` [S,S,3] uint8; every channel at least 1e-3."""
    side = image.shape[0]
    middle = np.arange(side) - (side - 1) / 2
    ring = np.hypot(*np.meshgrid(middle, middle)) > RING * side
    return np.maximum(np.median(LINEAR[image[ring]], axis=0), 1e-3)


def chromaticity(linear: np.ndarray) -> np.ndarray:
    """(log R/G, log B/G) [..., 2] of linear RGB [..., 3]."""
    logs = np.log(linear)
    return logs[..., [0, 2]] - logs[..., 1:2]


def skin_reference(images: list[np.ndarray]) -> dict:
    """The line on which the skins of `images` (training tiles only) lie: {"mean": [2], "direction": [2]}, unit length,
    pointing towards brown (log B/G falls)."""
    skins = np.stack([chromaticity(skin_light(image)) for image in images])
    mean = skins.mean(0)
    direction = np.linalg.svd(skins - mean, full_matrices=False)[2][0]
    direction = -direction if direction[1] > 0 else direction
    return {"mean": [round(float(v), 6) for v in mean], "direction": [round(float(v), 6) for v in direction]}


def skin_locus(image: np.ndarray, reference: dict) -> np.ndarray:
    """`image` [S,S,3] uint8 without shading and without the part of its cast that is off the skin line, uint8."""
    mean, direction = np.array(reference["mean"]), np.array(reference["direction"])
    skin = skin_light(image)
    excess = chromaticity(skin) - mean
    cast = excess - (excess @ direction) * direction
    cast *= min(1.0, CAST_LIMIT / max(np.linalg.norm(cast), 1e-9))
    gains = np.exp([-cast[0], 0.0, -cast[1]])
    gains = np.clip(gains * (LUMINANCE @ skin) / (LUMINANCE @ (gains * skin)), *GAIN_LIMITS)
    return to_u8(255 * encode(LINEAR[image] * gains * shading_gain(image)[..., None]))


def shading_gain(image: np.ndarray) -> np.ndarray:
    """[S,S] factors that level the plane in log luminance under `image`; their log has mean 0.

    Least squares on block means, three times, each time without what is over 2 deviations off: the lesion, hair.
    """
    side = image.shape[0]
    step = max(1, side // 32)
    size = side // step
    blocks = LINEAR[image[:size * step, :size * step]] @ LUMINANCE
    logs = np.log(np.maximum(blocks.reshape(size, step, size, step).mean((1, 3)), 1e-3)).ravel()
    middle = (np.arange(size) - (size - 1) / 2) / size
    x, y = (axis.ravel() for axis in np.meshgrid(middle, middle))
    plane, kept = np.stack([np.ones_like(x), x, y], axis=1), np.ones(len(logs), bool)
    for _ in range(3):
        fit = np.linalg.lstsq(plane[kept], logs[kept], rcond=None)[0]
        residual = np.abs(logs - plane @ fit)
        kept = residual <= 2 * 1.4826 * np.median(residual) + 1e-6
    full = (np.arange(side) - (side - 1) / 2) / side
    return np.clip(np.exp(-(fit[1] * full[None, :] + fit[2] * full[:, None])), *GAIN_LIMITS)
