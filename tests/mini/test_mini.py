"""The built-in base model: small enough, says where it comes from, and the default command works without a flag, twice the same."""
import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from lesion.run import files, folders

pytestmark = pytest.mark.skipif(not (folders.MINI / "unet").is_dir(), reason="the built-in base model is not in this checkout")
SHORT = ("--steps", 6, "--batch-size", 2, "--sample-count", 2, "--sample-steps", 2, "--val-tiles", 4, "--val-every", 3, "--views", 1)


def test_size_and_origin():
    """At most 20 MB in float16; every weight file names its data, their licence and who to thank; the card is there."""
    parts = [path for path in folders.MINI.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in parts) <= 20e6
    weights = [path for path in parts if path.suffix == ".safetensors"]
    assert {path.parent.name for path in weights} == {"unet", "vae", "text_encoder"}
    for path in weights:
        with safe_open(path, "pt") as opened:
            about = opened.metadata()
            assert {str(opened.get_slice(key).get_dtype()) for key in list(opened.keys())} == {"F16"}
        assert "benign training tiles" in about["lesion_data"]
        assert "CC-BY 4.0" in about["license"]
        assert "International Skin Imaging Collaboration" in about["attribution"]
    assert "CC-BY 4.0" in (folders.MINI / "README.md").read_text(encoding="utf-8")


def digests(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "timing.jsonl"}


def test_default_commands(run_script, tmp_path):
    """In an empty folder: train_lora.py --phase 2 draws the demo set, trains, and says where the results are and what the real thing is;
    a second time every file has the same bytes; generate.py without flags draws from that run."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    done = run_script("train_lora.py", "--phase", 2, *SHORT, cwd=first)
    assert done.returncode == 0, done.stderr
    for words in ("demo set", "mini", f"--data {folders.ISIC} --base {folders.SD15}", "lora.safetensors", "loss.png", "before-after.png"):
        assert words in done.stdout
    second.mkdir()
    shutil.copytree(first / "data", second / "data", ignore=shutil.ignore_patterns(".cache"))
    assert run_script("train_lora.py", "--phase", 2, *SHORT, cwd=second).returncode == 0
    assert digests(first / "runs") == digests(second / "runs")
    assert "malignant-phase2/lora.safetensors" in digests(first / "runs")
    assert files.read_jsonl(first / "runs" / "malignant-phase2" / "timing.jsonl")[-1]["peak_mem_gib"] < 3e9 / 2**30

    done = run_script("generate.py", "--count", 2, "--steps", 4, cwd=first)
    assert done.returncode == 0, done.stderr
    rows = files.read_manifest(first / "samples" / "malignant-phase2")
    assert [row["guidance_scale"] for row in rows] == [folders.MINI_RECIPE["guidance_scale"]] * 2
    image = np.asarray(Image.open(first / "samples" / "malignant-phase2" / rows[0]["file_name"]))
    assert image.shape == (128, 128, 3)
    assert image.std() > 3  # not one flat colour
