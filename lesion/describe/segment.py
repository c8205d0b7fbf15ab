"""Where the lesion is: a mask of the one lesion near the centre of a clinical tile, by its colour difference to the skin around.

1. Black borders and drapes are set aside; hair is found by black-hat and top-hat and painted over (the idea of DullRazor,
   Lee et al., Comput. Biol. Med. 1997;27:533); the skin's slow colour change is a quadratic surface, fitted robustly.
2. At 64 x 64 and two scales, level sets of the colour difference to skin, and of its projection on Fisher's discriminant
   between lesion and skin (Fisher 1936), compete; the one that stands out most from a ring around it wins.
3. At 128 x 128 the border is put where the colour is half way between the skin and the lesion next to it.

No learning, and nothing tuned to labels. Proven by tests/describe/test_attributes.py on phantoms whose mask is known.
"""
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from lesion.tiles.srgb import to_lab

FIELD_MM = 15.0  # an ISIC 2024 tile shows 15 mm x 15 mm whatever its pixel count
SIDE, HALF = 128, 64
MM = FIELD_MM / SIDE


def _grid(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Distance from the centre in mm, and the six terms of a quadratic surface, at side x side pixels."""
    y, x = ((np.mgrid[:side, :side] + 0.5) / side * 2 - 1).astype(np.float32)
    return np.hypot(x, y) * (FIELD_MM / 2), np.stack([np.ones_like(x), x, y, x * y, x * x, y * y], -1)


_RADIUS, _BASIS = _grid(HALF)
_BASIS_FULL = _grid(SIDE)[1]
_PRIOR = np.exp(-(_RADIUS / 3) ** 2 / 2)       # tiles are cut around the lesion


@dataclass
class Segment:
    """A tile taken apart; every array is 128 x 128."""
    mask: np.ndarray        # bool: the lesion, holes filled; all False where none was found
    field: np.ndarray       # float: the border is its 0.5 level
    profile: np.ndarray     # float: 0 = skin, 1 = the colour of the lesion near by
    delta: np.ndarray       # float [...,3]: CIELAB difference to the skin around, hair painted over
    score: float            # how far the lesion stands out: contrast over the spread of the skin around
    lab: np.ndarray         # float [...,3]: CIELAB of the raw pixels
    hair: np.ndarray        # bool
    outside: np.ndarray     # bool: no skin


def segment(image_u8: np.ndarray) -> Segment:
    """Take a square uint8 RGB tile of any size apart. A tile with no visible lesion gives a low `score` or an empty mask."""
    if image_u8.ndim != 3 or image_u8.shape[2] != 3 or image_u8.dtype != np.uint8:
        raise ValueError(f"a tile is uint8 RGB [H, W, 3], got {image_u8.dtype} {list(image_u8.shape)}")
    if image_u8.shape[:2] != (SIDE, SIDE):
        image_u8 = np.asarray(Image.fromarray(image_u8).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    lab = to_lab(image_u8)
    outside = _outside(lab)
    hair = _hair(lab[..., 0]) & ~outside
    clean = _fill(lab, outside | hair)
    half, ok = _halve(clean), _halve(~outside)[..., 0] > 0.99
    surface = _background(half, ok)
    delta = half - _BASIS @ surface
    score, mask = _best_patch(delta, ok)
    delta_full = clean - _BASIS_FULL @ surface
    mask, field, profile, delta_full = _border(mask, delta, delta_full, ok)
    return Segment(mask & ~outside, field, profile, delta_full, score, lab, hair, outside)


def _outside(lab: np.ndarray) -> np.ndarray:
    """Pixels that are no skin: black borders and blue drapes that reach the tile's edge, grown by 3 pixels."""
    labels, count = ndimage.label((lab[..., 0] < 8) | (lab[..., 2] < -12))
    if not count:
        return labels > 0
    edge = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    area = np.bincount(labels.ravel())
    keep = np.isin(labels, [i for i in edge if i and area[i] > 60])
    return _grow(keep, 3) if keep.any() else keep


def _hair(light: np.ndarray) -> np.ndarray:
    """Dark and bright lines at most 6 px (0.7 mm) wide and over 18 px long, grown by one pixel."""
    out = np.zeros(light.shape, bool)
    for hat in (ndimage.grey_closing(light, 7) - light, light - ndimage.grey_opening(light, 7)):
        labels, _ = ndimage.label(hat > max(6.0, 3 * np.median(hat[::2, ::2])), np.ones((3, 3)))
        area = np.bincount(labels.ravel())
        for i, box in enumerate(ndimage.find_objects(labels), 1):
            length = np.hypot(box[0].stop - box[0].start, box[1].stop - box[1].start)
            if length > 18 and area[i] < 6 * length:
                out[box] |= labels[box] == i
    return _grow(out, 1)


def _fill(lab: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Hidden pixels replaced by a blur of the others (normalised convolution, at half size)."""
    if not hidden.any():
        return lab
    weight = (~hidden).astype(np.float32)[..., None]
    blurred = _blur(np.concatenate([_halve(lab * weight), _halve(weight)], -1), 1.5)
    return np.where(hidden[..., None], _double(blurred[..., :3] / (blurred[..., 3:] + 1e-4)), lab)


def _blur(field: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(field, (sigma, sigma, 0)[:field.ndim], truncate=2.5)


def _halve(field: np.ndarray) -> np.ndarray:
    return field.reshape(HALF, 2, HALF, 2, -1).mean((1, 3))


def _double(field: np.ndarray) -> np.ndarray:
    return field.repeat(2, 0).repeat(2, 1)


def _background(half: np.ndarray, ok: np.ndarray) -> np.ndarray:
    """Skin colour as a quadratic surface [6,3], fitted to the rim more than to the centre, pixels unlike skin dropped."""
    basis, color = _BASIS[::2, ::2].reshape(-1, 6), half[::2, ::2].reshape(-1, 3)
    trust = ok[::2, ::2].ravel() * (0.03 + np.clip(_RADIUS[::2, ::2].ravel() / 6, 0, 1) ** 2)
    if not trust.any():
        return np.zeros((6, 3))
    ridge, weight = np.diag([1e-6, 1e-3, 1e-3, 0.03, 0.03, 0.03]), trust
    for _ in range(5):
        weighted = basis * weight[:, None]
        coefficients = np.linalg.solve(basis.T @ weighted + ridge * weight.sum(), weighted.T @ color)
        residual = color - basis @ coefficients
        spread = 1.4826 * np.median(np.abs(residual[trust > 0]), 0) + 0.5
        weight = trust * np.exp(-((residual / spread) ** 2).sum(1) / 9)
    return coefficients


def _best_patch(delta: np.ndarray, ok: np.ndarray) -> tuple[float, np.ndarray]:
    """(score, mask) of the patch that stands out most, over two scales, two kinds of field and several levels."""
    best = 0.0, np.zeros((HALF, HALF), bool)
    for sigma in (0.8, 2.0):
        smooth = _blur(delta, sigma)
        distance = _distance(smooth, ok)
        peak = np.quantile(distance[_RADIUS < 1.5], 0.8)
        levels = np.unique(np.clip([2.5, 3.5, 5, 7, 0.35 * peak, 0.5 * peak, 0.65 * peak], 2, None).round(1))
        found = _best_level(distance, levels, ok)
        best = max(best, found, key=lambda candidate: candidate[0])
        projection = _discriminant(found[1], smooth, ok)
        if projection is not None:
            field, middle = projection
            best = max(best, _best_level(field, middle * np.array([0.45, 0.55, 0.7]), ok), key=lambda candidate: candidate[0])
    score, mask = best
    opened = ndimage.binary_opening(mask)
    mask = _component(opened, 0.01 + _PRIOR) if opened.any() else mask
    return score, ndimage.binary_fill_holes(mask)


def _distance(smooth: np.ndarray, ok: np.ndarray) -> np.ndarray:
    """Colour difference to the skin in units of its own spread; brighter (gloss) and greener count less."""
    sample = smooth[ok & (_RADIUS > 3)]
    if not len(sample):
        return np.zeros(smooth.shape[:2])
    size = np.linalg.norm(sample, axis=1)
    sample = sample[size <= np.quantile(size, 0.7)]        # a large lesion reaches this far out
    signed = smooth / (1.85 * np.median(np.abs(sample - np.median(sample, 0)), 0) + 0.7)
    signed[..., 0] *= np.where(signed[..., 0] > 0, 0.35, 1)
    signed[..., 1] *= np.where(signed[..., 1] < 0, 0.6, 1)
    return np.sqrt((signed ** 2).sum(-1)) * ok


def _discriminant(mask: np.ndarray, smooth: np.ndarray, ok: np.ndarray) -> tuple[np.ndarray, float] | None:
    """(projection on Fisher's direction cov^-1 (lesion - skin), in units of the skin's spread; the lesion's median)."""
    core, gap = mask & ok, _grow(mask, 2)
    ring = _grow(gap, 9) & ~gap & ok
    if core.sum() < 3 or ring.sum() < 30:
        return None
    inside, around = smooth[core], smooth[ring]
    base = np.median(around, 0)
    field = (smooth - base) @ np.linalg.solve(np.cov(around.T) + 0.5 * np.eye(3), inside.mean(0) - base)
    field /= 1.4826 * np.median(np.abs(field[ring])) + 1e-6
    middle = np.median(field[core])
    return (field, middle) if middle > 0 else None


def _component(mask: np.ndarray, score: np.ndarray) -> np.ndarray:
    """The connected part with the largest sum of `score`."""
    labels, count = ndimage.label(mask)
    if count < 2:
        return mask
    total = np.bincount(labels.ravel(), score.ravel(), count + 1)
    total[0] = -np.inf
    return labels == int(np.argmax(total))


def _grow(mask: np.ndarray, times: int) -> np.ndarray:
    """Dilation by a 4-neighbour cross, `times` times (faster on small masks than scipy's)."""
    out = mask.copy()
    for _ in range(times):
        last = out.copy()
        out[1:] |= last[:-1]
        out[:-1] |= last[1:]
        out[:, 1:] |= last[:, :-1]
        out[:, :-1] |= last[:, 1:]
    return out


def _best_level(field: np.ndarray, levels: np.ndarray, ok: np.ndarray) -> tuple[float, np.ndarray]:
    """(score, mask) of the level set that stands out most: saturated contrast to a ring 0.2-0.9 mm outside over the ring's
    spread, times mild preferences for large, compact, central, and not cut by the tile's edge.

    Saturated, field / (field + 4), so that a black patch does not outdo the brown lesion around it.
    """
    best, positive = (0.0, np.zeros(field.shape, bool)), np.maximum(field, 0)
    saturated, weight = positive / (positive + 4), positive * (0.02 + _PRIOR)
    for level in levels:
        mask = _component((field > level) & ok, weight)
        inner = _grow(mask, 1)
        ring = _grow(inner, 3) & ~inner & ok
        area = np.count_nonzero(mask)
        if area < 8 or np.count_nonzero(ring) < 12:
            continue
        around = saturated[ring]
        perimeter = np.count_nonzero(mask[1:] != mask[:-1]) + np.count_nonzero(mask[:, 1:] != mask[:, :-1])
        cut = mask[[0, -1]].sum() + mask[:, [0, -1]].sum()
        score = (saturated[mask].mean() - around.mean()) / np.sqrt(around.var() + 0.01)
        score *= area ** 0.1 * (16 * area / perimeter ** 2) ** 0.4
        score *= (0.1 + _PRIOR[mask].mean()) ** 0.5 / (1 + cut / np.sqrt(area))
        if score > best[0]:
            best = float(score), mask
    return best


def _border(mask: np.ndarray, delta: np.ndarray, delta_full: np.ndarray, ok: np.ndarray) -> tuple:
    """(mask, field, profile, delta) at 128: the border where the colour is about half way from skin to the lesion next to it.

    v = direction of the lesion's colour difference within about 1 mm; p = <delta, v> and what is left of delta (debiased by the
    skin's), smoothed more where the contrast is low. Contrast is saturated, s(p) = p / (p + 0.5 W) with W the lesion's, so that
    a light part beside a black one is still lesion; the border is where s falls to 0.84 of its local mean.
    """
    empty = np.zeros((SIDE, SIDE), np.float32)
    gap = _grow(mask, 3)
    ring = _grow(gap, 8) & ~gap & ok
    if mask.sum() < 8 or ring.sum() < 12:
        return empty > 0, empty, empty, delta_full
    base = np.median(delta[ring], 0)
    delta, delta_full = delta - base, delta_full - base
    spread = 1.4826 * np.median(np.abs(delta[ring]), 0) + 0.7
    scaled = delta / spread
    strength = np.linalg.norm(scaled, axis=-1)
    weight = mask * np.sqrt(strength)       # the stronger parts count more: a faint rim is not the colour
    whole = (strength * weight).sum() / weight.sum()
    average = (scaled * weight[..., None]).sum((0, 1)) / weight.sum()
    local = _blur(scaled * weight[..., None], 3.5) + 1e-3 * average
    local /= np.linalg.norm(local, axis=-1, keepdims=True) + 1e-6
    level = np.maximum((scaled * local).sum(-1), 0)
    bend = 0.5 * whole
    middle = (_blur(level / (level + bend) * weight, 3.5) + 0.5e-3) / (_blur(weight, 3.5) + 1e-3)
    plain = (_blur(level * weight, 3.5) + 1e-3 * whole) / (_blur(weight, 3.5) + 1e-3)
    box = tuple(slice(max(0, where.min() - 3), where.max() + 4) for where in np.nonzero(gap))
    full = tuple(slice(2 * edge.start, 2 * edge.stop) for edge in box)
    local, middle, plain = (_double(part[box]) for part in (local, middle, plain))
    sharp = delta_full[full] / spread
    smooth = _blur(sharp, float(np.clip(10 / whole, 0.9, 3)))
    forward = np.maximum((smooth * local).sum(-1), 0) ** 2
    rest = (smooth ** 2).sum(-1) - forward
    smooth = np.sqrt(forward + 0.9 * np.maximum(rest - 2 * np.median(rest[::2, ::2][ring[box]]), 0))
    field, profile = empty.copy(), empty.copy()
    field[full] = smooth / (smooth + bend) / np.maximum(middle, 0.3) * (0.5 / 0.84)
    profile[full] = (sharp * local).sum(-1) / plain
    fine = _component((field > 0.5) & _double(gap), _double(mask.astype(np.float32)))
    closed = ~_grow(~_grow(fine, 3), 3)                    # a thin pale gap between two colours is lesion too
    return ndimage.binary_fill_holes(closed), field, profile, delta_full
