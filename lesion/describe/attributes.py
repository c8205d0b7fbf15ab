"""What a tile shows, measured on its raw pixels, and the words of the vocabulary for it.

`measure` gives continuous numbers, `to_attributes` the values of `lesion.describe.prompts.VOCABULARY` with a confidence each.
Clinical ABCD criteria (asymmetry, border, colour, diameter), skin tone by individual typology angle. Always on raw pixels:
colour normalisation of the grey-world family destroys skin tone. Surface words are left to people.
Proven by tests/describe/test_attributes.py: ITA vectors, shapes of known geometry, phantoms of known attributes, real tiles.
"""
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.spatial import ConvexHull
from skimage.measure import find_contours
from threadpoolctl import threadpool_limits

from lesion.describe.prompts import NAMES, validate
from lesion.describe.segment import MM, SIDE, Segment, segment
from lesion.run.files import is_missing
from lesion.tiles.decode import decode

# Edges between classes. Clinical where there is a convention: ITA groups (Del Bino & Bernerd 2013), 6 mm (the D of ABCD).
# The others are set so that no class holds under 10 % of real training tiles (figures in the tests' docstring).
ITA_EDGES = (55.0, 41.0, 28.0, 10.0, -30.0)      # degrees, falling: very light ... dark
SIZE_EDGES = (3.0, 4.0, 6.0, 9.0)                # mm
ASYMMETRY_EDGE = 0.19
BORDER_EDGE = 0.11
EDGE_WIDTH_EDGE = 0.9                            # mm
ROUND_EDGE = 0.70                                # short over long axis
OTHER_COLOR_SHARE = 0.10                         # of the lesion: less is not named
# 3D-TBP columns without natural edges: the share of tiles below the edge, as the pixel measures split the same tiles
BINNED = {"tbp_lv_symm_2axis": 0.5, "tbp_lv_eccentricity": 0.4, "tbp_lv_area_perim_ratio": 0.8, "tbp_lv_norm_border": 0.55}
SEEN = 0.25                                      # mask confidence under which the lesion is left undescribed


def lesion_mask(image_u8: np.ndarray) -> np.ndarray:
    """uint8 RGB [H,W,3] -> bool [H,W]: the lesion nearest the centre, holes filled; all False where none is found."""
    mask = Image.fromarray(segment(image_u8).mask.astype(np.uint8) * 255)
    return np.asarray(mask.resize(image_u8.shape[1::-1], Image.Resampling.BILINEAR)) > 127


def outlined(image_u8: np.ndarray) -> np.ndarray:
    """The tile uint8 RGB [H,W,3], twice as large, with a thin outline of the lesion's mask, white beside black to be seen on any skin."""
    large = np.asarray(Image.fromarray(image_u8).resize((2 * image_u8.shape[1], 2 * image_u8.shape[0]), Image.Resampling.BICUBIC)).copy()
    mask = np.kron(lesion_mask(image_u8), np.ones((2, 2), bool))
    grown = ndimage.binary_dilation(mask)
    large[grown & ~mask] = 255
    large[ndimage.binary_dilation(grown) & ~grown] = 0
    return large


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
    seen = float(1 / (1 + np.exp(-(part.score - 3.2) / 0.4)))
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
    """`diameter_mm`, `axis_ratio` and `irregularity` of a closed contour [n,2] in mm (first point repeated at the end).

    Diameter = longest distance between points. The best ellipse is that of the area's second moments; irregularity = standard
    deviation along the border of its distance from the centre, once that ellipse is made a unit circle: 0 for any ellipse.
    """
    y, x = contour.T
    cross = x[:-1] * y[1:] - x[1:] * y[:-1]                      # Green's theorem: moments of the area from its border
    area = cross.sum() / 2
    center = np.array([((q[:-1] + q[1:]) * cross).sum() / (6 * area) for q in (y, x)])
    (y0, x0), (y1, x1) = (contour[:-1] - center).T, (contour[1:] - center).T
    yy, xx = (((q0 * q0 + q0 * q1 + q1 * q1) * cross).sum() / (12 * area) for q0, q1 in ((y0, y1), (x0, x1)))
    yx = ((x0 * y1 + 2 * x0 * y0 + 2 * x1 * y1 + x1 * y0) * cross).sum() / (24 * area)
    values, vectors = np.linalg.eigh([[yy, yx], [yx, xx]])
    values = np.maximum(values, 1e-6)
    radius = np.linalg.norm((contour[:-1] - center) @ vectors / np.sqrt(values), axis=1)
    weight = np.hypot(y1 - y0, x1 - x0) + np.hypot(y0 - np.roll(y0, 1), x0 - np.roll(x0, 1))
    radius /= np.average(radius, weights=weight)
    hull = contour[ConvexHull(contour[:-1]).vertices]
    return {"diameter_mm": float(np.sqrt(((hull[:, None] - hull[None]) ** 2).sum(-1).max())),
            "axis_ratio": float(np.sqrt(values[0] / values[1])),
            "irregularity": float(np.sqrt(np.average((radius - 1) ** 2, weights=weight)))}


def asymmetry_of(delta: np.ndarray, mask: np.ndarray) -> float:
    """Fold the lesion's visibility p on an axis through the mask's centroid: sum |p - mirrored p| / (2 sum p), mean over two
    axes at right angles, at the best of six turns of that cross: 0 = mirror symmetric, 1 = nothing matches.

    p = |CIELAB difference to the skin|: `delta` [128,128,3] inside `mask` [128,128], halved in size: shape and pigment count.
    """
    delta, mask = (part.reshape(64, 2, 64, 2, -1).mean((1, 3)) for part in (delta, mask))
    pigment = np.linalg.norm(delta, axis=-1) * mask[..., 0]
    y, x = np.nonzero(mask[..., 0])
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
        (d_a > 5.5) & (d_a > -0.55 * d_light) & (d_b < 0.75 * d_a),
        light < min(50, 0.76 * skin[0])],
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


def metadata_quantiles(rows: Iterable[dict]) -> dict[str, list[float]]:
    """Percentiles 0..100 of the 3D-TBP columns that have no natural edges, over all rows of an ISIC metadata table.

    The documented ranges of these columns do not hold in the released file, hence quantiles. Columns with under 20 values are
    left out. Raises ValueError for a value that is not a number.
    """
    rows = list(rows)
    values = {name: [v for row in rows if (v := _number(row, name)) is not None] for name in BINNED}
    return {name: np.percentile(v, np.arange(101)).tolist() for name, v in values.items() if len(v) >= 20}


def from_metadata(row: dict, quantiles: dict[str, list[float]] | None = None) -> tuple[dict, dict]:
    """(attributes, confidence by attribute) that an ISIC metadata row gives: size from the clinical diameter, skin tone from
    `tbp_lv_Lext/Bext`, colour from `tbp_lv_L/A/B`, and by quantile symmetry, shape and border. Missing columns and empty
    values are passed over. Diagnosis, patient and network columns are never read."""
    found, ranks = {}, {}
    for name, share in BINNED.items():
        value, table = _number(row, name), (quantiles or {}).get(name)
        if value is not None and table:
            rank = float(np.interp(value, table, np.linspace(0, 1, 101)))
            ranks[name] = rank > share, 0.6 + 0.3 * min(1.0, abs(rank - share) / 0.2)
    light, b = _number(row, "tbp_lv_Lext"), _number(row, "tbp_lv_Bext")
    if light is not None and b is not None:
        found["skin_tone"] = _falling("skin_tone", ita_degrees(light, b), ITA_EDGES, 4.0, 0.9)
    if (diameter := _number(row, "clin_size_long_diam_mm")) is not None:
        found["size"] = _rising("size", diameter, SIZE_EDGES, 0.2, 0.95)
    lab = [_number(row, "tbp_lv_" + name) for name in ("L", "A", "B", "Lext", "Aext", "Bext")]
    if None not in lab:
        found["color"] = NAMES["color"][int(color_names(np.array([lab[:3]]), np.array(lab[3:]))[0])], 0.7
    if "tbp_lv_symm_2axis" in ranks:
        over, trust = ranks["tbp_lv_symm_2axis"]
        found["symmetry"] = NAMES["symmetry"][over], trust
    if "tbp_lv_eccentricity" in ranks:
        over, trust = ranks["tbp_lv_eccentricity"]
        jagged = ranks.get("tbp_lv_area_perim_ratio", (False, 0))
        found["shape"] = ("irregular", jagged[1]) if jagged[0] else (NAMES["shape"][over], trust)
    if "tbp_lv_norm_border" in ranks:
        over, trust = ranks["tbp_lv_norm_border"]
        found["border"] = NAMES["border"][over], trust
    attributes = validate({name: value for name, (value, _) in found.items()})
    return attributes, {name: round(found[name][1], 3) for name in attributes}


def _number(row: dict, name: str) -> float | None:
    value = row.get(name)
    if is_missing(value):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"metadata column {name!r} holds {value!r}: expected a number, or nothing") from None
    return number if np.isfinite(number) else None


def describe(measured: dict, row: dict | None = None, quantiles: dict | None = None) -> tuple[dict, dict]:
    """(attributes, confidence): the metadata's where it has them, else the pixels'; colour from whichever is surer."""
    attributes, trust = to_attributes(measured)
    given, given_trust = from_metadata(row or {}, quantiles)
    if given_trust.get("color", 1) < trust.get("color", 0):
        given.pop("color")
    attributes |= given
    trust |= {name: given_trust[name] for name in given}
    if "other_colors" in attributes:
        attributes["other_colors"] = [name for name in attributes["other_colors"] if name != attributes["color"]]
    attributes = validate(attributes)
    return attributes, {name: trust[name] for name in attributes}


def measure_all(items: Iterable, workers: int = 2, progress: Callable | None = None) -> list[dict]:
    """`measure` over images_u8 [H,W,3] or paths, in order, in `workers` processes; `progress` wraps the iterator as
    `cli.progress` does."""
    items = list(items)
    pool = None
    if workers > 1 and len(items) >= 32:
        method = "fork" if sys.platform.startswith("linux") else "spawn"
        pool = ProcessPoolExecutor(workers, get_context(method), initializer=threadpool_limits, initargs=(1,))
    with pool or nullcontext():
        done = pool.map(_measure_one, items, chunksize=16) if pool else map(_measure_one, items)
        return list(progress(done, total=len(items), desc="attributes", unit="tile") if progress else done)


def _measure_one(item: np.ndarray | str | Path) -> dict:
    if not isinstance(item, np.ndarray):
        item = decode(Path(item).read_bytes())
    return measure(item)
