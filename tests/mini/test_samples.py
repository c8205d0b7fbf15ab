"""The check of LoRA pictures: held out is what the LoRA did not see, and a copy of what it saw is nearer than real tiles are."""
import numpy as np
import pytest
from PIL import Image

from lesion.mini import samples
from lesion.run import files


def tiles(seed, count):
    """Smooth random colour pictures, uint8 [count,128,128,3]."""
    small = np.random.default_rng(seed).integers(60, 220, (count, 8, 8, 3)).astype(np.uint8)
    return np.stack([np.asarray(Image.fromarray(image).resize((128, 128), Image.BICUBIC)) for image in small])


def write(folder, images, **more):
    (folder / "images").mkdir(parents=True)
    rows = []
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / "images" / f"{i}.png")
        rows.append({"file_name": f"images/{i}.png", "label": "malignant", **{key: value[i] for key, value in more.items()}})
    files.write_manifest(folder, rows)


@pytest.fixture
def folders(tmp_path):
    """30 real tiles, 20 seen; pictures of a LoRA that copies what it saw, and of a base that draws something else."""
    real = tiles(0, 30)
    write(tmp_path / "data", real, split=["train"] * 25 + ["val"] * 5)
    write(tmp_path / "lora", real[:20])
    seen = [{"file_name": f"images/{i}.png"} for i in range(20)]
    files.write_json(tmp_path / "lora" / "provenance.json", {"loras": [{"train_files": seen}]})
    write(tmp_path / "base", tiles(1, 20) // 4)
    files.write_json(tmp_path / "base" / "provenance.json", {"loras": []})
    return tmp_path


def test_copies_and_strangers(folders):
    """Copies of the tiles seen: their KID is that of the tiles seen, their distance 0; dark pictures are far."""
    (row,) = samples.check(folders / "data", [folders / "base", folders / "lora"])
    assert (row["samples"], row["n"], row["held_out"]) == ("lora", 20, 10)
    assert row["kid"] == pytest.approx(row["kid_of_seen_real"])
    assert row["kid_of_base"] > row["kid"] + 5 * row["kid_se"]
    assert row["nearest_seen"] < 1e-3 < row["nearest_seen_of_held_out"]


def test_bad_folders(folders):
    """A folder without provenance, or no LoRA at all, is one line."""
    with pytest.raises(ValueError, match="none of the folders"):
        samples.check(folders / "data", [folders / "base"])
    (folders / "base" / "provenance.json").unlink()
    with pytest.raises(ValueError, match="has no provenance.json"):
        samples.check(folders / "data", [folders / "base"])
