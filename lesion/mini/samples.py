"""`python -m lesion pretrain --stage check --samples DIR ...`: what LoRA changed, on real tiles that neither it nor the base has seen.

Each DIR is a folder of generate.py. Held out for a LoRA: the malignant tiles of split `val` and those of `train` that its run kept back
(train_lora.py --holdout). Proven by tests/mini/test_samples.py.
"""
from pathlib import Path

import numpy as np

from lesion.classify import features
from lesion.run import files
from lesion.stats import fidelity, memorisation
from lesion.tiles import seen
from lesion.tiles.decode import load_tiles


def check(data: Path, folders: list[Path], features_from: Path | None = None) -> list[dict]:
    """One row a LoRA's folder: n, held_out; KID to its held-out tiles of its own tiles, of the real tiles it saw (the floor) and of each
    folder that was drawn without a LoRA; and the median distance by pixels to the nearest tile it saw, of its tiles and of the held-out
    real ones. ValueError for a folder without provenance, or if none was drawn with a LoRA."""
    extractor = features.choose(features_from)

    def features_of(folder, rows):
        images_u8 = load_tiles(folder, rows, 128).images_u8
        return features.cached(extractor, images_u8, Path(folder) / ".cache"), images_u8

    rows = [row for row in files.read_manifest(data) if row["label"] == "malignant"]
    vectors, images_u8 = features_of(data, rows)
    sets = {folder: (seen_by(folder), *features_of(folder, files.read_manifest(folder))) for folder in folders}
    if not any(known for known, *_ in sets.values()):
        raise ValueError("none of the folders of --samples was drawn with a LoRA")
    result = []
    for folder, (known_files, drawn, drawn_u8) in sets.items():
        if not known_files:
            continue
        train = np.array([row["file_name"] in known_files for row in rows])
        held = np.array([row["split"] in ("train", "val") for row in rows]) & ~train
        known = memorisation.pixel_vectors(images_u8[train])
        value, error = fidelity.kid(vectors[held], drawn)
        result.append({
            "samples": folder.name, "n": len(drawn), "held_out": int(held.sum()), "kid": value, "kid_se": error,
            "kid_of_seen_real": fidelity.kid(vectors[held], vectors[train])[0],
            **{f"kid_of_{other.name}": fidelity.kid(vectors[held], tiles)[0] for other, (lora, tiles, _) in sets.items() if not lora},
            "nearest_seen": median_distance(drawn_u8, known), "nearest_seen_of_held_out": median_distance(images_u8[held], known)})
    return result


def seen_by(folder: Path) -> set[str]:
    """File names of the tiles that the folder's LoRAs saw; empty where there was none."""
    path = folder / "provenance.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no provenance.json: give folders of generate.py")
    return {tile["file_name"] for lora in seen.read_provenance(path)["loras"] for tile in lora["train_files"]}


def median_distance(images_u8: np.ndarray, known: np.ndarray) -> float:
    """Median over tiles of the distance to the nearest training tile, over the 8 views (lesion.stats.memorisation)."""
    return float(np.median(memorisation.nearest_pixels(images_u8, known).distance))
