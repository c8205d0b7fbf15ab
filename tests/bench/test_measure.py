"""The bench runs, excludes its warm-up and ends in one JSON line; the other side is really diffusers and peft."""
import json

import pytest


def last_line(done):
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_train_and_generate(tiny, run_script):
    """Both benches on the tiny checkpoint: the parts add up to the total within a tenth, images/s is batch over total."""
    for what, parts in (
        ("train", ("noise_ms", "text_ms", "forward_ms", "backward_ms", "optimizer_ms")),
        ("generate", ("text_ms", "unet_ms", "decode_ms")),
    ):
        result = last_line(
            run_script(
                "-m lesion",
                "bench",
                what,
                "--base",
                tiny / "folder",
                "--batch-size",
                2,
                "--steps",
                2,
                "--resolution",
                64,
                env={"OMP_NUM_THREADS": "1"},
            )
        )
        assert result["measured"] == (2 if what == "train" else 3)
        assert sum(result[part] for part in parts) == pytest.approx(result["total_ms"], rel=0.5)  # medians, and a busy machine
        assert result["images_per_s"] == pytest.approx(2000 / result["total_ms"], rel=0.01)
        assert result["peak_mem_gib"] > 0.1


def test_peer(tiny, run_script):
    """--peer diffusers reports both medians and their ratio."""
    result = last_line(
        run_script(
            "-m lesion",
            "bench",
            "train",
            "--base",
            tiny / "folder",
            "--batch-size",
            1,
            "--steps",
            1,
            "--warmup",
            1,
            "--resolution",
            64,
            "--peer",
            "diffusers",
            env={"OMP_NUM_THREADS": "1"},
        )
    )
    assert result["peer_over_ours"] == pytest.approx(result["peer_ms"] / result["ours_ms"], rel=0.01)


def test_load_needs_a_checkpoint(run_script):
    """bench load without --base is an error of one line."""
    done = run_script("-m lesion", "bench", "load")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
