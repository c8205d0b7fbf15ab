"""train_lora.py as a user runs it: phases, resume to the bit, fp16, non-finite losses, bad input."""
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lesion.run import files, sums

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("train_lora", ROOT / "train_lora.py")
train_lora = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train_lora)


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny networks are faster on one thread, and nothing then depends on the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A prepared set of 12 malignant and 4 benign noise tiles, three of them held out."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(16):
        name = f"images/T_{i:02d}.jpg"
        (folder / "images").mkdir(exist_ok=True)
        image = (rng.normal(0, 12, (64, 64, 3)) + np.array([190, 150, 130]) - 70 * (np.hypot(*np.mgrid[-32:32, -32:32]) < 8 + i)[..., None])
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / name, quality=90)
        label = "benign" if i >= 12 else "malignant"
        rows.append({"file_name": name, "text": f"a clinical photograph of a {label} skin lesion", "label": label,
                     "split": "val" if i in (9, 10, 11) else "train", "patient_id": f"P{i // 2}"})
    files.write_manifest(folder, rows)
    files.write_json(folder / "dataset.json", {"format": 1, "color_norm": "none"})
    return folder


def flags(tiny, data, out, *more):
    return [
        "--base",
        tiny / "folder",
        "--data",
        data,
        "--out",
        out,
        "--steps",
        8,
        "--batch-size",
        2,
        "--rank",
        2,
        "--alpha",
        3,
        "--lr",
        "1e-2",
        "--sample-count",
        0,
        "--checkpoint-every",
        4,
        "--val-every",
        4,
        "--precision",
        "fp32",
        "--resolution",
        128,  # at 64 the deepest map is one pixel, the softmax over it constant, and its queries' and keys' gradients zero
        *more,
    ]


def train(*arguments):
    train_lora.main([str(a) for a in arguments])


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_phase_1_then_2(tiny, data, tmp_path):
    """Phase 1 touches the U-Net alone; phase 2 starts from it and moves both; after one step every lora_up is non-zero."""
    base = {path: digest(path) for path in (tiny / "folder").rglob("*.safetensors")}
    train("--phase", 1, *flags(tiny, data, tmp_path / "p1"))
    one = load_file(tmp_path / "p1" / "lora.safetensors")
    assert len(one) == 3 * 128
    assert all(key.startswith("lora_unet_") for key in one)
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in one.values())
    train("--phase", 2, *flags(tiny, data, tmp_path / "p2", "--init-lora", tmp_path / "p1", "--steps", 1))
    two = load_file(tmp_path / "p2" / "lora.safetensors")
    assert len(two) == 3 * (128 + 8)
    assert all(value.abs().max() > 0 for key, value in two.items() if "lora_up" in key)
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight"
    assert 0 < (one[key] - two[key]).abs().max() <= 1.1e-2  # went on from phase 1: one AdamW step of lr 1e-2 away
    assert {path: digest(path) for path in base} == base
    recipe = json.loads((tmp_path / "p2" / "args.json").read_text(encoding="utf-8"))
    assert recipe["init_lora_sha256"] == digest(tmp_path / "p1" / "lora.safetensors")
    assert {"args.json", "metrics.jsonl", "timing.jsonl", "loss.png", "lora.safetensors", "train_files.json"} <= {
        p.name for p in (tmp_path / "p2").iterdir()
    }
    seen = json.loads((tmp_path / "p2" / "train_files.json").read_text(encoding="utf-8"))
    assert {row["file_name"] for row in seen} == {f"images/T_{i:02d}.jpg" for i in range(9)}


def test_resume_equals_uninterrupted(tiny, data, tmp_path, monkeypatch):
    """A run that dies after step 6 and resumes from its checkpoint at 4 ends with the bytes of an uninterrupted one: LoRA,
    optimizer state and log. Accumulation, warm-up, cosine schedule, text-encoder budget, noise offset and min-SNR all take part."""
    recipe = [
        "--phase",
        2,
        "--accumulate",
        2,
        "--warmup-steps",
        3,
        "--schedule",
        "cosine",
        "--text-encoder-steps",
        5,
        "--noise-offset",
        0.05,
        "--min-snr-gamma",
        5,
        "--caption-dropout",
        0.5,
    ]
    train(*flags(tiny, data, tmp_path / "whole", *recipe))
    from lesion.train import watch
    real, calls = watch.Log.step, []

    def dies(self, done, *rest):
        calls.append(done)
        if done == 7:
            raise RuntimeError("power cut")
        real(self, done, *rest)
    monkeypatch.setattr(watch.Log, "step", dies)
    with pytest.raises(RuntimeError, match="power cut"):
        train(*flags(tiny, data, tmp_path / "cut", *recipe))
    assert not (tmp_path / "cut" / "lora.safetensors").exists()
    monkeypatch.setattr(watch.Log, "step", real)
    shutil.rmtree(data / ".cache")  # nor does the latent cache matter
    train(*flags(tiny, data, tmp_path / "cut", *recipe, "--resume"))
    for name in ("metrics.jsonl", "checkpoint.safetensors", "lora.safetensors", "loss.png"):
        assert digest(tmp_path / "whole" / name) == digest(tmp_path / "cut" / name), name
    steps = [row["step"] for row in files.read_jsonl(tmp_path / "cut" / "metrics.jsonl") if "loss" in row]
    assert steps == list(range(1, 9))


def test_text_encoder_budget(tiny, data, tmp_path):
    """After --text-encoder-steps the text encoder's LoRA stands still while the U-Net's goes on."""
    train("--phase", 2, *flags(tiny, data, tmp_path / "r", "--text-encoder-steps", 4))
    at_4, at_8 = (load_file(tmp_path / "r" / "checkpoints" / f"lora-{step:06d}.safetensors") for step in (4, 8))
    moved = {key for key in at_4 if not torch.equal(at_4[key], at_8[key])}
    assert moved
    assert all(key.startswith("lora_unet_") for key in moved)


def test_accumulation_equals_a_larger_batch(tiny, data, tmp_path):
    """2 x 2 accumulated tiles give the gradient, and so the LoRA, of a batch of 4."""
    train("--phase", 1, *flags(tiny, data, tmp_path / "a", "--accumulate", 2, "--steps", 1, "--resolution", 128))
    train("--phase", 1, *flags(tiny, data, tmp_path / "b", "--batch-size", 4, "--steps", 1, "--resolution", 128))
    a, b = (files.read_jsonl(tmp_path / run / "metrics.jsonl") for run in "ab")
    a, b = ([row for row in rows if "loss" in row] for rows in (a, b))
    assert a[0]["loss"] == pytest.approx(b[0]["loss"], rel=1e-5)
    assert a[0]["grad_norm"] == pytest.approx(b[0]["grad_norm"], rel=2e-3)  # float32 at 2x2 latents


def test_clipping_clips(tiny, data, tmp_path, monkeypatch):
    """--clip bounds the gradient that reaches the optimizer (in the field's best-known script it bounds nothing)."""
    norms, real = [], torch.optim.AdamW.step

    def watch(self, *rest):
        norms.append(torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]]).norm().item())
        return real(self, *rest)
    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    train("--phase", 1, *flags(tiny, data, tmp_path / "r", "--clip", "1e-4", "--steps", 3))
    logged = [row["grad_norm"] for row in files.read_jsonl(tmp_path / "r" / "metrics.jsonl") if "loss" in row]
    assert min(logged) > 1e-3
    assert norms == pytest.approx([1e-4] * 3, rel=1e-2)


def test_fp16_on_the_cpu(tiny, data, tmp_path, monkeypatch):
    """fp16 autocast with GradScaler over 20 steps: the factors stay float32, one injected overflow is skipped and counted."""
    from lesion.lora import layers
    real, calls = layers.inject, []

    def inject_and_overflow(network, *rest):
        real(network, *rest)

        def hook(gradient):
            calls.append(1)
            return gradient * float("inf") if len(calls) == 5 else gradient
        next(iter(layers.lora_layers(network).values())).lora_up.weight.register_hook(hook)
    monkeypatch.setattr("lesion.train.setup.layers.inject", inject_and_overflow)
    train("--phase", 1, *flags(tiny, data, tmp_path / "r", "--precision", "fp16", "--steps", 20, "--lr", "1e-3"))
    rows = [row for row in files.read_jsonl(tmp_path / "r" / "metrics.jsonl") if "loss" in row]
    skipped = [row["skipped_steps"] for row in rows]  # the first steps may overflow by themselves: the scale starts at 65536
    assert skipped[4] == skipped[3] + 1
    assert skipped[-1] < 10
    lora = load_file(tmp_path / "r" / "lora.safetensors")
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in lora.values())
    assert all(value.abs().max() > 0 for key, value in lora.items() if "lora_up" in key)
    from lesion.run.state import load_state
    _, meta = load_state(tmp_path / "r" / "checkpoint.safetensors")
    assert meta["scaler"]["scale"] == 65536.0 / 2 ** skipped[-1]


def test_non_finite_loss_stops(tiny, data, tmp_path, monkeypatch):
    """A NaN names step, timesteps and tiles, ends the run, and leaves the checkpoint before it as it was."""
    from lesion.train.step import posterior_sample
    real, calls = posterior_sample, []

    def poisoned(*arguments):
        calls.append(1)
        latents = real(*arguments)
        if len(calls) == 6:
            latents[1] = torch.nan
        return latents
    monkeypatch.setattr("lesion.train.step.posterior_sample", poisoned)
    with pytest.raises(ValueError, match=r"step 6: loss is not finite for timesteps \[\d+\], tiles \['images/T_\d\d.jpg'\]"):
        train("--phase", 1, *flags(tiny, data, tmp_path / "r"))
    from lesion.run.state import load_state
    tensors, meta = load_state(tmp_path / "r" / "checkpoint.safetensors")
    assert meta["step"] == 4
    assert all(value.isfinite().all() for value in tensors.values())
    assert not (tmp_path / "r" / "lora.safetensors").exists()
    assert [p.name for p in (tmp_path / "r" / "checkpoints").iterdir()] == ["lora-000004.safetensors"]


def test_training_lowers_the_validation_loss(tiny, data, tmp_path):
    """300 steps on the tiny checkpoint lower the held-out loss by at least a tenth."""
    train(
        "--phase",
        1,
        *flags(tiny, data, tmp_path / "r", "--steps", 300, "--val-every", 300, "--checkpoint-every", 300, "--batch-size", 4, "--rank", 8),
    )
    first, last = (row["val_loss"] for row in files.read_jsonl(tmp_path / "r" / "metrics.jsonl") if "val_loss" in row)
    assert last < 0.9 * first


def test_interrupt_checkpoints_and_says_how_to_go_on(tiny, data, tmp_path):
    """Ctrl-C (SIGINT) finishes the step, writes a checkpoint and exits with 130; --resume then ends the run."""
    import signal
    import time

    command = [
        sys.executable,
        str(ROOT / "train_lora.py"),
        "--phase",
        "1",
        *map(str, flags(tiny, data, tmp_path / "r", "--steps", 100000, "--checkpoint-every", 5)),
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8") as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "r" / "checkpoint.safetensors").exists():
            assert time.monotonic() < deadline
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "go on with: python train_lora.py --resume" in out
    from lesion.run.state import load_state
    done = load_state(tmp_path / "r" / "checkpoint.safetensors")[1]["step"]
    train("--phase", 1, *flags(tiny, data, tmp_path / "r", "--steps", done + 2, "--resume"))
    assert (tmp_path / "r" / "lora.safetensors").is_file()


@pytest.mark.parametrize(("change", "message"), [
    (["--label", "melanoma"], "no training tile labelled 'melanoma'; its labels: {'malignant': 9, 'benign': 4}"),
    (["--rank", "0"], "0 is out of range: allowed is at least 1"),
    (["--resolution", "100"], "100 is not a multiple of 64"),
    (["--data", "nowhere"], "nowhere is not a prepared data set"),
    (["--base", "nowhere.safetensors"], "nowhere.safetensors not found"),
    (["--init-lora", "nowhere.safetensors"], "nowhere.safetensors not found"),
    (["--device", "cuda"], "no CUDA device"),
    (["--step", "3"], "unrecognized arguments: --step"),
])
def test_bad_input(tiny, data, tmp_path, run_script, change, message):
    """Bad flags and inputs end with exit code 2 and one line, and leave no output."""
    if change[0] == "--device" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    done = run_script("train_lora.py", "--phase", 1, *flags(tiny, data, tmp_path / "r"), *change)
    assert done.returncode == 2
    assert message in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("train_lora.py: ")]) == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "r").exists()


def test_folder_of_another_run(tiny, data, tmp_path):
    """A run folder is neither overwritten nor resumed with another recipe; a foreign folder is left alone."""
    train("--phase", 1, *flags(tiny, data, tmp_path / "r", "--steps", 1))
    before = digest(tmp_path / "r" / "lora.safetensors")
    with pytest.raises(ValueError, match="holds a run already"):
        train("--phase", 1, *flags(tiny, data, tmp_path / "r", "--steps", 1))
    with pytest.raises(ValueError, match="lr was 0.01, now 0.02"):
        train("--phase", 1, *flags(tiny, data, tmp_path / "r", "--lr", "2e-2", "--resume"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious", encoding="utf-8")
    with pytest.raises(ValueError, match="not a run folder"):
        train("--phase", 1, *flags(tiny, data, tmp_path / "mine"))
    assert digest(tmp_path / "r" / "lora.safetensors") == before


def test_unreadable_tile_is_named_and_skipped(tiny, data, tmp_path, capsys):
    """A damaged JPEG is named and left out; the run goes on with the rest."""
    broken = tmp_path / "data"
    shutil.copytree(data, broken, ignore=shutil.ignore_patterns(".cache"))
    (broken / "images" / "T_03.jpg").write_bytes((data / "images" / "T_03.jpg").read_bytes()[:300])
    train("--phase", 1, *flags(tiny, broken, tmp_path / "r", "--steps", 1))
    assert "skipped images/T_03.jpg" in capsys.readouterr().out
    seen = json.loads((tmp_path / "r" / "train_files.json").read_text(encoding="utf-8"))
    assert "images/T_03.jpg" not in {row["file_name"] for row in seen}


def test_long_prompt_says_what_is_cut(tiny, data, tmp_path, capsys):
    """A prompt over 75 tokens is used cut, and the lost end is printed."""
    long = tmp_path / "data"
    shutil.copytree(data, long, ignore=shutil.ignore_patterns(".cache"))
    rows = files.read_manifest(long)
    rows[0]["text"] = "mole " * 80 + "the very end"
    files.write_manifest(long, rows)
    train("--phase", 1, *flags(tiny, long, tmp_path / "r", "--steps", 1))
    assert "1 prompts are longer than 75 tokens" in (said := capsys.readouterr().out)
    assert "the very end" in said


def test_a_recipe_file_reproduces_a_run(tiny, data, tmp_path):
    """A run from another's args.json ends with the same LoRA, and logs to TensorBoard where that is installed, else says so."""
    train("--phase", 1, *flags(tiny, data, tmp_path / "a", "--steps", 2))
    train("--recipe", tmp_path / "a" / "args.json", "--out", tmp_path / "b")
    assert load_file(tmp_path / "a" / "lora.safetensors").keys() == load_file(tmp_path / "b" / "lora.safetensors").keys()
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == (tmp_path / "b" / "metrics.jsonl").read_bytes()
    if importlib.util.find_spec("tensorboard"):
        train("--recipe", tmp_path / "a" / "args.json", "--out", tmp_path / "c", "--log", "tensorboard")
        assert list((tmp_path / "c" / "tensorboard").glob("events.*"))
    else:
        with pytest.raises(ValueError, match="pip install tensorboard"):
            train("--recipe", tmp_path / "a" / "args.json", "--out", tmp_path / "c", "--log", "tensorboard")


# --- guards that survive the process ---------------------------------------------------------------------------------------


def overflow_always(monkeypatch):
    """Every gradient of the first LoRA layer is infinite."""
    from lesion.lora import layers
    real = layers.inject

    def inject(network, *rest):
        real(network, *rest)
        next(iter(layers.lora_layers(network).values())).lora_up.weight.register_hook(lambda gradient: gradient * float("inf"))
    monkeypatch.setattr("lesion.train.setup.layers.inject", inject)


def test_overflows_in_a_row_are_counted_across_resume(tiny, data, tmp_path, monkeypatch):
    """Five in a row are too many: a run stopped after four and resumed ends at the next one, not after five more."""
    monkeypatch.setattr(train_lora, "MAX_SKIPPED", 5)
    overflow_always(monkeypatch)
    recipe = flags(tiny, data, tmp_path / "r", "--precision", "fp16", "--steps", 12, "--checkpoint-every", 4)
    with pytest.raises(ValueError, match="step 4: 5 steps in a row overflowed in fp16"):
        train("--phase", 1, *recipe)
    with pytest.raises(ValueError, match="step 4: 5 steps in a row overflowed in fp16"):
        train("--phase", 1, *recipe, "--resume")
    assert not (tmp_path / "r" / "lora.safetensors").exists()


def test_a_run_that_never_learnt_ends_badly(tiny, data, tmp_path, monkeypatch):
    """Fewer steps than the limit, every one of them void: an error, and no LoRA."""
    overflow_always(monkeypatch)
    with pytest.raises(ValueError, match="all 3 steps overflowed in fp16: nothing was learnt, no LoRA is written"):
        train("--phase", 1, *flags(tiny, data, tmp_path / "r", "--precision", "fp16", "--steps", 3))
    assert not (tmp_path / "r" / "lora.safetensors").exists()


def test_a_second_ctrl_c_while_a_sample_is_drawn(tiny, data, tmp_path, monkeypatch):
    """The first signal waits for the step, the second interrupts the drawing at once; the last state is as it was."""
    import signal

    from lesion.train import watch
    reached = []

    def sampling(*_):
        def sample(path):
            if path.stem == "step-000005":
                signal.raise_signal(signal.SIGINT)
                reached.append(1)
                signal.raise_signal(signal.SIGINT)
                reached.append(2)
        return sample
    monkeypatch.setattr(watch, "sampling", sampling)
    with pytest.raises(KeyboardInterrupt):
        train("--phase", 1, *flags(tiny, data, tmp_path / "r", "--sample-every", 5))
    assert reached == [1]
    from lesion.run.state import load_state
    assert load_state(tmp_path / "r" / "checkpoint.safetensors")[1]["step"] == 4
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # given back


def test_training_in_a_thread(tiny, data, tmp_path):
    """A notebook's worker thread may train: no handler is set there, and the run ends well."""
    import signal
    import threading
    errors = []

    def work():
        try:
            train("--phase", 1, *flags(tiny, data, tmp_path / "r", "--steps", 1))
        except BaseException as error:
            errors.append(error)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert (tmp_path / "r" / "lora.safetensors").is_file()
    assert not (tmp_path / "r" / ".lock").exists()


def test_more_steps_of_a_cosine_are_said(tiny, data, tmp_path, capsys):
    """Resumed with more steps: the line tells the rate of before, the new one and the step; the log has the new one."""
    recipe = ["--phase", 1, *flags(tiny, data, tmp_path / "r", "--schedule", "cosine")]
    train(*recipe, "--steps", 4)
    capsys.readouterr()
    train(*recipe, "--steps", 8, "--resume")
    assert "--steps was 4 and is 8: the cosine is drawn anew over all of them, so at step 4 the learning rate goes from 0 to 0.005" in \
        capsys.readouterr().out
    rates = {row["step"]: row["lr"] for row in files.read_jsonl(tmp_path / "r" / "metrics.jsonl") if "loss" in row}
    assert rates[5] == pytest.approx(5e-3)


def test_a_second_run_on_one_folder_is_refused(tiny, data, tmp_path):
    """While a run works on a folder, `--resume` on it is refused with who holds it, and the run's files are not touched."""
    from lesion.run import lock
    with lock.owner(tmp_path / "r"), pytest.raises(ValueError, match=r"is in use by .* \(process \d+ on "):
        train("--phase", 1, *flags(tiny, data, tmp_path / "r"), "--resume")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(("name", "change"), [
    ("images/T_03.jpg", lambda content: content[:-4] + b"XX" + content[-2:]),
    ("images/T_03.jpg", lambda content: content[:len(content) // 2]),  # cannot be read: but it could be when it was written
    ("metadata.jsonl", lambda content: content.replace(b"lesion", b"lerion", 1)),
    ("dataset.json", lambda content: content.replace(b"none", b"nine")),
])
def test_a_changed_data_set_is_refused(tiny, data, tmp_path, name, change):
    """A tile, a text or a setting that is not what `prepare` wrote down is named before anything is learnt from it."""
    shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns(".cache"))
    sums.write(tmp_path / "data")
    (tmp_path / "data" / name).write_bytes(change((data / name).read_bytes()))
    with pytest.raises(ValueError, match=f"{Path(name).name} is not what was written: its SHA-256 differs from SHA256SUMS"):
        train("--phase", 1, *flags(tiny, tmp_path / "data", tmp_path / "r"))


def test_a_finished_run_is_not_spoilt(tiny, data, tmp_path):
    """A refused --resume (fewer steps) leaves every byte; one bit of a finished run's LoRA is neither gone on from nor begun with, nor
    taken for whole because the run was resumed; an old checkpoint that was removed by hand is not missed."""
    run = tmp_path / "r"
    train("--phase", 1, *flags(tiny, data, run, "--steps", 2, "--checkpoint-every", 1))
    before = {path: digest(path) for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="has done 2 steps already: --steps 1 is fewer"):
        train("--phase", 1, *flags(tiny, data, run, "--steps", 1, "--checkpoint-every", 1), "--resume")
    assert {path: digest(path) for path in run.rglob("*") if path.is_file()} == before
    (run / "checkpoints" / "lora-000001.safetensors").unlink()
    train("--phase", 1, *flags(tiny, data, run, "--steps", 2, "--checkpoint-every", 1), "--resume")
    content = bytearray((run / "lora.safetensors").read_bytes())
    content[-2] ^= 64
    (run / "lora.safetensors").write_bytes(content)
    for more in (("--phase", 1, *flags(tiny, data, run, "--steps", 2, "--checkpoint-every", 1), "--resume"),
                 ("--phase", 2, *flags(tiny, data, tmp_path / "p2", "--init-lora", run))):
        with pytest.raises(ValueError, match="lora.safetensors is not what was written"):
            train(*more)
    assert not (tmp_path / "p2").exists()


def test_flags_reach_the_run(tiny, data, tmp_path):
    """A constant rate stays, one view is the only one encoded, all layers have a LoRA, every written file is in the layout asked for."""
    alone = tmp_path / "data"
    shutil.copytree(data, alone, ignore=shutil.ignore_patterns(".cache"))
    train("--phase", 1, *flags(tiny, alone, tmp_path / "r", "--steps", 3, "--views", 1, "--lora-targets", "all", "--lora-format",
                                "diffusers"))
    assert [row["lr"] for row in files.read_jsonl(tmp_path / "r" / "metrics.jsonl") if "loss" in row] == [1e-2] * 3
    for path in (tmp_path / "r" / "lora.safetensors", tmp_path / "r" / "checkpoints" / "lora-000003.safetensors"):
        assert all(key.startswith("unet.") for key in load_file(path)), path
        assert any(".ff.net.2.lora_A" in key for key in load_file(path))
    (cache,) = (alone / ".cache").glob("latents-*.safetensors")
    encoded = ~load_file(cache)["mean"][:, :, 0, 0, 0].isnan()
    assert encoded[:, 0].any()
    assert not encoded[:, 1:].any()


def test_text_encoder_budget_across_resume(tiny, data, tmp_path):
    """Resumed long after the budget of 2 steps was spent, the text encoder's LoRA still stands still: the run is the uninterrupted one."""
    recipe = ["--phase", 2, "--init-lora", "none", "--text-encoder-steps", 2]
    train(*recipe, *flags(tiny, data, tmp_path / "whole"))
    train(*recipe, *flags(tiny, data, tmp_path / "cut", "--steps", 4))
    train(*recipe, *flags(tiny, data, tmp_path / "cut"), "--resume")
    assert digest(tmp_path / "cut" / "lora.safetensors") == digest(tmp_path / "whole" / "lora.safetensors")


@pytest.mark.parametrize(("flag", "value", "words"), [
    ("--seed", 1, "seed was 0, now 1"), ("--batch-size", 3, "batch_size was 2, now 3"), ("--holdout", 0.3, "holdout was 0.0, now 0.3"),
    ("--min-snr-gamma", 5, "min_snr_gamma was None, now 5.0"), (None, None, "data_sha256 was")])
def test_what_decides_the_steps_may_not_change(tiny, data, tmp_path, flag, value, words):
    """Another seed, batch, share held out, weighting or text of a tile: not the same run."""
    own = tmp_path / "data"
    shutil.copytree(data, own)
    train("--phase", 1, *flags(tiny, own, tmp_path / "r", "--steps", 1))
    if flag is None:
        rows = files.read_manifest(own)
        files.write_manifest(own, [rows[0] | {"text": "another text"}, *rows[1:]])
    with pytest.raises(ValueError, match=words):
        train("--phase", 1, *flags(tiny, own, tmp_path / "r", "--steps", 2, "--resume", *([flag, value] if flag else [])))


def test_the_tile_of_a_bad_loss_is_the_right_one(tiny, data, tmp_path, monkeypatch):
    """The second sample of step 6 is spoilt: the tile named is the plan's."""
    from lesion.train.latents import plan
    from lesion.train.step import posterior_sample
    calls = []

    def poisoned(*arguments):
        calls.append(1)
        latents = posterior_sample(*arguments)
        latents[1] *= torch.nan if len(calls) == 6 else 1
        return latents
    monkeypatch.setattr("lesion.train.step.posterior_sample", poisoned)
    tile = plan(9, 2, 8, 0)[0][5, 1]
    with pytest.raises(ValueError, match=rf"tiles \['images/T_{tile:02d}.jpg'\]"):
        train("--phase", 1, *flags(tiny, data, tmp_path / "r"))
