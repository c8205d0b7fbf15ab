"""A small prepared set and synthetic folders of 64 px tiles for the tests of the pictures section: smooth colour
blobs."""
import numpy as np
from PIL import Image

from lesion.run import files

SIDE = 64


def blobs(rng, count: int, malignant: bool) -> np.ndarray:
    """[count,64,64,3] uint8: skin with low-frequency mottling and a spot, redder where malignant."""
    coarse = rng.normal(0, 14, (count, 8, 8, 3)).repeat(8, 1).repeat(8, 2)
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE - 0.5
    radius = rng.normal(0.24, 0.05, (count, 1, 1))
    inside = (x ** 2 + y ** 2 < radius ** 2)[..., None]
    spot = np.array([150, 70, 60]) if malignant else np.array([120, 90, 70])
    return np.clip(np.where(inside, spot + 0.6 * coarse, [205, 165, 140] + coarse), 0, 255).astype(np.uint8)


def write_data(folder, seed: int = 0) -> dict[str, np.ndarray]:
    """A prepared set: train 60 benign and 40 malignant, val 190 and 12; returns its training tiles by label."""
    rng, rows, tiles = np.random.default_rng(seed), [], {}
    for split, label, count in (("train", "benign", 60), ("train", "malignant", 40), ("val", "benign", 190),
                                ("val", "malignant", 12)):
        images = blobs(rng, count, label == "malignant")
        if split == "train":
            tiles[label] = images
        for image in images:
            name = f"images/ISIC_{len(rows):07d}.png"
            (folder / "images").mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / name)
            rows.append({"file_name": name, "text": "", "label": label, "split": split, "attributes": {},
                         "patient_id": f"P{split}{len(rows) // 2}", "source": "test", "license": "CC0",
                         "sha256": files.sha256_file(folder / name)})
    files.write_manifest(folder, rows)
    files.write_json(folder / "dataset.json", {"format": 1, "color_norm": "none", "split": "patient"})
    return tiles


def write_synthetic(folder, images: np.ndarray, lora: str = "cd" * 32, train_files: list | None = None, **more) -> None:
    """A folder as generate.py writes it; `more` goes into every row."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, image in enumerate(images):
        Image.fromarray(np.ascontiguousarray(image)).save(folder / f"{number:05d}.png")
        rows.append({"file_name": f"{number:05d}.png", "text": "", "label": "malignant", "prompt": "", "seed": number,
                     "sampler": "ddim", "steps": 50, "guidance_scale": 7.5, "resolution": SIDE, "base_sha256": "ab" * 32,
                     "lora_sha256": lora, "attributes": {}, "source": "synthetic", **more})
    files.write_manifest(folder, rows)
    files.write_json(folder / "provenance.json", {"base_sha256": "ab" * 32, "settings": {}, "loras": [
        {"file": "lora.safetensors", "sha256": lora, "weight": 1.0, "train_files": train_files or []}]})
