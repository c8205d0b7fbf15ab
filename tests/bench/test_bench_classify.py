"""`lesion bench classify`: both sides train the same number of tiles, the last line is JSON, bad input is refused."""
import json

import pytest
from tiny_tiles import write_set

from lesion.bench import classify


def test_bench_prints_a_ratio_and_a_profile(tmp_path, capsys):
    """A tiny epoch of each: figures, parts that add up to our epoch, one JSON line at the end."""
    write_set(tmp_path, {"train": (20, 12), "val": (4, 4)})
    classify.main(["--data", str(tmp_path), "--tiles", "20", "--batch-size", "8", "--arch", "resnet18",
                         "--image-size", "32", "--workers", "0", "--repeats", "1", "--device", "cpu"])
    lines = capsys.readouterr().out.strip().splitlines()
    result = json.loads(lines[-1])
    assert result["tiles"] == 16, "two full batches of 8, on both sides"
    assert set(result["parts_s"]) == {"tiles, augment", "forward", "backward", "optimiser"}
    assert result["ours_images_per_s"] == pytest.approx(16 / sum(result["parts_s"].values()), rel=0.05)
    assert result["ratio"] == pytest.approx(result["ours_images_per_s"] / result["peer_images_per_s"], abs=0.02)


def test_bench_needs_enough_tiles(tmp_path):
    """More tiles asked for than the training part has: said how many there are."""
    write_set(tmp_path, {"train": (8, 4)})
    with pytest.raises(ValueError, match="has 12 training tiles"):
        classify.main(["--data", str(tmp_path), "--tiles", "64"])
