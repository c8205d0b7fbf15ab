"""Where the lesion is: a mask of the one lesion near the centre of a clinical tile, by colour difference to the skin around it.

Steps, all on a 64 x 64 copy in CIELAB (CIE 15:2004): black borders and drapes are set aside; hair is found by black-hat and
top-hat and painted over (DullRazor, Lee et al., Comput. Biol. Med. 1997;27:533, with scipy's morphology); the skin's slow
colour change is a quadratic surface fitted robustly; at two scales the most salient patch near the centre seeds a Fisher
discriminant (Fisher 1936) between lesion and surrounding skin; of its level sets the one is kept that stands out most from a
ring around it. No learning, no tuning to labels. Proven by tests/data/test_attributes.py against phantoms whose mask is known.
"""
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

FIELD_MM = 15.0  # an ISIC 2024 tile shows 15 mm x 15 mm whatever its pixel count
SIDE, HALF = 128, 64
PX_MM = FIELD_MM / HALF
LEVELS = (0.35, 0.42, 0.5, 0.6, 0.7)

_CODE = np.arange(256) / 255
_LINEAR = np.where(_CODE <= 0.04045, _CODE / 12.92, ((_CODE + 0.055) / 1.055) ** 2.4).astype(np.float32)
_TO_XYZ = (np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
                     [0.0193339, 0.1191920, 0.9503041]]) / [[0.95047], [1.0], [1.08883]]).T.astype(np.float32)
_Y, _X = ((np.mgrid[:HALF, :HALF] - (HALF - 1) / 2) * PX_MM).astype(np.float32)
_RADIUS = np.hypot(_X, _Y)                     # mm from the centre
_PRIOR = np.exp(-(_RADIUS / 3) ** 2 / 2)       # tiles are cut around the lesion
_U, _V = _X / FIELD_MM * 2, _Y / FIELD_MM * 2
_BASIS = np.stack([np.ones_like(_U), _U, _V, _U * _V, _U * _U, _V * _V], -1)


@dataclass
class Segment:
    """A tile taken apart, all at 64 x 64 except where it says 128."""
    mask: np.ndarray        # bool: the lesion, holes filled
    field: np.ndarray       # float: 0 = skin, 1 = the lesion's median
    level: float            # the level set of `field` that is the border
    score: float            # how far it stands out: contrast over the spread of the skin around
    lab: np.ndarray         # float [128,128,3]: CIELAB of the raw pixels
    clean: np.ndarray       # float [128,128,3]: the same with hair painted over
    hair: np.ndarray        # bool [128,128]
    outside: np.ndarray     # bool [128,128]: no skin


def rgb_to_lab(image_u8: np.ndarray) -> np.ndarray:
    """uint8 sRGB [...,3] -> float32 CIELAB (D65, 2 degrees)."""
    xyz = _LINEAR[image_u8] @ _TO_XYZ
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), xyz * (24389 / 27 / 116) + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


def segment(image_u8: np.ndarray) -> Segment:
    """Take a square uint8 RGB tile of any size apart. A tile without a visible lesion gives a low `score`, or an empty mask."""
    if image_u8.ndim != 3 or image_u8.shape[2] != 3 or image_u8.dtype != np.uint8:
        raise ValueError(f"a tile is uint8 RGB [H, W, 3], got {image_u8.dtype} {list(image_u8.shape)}")
    if image_u8.shape[:2] != (SIDE, SIDE):
        image_u8 = np.asarray(Image.fromarray(image_u8).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    lab = rgb_to_lab(image_u8)
    outside = _outside(lab)
    hair = _hair(lab[..., 0]) & ~outside
    clean = _fill(lab, outside | hair)
    half, ok = _halve(clean), _halve(~outside)[..., 0] > 0.99
    delta = half - _background(half, ok)
    best = 0.0, np.zeros((HALF, HALF), bool), np.zeros((HALF, HALF), np.float32), 0.5
    for sigma in (0.8, 2.0):
        smooth = ndimage.gaussian_filter(delta, (sigma, sigma, 0), truncate=3)
        weighted = _saliency(smooth, ok) * (0.1 + _PRIOR)
        mask = _component(weighted > 0.6 * weighted.max(), weighted)
        for _ in range(3):
            field = _discriminant(mask, smooth, ok)
            found = field is not None and _best_level(field, ok)
            if not found:
                break
            mask = found[1]
            best = max(best, found, key=lambda candidate: candidate[0])
    score, mask, field, level = best
    return Segment(mask, field, level, score, lab, clean, hair, outside)


def _outside(lab: np.ndarray) -> np.ndarray:
    """Pixels that are no skin: black borders and blue drapes that reach the tile's edge, grown by 3 pixels."""
    labels, count = ndimage.label((lab[..., 0] < 8) | (lab[..., 2] < -12))
    if not count:
        return labels > 0
    edge = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    area = np.bincount(labels.ravel())
    keep = np.isin(labels, [i for i in edge if i and area[i] > 60])
    return ndimage.binary_dilation(keep, iterations=3) if keep.any() else keep


def _hair(light: np.ndarray) -> np.ndarray:
    """Dark and bright lines at most 6 px (0.7 mm) wide and over 18 px long, grown by one pixel."""
    out = np.zeros(light.shape, bool)
    for hat in (ndimage.grey_closing(light, 7) - light, light - ndimage.grey_opening(light, 7)):
        labels, _ = ndimage.label(hat > max(6.0, 3 * np.median(hat)), np.ones((3, 3)))
        area = np.bincount(labels.ravel())
        for i, box in enumerate(ndimage.find_objects(labels), 1):
            length = np.hypot(box[0].stop - box[0].start, box[1].stop - box[1].start)
            if length > 18 and area[i] < 6 * length:
                out[box] |= labels[box] == i
    return ndimage.binary_dilation(out)


def _fill(lab: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Hidden pixels replaced by a blur of the others (normalised convolution)."""
    if not hidden.any():
        return lab
    weight = (~hidden).astype(np.float32)[..., None]
    blurred = ndimage.gaussian_filter(lab * weight, (3, 3, 0), truncate=2.5)
    blurred /= ndimage.gaussian_filter(weight, (3, 3, 0), truncate=2.5) + 1e-4
    return np.where(hidden[..., None], blurred, lab)


def _halve(field: np.ndarray) -> np.ndarray:
    return field.reshape(HALF, 2, HALF, 2, -1).mean((1, 3))


def _background(half: np.ndarray, ok: np.ndarray) -> np.ndarray:
    """Skin colour as a quadratic surface, fitted to the rim more than to the centre, with pixels unlike skin dropped."""
    basis, color = _BASIS[::2, ::2].reshape(-1, 6), half[::2, ::2].reshape(-1, 3)
    trust = ok[::2, ::2].ravel() * (0.15 + np.clip(_RADIUS[::2, ::2].ravel() / 5, 0, 1))
    if not trust.any():
        return np.zeros_like(half)
    ridge, weight = np.diag([1e-6, 1e-3, 1e-3, 0.03, 0.03, 0.03]), trust
    for _ in range(5):
        weighted = basis * weight[:, None]
        coefficients = np.linalg.solve(basis.T @ weighted + ridge * weight.sum(), weighted.T @ color)
        residual = color - basis @ coefficients
        spread = 1.4826 * np.median(np.abs(residual[trust > 0]), 0) + 0.5
        weight = trust * np.exp(-((residual / spread) ** 2).sum(1) / 9)
    return _BASIS @ coefficients


def _saliency(smooth: np.ndarray, ok: np.ndarray) -> np.ndarray:
    """Colour difference to the skin in units of its own spread; brighter (gloss) and greener count less."""
    sample = smooth[ok & (_RADIUS > 3)]
    if not len(sample):
        return np.zeros(smooth.shape[:2])
    spread = 1.4826 * np.median(np.abs(sample - np.median(sample, 0)), 0) + 0.7
    signed = smooth / spread
    signed[..., 0] *= np.where(signed[..., 0] > 0, 0.35, 1)
    signed[..., 1] *= np.where(signed[..., 1] < 0, 0.6, 1)
    return np.sqrt((signed ** 2).sum(-1)) * ok


def _component(mask: np.ndarray, score: np.ndarray) -> np.ndarray:
    """The connected part with the largest sum of `score`."""
    labels, count = ndimage.label(mask)
    if count < 2:
        return mask
    total = np.bincount(labels.ravel(), score.ravel(), count + 1)
    total[0] = -np.inf
    return labels == int(np.argmax(total))


def _grow(mask: np.ndarray, times: int) -> np.ndarray:
    """Dilation by a 4-neighbour cross, `times` times (faster on 64 x 64 than scipy's)."""
    out = mask.copy()
    for _ in range(times):
        last = out.copy()
        out[1:] |= last[:-1]
        out[:-1] |= last[1:]
        out[:, 1:] |= last[:, :-1]
        out[:, :-1] |= last[:, 1:]
    return out


def _discriminant(mask: np.ndarray, smooth: np.ndarray, ok: np.ndarray) -> np.ndarray | None:
    """Projection on Fisher's direction, cov^-1 (lesion - skin), scaled to 0 on the skin around and 1 at the lesion's median."""
    core, gap = mask & ok, _grow(mask, 2)
    ring = _grow(gap, 9) & ~gap & ok
    if core.sum() < 3 or ring.sum() < 30:
        return None
    inside, around = smooth[core], smooth[ring]
    base = np.median(around, 0)
    field = (smooth - base) @ np.linalg.solve(np.cov(around.T) + np.eye(3), inside.mean(0) - base)
    middle = np.median(field[core])
    return field / middle if middle > 0 else None


def _best_level(field: np.ndarray, ok: np.ndarray) -> tuple | None:
    """(score, mask, field, level) of the level set that stands out most: contrast to a ring 0.2-0.9 mm outside over the ring's
    spread, times mild preferences for large, compact, central, and not cut by the tile's edge."""
    best, weight = None, np.maximum(field, 0) * (0.02 + _PRIOR)
    for level in LEVELS:
        mask = _component((field > level) & ok, weight)
        mask = ndimage.binary_opening(mask)
        mask = ndimage.binary_fill_holes(_component(mask, 0.01 + _PRIOR))
        ring = _grow(mask, 4) & ~_grow(mask, 1) & ok
        area = mask.sum()
        if area < 8 or ring.sum() < 12:
            continue
        around = field[ring]
        perimeter = (mask[1:] != mask[:-1]).sum() + (mask[:, 1:] != mask[:, :-1]).sum()
        cut = mask[0].sum() + mask[-1].sum() + mask[:, 0].sum() + mask[:, -1].sum()
        score = (field[mask].mean() - around.mean()) / np.sqrt(around.var() + 0.03)
        score *= area ** 0.15 * (16 * area / perimeter ** 2) ** 0.3
        score *= (0.1 + _PRIOR[mask].mean()) ** 0.5 / (1 + cut / np.sqrt(area))
        if best is None or score > best[0]:
            best = float(score), mask, field, level
    return best
