"""Corners of the training set-up and log that no whole run of tests/train/test_train_lora.py reaches."""

import importlib.util
import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from lesion.lora import formats, layers
from lesion.run import files
from lesion.run.optim import warmup_cosine
from lesion.run.state import load_state
from lesion.sd import checkpoint
from lesion.train import setup, watch


def a_log(out: Path, done: int = 0) -> watch.Log:
    rows = [{"file_name": f"images/{i}.jpg"} for i in range(3)]
    return watch.Log(out, torch.device("cpu"), rows, done, 2)


def test_a_run_killed_before_its_first_checkpoint_starts_its_log_again(tmp_path):
    """Step 0's validation would otherwise stand twice in the log of a run that is resumed from nothing."""
    log = a_log(tmp_path)
    log.open(0)
    log.validation(0, {"val_loss": 1.0})
    again = a_log(tmp_path)
    again.open(0)
    again.validation(0, {"val_loss": 1.0})
    assert files.read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 0, "val_loss": 1.0}]


def test_the_log_is_cut_to_the_checkpoint(tmp_path):
    """Resumed from step 2: the validation of step 0 and the rows up to 2 stay, in both logs."""
    for name in ("metrics.jsonl", "timing.jsonl"):
        files.append_jsonl(tmp_path / name, *({"step": step} for step in (0, 1, 2, 3)))
    a_log(tmp_path, 2).open(2)
    for name in ("metrics.jsonl", "timing.jsonl"):
        assert [row["step"] for row in files.read_jsonl(tmp_path / name)] == [0, 1, 2]


def test_an_overflowed_gradient_is_valid_json(tmp_path):
    """The norm of a skipped step is logged as null: other readers of JSON do not know Infinity or NaN."""
    log = a_log(tmp_path)
    for step, norm in ((1, float("inf")), (2, float("nan")), (3, 0.5)):
        log.step(step, torch.ones(2), torch.tensor([10, 990]), [0, 2], torch.tensor(norm), 1e-4, 0)
    log.flush()

    def refuse(constant):
        raise AssertionError(constant)

    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line, parse_constant=refuse)["grad_norm"] for line in lines] == [None, None, 0.5]


def test_a_non_finite_loss_is_never_logged(tmp_path):
    """The error names step, timestep and tile of the bad sample only, and no row of the batch reaches the file."""
    log = a_log(tmp_path)
    log.step(1, torch.tensor([1.0, 2.0]), torch.tensor([10, 990]), [0, 2], torch.tensor(1.0), 1e-4, 0)
    log.step(2, torch.tensor([1.0, torch.inf]), torch.tensor([10, 990]), [0, 2], torch.tensor(1.0), 1e-4, 0)
    with pytest.raises(ValueError, match=r"step 2: .* timesteps \[990\], tiles \['images/2.jpg'\]"):
        log.flush()
    with pytest.raises(ValueError, match="step 2: validation loss is nan"):
        log.validation(2, {"val_loss": float("nan")})
    assert not (tmp_path / "metrics.jsonl").exists()


def test_quartiles():
    """Means over timesteps 0-249, 250-499, 500-749, 750-999; None, not NaN, where a quarter is empty."""
    error = torch.tensor([1.0, 3.0, 5.0, 7.0], dtype=torch.float64)
    assert watch.quartiles(error, torch.tensor([0, 249, 250, 999])) == {1: 2.0, 2: 5.0, 3: None, 4: 7.0}


def test_learning_rate():
    """Linear warm-up ends at the peak; constant stays; a cosine would reach 0 one step after the last."""
    factors = [warmup_cosine(1.0, step, 12, 4) for step in range(12)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[8] == pytest.approx(0.5)
    assert warmup_cosine(1.0, 12, 12, 4) == pytest.approx(0, abs=1e-12)
    assert all(a > b for a, b in zip(factors[4:], factors[5:]))
    assert {warmup_cosine(3e-5, step, 12, 0, "constant") for step in range(12)} == {3e-5}


def test_phase_1_refuses_a_text_encoder_lora(tiny, tmp_path):
    """Phase 1 would drop that part from its own LoRA without a word."""
    sd = checkpoint.load(tiny / "folder")
    path = layers.target_paths(sd.text_encoder, "attention")[0]
    start = tmp_path / "two.safetensors"
    both = {f"text_encoder.{path}": layers.Factors(torch.zeros(2, 64), torch.zeros(64, 2), 2.0)}
    formats.write(start, both, {})
    recipe = SimpleNamespace(phase=1, lora_targets="attention", rank=2, alpha=2.0, seed=0, rates=lambda: {"unet": 1e-3})
    with pytest.raises(ValueError, match="phase 1 would neither train nor save"):
        setup.add_lora(recipe, sd, str(start))


@pytest.fixture
def train_lora():
    """The script as a module; its signal handlers are taken back."""
    spec = importlib.util.spec_from_file_location("train_lora", Path(__file__).parents[2] / "train_lora.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    yield module
    for name, handler in before.items():
        signal.signal(name, handler)


@pytest.fixture
def data(tmp_path):
    """A prepared set of one tile."""
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (64, 64), (200, 160, 140)).save(folder / "a.png")
    files.write_manifest(folder, [{"file_name": "a.png", "text": "a lesion", "label": "malignant"}])
    return folder


def flags(tiny, data, out):
    common = {
        "--phase": 1,
        "--base": tiny / "folder",
        "--data": data,
        "--out": out,
        "--resolution": 64,
        "--batch-size": 1,
    }
    return [str(part) for pair in common.items() for part in pair]


def test_a_refused_lora_leaves_no_run_folder(tiny, data, tmp_path, train_lora):
    """A bad --init-lora is found before the run folder is made: the corrected command can use the same --out."""
    (tmp_path / "bad.safetensors").write_bytes(b"not a LoRA")
    with pytest.raises(ValueError, match="bad.safetensors is damaged"):
        train_lora.main([*flags(tiny, data, tmp_path / "run"), "--init-lora", str(tmp_path / "bad.safetensors")])
    assert not (tmp_path / "run").exists()


def test_ctrl_c_during_a_long_sample_loses_nothing(tiny, data, tmp_path, train_lora, monkeypatch, capsys):
    """A signal that comes while the sample sheet is drawn, the slowest part of a step, still ends in a checkpoint of the
    very step that the message names."""

    def sampling(*_):
        return lambda path: path.stem == "step-000002" and signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(watch, "sampling", sampling)
    with pytest.raises(KeyboardInterrupt):
        train_lora.main([*flags(tiny, data, tmp_path / "run"), "--steps", "9", "--sample-every", "2"])
    done = load_state(tmp_path / "run" / "checkpoint.safetensors")[1]["step"]
    assert f"stopped after step {done};" in capsys.readouterr().out
    assert done in (2, 3)


@pytest.mark.parametrize("split", ["train", "val"])
def test_tiles_without_text_are_refused(tiny, data, tmp_path, train_lora, split):
    """A training or a held-out tile that nobody has described is named; a test tile does not matter."""
    rows = files.read_manifest(data)
    files.write_manifest(
        data,
        [
            *rows,
            {**rows[0], "file_name": "b.png", "split": split, "text": None},
            {**rows[0], "file_name": "c.png", "split": "test", "text": None},
        ],
    )
    with pytest.raises(ValueError, match="1 tiles have no text, first b.png"):
        train_lora.main(flags(tiny, data, tmp_path / "run"))


def test_phase_2_starts_from_its_own_phase_1(tmp_path, monkeypatch):
    """Same base, data, colour normalisation, rank and targets, of the same class; anything else is not a start."""
    monkeypatch.chdir(tmp_path)
    known = {"base_sha256": "b", "data_sha256": "d", "color_norm": "none", "rank": 4, "lora_targets": "all"}
    for folder, args in (("malignant-phase1", known), ("benign-phase1", known)):
        files.write_bytes(tmp_path / "runs" / folder / "lora.safetensors", b"x")
        files.write_json(tmp_path / "runs" / folder / "args.json", args)
    recipe = SimpleNamespace(init_lora=None, phase=2, label="malignant")
    assert setup._starting_lora(recipe, known) == Path("runs/malignant-phase1/lora.safetensors")
    for key in known:
        assert setup._starting_lora(recipe, known | {key: "other"}) is None, key
    (tmp_path / "runs" / "malignant-phase1" / "lora.safetensors").unlink()
    assert setup._starting_lora(recipe, known) is None


def test_held_out_patients_are_rounded():
    """.35 of five patients are two, not one."""
    rows = [{"file_name": f"{i}.jpg", "patient_id": f"P{i // 2}"} for i in range(10)]
    assert len(setup.hold_out(rows, 0.35, 0)[1]) == 4


def test_samples_have_seeds_of_their_own(tiny, tmp_path, monkeypatch):
    """Five samples in batches of two: seeds 0 to 4, the empty negative prompt, the base's guidance, the run's size and steps."""
    calls = []
    sd = checkpoint.load(tiny / "folder")
    monkeypatch.setattr(watch.pipeline, "draw", lambda *given, **more: calls.append((given, more)) or torch.zeros(len(given[3]), 4, 8, 8))
    monkeypatch.setattr(watch.pipeline, "decode", lambda sd, latents: torch.zeros(len(latents), 3, 64, 64))
    recipe = SimpleNamespace(seed=0, sample_count=5, batch_size=2, base=str(watch.folders.MINI), precision="fp32", resolution=64,
                             sample_steps=7)
    watch.sampling(recipe, sd, [{"text": "a"}, {"text": "b"}], torch.device("cpu"))(tmp_path / "sheet.png")
    empty = watch.pipeline.encode_prompts(sd, [""])[0]
    assert [seed for given, _ in calls for seed in given[3]] == [0, 1, 2, 3, 4]
    for given, more in calls:
        assert all(torch.equal(row, empty) for row in given[2])
        assert not any(torch.equal(row, empty) for row in given[1])
        assert (given[4], more) == (64, {"steps": 7, "guidance_scale": 2.0})


def test_validation_by_quartile(tiny, monkeypatch):
    """An error that is the timestep's: .125 .375 .625 .875, each under its own quartile."""
    monkeypatch.setattr(watch, "noise_error", lambda model, latents, noise, timesteps, **texts: timesteps / 1000)
    held = watch.Tiles(torch.zeros(3, 64, 64, 3, dtype=torch.uint8).numpy(), [{"text": "a"}] * 3, [])
    recipe = SimpleNamespace(seed=0, phase=1, precision="fp32")
    found = watch.validation(recipe, checkpoint.load(tiny / "folder"), held, torch.device("cpu"))()
    assert found == {"val_loss": pytest.approx(0.5), **{f"val_loss_q{q}": pytest.approx(0.25 * q - 0.125) for q in (1, 2, 3, 4)}}
