"""Small sets of tiles for the reader-study tests: a prepared data set and a synthetic folder."""
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from lesion.run import files


def picture(rng: np.random.Generator, side: int) -> Image.Image:
    """Skin with a dark blob and fine noise."""
    y, x = np.mgrid[:side, :side] / side - 0.5
    blob = np.exp(-((x - rng.normal(0, 0.05)) ** 2 + (y - rng.normal(0, 0.05)) ** 2) / rng.uniform(0.005, 0.04))
    base = rng.uniform([170, 120, 90], [230, 180, 150])
    image = base * (1 - 0.6 * blob[..., None]) + rng.normal(0, 4, (side, side, 1))
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def real_set(folder: Path, count: int, seed: int = 0) -> Path:
    """A prepared data set: JPEG of several sizes at ISIC's quality, all in the test split, two tiles a patient."""
    rng = np.random.default_rng([seed, 1])
    rows = []
    (folder / "images").mkdir(parents=True)
    for number in range(count):
        side = int(rng.choice([48, 61, 64, 80]))
        buffer = io.BytesIO()
        picture(rng, side).save(buffer, "JPEG", quality=75, subsampling=2)
        (folder / "images" / f"ISIC_{number:07d}.jpg").write_bytes(buffer.getvalue())
        rows.append({"file_name": f"images/ISIC_{number:07d}.jpg", "text": "", "label": "malignant", "split": "test",
                     "patient_id": f"p{number // 2}", "source": "isic", "license": "CC-BY"})
    files.write_manifest(folder, rows)
    (folder / "dataset.json").write_text(json.dumps({"format": 1, "name": "small", "color_norm": "none"}), encoding="utf-8")
    return folder


def synthetic_set(folder: Path, count: int, side: int = 64, seed: int = 0) -> Path:
    """A folder as generate.py writes it: PNG with text chunks, of one size."""
    rng = np.random.default_rng([seed, 2])
    rows = []
    folder.mkdir(parents=True)
    for number in range(count):
        picture(rng, side).save(folder / f"{number:05d}.png")
        rows.append({"file_name": f"{number:05d}.png", "text": "", "label": "malignant", "prompt": "", "seed": number,
                     "source": "synthetic", "lora_sha256": "00", "base_sha256": "11"})
    files.write_manifest(folder, rows)
    return folder
