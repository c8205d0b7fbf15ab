"""The bench runs the product's own step, excludes its warm-up and ends in one JSON line; the other side is really diffusers and peft."""
import json

import pytest
import torch

from lesion.bench import machine, measure, sides

ONE = {"OMP_NUM_THREADS": "1"}


def last_line(done):
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def bench(run_script, *arguments):
    return last_line(run_script("-m lesion", "bench", *arguments, env=ONE))


def test_train_generate_and_encode(tiny, run_script):
    """On the tiny checkpoint: percentiles in order, images/s is batch over the median, memory; generate's parts make its total."""
    for what, measured in (("train", 2), ("generate", 3), ("encode", 2)):
        row = bench(run_script, what, "--base", tiny / "folder", "--batch-size", 2, "--steps", 2, "--resolution", 64)
        assert row["measured"] == measured
        assert row["total_p10_ms"] <= row["total_ms"] <= row["total_p90_ms"]
        assert row["images_per_s"] == pytest.approx(2000 / row["total_ms"], rel=0.02)
        assert row["peak_mem_gib"] > 0.1
        assert "device" in row
    assert "mfu" in bench(run_script, "train", "--base", tiny / "folder", "--batch-size", 1, "--steps", 1, "--parts")


def test_sweep(tiny, run_script):
    """Several batch sizes: a row each."""
    found = bench(run_script, "train", "--base", tiny / "folder", "--batch-size", 1, 2, "--steps", 1, "--warmup", 1, "--resolution", 64)
    assert [row["batch_size"] for row in found["rows"]] == [1, 2]


@pytest.mark.parametrize(("what", "peer", "phase"), [("train", "diffusers", 2), ("train", "diffusers-example", 1),
                                                     ("generate", "diffusers-merged", 1)])
def test_peer(tiny, run_script, what, peer, phase):
    """Both medians and their ratio."""
    row = bench(run_script, what, "--base", tiny / "folder", "--batch-size", 1, "--steps", 1, "--warmup", 1, "--resolution", 64,
                "--peer", peer, "--phase", phase)
    assert row["peer_over_ours"] == pytest.approx(row["peer_ms"] / row["ours_ms"], rel=0.05)


def test_the_step_is_the_products(tiny, monkeypatch):
    """The bench's step calls lesion.train.step's functions, and its factors move as training moves them."""
    called = []
    for name in ("draw_step", "backward", "update"):
        real = getattr(sides, name)
        monkeypatch.setattr(sides, name, lambda *a, real=real, name=name, **k: (called.append(name), real(*a, **k))[1])
    (args,) = measure.sweep(measure.parse(["train", "--base", str(tiny / "folder"), "--batch-size", "1", "--precision", "fp32"]))
    step = sides.training_step(args, torch.device("cpu"))
    assert step()["total_ms"] > 0
    assert called == ["draw_step", "backward", "update"]


def test_flops_are_counted_not_estimated():
    """One U-Net step at 128 px is 89.2 GFLOP at batch 1 (forward and backward through the frozen base, by independent counting)."""
    (args,) = measure.sweep(measure.parse(["train", "--batch-size", "1", "--rank", "4"]))
    assert measure.flops_of_training(args) == pytest.approx(89.2e9, rel=0.03)


def test_peak_of_an_unknown_device_is_unknown(monkeypatch):
    """A GPU that is not in the table has no MFU; the longest name wins; a CPU is measured."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda where: "NVIDIA Foo")
    assert machine.peak_tflops(torch.device("cuda"), "fp16") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda where: "NVIDIA H100 PCIe")
    assert machine.peak_tflops(torch.device("cuda"), "fp16") == 756.0
    assert machine.peak_tflops(torch.device("cpu"), "fp32", side=256) > 0


def test_load_is_a_whole_start(tiny, run_script):
    """From a fresh process to its first denoising step: the parts make the total, and importing is one of them."""
    row = bench(run_script, "load", "--base", tiny / "folder", "--steps", 2, "--warmup", 1, "--resolution", 64)
    assert row["measured"] == 2
    assert row["import_ms"] > 300
    assert row["total_ms"] == pytest.approx(sum(row[f"{name}_ms"] for name in ("import", "load", "fast", "first_step")), rel=0.2)


def test_beside_a_busy_process(tiny, run_script):
    """Quiet and busy turns, and their ratio; nothing is left running."""
    row = bench(run_script, "train", "--base", tiny / "folder", "--batch-size", 1, "--steps", 2, "--resolution", 64, "--beside", 1)
    assert row["busy_over_quiet"] == pytest.approx(row["busy_ms"] / row["quiet_ms"], rel=0.05)
    assert row["processes"] == 1


def test_bad_flags_are_one_line(run_script):
    """bench load without --base, a peer that does not exist, a busy machine for drawing."""
    for arguments in (("load",), ("encode", "--peer", "diffusers-example"), ("generate", "--beside", 1)):
        done = run_script("-m lesion", "bench", *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
