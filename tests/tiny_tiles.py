"""Tiny tile sets for the classifier's tests: 32 px pictures whose class shows, but not plainly."""
import json

import numpy as np
from PIL import Image

from lesion.run import files


def picture(rng, malignant: bool, side: int = 32) -> np.ndarray:
    """Skin with a dark spot, larger and redder for malignant tiles, [side,side,3] uint8."""
    y, x = np.mgrid[:side, :side] / side - 0.5
    skin = np.array([215, 170, 140]) + rng.normal(0, 8, 3)
    spot = np.array([150, 80, 70]) if malignant else np.array([130, 95, 70])
    radius = rng.normal(0.24 if malignant else 0.17, 0.04)
    inside = (x ** 2 + y ** 2 < radius ** 2)[..., None]
    return np.clip(np.where(inside, spot, skin) + rng.normal(0, 10, (side, side, 3)), 0, 255).astype(np.uint8)


def write_set(folder, counts: dict, patients: bool = True, seed: int = 0) -> list[dict]:
    """A prepared data set; counts is {split: (benign, malignant)}; two tiles a patient. Returns the rows."""
    rng, rows = np.random.default_rng(seed), []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for split, numbers in counts.items():
        for label, count in zip(("benign", "malignant"), numbers, strict=True):
            for i in range(count):
                name = f"ISIC_{len(rows):07d}"
                Image.fromarray(picture(rng, label == "malignant")).save(folder / f"images/{name}.jpg", quality=95)
                rows.append({"file_name": f"images/{name}.jpg", "isic_id": name, "text": "", "label": label,
                             "split": split, "patient_id": f"P{split}{label}{i // 2}" if patients else None,
                             "attributes": {}, "source": "test", "license": "CC0",
                             "sha256": files.sha256_file(folder / f"images/{name}.jpg")})
    files.write_manifest(folder, rows)
    files.write_json(folder / "dataset.json", {"format": 1, "color_norm": "none", "split": "patient"})
    return rows


def write_synthetic(folder, count: int, train_files: list[dict] | None, lora: str = "ab" * 32, seed: int = 9) -> None:
    """A folder as generate.py writes it; train_files None leaves provenance.json out."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        Image.fromarray(picture(rng, True)).save(folder / f"{i:05d}.png")
        rows.append({"file_name": f"{i:05d}.png", "label": "malignant", "text": "", "prompt": "", "seed": i,
                     "lora_sha256": lora, "base_sha256": "00", "source": "synthetic"})
    files.write_manifest(folder, rows)
    if train_files is not None:
        keys = ("file_name", "sha256", "patient_id")
        loras = [{"file": "lora.safetensors", "sha256": lora, "weight": 1.0,
                  "train_files": [{key: row[key] for key in keys} for row in train_files]}]
        (folder / "provenance.json").write_text(json.dumps({"base_sha256": "00", "loras": loras}), encoding="utf-8")
