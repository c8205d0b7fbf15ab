"""The numbers about sets of synthetic tiles: what is compared with what. lesion/report/pictures.py puts them in words.

Of a prepared data set: `real`, the training tiles of the class the generator learnt; `held_out`, tiles of that class it
never saw (the ceiling); `training`, every training tile (any could be copied); `calibration`, held-out tiles of every
class, which set the limit for copies. Proven by tests/report/test_sets.py.
"""
import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import chain, count
from pathlib import Path

import numpy as np

from lesion.classify import arms, features
from lesion.describe import adherence, attributes, prompts
from lesion.run import devices, files, folders
from lesion.stats import fidelity, inference, memorisation
from lesion.tiles import seen
from lesion.tiles.decode import load_tiles, recorded_norm

CALIBRATION = 1000  # held-out tiles at most: their features are needed in 8 views
LEAST = 199         # held-out tiles for 1 % false alarms under two measures
DRAWN = 300         # tiles of a set in a t-SNE map
STEP = 256          # tiles between two moves of a progress bar: whole batches of every extractor


@dataclass
class Set:
    """Tiles of one kind: images_u8 [M,R,R,3], their manifest rows, the folder they lie in; features [M,D] for
    comparing sets, copy_features [M,E] for finding copies."""
    name: str
    folder: Path
    images: np.ndarray
    rows: list[dict]
    features: np.ndarray
    copy_features: np.ndarray

    def patients(self) -> np.ndarray:
        """Who each tile belongs to, [M]."""
        return np.array([seen.unit_of(row) for row in self.rows])


@dataclass
class Material:
    """Everything that is compared; `notes` are sentences for the report. copy_extractor: as extractor, but never a
    classifier: one that was fitted to the training tiles sees them otherwise than held-out ones, and the limit for
    copies rests on those."""
    label: str
    extractor: features.Extractor
    copy_extractor: features.Extractor
    real: Set
    held_out: Set | None
    other: Set
    training: Set
    calibration: Set
    synthetic: list[Set]
    notes: list[str] = field(default_factory=list)


def gather(folders: list[Path], data: Path, classify: Path | None = None, progress=None) -> Material:
    """Load the synthetic `folders` and the prepared set `data`; features by what `features.choose` finds, among it the
    baseline classifiers of the run folder `classify`.

    ValueError if sets are of several classes or sizes, the data set lacks the class, or a LoRA saw a held-out tile.
    """
    synthetic_rows = [files.read_manifest(folder) for folder in folders]
    label = _one("class", {row.get("label") for rows in synthetic_rows for row in rows}, folders)
    side = _one("size", {_side(folder, row) for folder, rows in zip(folders, synthetic_rows) for row in rows}, folders)
    rows = files.read_manifest(data)
    if unlabelled := [row["file_name"] for row in rows if row.get("label") is None]:
        raise ValueError(f"{data} has {len(unlabelled)} tiles without a label (first: {unlabelled[0]}): which class they are is not known")
    train = [row for row in rows if row.get("split", "train") == "train"]
    held = [row for row in rows if row.get("split") == "val"]
    notes = []
    if len(held) < LEAST:
        held = [row for row in rows if row.get("split") in ("val", "test")]
        notes.append("The validation part is too small to set the limit for copies: the test part helps.")
    if not any(row["label"] == label for row in train):
        raise ValueError(f"{data} has no training tile labelled {label!r}, the class of {folders[0]}")
    for folder in folders:
        _refuse_leaks(folder, held, notes)
    extractor, copy_extractor = (_watched(features.choose(path, str(devices.device())), progress)
                                 for path in (_baseline(classify), None))

    def load(name, folder, rows):
        tiles = load_tiles(folder, rows, side, progress)
        notes.extend(f"{folder}: left out, unreadable: {problem}" for problem in tiles.unreadable)
        both = (features.cached(each, tiles.images_u8, Path(folder) / ".cache") for each in (extractor, copy_extractor))
        return Set(name, Path(folder), tiles.images_u8, tiles.rows, *both)

    training = load("training tiles", data, train)
    training = _subset(training, _first_of_each(training.images), training.name)
    unseen = load("held-out tiles", data, held) if held else _subset(training, np.array([], int), "held-out tiles")
    of_class = [np.array([row["label"] == label for row in part.rows], bool) for part in (training, unseen)]
    order = np.sort(np.random.default_rng(0).permutation(len(unseen.rows))[:CALIBRATION])
    held_out = _subset(unseen, np.flatnonzero(of_class[1]), f"held-out real {label}") if of_class[1].any() else None
    synthetic = [load(name, *pair) for name, *pair in zip(names(folders), folders, synthetic_rows)]
    return Material(label, extractor, copy_extractor, _subset(training, np.flatnonzero(of_class[0]), f"real {label}"),
                    held_out, _subset(training, np.flatnonzero(~of_class[0]), "real, other class"), training,
                    _subset(unseen, order, "calibration"), synthetic, notes)


def _watched(extractor, progress):
    """The extractor, showing how far it is; the same batches, so the same numbers."""
    def run(images_u8):
        starts = progress(range(0, len(images_u8), STEP), desc=f"features ({extractor.name})", unit="batch")
        return np.concatenate([extractor.run(images_u8[start:start + STEP]) for start in starts])
    return replace(extractor, run=run) if progress else extractor


def silent(items, **settings):
    """In the place of cli.progress where nobody watches."""
    return items


def _one(what, found, folders):
    if len(found) > 1:
        raise ValueError(f"{', '.join(map(str, folders))} hold tiles of more than one {what}: "
                         f"{', '.join(map(str, sorted(found, key=str)))}; give sets of one {what}")
    return next(iter(found))


def _side(folder: Path, row: dict) -> int:
    """The side in pixels that a synthetic tile's row tells; ValueError if generate.py draws none of that size."""
    side = 128 if row.get("resolution") is None else row["resolution"]
    if type(side) is not int or not 64 <= side <= 2048 or side % 64:
        raise ValueError(f"{folder}/{files.MANIFEST}, {row['file_name']}: resolution is {str(side)[:40]!r}, expected a multiple of 64 "
                         "from 64 to 2048")
    return side


def names(folders: list[Path]) -> list[str]:
    """What the sets are called: the folders' names, with their parent's where two are alike or one reads like a set of real
    tiles, numbered where that is not enough; no unprintable signs, which neither a figure nor a page can hold."""
    folders = [Path(folder) for folder in folders]
    counts, called = Counter(folder.name for folder in folders), []
    for folder in folders:
        alone = counts[folder.name] == 1 and not folder.name.startswith(("real ", "real,", "held-out "))
        name = "".join(sign if sign.isprintable() else "?" for sign in (folder.name if alone else f"{folder.parent.name}/{folder.name}"))
        called.append(next(one for one in chain([name], (f"{name} ({number})" for number in count(2))) if one not in called))
    return called


def _refuse_leaks(folder, held, notes):
    """A tile the generator saw is not held out."""
    path = folder / "provenance.json"
    if not path.is_file():
        notes.append(f"{folder} has no provenance.json: which tiles its generator saw is not known.")
        return
    for lora in seen.read_provenance(path)["loras"]:
        if leaks := seen.overlap(lora["train_files"], held):
            raise ValueError(f"the LoRA {lora.get('file')} of {folder} was trained on {len(leaks)} held-out tiles or "
                             f"their patients (first: {leaks[0]}): the comparison would be worthless")


def _baseline(classify):
    honest = [name for name, arm in arms.ARMS.items() if arm.extra != "synthetic"]
    found = [path for arm in honest for path in sorted(Path(classify).glob(f"{arm}/seed*/**/model.safetensors"))] \
        if classify else []
    return found[0] if found else None


def _subset(tiles, index, name):
    return Set(name, tiles.folder, tiles.images[index], [tiles.rows[i] for i in index], tiles.features[index],
               tiles.copy_features[index])


def _first_of_each(images):
    """Indices of the tiles without exact repetitions: those would hide copies from a relative distance."""
    seen = {}
    for number, image in enumerate(images):
        seen.setdefault(hashlib.sha256(image).digest(), number)
    return np.array(sorted(seen.values()))


# -------------------------------------------------------------------------------- fidelity

def judge_fidelity(material: Material, progress: Callable | None = None) -> dict:
    """One row a synthetic set and one for the held-out tiles (`ceiling`), against `real`; `floor`: real tiles among themselves."""
    real = material.real
    n = min([len(part.rows) for part in material.synthetic] + [len(real.rows) // 2])
    if n < 10:
        raise ValueError(f"{n} tiles are too few to compare sets: at least 10 synthetic and 20 real tiles are needed")
    centre, spread = real.features.mean(0), real.features.std(0)

    def varied(rows):
        return fidelity.vendi(rows, centre, spread)
    floor = {"n": n, "distance": fidelity.mean_distance(real.features)[0], "vendi": varied(_some(real.features, n))}
    for name, statistic in (("kid", lambda x, y: fidelity.kid(x, y)[0]), ("fid", fidelity.fid)):
        floor[name], floor[f"{name}_sd"] = fidelity.real_vs_real(statistic, real.features, n)
    parts = [*material.synthetic, *([material.held_out] if _enough(material.held_out) else [])]
    rows = [_fidelity_row(part, real, material.other, n, varied) | {"ceiling": part is material.held_out}
            for part in (progress or silent)(parts, desc="fidelity", unit="set")]
    return {"floor": floor, "sets": rows, "real": len(real.rows)}


def _enough(part):
    return part is not None and len(part.rows) >= 10


def _some(rows, n):
    return rows[np.sort(np.random.default_rng(0).permutation(len(rows))[:n])]


def drawn(rows: np.ndarray) -> np.ndarray:
    """At most DRAWN of the rows, at random: those a t-SNE map shows."""
    return _some(rows, DRAWN)


def _fidelity_row(part, real, other, n, varied):
    kid, kid_se = fidelity.kid(real.features, part.features, real.patients())
    density, coverage = fidelity.density_coverage(real.features, part.features)
    distance, distance_se = fidelity.mean_distance(part.features)
    enough = len(part.rows) >= n
    row = {"name": part.name, "n": len(part.rows), "kid": kid, "kid_se": kid_se,
           "fid": fidelity.at_n(fidelity.fid, real.features, part.features, n) if enough else None,
           "density": density, "coverage": coverage,
           "expected_coverage": fidelity.expected_coverage(len(real.rows), len(part.rows)),
           "distance": distance, "distance_se": distance_se,
           "vendi": varied(_some(part.features, n)) if enough else None,
           "against_real": vars(fidelity.two_sample(real.features, part.features, real.patients()))}
    if len(other.rows) >= 10:
        row["against_other"] = vars(fidelity.two_sample(other.features, part.features, other.patients()))
    return row


# -------------------------------------------------------------------------------- copies

@dataclass
class Copies:
    """Of one set: nearest training tiles by pixels and by features, and which tiles are called copies [M] bool."""
    pixels: memorisation.Nearest
    features: memorisation.Nearest
    is_copy: np.ndarray


def judge_copies(material: Material, progress: Callable | None = None) -> tuple[dict, dict[str, Copies]]:
    """(results, set name -> Copies). ValueError if there are too few held-out tiles to set a limit."""
    if len(material.calibration.rows) < LEAST:
        raise ValueError(f"copies cannot be told: {len(material.calibration.rows)} held-out real tiles are too few to "
                         f"set the limit for 1 % false alarms ({LEAST} are needed; see `python -m lesion prepare`)")
    vectors = memorisation.pixel_vectors(material.training.images)
    calibration = _search(material.calibration, material, vectors)
    limits = memorisation.thresholds(_relative(calibration))
    results = {"limits": dict(zip(("pixels", "features"), limits.tolist())), "sets": [],
               "calibration": len(material.calibration.rows), "training": len(material.training.rows),
               "features": material.copy_extractor.name}
    found = {}
    for part in (progress or silent)(material.synthetic, desc="copies", unit="set"):
        pixels, by_features = _search(part, material, vectors)
        relative = _relative((pixels, by_features))
        is_copy = memorisation.copies(relative, limits)
        found[part.name] = Copies(pixels, by_features, is_copy)
        low, high = inference.clopper_pearson(is_copy.sum(), len(is_copy))
        results["sets"].append({
            "name": part.name, "n": len(is_copy), "copies": int(is_copy.sum()), "mean": float(is_copy.mean()),
            "low": low, "high": high, "by_pixels": int((relative[:, 0] < limits[0]).sum()),
            "by_features": int((relative[:, 1] < limits[1]).sum()), "median": float(np.median(pixels.relative)),
            **_three_sample(part, material)})
    return results, found


def _search(part, material, vectors):
    pixels = memorisation.nearest_pixels(part.images, vectors)
    if material.copy_extractor.invariant:
        queries = [part.copy_features]
    else:
        queries = [features.cached(material.copy_extractor, np.ascontiguousarray(view), part.folder / ".cache")
                   for view in memorisation.views(part.images)]
    return pixels, memorisation.nearest(queries, material.training.copy_features)


def _relative(pair):
    return np.stack([nearest.relative for nearest in pair], axis=1)


def _three_sample(part, material):
    """Meehan's test in features, training and held-out tiles of the class itself; {} with fewer than 10 held out."""
    if not _enough(material.held_out):
        return {}
    ours, real, unseen = (tiles.copy_features for tiles in (part, material.real, material.held_out))
    own, other = (memorisation.nearest([rows], real).distance for rows in (ours, unseen))
    count = min(10, len(unseen) // 20)
    groups = memorisation.cells(real, ours, unseen, count=count) if count > 1 else (None, None)
    return {"three_sample": vars(memorisation.three_sample(own, other, *groups)), "held_out": len(unseen)}


# -------------------------------------------------------------------------------- attributes

def judge_attributes(material: Material, progress: Callable | None = None) -> dict:
    """Counts of every measured value by set, and for the synthetic sets how asked and measured values go together."""
    sets = [material.real, *material.synthetic]
    measured = {part.name: attributes.measure_all(list(part.images))
                for part in (progress or silent)(sets, desc="attributes", unit="set")}
    counts = {name: _counts([attributes.to_attributes(one)[0] for one in tiles]) for name, tiles in measured.items()}
    asked = {part.name: [adherence.adherence(name, part.rows, measured[part.name]) for name in adherence.MEASURES]
             for part in material.synthetic if any(row.get("attributes") for row in part.rows)}
    return {"counts": counts, "adherence": asked, "color_norm": recorded_norm(material.real.folder)[0]}


def _counts(described):
    counts = {}
    for name, values in prompts.NAMES.items():
        if name != "surface":
            shown = Counter(value for one in described if name in one
                            for value in (one[name] if isinstance(one[name], list) else [one[name]]))
            counts[name] = [shown[value] for value in values]
    return counts


# -------------------------------------------------------------------------------- training

def judge_training(runs: list[Path], material: Material, copies: dict | None) -> list[dict]:
    """Validation loss by step of each train_lora.py run, and the copies among the tiles drawn from its checkpoints
    (found by the LoRA's SHA-256). ValueError for a folder without a validation loss."""
    curves = []
    for name, run in zip(names(runs), runs):
        path = Path(run) / "metrics.jsonl"
        if not path.is_file():
            raise ValueError(f"{run} is not a run folder of train_lora.py: it has no metrics.jsonl")
        points = [(row["step"], row["val_loss"]) for row in folders.read_metrics(path) if "val_loss" in row]
        if not points:
            raise ValueError(f"{path} holds no validation loss: train with held-out tiles of the class")
        steps, losses = map(list, zip(*points))
        step_of = {files.sha256_file(file): int(file.stem.rpartition("-")[2])
                   for file in (Path(run) / "checkpoints").glob("lora-*.safetensors")}
        drawn = []
        for part, row in zip(material.synthetic, (copies or {}).get("sets", [])):
            loras = {row.get("lora_sha256") if isinstance(row.get("lora_sha256"), str) else None for row in part.rows}
            if len(loras) == 1 and (step := step_of.get(next(iter(loras)))) is not None:
                drawn.append((step, row["mean"], row["low"], row["high"]))
        curves.append({"name": name, "steps": steps, "losses": losses, "best": steps[int(np.argmin(losses))],
                       "copies": sorted(drawn)})
    return curves
