"""`python -m lesion pretrain`: both stages run, resume to the bit, end in a folder that our loader and diffusers read."""
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from lesion.describe import prompts
from lesion.mini import check, loop, pretrain, unet
from lesion.mini import vae as autoencoder
from lesion.run import files, folders, sums
from lesion.sd import checkpoint
from lesion.sd.clip import Tokenizer
from lesion.sd.vae import VAE, VAEConfig, to_pixels


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twenty-four benign training tiles with sentences of the grammar, and a val tile that must not be read."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i in range(25):
        image = rng.normal([200, 150, 130], 10, (128, 128, 3)) - 80 * (np.hypot(*np.mgrid[-64:64, -64:64]) < 10 + i)[..., None]
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{i}.png")
        rows.append({"file_name": f"images/{i}.png", "label": "benign", "split": "val" if i == 24 else "train",
                     "attributes": {"skin_tone": prompts.NAMES["skin_tone"][i % 6]},
                     "text": prompts.to_sentence("benign", {"skin_tone": prompts.NAMES["skin_tone"][i % 6]})})
    (folder / "images" / "24.png").write_bytes(b"a val tile is never opened")
    files.write_manifest(folder, rows)
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few held-back tiles, one thread."""
    monkeypatch.setattr(loop, "CHECK_TILES", 8)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(stage, data, out, *more):
    pretrain.main([str(a) for a in ("--stage", stage, "--data", data, "--out", out, "--batch-size", 2, "--steps", 4, "--warmup-steps", 2,
                                    "--checkpoint-every", 2, *more)])


def digests(folder):
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.suffix in (".safetensors", ".jsonl", ".png")
    }


def test_every_stage_resumes_to_the_bit_and_loads(data, tmp_path, monkeypatch, capsys):
    """4 steps equal 2 + a log row that a crash left + resume + 2: the same bytes of every file (weights with metadata, checkpoint,
    log, sheet), in both precisions; the result loads as an SD 1.5 folder, here and in diffusers."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    monkeypatch.setattr(unet, "sample_sheet", lambda *_, **__: None)  # thirty sampling steps a checkpoint
    for stage, more in (("vae", ("--precision", "fp32")), ("texture", ("--precision", "bf16")), ("unet", ("--rare-power", 0.5))):
        run(stage, data, whole, *more)
        run(stage, data, cut, "--stop-at", 2, *more)
        files.append_jsonl(cut / f"{stage}.jsonl", {"step": 3, "loss": 0.0})  # logged, killed before its checkpoint:
        (cut / sums.NAME).unlink()                                            # and so before its hashes
        with pytest.raises(ValueError, match="give --resume"):
            run(stage, data, cut, *more)
        run(stage, data, cut, "--resume", *more)
        assert digests(whole) == digests(cut)
    sd = checkpoint.load(whole)
    from diffusers import AutoencoderKL, UNet2DConditionModel
    g = torch.Generator().manual_seed(0)
    x, t, pixels = torch.randn(1, 4, 16, 16, generator=g), torch.tensor([500]), torch.rand(1, 3, 64, 64, generator=g) * 2 - 1
    with torch.no_grad():
        context = sd.text_encoder(sd.tokenizer(["a clinical photograph of a benign skin lesion"])[0])
        reference = UNet2DConditionModel.from_pretrained(whole / "unet", torch_dtype=torch.float32)
        torch.testing.assert_close(sd.unet(x, t, context), reference(x, t, context).sample, rtol=0, atol=1e-5)
        reference = AutoencoderKL.from_pretrained(whole / "vae", torch_dtype=torch.float32)
        torch.testing.assert_close(sd.vae.encode(pixels)[0], reference.encode(pixels).latent_dist.mean, rtol=0, atol=2e-4)

    monkeypatch.setattr(check, "GUIDANCE", (1.0, 3.0))
    monkeypatch.setattr(check, "TRIED", 4)
    monkeypatch.setattr(check, "DRAWN", 12)
    monkeypatch.setattr(check, "DRAW_STEPS", 2)
    run("check", with_val(data, tmp_path / "val", 8), whole)
    base = json.loads(capsys.readouterr().out.splitlines()[-1])["base"]
    assert {base["steering_guidance"], base["kid_guidance"]} <= {1.0, 3.0}
    assert base["steering"]["skin_tone"]["n"] == 12
    assert base["real_vs_real"] < base["kid"] > 3 * base["kid_se"]  # four steps of training draw nothing like skin
    assert Image.open(whole / "samples" / "check-base.png").width > 16 * 128


def with_val(data, folder, count):
    """A copy of the data set whose first `count` rows are split val, and where no tile is broken."""
    shutil.copytree(data, folder, ignore=shutil.ignore_patterns(".cache"))
    rows = files.read_manifest(data)
    files.write_manifest(folder, [{**row, "split": "val" if i < count else "train"} for i, row in enumerate(rows) if i < 24])
    return folder


def test_latents_have_unit_scale(data, tmp_path):
    """After the export 0.18215 times a training tile's latent mean has mean 0 and deviation 1 in every channel."""
    run("vae", data, tmp_path)
    images, _ = loop.benign_training_tiles(data, 128)
    with torch.no_grad():
        mean, _ = autoencoder.load(tmp_path).encode(to_pixels(images[:-8]))
    latents = 0.18215 * mean
    assert latents.mean((0, 2, 3)).abs().max() < 0.05
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.05


@torch.no_grad()
def test_another_unit_of_latents_is_the_same_autoencoder():
    """The change of unit is folded into both ends: what is encoded and decoded comes out as before."""
    torch.manual_seed(0)
    vae = VAE(VAEConfig(block_out_channels=(8, 8, 8, 8), norm_num_groups=4)).eval()
    images = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8)
    before = vae.decode(vae.encode(to_pixels(images))[0])
    autoencoder.to_unit_scale(vae, images)
    mean, _ = vae.encode(to_pixels(images))
    assert (0.18215 * mean).std((0, 2, 3)) == pytest.approx(1, abs=1e-3)
    assert (vae.decode(mean) - before).abs().max() < 1e-4 * before.abs().max()


def test_changed_flags_are_refused_or_recorded(data, tmp_path):
    """--resume with another flag is an error that names it; with --change-flags the weights' metadata tells both stretches."""
    run("vae", data, tmp_path, "--stop-at", 2)
    with pytest.raises(ValueError, match=r"kl_weight was 0.0005, now 0.1.*--change-flags"):
        run("vae", data, tmp_path, "--resume", "--kl-weight", 0.1)
    shutil.copytree(data, tmp_path / "other", ignore=shutil.ignore_patterns(".cache"))
    shutil.copy(data / "images" / "3.png", tmp_path / "other" / "images" / "4.png")
    with pytest.raises(ValueError, match=r"data_sha256 was .*--change-flags"):
        run("vae", tmp_path / "other", tmp_path, "--resume")
    run("vae", data, tmp_path, "--resume", "--kl-weight", 0.1, "--change-flags")
    with safe_open(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", "pt") as file:
        stretches = json.loads(file.metadata()["lesion_recipe"])
    assert [(one["from_step"], one["kl_weight"]) for one in stretches] == [(0, 5e-4), (2, 0.1)]


def test_start(data, tmp_path):
    """--start begins with a model's weights: texture leaves its encoder as it was and moves its decoder; a U-Net of other latents,
    or a folder without a model, is refused."""
    run("vae", data, tmp_path / "first")
    run("texture", data, tmp_path / "second", "--start", tmp_path / "first", "--precision", "fp32")
    before, after = (autoencoder.load(tmp_path / name).state_dict() for name in ("first", "second"))
    moved = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert moved == {"decoder", "post_quant_conv"}
    with pytest.raises(ValueError, match="holds no model"):
        run("vae", data, tmp_path / "third", "--start", tmp_path)
    run("vae", data, tmp_path / "third", "--seed", 1)
    with pytest.raises(ValueError, match="latents of another autoencoder"):
        run("unet", data, tmp_path / "third", "--start", folders.MINI)


TORCHRUN = """
import sys
from lesion.mini import loop, pretrain, unet
loop.CHECK_TILES = 8
unet.sample_sheet = lambda *_, **__: None
pretrain.main(sys.argv[1:])
"""


def test_two_processes_equal_one(data, tmp_path, monkeypatch):
    """Stage unet under torchrun, in two sittings: two processes with half a batch each take the steps of one with the whole (without the
    averaging, weights go elsewhere); a batch that cannot be shared and another stage are refused."""
    monkeypatch.setattr(unet, "sample_sheet", lambda *_, **__: None)
    flags = ("--batch-size", 4, "--precision", "fp32")
    for name in ("two", "one"):
        run("vae", data, tmp_path / name, "--steps", 1)
    run("unet", data, tmp_path / "one", *flags)
    (tmp_path / "run.py").write_text(TORCHRUN, encoding="utf-8")
    for more in (("--stop-at", 2), ("--resume",)):
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--",
                               *map(str, (tmp_path / "run.py", "--stage", "unet", "--data", data, "--out", tmp_path / "two", "--steps", 4,
                                          "--warmup-steps", 2, "--checkpoint-every", 2, *flags, *more))],
                              env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(loop.__file__).parents[2])},
                              capture_output=True, encoding="utf-8", timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
    two, one = (load_file(tmp_path / name / "unet.checkpoint.safetensors") for name in ("two", "one"))
    begin = unet.build(unet.write_tokenizer(tmp_path / "tokenizer"), 0).state_dict()
    way = {key: (one[f"model.{key}"] - value).norm() for key, value in begin.items()}
    apart = {key: (two[f"model.{key}"] - one[f"model.{key}"]).norm() for key in begin}
    assert sum(apart.values()) < 0.05 * sum(way.values())
    assert [row["step"] for row in files.read_jsonl(tmp_path / "two" / "unet.jsonl")] == [2, 4]
    monkeypatch.setattr("lesion.run.devices.process", lambda _: (0, 2, torch.device("cpu")))
    for stage, size in (("unet", 3), ("vae", 4)):
        with pytest.raises(ValueError, match="2 processes share"):
            run(stage, data, tmp_path / "two", "--batch-size", size, "--resume")


def test_vocabulary_covers_the_grammar(tmp_path):
    """Every sentence of the grammar is at most 77 tokens, every word of it one token; other text still has tokens."""
    size = unet.write_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    everything = {name: list(values[1:]) if prompts.VOCABULARY[name].many else values[0] for name, values in prompts.NAMES.items()}
    everything["other_colors"] = [c for c in prompts.NAMES["color"] if c != everything["color"]]
    sentence = prompts.to_sentence("malignant", everything)
    token_ids, cut = tokenizer([sentence, "Größe 12 µm?"])
    assert cut == ["", ""]
    assert token_ids.max() < size
    words = [w for w in unet.vocabulary_words() if w.isalpha()]
    assert all(len(tokenizer.clip(word, add_special_tokens=False).input_ids) == 1 for word in words)
    assert tokenizer.clip.decode(tokenizer.clip(sentence, add_special_tokens=False).input_ids).replace(" ", "") == sentence.replace(" ", "")


def test_only_benign_training_tiles(data, tmp_path):
    """Too few tiles, or a missing first stage, is one clear line."""
    few = tmp_path / "few"
    shutil.copytree(data, few, ignore=shutil.ignore_patterns(".cache"))
    rows = files.read_manifest(few)
    files.write_manifest(few, [{**row, "label": "malignant"} if i > 3 else row for i, row in enumerate(rows)])
    with pytest.raises(ValueError, match="has 4 benign training tiles; at least 16"):
        run("vae", few, tmp_path / "out")
    with pytest.raises(ValueError, match="run --stage vae first"):
        run("unet", data, tmp_path / "out")


def test_check(data, tmp_path, capsys):
    """--stage check reports the autoencoder beside the bicubic baseline, on split val alone."""
    run("vae", data, tmp_path / "out")
    run("check", with_val(data, tmp_path / "val", 4), tmp_path / "out")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])["autoencoder"]
    assert result["tiles"] == 4
    assert result["bicubic_8x"]["psnr_db"] > 20
    assert set(result["vae"]) == {"psnr_db", "psnr_color_db", "high_frequency"}
    assert (tmp_path / "out" / "samples" / "check-vae.png").is_file()
