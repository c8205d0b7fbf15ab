"""Procedural tiles with known attributes: ground truth for tests, and data for a machine that has none.

Clinical close-ups of 15 mm of skin: every skin tone, skin lines, mottling, pores, freckles, hair, uneven light, blur, JPEG noise;
on it one lesion built from a Fourier contour, with pigment that varies. Numbers are fixed in advance from the literature, not
tuned to any classifier or generator: benign and malignant differ ONLY in how often each clinical ABCD criterion is met, at the
sensitivity and specificity of Thomas et al., Dermatology 1998;197:11 (asymmetry 57/72 %, border 57/71 %, several colours 65/59 %,
diameter over 6 mm 90/63 %), each criterion by itself. A criterion met or not gives the same distributions in both classes, so the
classes overlap as that study says: a reader who saw all four criteria without error would reach an AUROC of 0.865. Pigment is
kept visible (at least a tenth lighter or darker than the skin, or redder), or the true border would be nobody's to see.
Deterministic by seed: the same seed gives the same JPEG bytes. Proven by tests/mini/test_phantoms.py.
"""
import hashlib
import io
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from PIL import __version__ as PILLOW
from scipy import fft, ndimage
from skimage.measure import find_contours

from lesion import __version__
from lesion.describe.attributes import asymmetry_of, ita_degrees, outline_of, to_attributes
from lesion.describe.prompts import LABELS, NAMES, to_sentence
from lesion.run import files
from lesion.tiles.srgb import encode, lab_to_linear

SIDE, FIELD_MM = 128, 15.0
MM = FIELD_MM / SIDE
# P(criterion met): sensitivity for malignant, 1 - specificity for benign
CRITERIA = {"asymmetry": {"malignant": 0.57, "benign": 0.28}, "border": {"malignant": 0.57, "benign": 0.29},
            "colors": {"malignant": 0.65, "benign": 0.41}, "diameter": {"malignant": 0.90, "benign": 0.37}}
ITA_RANGES = ((56, 68), (42, 54), (29, 40), (11, 27), (-28, 9), (-55, -32))  # degrees, the six groups, drawn equally often
# P(main colour), and P(another colour beside it), in the vocabulary's order: white, red, light, dark brown, blue-grey, black
MAIN_COLOR = (0.02, 0.18, 0.40, 0.30, 0.05, 0.05)
OTHER_COLOR = ((0.0, 0.45, 0.3, 0.15, 0.05, 0.05), (0.22, 0.0, 0.38, 0.22, 0.08, 0.10), (0.07, 0.22, 0.0, 0.48, 0.12, 0.11),
               (0.06, 0.12, 0.38, 0.0, 0.18, 0.26), (0.08, 0.10, 0.17, 0.40, 0.0, 0.25), (0.04, 0.10, 0.14, 0.50, 0.22, 0.0))
QUALITY = 85

_Y, _X = ((np.mgrid[:SIDE, :SIDE] + 0.5) * MM - FIELD_MM / 2).astype(np.float32)  # mm from the centre
_FY, _FX = (f.astype(np.float32) for f in (np.fft.fftfreq(SIDE, MM)[:, None], np.fft.rfftfreq(SIDE, MM)[None]))  # 1/mm
_FREQUENCY2 = _FY ** 2 + _FX ** 2


def draw(seed: int, label: str, patient: int | None = None) -> tuple[np.ndarray, dict, dict]:
    """One tile: (image_u8 [128,128,3], attributes, truth).

    `truth` holds the continuous values under `measure`'s names (`ita`, `diameter_mm`, `axis_ratio`, `asymmetry`,
    `irregularity`, `edge_width_mm`, `colors`), `criteria` met, and `mask` bool [128,128]. Tiles of one `patient` share skin.
    """
    data, attributes, truth = draw_jpeg(seed, label, patient)
    return np.array(Image.open(io.BytesIO(data))), attributes, truth


def draw_jpeg(seed: int, label: str, patient: int | None = None) -> tuple[bytes, dict, dict]:
    """As `draw`, with the tile as JPEG bytes. Raises ValueError for an unknown label."""
    if label not in LABELS:
        raise ValueError(f"no label {label!r}: allowed are {', '.join(LABELS)}")
    rng = np.random.default_rng([seed, LABELS.index(label)])
    person = _person(np.random.default_rng([seed if patient is None else patient, 7]))
    criteria = _criteria(rng, label)
    skin = person["lab"] + _texture(rng, person)
    inside, truth = _lesion_shape(rng, criteria)
    paint, truth["colors"] = _pigment(rng, person["lab"], truth, criteria)
    lab = skin + inside[..., None] * (paint - person["lab"])
    truth |= {"ita": person["ita"], "criteria": criteria}
    truth["asymmetry"] = asymmetry_of(inside[..., None] * (paint - person["lab"]), truth["mask"])
    image = _photograph(rng, person, lab_to_linear(lab))
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=QUALITY)
    attributes, _ = to_attributes(truth | {"confidence": dict.fromkeys(
        ("ita", "mask", "diameter_mm", "axis_ratio", "asymmetry", "irregularity", "edge_width_mm", "colors"), 1.0)})
    return buffer.getvalue(), attributes, truth


def _criteria(rng: np.random.Generator, label: str) -> dict[str, bool]:
    """Which of the ABCD criteria this lesion meets: all that the label decides."""
    return {name: bool(rng.random() < rate[label]) for name, rate in CRITERIA.items()}


def _person(rng: np.random.Generator) -> dict:
    """Skin tone (exact ITA), and what else one patient's tiles share."""
    low, high = ITA_RANGES[rng.integers(6)]
    ita = rng.uniform(low, high)
    b = np.interp(ita, (-60, -30, -10, 10, 28, 41, 55, 70), (11, 16, 19, 20, 19, 17, 13, 8.5)) * rng.uniform(0.95, 1.25)
    lab = np.array([50 + b * np.tan(np.radians(ita)), np.interp(ita, (-60, 0, 40, 70), (10, 15, 13, 9)) + rng.normal(0, 2), b])
    return {"ita": ita_degrees(lab[0], lab[2]), "lab": lab, "lines": rng.gamma(1.5, 0.5), "hairs": rng.choice([0, 0, 1, 3, 9]),
            "hair_color": np.array([[14, 3, 5], [25, 6, 12], [62, 2, 12]])[rng.choice(3, p=[0.55, 0.35, 0.1])],
            "freckles": rng.choice([0, 1, 3, 8], p=[0.4, 0.3, 0.2, 0.1]), "gloss": rng.uniform(0, 2.0)}


def _noise(rng: np.random.Generator, sigma_mm: float | tuple, angle: float = 0.0) -> np.ndarray:
    """Gaussian noise [S,S] blurred by sigma (mm; or along and across `angle`), mean 0, standard deviation 1.

    White noise is drawn in the frequency domain, where the blur is a product.
    """
    if np.isscalar(sigma_mm):
        response = _round_blur(float(sigma_mm))
    else:
        along, across = _FX * np.cos(angle) + _FY * np.sin(angle), _FY * np.cos(angle) - _FX * np.sin(angle)
        response = np.exp(-2 * np.pi ** 2 * ((sigma_mm[0] * along) ** 2 + (sigma_mm[1] * across) ** 2))
    white = rng.standard_normal((SIDE, SIDE // 2 + 1, 2), dtype=np.float32).view(np.complex64)[..., 0]
    spectrum = white * response.astype(np.float32)
    spectrum[0, 0] = 0
    field = fft.irfft2(spectrum, (SIDE, SIDE))
    return field / np.sqrt(np.vdot(field, field) / field.size)


@lru_cache(maxsize=16)
def _round_blur(sigma_mm: float) -> np.ndarray:
    return np.exp(-2 * np.pi ** 2 * sigma_mm ** 2 * _FREQUENCY2)


def _texture(rng: np.random.Generator, person: dict) -> np.ndarray:
    """CIELAB offsets of bare skin: mottling at three scales, crossing skin lines, pores, freckles."""
    depth = 0.5 + person["lab"][0] / 130                      # darker skin shows less of it in L*
    broad, middle, fine = _noise(rng, 1.6), _noise(rng, 0.4), _noise(rng, 0.12)
    mottle = rng.uniform(0.5, 1.6)
    light = 0.9 * broad + 1.1 * mottle * middle + 1.1 * fine
    red = rng.uniform(0.4, 1.4) * _noise(rng, 1.0) - 0.4 * mottle * middle
    angle = rng.uniform(0, np.pi)
    for turn, share in ((0, 1.0), (rng.uniform(0.8, 1.6), 0.7)):
        ridges = _noise(rng, (0.9, 0.13), angle + turn)
        gloss = person["gloss"] * np.clip(ridges - 1.2, 0, 1.5)
        light += share * person["lines"] * (0.8 - 2.2 * np.exp(-np.abs(ridges) / 0.35) + gloss)
    pores = (rng.random((SIDE, SIDE)) < 0.004).astype(np.float32)
    light -= 14 * rng.uniform(0.2, 1) * ndimage.gaussian_filter(pores, 0.9)
    offsets = np.stack([light * depth, red, 0.35 * middle + 0.3 * broad], -1)
    for _ in range(rng.poisson(person["freckles"])):
        y, x, radius = rng.uniform(-7.5, 7.5), rng.uniform(-7.5, 7.5), rng.uniform(0.2, 0.7)
        if np.hypot(x, y) > 3.5:
            spot = np.exp(-(((_X - x) ** 2 + (_Y - y) ** 2) / radius ** 2) ** 1.5)
            offsets += spot[..., None] * rng.uniform(0.3, 1) * np.array([-0.14 * person["lab"][0], 2.5, 4])
    return offsets - np.median(offsets, (0, 1))


def _lesion_shape(rng: np.random.Generator, criteria: dict) -> tuple[np.ndarray, dict]:
    """Soft mask [S,S] in 0..1 (0.5 at the border) and the truth of the outline.

    Contour r(t) = ellipse(t) (1 + sum_k a_k cos(k t + phase_k)): orders 1..3 make it lopsided, 4 and up ragged,
    more in places, with notches 0.65 mm (5 pixels) or more wide whatever the size: a tile shows no finer.
    """
    diameter = rng.uniform(6.0, 11.0) if criteria["diameter"] else 2.2 + 3.8 * rng.beta(1.6, 1.6)
    t = np.linspace(-np.pi, np.pi, 361)
    ratio, tilt = rng.uniform(0.6, 1.0), rng.uniform(0, np.pi)
    radius = 1 / np.sqrt(np.cos(t - tilt) ** 2 + (np.sin(t - tilt) / ratio) ** 2)
    ragged = rng.uniform(0.08, 0.15) if criteria["border"] else rng.uniform(0.005, 0.05)
    lopsided = rng.uniform(0.12, 0.22) if criteria["asymmetry"] else rng.uniform(0.0, 0.05)
    notches = _bumps(rng, t, np.arange(4, max(7, int(np.pi * diameter / 1.3))), 1.0, 1.6)
    notches = notches * (1 + 0.8 * np.cos(t + rng.uniform(0, 2 * np.pi)))
    radius = radius * np.clip(1 + ragged * notches / notches.std() + _bumps(rng, t, np.arange(1, 4), lopsided, 0.6), 0.3, 2)
    y, x = radius * np.sin(t), radius * np.cos(t)
    scale = diameter / np.hypot(y[::4, None] - y[::4], x[::4, None] - x[::4]).max()
    radius, y0, x0 = radius * scale, *(rng.normal(0, 0.35, 2) - scale * np.array([y.mean(), x.mean()]))
    slope = np.gradient(radius, t) / radius
    rho, where = np.hypot(_Y - y0, _X - x0), np.arctan2(_Y - y0, _X - x0)
    distance = (np.interp(where, t, radius) - rho) / np.sqrt(1 + np.interp(where, t, slope) ** 2)  # mm, first order
    width = min(float(np.clip(rng.lognormal(np.log(0.7), 0.5), 0.25, 2.0)), 0.25 * diameter)
    distance = distance + 0.1 * width * _noise(rng, 0.3)                                            # pigment frays
    inside = 0.5 + 0.5 * np.tanh(2 * distance / width)
    contour = max(find_contours(inside, 0.5), key=len) * MM
    return inside, outline_of(contour) | {"edge_width_mm": width, "mask": inside > 0.5}


def _bumps(rng: np.random.Generator, t: np.ndarray, orders: np.ndarray, rms: float, decay: float) -> np.ndarray:
    """Random Fourier series of the given orders, amplitudes falling as k^-decay, scaled to `rms`."""
    amplitude = rng.rayleigh(1, len(orders)) * orders ** -decay
    wave = (amplitude * np.cos(orders * t[:, None] + rng.uniform(0, 2 * np.pi, len(orders)))).sum(1)
    return wave * rms / (wave.std() + 1e-9)


def _paints(skin: np.ndarray) -> np.ndarray:
    """CIELAB of the six ABCD colours on this skin [6,3]: pigment darkens skin, so browns and black are at most a share of it."""
    light, a, b = skin
    return np.array([[min(light + 9, 94), 0.5 * a, 0.5 * b], [0.86 * light, a + 14, b - 1],
                     [min(60, 0.80 * light), a + 3, b + 5], [min(38, 0.62 * light), a + 1, 0.85 * b],
                     [0.66 * light, 3, 0.28 * b], [min(19, 0.40 * light), 4, 5]])


def _pigment(rng: np.random.Generator, skin: np.ndarray, truth: dict, criteria: dict) -> tuple[np.ndarray, dict]:
    """CIELAB [S,S,3] of the lesion's pigment and the true share of each colour.

    One main colour; where the colour criterion is met, one to three more, each a patch of a random field whose threshold is
    the quantile that gives it its share.
    """
    main, mask = int(rng.choice(6, p=MAIN_COLOR)), truth["mask"]
    count = rng.choice([1, 2, 3], p=[0.6, 0.3, 0.1]) if criteria["colors"] else 0
    others = rng.choice(6, size=count, replace=False, p=OTHER_COLOR[main]) if count else []
    paints = _paints(skin) + rng.normal(0, [1.5, 1, 1], (6, 3))
    paints[1:3] = skin + (paints[1:3] - skin) * rng.uniform(0.8, 1.1)        # faint moles are light brown or red
    scale = 0.09 * truth["diameter_mm"] + 0.15
    color, owner = np.broadcast_to(paints[main], (SIDE, SIDE, 3)).astype(np.float32), np.full((SIDE, SIDE), main)
    for other in others:
        angle = rng.uniform(0, 2 * np.pi)
        field = _noise(rng, scale) + 0.15 * _noise(rng, 0.2)
        field += rng.uniform(0, 4) * (_X * np.cos(angle) + _Y * np.sin(angle)) / truth["diameter_mm"]
        cut = np.quantile(field[mask], 1 - rng.uniform(0.16, 0.34))
        patch = 0.5 + 0.5 * np.tanh((field - cut) / rng.uniform(0.2, 0.7))
        color = color + patch[..., None] * (paints[other] - color)
        owner[field > cut] = other
    depth = 1 + 0.10 * _noise(rng, 0.2) + 0.10 * _noise(rng, scale) + rng.uniform(-0.1, 0.25) * _edge_to_middle(truth["mask"])
    color = skin + (color - skin) * np.clip(depth, 0.5, 1.25)[..., None]     # uneven pigment, mostly darker inside
    share = np.bincount(owner[mask], minlength=6) / mask.sum()
    return color, dict(zip(NAMES["color"], share.tolist()))


def _edge_to_middle(mask: np.ndarray) -> np.ndarray:
    """-0.5 outside and at the rim to 0.5 at the middle of a mask."""
    smooth = ndimage.gaussian_filter(mask.astype(np.float32), np.sqrt(mask.sum()) / 4, truncate=2.5)
    return smooth / smooth.max() - 0.5


def _photograph(rng: np.random.Generator, person: dict, linear: np.ndarray) -> np.ndarray:
    """Hair over it, uneven light, vignette, gloss, lens blur, sensor noise, sometimes a black border: uint8 RGB."""
    if count := rng.poisson(person["hairs"]):
        cover = _hairs(rng, count)[..., None]
        linear = linear + cover * (lab_to_linear(person["hair_color"][None, None].astype(float)) - linear)
    angle, slope = rng.uniform(0, 2 * np.pi), rng.gamma(2, 0.03)
    light = 1 + slope * (_X * np.cos(angle) + _Y * np.sin(angle)) / (FIELD_MM / 2)
    light -= rng.gamma(1.5, 0.03) * ((_X ** 2 + _Y ** 2) / (FIELD_MM / 2) ** 2 - 0.6)
    linear = linear * light[..., None]
    blur = rng.uniform(0.3, 0.85)
    linear = ndimage.gaussian_filter(linear, (blur, blur, 0), truncate=3)
    code = encode(linear)
    code += rng.normal(0, rng.uniform(0.002, 0.009), code.shape)
    if rng.random() < 0.03:
        edge, width = rng.integers(4), rng.integers(3, 22)
        np.rot90(code, edge)[:width] = 0
    return (np.clip(code, 0, 1) * 255).round().astype(np.uint8)


def _hairs(rng: np.random.Generator, count: int) -> np.ndarray:
    """Coverage [S,S] in 0..1 of `count` curved hairs that mostly lie one way."""
    fine, way = 3, rng.uniform(0, np.pi)
    canvas = Image.new("L", (SIDE * fine, SIDE * fine))
    pen = ImageDraw.Draw(canvas)
    s = np.linspace(0, 1, 14)[:, None]
    for _ in range(count):
        angle = way + rng.normal(0, 0.35)
        along, across = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
        middle, length, bend = rng.uniform(-6.5, 6.5, 2), rng.uniform(3, 11), rng.normal(0, 0.8)
        path = middle + along * length * (s - 0.5) + across * bend * (4 * s * (1 - s))
        points = [tuple(p) for p in (path + FIELD_MM / 2) / MM * fine]
        pen.line(points, fill=int(rng.uniform(120, 235)), width=int(rng.integers(2, 5)), joint="curve")
    return np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32) / 255


DEMO_BENIGN, DEMO_MALIGNANT = 600, 240
DEMO_TILES = DEMO_BENIGN + DEMO_MALIGNANT


def write_demo(folder: str | Path, seed: int = 0, benign: int = DEMO_BENIGN, malignant: int = DEMO_MALIGNANT,
               progress: Callable | None = None) -> list[dict]:
    """Write a prepared data set of phantoms: images/*.jpg, dataset.json, metadata.jsonl (last: its presence means complete).

    About six tiles a patient; patients are split 70/10/20 into train, val and test, so no patient is in two parts. The same
    seed gives the same bytes. Rows carry the true `attributes`, their sentence as `text`, and `truth`. Returns the rows.
    `progress` wraps the iterator of tiles, as `cli.progress` does. Raises ValueError for counts under 1.
    """
    if benign < 1 or malignant < 1:
        raise ValueError(f"a demo set needs tiles of both classes, got {benign} benign and {malignant} malignant")
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    labels = ["malignant"] * malignant + ["benign"] * benign
    rng = np.random.default_rng([seed, 1])
    count = max(10, len(labels) // 6)
    patients, parts = rng.integers(count, size=len(labels)), _parts(count, rng)
    rows = []
    tiles = progress(labels, desc="demo set", unit="tile") if progress else labels
    for i, label in enumerate(tiles):
        number = seed * 1_000_000 + i
        data, attributes, truth = draw_jpeg(number, label, patient=seed * 1_000_000 + int(patients[i]))
        name = f"images/PHANTOM_{number:07d}.jpg"
        (folder / name).write_bytes(data)
        rows.append({"file_name": name, "isic_id": name[7:-4], "text": to_sentence(label, attributes), "label": label,
                     "split": parts[patients[i]], "patient_id": f"PP_{patients[i]:05d}", "attributes": attributes,
                     "source": "phantom", "license": "MIT", "sha256": hashlib.sha256(data).hexdigest(),
                     "truth": _plain(truth)})
    files.write_json(folder / "dataset.json", {
        "format": 1, "name": "demo", "source": "phantom", "color_norm": "none", "split": "patient", "seed": seed,
        "prompts": "structured", "counts": _counts(rows), "overlap": {"patients": 0}, "license": ["MIT"],
        "versions": {"lesion": __version__, "numpy": np.__version__, "pillow": PILLOW},
        "command": "lesion.mini.phantoms.write_demo"})
    files.write_manifest(folder, rows)
    return rows


def _parts(count: int, rng: np.random.Generator) -> list[str]:
    """The part of each patient: 70 % train, 10 % val, 20 % test."""
    names = np.array(["train"] * count, dtype=object)
    order = rng.permutation(count)
    names[order[:round(0.2 * count)]] = "test"
    names[order[round(0.2 * count):round(0.3 * count)]] = "val"
    return names.tolist()


def _counts(rows: list[dict]) -> dict:
    parts = {part: [row for row in rows if row["split"] == part] for part in ("train", "val", "test")}
    return {part: {**{label: sum(row["label"] == label for row in mine) for label in LABELS},
                   "patients": len({row["patient_id"] for row in mine})} for part, mine in parts.items()}


def _plain(truth: dict) -> dict:
    """Truth without the mask, floats to four decimals: what a manifest row can hold."""
    rounded = {name: round(float(value), 4) for name, value in truth.items() if isinstance(value, float)}
    return rounded | {"colors": {name: round(share, 4) for name, share in truth["colors"].items()},
                      "criteria": truth["criteria"]}
