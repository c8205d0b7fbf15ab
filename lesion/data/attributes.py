"""What a tile shows, measured on its raw pixels, and the words of the vocabulary for it.

`measure` gives continuous numbers, `to_attributes` the values of `lesion.data.prompts.VOCABULARY` with a confidence each.
Clinical ABCD criteria (asymmetry, border, colour, diameter), skin tone by individual typology angle. Always on raw pixels:
colour normalisation of the grey-world family destroys skin tone. Surface words are left to people.
Proven by tests/data/test_attributes.py: ITA vectors, shapes of known geometry, phantoms of known attributes, real tiles.
"""
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.spatial import ConvexHull
from skimage.measure import find_contours

from lesion.data.prompts import NAMES, validate
from lesion.data.segment import MM, SIDE, Segment, segment

# Edges between classes. Clinical where there is a convention: ITA groups (Del Bino & Bernerd 2013), 6 mm (the D of ABCD).
# The others are set so that no class holds under 10 % of real training tiles (figures in the tests' docstring).
ITA_EDGES = (55.0, 41.0, 28.0, 10.0, -30.0)      # degrees, falling: very light ... dark
SIZE_EDGES = (3.0, 4.0, 6.0, 9.0)                # mm
ASYMMETRY_EDGE = 0.16
BORDER_EDGE = 0.085
EDGE_WIDTH_EDGE = 1.4                            # mm
ROUND_EDGE = 0.75                                # short over long axis
OTHER_COLOR_SHARE = 0.10                         # of the lesion: less is not named
SEEN = 0.2                                       # mask confidence under which the lesion is left undescribed


def lesion_mask(image_u8: np.ndarray) -> np.ndarray:
    """uint8 RGB [H,W,3] -> bool [H,W]: the lesion nearest the centre, holes filled; all False where none is found."""
    mask = Image.fromarray(segment(image_u8).mask.astype(np.uint8) * 255)
    return np.asarray(mask.resize(image_u8.shape[1::-1], Image.Resampling.BILINEAR)) > 127


def ita_degrees(light: float, b: float) -> float:
    """Individual typology angle, atan2(L* - 50, b*) in degrees (Chardon et al. 1991)."""
    return float(np.degrees(np.arctan2(light - 50, b)))


def measure(image_u8: np.ndarray) -> dict:
    """Measure a square uint8 RGB tile of any size showing 15 mm.

    Returns floats `ita` (degrees), `skin_lab`, and, where a lesion was found, `diameter_mm` (longest), `area_mm2`, `axis_ratio`
    (short over long), `asymmetry` (0 = mirror symmetric .. 1), `irregularity` (spread of the border about its ellipse, over its
    radius), `edge_width_mm` (skin to lesion), `colors` {ABCD colour: share of the lesion}, `lesion_lab`, `offset_mm` (centroid
    from the centre), `mask_fraction` of the tile, and `confidence` {measure: 0..1}.
    """
    part = segment(image_u8)
    tone = _skin(part)
    out = {"ita": ita_degrees(tone[0][0], tone[0][2]), "skin_lab": tone[0].tolist(), "confidence": {"ita": tone[1]}}
    contour = _contour(part)
    if contour is None:
        return out
    seen = float(1 / (1 + np.exp(-(part.score - 6.0) / 1.5)))
    y, x = np.nonzero(part.mask)
    out |= outline_of(contour) | {"mask_fraction": float(part.mask.mean()), "area_mm2": float(part.mask.sum() * MM ** 2)}
    out["offset_mm"] = float(np.hypot(x.mean() - (SIDE - 1) / 2, y.mean() - (SIDE - 1) / 2) * MM)
    out["asymmetry"] = asymmetry_of(part.delta, part.mask)
    out["edge_width_mm"] = _edge_width(part, contour)
    out["colors"], out["lesion_lab"] = _colors(part, tone[0])
    cut = float((part.mask[[0, -1]].sum() + part.mask[:, [0, -1]].sum()) / max(1, len(contour)))
    small = min(1.0, out["diameter_mm"] / 3)
    out["confidence"] |= {"mask": seen, "diameter_mm": seen * (1 - min(1, 2 * cut)), "asymmetry": seen * small,
                          "irregularity": seen * small, "axis_ratio": seen * small, "edge_width_mm": seen * small,
                          "colors": seen}
    return out


def _skin(part: Segment) -> tuple[np.ndarray, float]:
    """Median CIELAB of raw skin pixels at least 1 mm from the lesion, and how far to trust it."""
    near = part.mask
    skin = ~part.outside & ~part.hair & ~ndimage.binary_dilation(near, iterations=round(1 / MM))
    if skin.sum() < 500:
        skin = ~part.outside & ~near
    if not skin.any():
        skin = np.ones_like(skin)
    return np.median(part.lab[skin], 0).astype(float), float(min(1.0, skin.mean() / 0.3))


def _contour(part: Segment) -> np.ndarray | None:
    """Border of the mask at sub-pixel precision: [n, 2] (y, x) in mm, or None where there is no lesion."""
    if part.mask.sum() < 30:
        return None
    field = np.where(part.mask, np.clip(part.field, 0.55, 1), np.minimum(part.field, 0.45))
    contours = find_contours(np.pad(field, 1), 0.5)
    return (max(contours, key=len) - 1) * MM if contours else None


def outline_of(contour: np.ndarray) -> dict:
    """Diameter (longest distance between hull points), axis ratio, and irregularity: the standard deviation of the border's
    distance from the centre once its best ellipse is made a unit circle, so that 0 is an ellipse."""
    step = np.linalg.norm(np.diff(contour, axis=0), axis=1)
    points = contour[:-1]
    hull = points[ConvexHull(points).vertices]
    diameter = np.sqrt(((hull[:, None] - hull[None]) ** 2).sum(-1).max())
    centered = points - np.average(points, axis=0, weights=step)
    values, vectors = np.linalg.eigh((centered * step[:, None]).T @ centered / step.sum())
    radius = np.linalg.norm(centered @ vectors / np.sqrt(values), axis=1)
    radius /= np.average(radius, weights=step)
    return {"diameter_mm": float(diameter), "axis_ratio": float(np.sqrt(values[0] / values[1])),
            "irregularity": float(np.sqrt(np.average((radius - 1) ** 2, weights=step)))}


def asymmetry_of(delta: np.ndarray, mask: np.ndarray) -> float:
    """Fold the lesion's visibility p on an axis through the mask's centroid: sum |p - mirrored p| / (2 sum p), mean over two
    axes at right angles, at the best of six turns of that cross: 0 = mirror symmetric, 1 = nothing matches.

    p = |CIELAB difference to the skin| `delta` [H,W,3] inside `mask` [H,W], blurred by 1.5 pixels: shape and pigment both count.
    """
    pigment = np.linalg.norm(ndimage.gaussian_filter(delta, (1.5, 1.5, 0), truncate=2.5), axis=-1) * mask
    y, x = np.nonzero(mask)
    cy, cx = y.mean(), x.mean()
    side = int(np.ceil(np.hypot(y - cy, x - cx).max())) + 2
    step = max(1.0, side / 24)
    axis = np.arange(-side, side + step, step)
    v, u = np.meshgrid(axis, axis, indexing="ij")
    angles = np.arange(12)[:, None, None] * np.pi / 12
    c, s = np.cos(2 * angles), np.sin(2 * angles)
    where = np.stack([np.concatenate([v[None], s * u - c * v]) + cy, np.concatenate([u[None], c * u + s * v]) + cx])
    sampled = ndimage.map_coordinates(pigment, where, order=1)
    folds = np.abs(sampled[1:] - sampled[0]).sum((1, 2)) / (2 * sampled[0].sum())
    return float(((folds[:6] + folds[6:]) / 2).min())


def _edge_width(part: Segment, contour: np.ndarray) -> float:
    """Width in mm of the step from skin to lesion, 1 / slope of the mean profile 0.25 mm either side of the border."""
    points = contour[:-1] / MM
    tangent = ndimage.gaussian_filter1d(np.roll(points, -1, 0) - np.roll(points, 1, 0), 2, axis=0, mode="wrap")
    normal = np.stack([tangent[:, 1], -tangent[:, 0]], 1) / (np.linalg.norm(tangent, axis=1, keepdims=True) + 1e-6)
    offsets = np.array([-0.25, 0.25]) / MM
    where = points[None] + offsets[:, None, None] * normal[None]
    inner, outer = ndimage.map_coordinates(part.profile, where.transpose(2, 0, 1), order=1, mode="nearest").mean(1)
    return float(np.clip(0.5 / max(abs(inner - outer), 0.05), 0, 5))


def _colors(part: Segment, skin: np.ndarray) -> tuple[dict, list]:
    """Share of each ABCD colour among the lesion's pixels (rim and hair left out), and the lesion's median CIELAB."""
    core = ndimage.binary_erosion(part.mask, iterations=2)
    core = core if core.sum() > 60 else part.mask
    pixels = skin + part.delta[core & ~part.hair if (core & ~part.hair).sum() > 30 else core]
    names = color_names(pixels, skin)
    share = np.bincount(names, minlength=6) / len(names)
    return dict(zip(NAMES["color"], share.tolist())), np.median(pixels, 0).astype(float).tolist()


def color_names(lab: np.ndarray, skin: np.ndarray) -> np.ndarray:
    """CIELAB [n,3] of lesion pixels and [3] of the skin around -> index of the ABCD colour (order of the vocabulary).

    Named as an eye adapted to the skin around would: by lightness, and by difference from the skin.
    """
    light, a, b = lab.T
    d_light, d_a, d_b = (lab - skin).T
    chroma = np.hypot(a, b)
    return np.select([
        light < np.minimum(23, 0.5 * skin[0]),
        (d_light > 3) & (chroma < np.hypot(skin[1], skin[2])),
        (b < 8) & (d_b < -6) | (d_b < -9) & (d_a < 1),
        (d_a > 4) & (d_a > -0.45 * d_light) & (d_b < 0.8 * d_a),
        light < min(46, 0.72 * skin[0])],
        [5, 0, 4, 1, 3], 2)


def to_attributes(measured: dict) -> tuple[dict, dict]:
    """(attributes, confidence by attribute) in words. Where no lesion was seen, only the skin tone is named.

    Confidence = that of the measure, less near a class edge: half of it at the edge itself.
    """
    trust = measured["confidence"]
    found = {"skin_tone": _falling("skin_tone", measured["ita"], ITA_EDGES, 4.0, trust["ita"])}
    if trust.get("mask", 0) >= SEEN:
        m = measured
        found["size"] = _rising("size", m["diameter_mm"], SIZE_EDGES, 0.15 * m["diameter_mm"], trust["diameter_mm"])
        share = sorted(m["colors"].items(), key=lambda item: -item[1])
        found["color"] = share[0][0], trust["colors"] * (0.5 + 0.5 * min(1, (share[0][1] - share[1][1]) / 0.3))
        others = [name for name, part in share[1:] if part >= OTHER_COLOR_SHARE]
        doubt = min(abs(part - OTHER_COLOR_SHARE) for _, part in share[1:])
        found["other_colors"] = others, trust["colors"] * (0.5 + 0.5 * min(1, doubt / 0.1))
        found["symmetry"] = _rising("symmetry", m["asymmetry"], (ASYMMETRY_EDGE,), 0.03, trust["asymmetry"])
        found["shape"] = _shape(m)
        found["border"] = _rising("border", m["irregularity"], (BORDER_EDGE,), 0.02, trust["irregularity"])
        found["edge"] = _rising("edge", m["edge_width_mm"], (EDGE_WIDTH_EDGE,), 0.2, trust["edge_width_mm"])
    attributes = validate({name: value for name, (value, _) in found.items()})
    return attributes, {name: round(found[name][1], 3) for name in attributes}


def _rising(name: str, value: float, edges: tuple, scale: float, trust: float) -> tuple[str, float]:
    margin = min(abs(value - edge) for edge in edges)
    return NAMES[name][int(np.searchsorted(edges, value, "right"))], trust * (1 - 0.5 * float(np.exp(-margin / scale)))


def _falling(name: str, value: float, edges: tuple, scale: float, trust: float) -> tuple[str, float]:
    return _rising(name, -value, tuple(-edge for edge in edges), scale, trust)


def _shape(m: dict) -> tuple[str, float]:
    if m["irregularity"] > 1.5 * BORDER_EDGE:
        return "irregular", m["confidence"]["irregularity"]
    value, trust = _rising("shape", -m["axis_ratio"], (-ROUND_EDGE,), 0.05, m["confidence"]["axis_ratio"])
    return value, trust


def _measure_one(item: np.ndarray | str | Path) -> dict:
    if not isinstance(item, np.ndarray):
        with Image.open(item) as image:
            item = np.asarray(image.convert("RGB"))
    return measure(item)


def measure_all(items: Iterable, workers: int = 2, progress: Callable[[int], None] | None = None) -> list[dict]:
    """`measure` over images_u8 or paths, in order, in `workers` processes; `progress(done)` is called as they finish."""
    items, out = list(items), []
    if workers <= 1 or len(items) < 32:
        results = map(_measure_one, items)
        return [_tick(result, out, progress) for result in results] and out
    method = "fork" if sys.platform.startswith("linux") else "spawn"
    with ProcessPoolExecutor(workers, mp_context=get_context(method)) as pool:
        for result in pool.map(_measure_one, items, chunksize=16):
            _tick(result, out, progress)
    return out


def _tick(result: dict, out: list, progress: Callable[[int], None] | None) -> None:
    out.append(result)
    if progress:
        progress(len(out))
