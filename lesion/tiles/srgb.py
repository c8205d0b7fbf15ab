"""sRGB and CIELAB, once: the transfer curve (IEC 61966-2-1) and the way to L*a*b* (CIE 15) under D65, 2 degrees.

Written out and not scikit-image's: its matrix and white point are rounded to six digits, which moves L*a*b* by up to
0.005 and with it attributes at a class edge; these are Lindbloom's seven. Proven by tests/tiles/test_colour.py against
it.
"""
import numpy as np

_CODES = np.arange(256) / 255
LINEAR = np.where(_CODES <= 0.04045, _CODES / 12.92, ((_CODES + 0.055) / 1.055) ** 2.4).astype(np.float32)  # of a uint8
WHITE = [0.95047, 1.0, 1.08883]
_TO_XYZ = (np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
                     [0.0193339, 0.1191920, 0.9503041]]) / np.array(WHITE)[:, None]).T.astype(np.float32)
_FROM_XYZ = np.array([[3.2404542, -1.5371385, -0.4985314], [-0.9692660, 1.8760108, 0.0415560],
                      [0.0556434, -0.2040259, 1.0572252]]) * WHITE


def encode(linear: np.ndarray) -> np.ndarray:
    """Linear light (1 is white) to sRGB in 0..1, float; below 0 the curve's straight part goes on."""
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 0.0031308) ** (1 / 2.4) - 0.055)


def to_lab(image_u8: np.ndarray) -> np.ndarray:
    """uint8 sRGB [...,3] -> float32 CIELAB [...,3]."""
    xyz = LINEAR[image_u8] @ _TO_XYZ
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), xyz * (24389 / 27 / 116) + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


def lab_to_linear(lab: np.ndarray) -> np.ndarray:
    """CIELAB [...,3] -> linear sRGB [...,3], clipped to 0..1."""
    fy = (lab[..., 0] + 16) / 116
    f = np.stack([fy + lab[..., 1] / 500, fy, fy - lab[..., 2] / 200], -1)
    xyz = np.where(f > 6 / 29, f ** 3, (f - 16 / 116) * 3 * (6 / 29) ** 2)
    return np.clip(xyz @ _FROM_XYZ.T, 0, 1)
