"""Colour normalisation of tiles: one recorded choice per prepared data set, the same for real, synthetic and test tiles.

The grey-world family (van de Weijer, Gevers & Gijsenij 2007, equation 6 without derivatives; Shades of Gray is Finlayson &
Trezzi 2004) estimates the light's colour by the Minkowski mean of each channel,

    e_c = (mean over pixels of x_c ** p) ** (1 / p),        gain_c = |e| / (sqrt(3) e_c),

p = 1 grey world, p = 6 Shades of Gray, p = infinity max-RGB; a neutral light gives gain 1. A tile is mostly skin, which the
family takes for the light: it turns skin grey. Proven by tests/data/test_colour.py.
"""
import numpy as np

NAMES = ("none", "grey-world", "shades-of-gray", "max-rgb")
MINKOWSKI = {"grey-world": 1.0, "shades-of-gray": 6.0, "max-rgb": np.inf}


def minkowski_gains(image: np.ndarray, p: float) -> np.ndarray:
    """Gains [3] (float64) of the light of `image` [H,W,3] (0..255), by the Minkowski mean of order p >= 1.

    float64 throughout: 255 ** 6 overflows half precision. A channel that is black everywhere keeps its value (gain 1).
    """
    pixels = image.reshape(-1, 3).astype(np.float64) / 255.0
    light = pixels.max(0) if np.isinf(p) else (pixels ** p).mean(0) ** (1.0 / p)
    if (light == 0).any():
        return np.ones(3)
    return np.linalg.norm(light) / (np.sqrt(3.0) * light)


def to_u8(values: np.ndarray) -> np.ndarray:
    """Round, clip to 0..255, then cast: a cast alone wraps 256 round to 0."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def normalise(image: np.ndarray, name: str) -> np.ndarray:
    """`image` [H,W,3] uint8 RGB under the named normalisation, uint8. ValueError on an unknown name."""
    if name == "none":
        return image
    if name not in MINKOWSKI:
        raise ValueError(f"colour normalisation {name!r} is unknown: allowed are {', '.join(NAMES)}")
    return to_u8(image * minkowski_gains(image, MINKOWSKI[name]))
