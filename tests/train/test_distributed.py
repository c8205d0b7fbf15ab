"""Two processes under torchrun (gloo) train as one with the doubled batch, and draw the same images."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lesion.run import files

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def data(tmp_path):
    """Eight tiles of flat colour with a spot."""
    rng = np.random.default_rng(0)
    (tmp_path / "data" / "images").mkdir(parents=True)
    rows = []
    for i in range(8):
        image = rng.normal(170, 20, (64, 64, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(image).save(tmp_path / "data" / "images" / f"{i}.png")
        rows.append({"file_name": f"images/{i}.png", "text": "a lesion", "label": "malignant", "split": "train", "patient_id": str(i)})
    files.write_manifest(tmp_path / "data", rows)
    return tmp_path / "data"


def run(script, *arguments, processes):
    launcher = (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        if processes > 1
        else [sys.executable]
    )
    done = subprocess.run([*launcher, str(ROOT / script), *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=240,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_equal_one(tiny, data, tmp_path):
    """Phase 2 on 2 x 2 tiles has the loss over process 0's tiles and the gradient of 4 tiles in one process, in the steps after the text
    encoder is frozen too (without a new wrapper for what is left to train, gradients are no longer averaged, and the third step stops);
    files come from rank 0 alone. Then generation, sharded by batches, gives the same PNG bytes."""
    common = ["--phase", 2, "--init-lora", "none", "--base", tiny / "folder", "--data", data, "--steps", 3, "--rank", 2, "--lr", "1e-4",
              "--sample-count", 0, "--text-encoder-steps", 1, "--resolution", 128]
    run("train_lora.py", *common, "--out", tmp_path / "two", "--batch-size", 2, processes=2)
    run("train_lora.py", *common, "--out", tmp_path / "one", "--batch-size", 4, processes=1)
    two, one = ([row for row in files.read_jsonl(tmp_path / name / "metrics.jsonl") if "loss" in row] for name in ("two", "one"))
    assert [row["step"] for row in two] == [1, 2, 3]
    assert two[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=5e-3)
    assert [row["grad_norm"] for row in two[1:]] == pytest.approx([row["grad_norm"] for row in one[1:]], rel=0.05)
    assert two[0]["loss"] != one[0]["loss"]
    lora = tmp_path / "one" / "lora.safetensors"
    draw = [
        "--base",
        tiny / "folder",
        "--lora",
        lora,
        "--prompt",
        "a lesion",
        "--count",
        4,
        "--batch-size",
        1,
        "--steps",
        3,
        "--resolution",
        64,
    ]
    run("generate.py", *draw, "--out", tmp_path / "g2", processes=2)
    run("generate.py", *draw, "--out", tmp_path / "g1", processes=1)
    for i in range(4):
        name = f"malignant-{i:05d}.png"
        assert (tmp_path / "g1" / name).read_bytes() == (tmp_path / "g2" / name).read_bytes()
    assert (tmp_path / "g1" / "metadata.jsonl").read_bytes() == (tmp_path / "g2" / "metadata.jsonl").read_bytes()
    assert files.read_json(tmp_path / "g2" / "provenance.json")["loras"][0]["train_files"][0]["file_name"] == "images/0.png"


STOPS = """
import os, runpy, signal, sys
from lesion.train import watch
what, rank = sys.argv.pop(1), int(os.environ["RANK"])
log = watch.Log.step
def sees(self, done, error, *rest):
    if rank == 1 and done == 6 and what == "signal":
        signal.raise_signal(signal.SIGTERM)
    log(self, done, error * float("nan") if rank == 1 and done == 6 and what == "nan" else error, *rest)
watch.Log.step = sees
sys.argv[0] = "train_lora.py"
try:
    runpy.run_path("train_lora.py", run_name="__main__")
finally:
    print(f"rank {rank} left with {getattr(sys.exc_info()[1], 'code', None)}", file=sys.stderr, flush=True)
"""


@pytest.mark.parametrize(("what", "code", "step"), [("nan", 2, 4), ("signal", 143, 7)])
def test_what_one_process_sees_stops_all(tiny, data, tmp_path, what, code, step):
    """A loss that is not finite, or a signal, in process 1 alone: both processes leave at the same step with one line and the same exit
    code, long before any time-out; the state is the last good one, or that of the step where the signal was taken."""
    import time
    (tmp_path / "stops.py").write_text(STOPS, encoding="utf-8")
    arguments = ["--phase", 1, "--base", tiny / "folder", "--data", data, "--steps", 100, "--rank", 2, "--sample-count", 0,
                 "--batch-size", 1, "--resolution", 64, "--checkpoint-every", 4, "--out", tmp_path / "run"]
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(tmp_path / "stops.py"),
                           what, *map(str, arguments)], cwd=ROOT, capture_output=True, encoding="utf-8", timeout=240,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert done.returncode != 0
    assert time.monotonic() - began < 200
    assert {f"rank {rank} left with {code}" for rank in (0, 1)} <= set(done.stderr.splitlines()), done.stderr[-3000:]
    from lesion.run.state import load_state
    assert load_state(tmp_path / "run" / "checkpoint.safetensors")[1]["step"] == step
    if what == "nan":
        assert "step 6: loss is not finite for timesteps" in done.stderr
        assert "loss is not finite in another process, which names the tiles" in done.stderr
