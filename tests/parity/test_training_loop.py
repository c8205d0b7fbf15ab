"""The real loop of train_lora.py, two steps of phase 2 with every option on, against a loop built from diffusers, transformers, peft
and torch alone: losses, gradient norms, learning rates, validation, and every tensor of the written file.

The reference shares no code with the project. It knows only the published rules: which tiles train (split, patients held out), which
tile and view a step sees, how its random numbers are keyed, and kohya's file layout.
"""
import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
SEED, STEPS, BATCH, ACCUMULATE, RANK, ALPHA = 5, 2, 2, 2, 2, 3.0
LR, TEXT_LR, DECAY, CLIP, OFFSET, DROPOUT, GAMMA, HOLDOUT, VAL = 2e-3, 5e-4, 0.3, 0.05, 0.3, 0.5, 5.0, 0.3, 4
SETTINGS = {"phase": 2, "steps": STEPS, "batch-size": BATCH, "accumulate": ACCUMULATE, "rank": RANK, "alpha": ALPHA, "lr": LR,
            "text-encoder-lr": TEXT_LR, "weight-decay": DECAY, "clip": CLIP, "noise-offset": OFFSET, "caption-dropout": DROPOUT,
            "min-snr-gamma": GAMMA, "holdout": HOLDOUT, "val-tiles": VAL, "val-every": 1, "warmup-steps": 1, "schedule": "cosine",
            "seed": SEED, "sample-count": 0, "resolution": 128, "precision": "fp32"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """16 tiles of 128 px: 9 malignant training tiles of 5 patients, one of val, one of test, benign ones; each its own text."""
    folder, rng, rows = tmp_path_factory.mktemp("data"), np.random.default_rng(1), []
    (folder / "images").mkdir()
    for i in range(16):
        coarse = rng.uniform(40, 255, (8, 8, 3)).repeat(16, 0).repeat(16, 1)
        Image.fromarray((coarse + rng.normal(0, 8, coarse.shape)).clip(0, 255).astype(np.uint8)).save(folder / f"images/{i:02d}.png")
        rows.append({"file_name": f"images/{i:02d}.png", "text": f"tile number {i} of a lesion", "patient_id": f"P{i // 2}",
                     "label": "benign" if i % 5 == 4 else "malignant", "split": {14: "val", 15: "test"}.get(i, "train")})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    (folder / "dataset.json").write_text(json.dumps({"format": 1, "color_norm": "none"}), encoding="utf8")
    return folder


@pytest.fixture(scope="module")
def start(tiny, tmp_path_factory):
    """A starting LoRA in kohya's layout with alpha 1 at rank 2, every factor random: {key: tensor}, and its file."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel
    g, tensors = torch.Generator().manual_seed(7), {}
    for prefix, network, ends in (
            ("lora_unet_", UNet2DConditionModel.from_pretrained(tiny / "folder" / "unet"), ("to_q", "to_k", "to_v", "to_out.0")),
            ("lora_te_text_model_", CLIPTextModel.from_pretrained(tiny / "folder" / "text_encoder"),
             ("q_proj", "k_proj", "v_proj", "out_proj"))):
        for path, module in network.named_modules():
            if isinstance(module, torch.nn.Linear) and path.endswith(ends):
                key = prefix + path.removeprefix("text_model.").replace(".", "_")
                tensors[f"{key}.lora_down.weight"] = torch.randn(RANK, module.in_features, generator=g) * 0.3
                tensors[f"{key}.lora_up.weight"] = torch.randn(module.out_features, RANK, generator=g) * 0.3
                tensors[f"{key}.alpha"] = torch.tensor(1.0)
    path = tmp_path_factory.mktemp("start") / "start.safetensors"
    save_file(tensors, path)
    return tensors, path


@pytest.fixture(scope="module")
def ours(tiny, data, start, tmp_path_factory):
    """The run folder of train_lora.py."""
    spec = importlib.util.spec_from_file_location("train_lora", ROOT / "train_lora.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    out = tmp_path_factory.mktemp("run") / "run"
    given = [str(part) for name, value in SETTINGS.items() for part in (f"--{name}", value)]
    script.main(["--base", str(tiny / "folder"), "--data", str(data), "--init-lora", str(start[1]), "--out", str(out), *given])
    return out


def keyed(*key):
    """A generator seeded by NumPy's SeedSequence of the key, 63 bits of it."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(list(key)).generate_state(1, np.uint64)[0]) & (2**63 - 1))


class Reference:
    """Networks of diffusers and transformers under peft, the tiles, and one method a thing that the loop computes."""

    def __init__(self, tiny, data, start):
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
        from peft import LoraConfig, get_peft_model
        from transformers import CLIPTextModel, CLIPTokenizer
        folder = tiny / "folder"
        self.scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
        self.vae = AutoencoderKL.from_pretrained(folder / "vae").requires_grad_(False)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        config = dict(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0)
        self.unet = get_peft_model(UNet2DConditionModel.from_pretrained(folder / "unet"),
                                   LoraConfig(target_modules=["to_q", "to_k", "to_v", "to_out.0"], **config))
        self.text = get_peft_model(CLIPTextModel.from_pretrained(folder / "text_encoder"),
                                   LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "out_proj"], **config))
        self.factors = {}
        for prefix, model in (("lora_unet_", self.unet), ("lora_te_text_model_", self.text)):
            for path, module in model.base_model.model.named_modules():
                if hasattr(module, "lora_A") and "default" in getattr(module, "lora_A", {}):
                    key = prefix + path.removeprefix("text_model.").replace(".", "_")
                    self.factors[f"{key}.lora_down.weight"] = module.lora_A["default"].weight
                    self.factors[f"{key}.lora_up.weight"] = module.lora_B["default"].weight
        assert self.factors.keys() == {key for key in start if not key.endswith("alpha")}
        for key, parameter in self.factors.items():  # (1 / 2) B A of the file is (3 / 2) (B / 3) A here
            parameter.data.copy_(start[key] / (3 if "lora_up" in key else 1))
        rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text(encoding="utf8").splitlines()]
        mine = [row for row in rows if row["label"] == "malignant"]
        train = [row for row in mine if row["split"] == "train"]
        people = sorted({row["patient_id"] for row in train})
        away = set(np.random.default_rng([SEED, 2]).permutation(people)[:round(HOLDOUT * len(people))])
        self.train = [row for row in train if row["patient_id"] not in away]
        self.held = ([row for row in train if row["patient_id"] in away] + [row for row in mine if row["split"] == "val"])[:VAL]
        assert self.train
        assert len({row["patient_id"] for row in self.held}) > 1
        self.data = data

    def posterior(self, row, view=0):
        """(mean, logvar) of a tile, a quarter turn for each of view % 4, mirrored from view 4 on."""
        image = np.rot90(np.asarray(Image.open(self.data / row["file_name"]).convert("RGB")), view % 4)
        image = image[:, ::-1] if view >= 4 else image
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        found = self.vae.encode(pixels).latent_dist
        return found.mean, found.logvar

    def context(self, texts):
        ids = self.tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        return self.text(ids).last_hidden_state

    def error(self, latents, noise, timesteps, texts):
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        return (self.unet(noisy, timesteps, self.context(texts)).sample - noise).square().mean((1, 2, 3))

    @torch.no_grad()
    def validation(self):
        """Mean error over held-out tiles x four timesteps, latents at 0.18215 times the mean, noise keyed by (seed, 0, 8)."""
        latents = torch.cat([0.18215 * self.posterior(row)[0] for row in self.held for _ in range(4)])
        timesteps = torch.tensor([125, 375, 625, 875] * len(self.held))
        noise = torch.randn(latents.shape, generator=keyed(SEED, 0, 8))
        return self.error(latents, noise, timesteps, [row["text"] for row in self.held for _ in range(4)]).mean().item()

    def run(self):
        """[{loss, grad_norm, lr, val_loss}] of the steps; the factors end as the loop leaves them."""
        from diffusers.training_utils import compute_snr
        whole, tiles = BATCH * ACCUMULATE, len(self.train)
        order = np.concatenate([np.random.default_rng([SEED, 0, epoch]).permutation(tiles) for epoch in range(STEPS * whole)])
        views = np.random.default_rng([SEED, 1]).integers(8, size=(STEPS, whole))
        groups = [[p for key, p in self.factors.items() if key.startswith(prefix)] for prefix in ("lora_unet_", "lora_te_")]
        optimizer = torch.optim.AdamW([{"params": some} for some in groups], betas=(0.9, 0.999), eps=1e-8, weight_decay=DECAY)
        rows = []
        for step in range(STEPS):
            factor = 1.0 if step < 1 else 0.5 * (1 + math.cos(math.pi * (step - 1) / (STEPS - 1)))  # a warm-up of one step
            for group, peak in zip(optimizer.param_groups, (LR, TEXT_LR)):
                group["lr"] = peak * factor
            g = keyed(SEED, step)
            timesteps = torch.randint(1000, (whole,), generator=g)
            noise = torch.randn(whole, 4, 16, 16, generator=g)
            noise = noise + OFFSET * torch.randn(whole, 4, 1, 1, generator=g)
            draw = torch.randn(whole, 4, 16, 16, generator=g)
            dropped = torch.rand(whole, generator=g) < DROPOUT
            assert 0 < dropped.sum() < whole or step
            chosen = [self.train[i] for i in order[step * whole:(step + 1) * whole]]
            found = [self.posterior(row, view) for row, view in zip(chosen, views[step])]
            mean, logvar = (torch.cat(parts) for parts in zip(*found))
            latents = 0.18215 * (mean + (logvar / 2).exp() * draw)
            texts = ["" if gone else row["text"] for row, gone in zip(chosen, dropped)]
            error = self.error(latents, noise, timesteps, texts)
            snr = compute_snr(self.scheduler, timesteps)
            (error * snr.clamp(max=GAMMA) / snr).mean().backward()
            norm = torch.nn.utils.clip_grad_norm_([p for some in groups for p in some], CLIP)
            assert norm > CLIP
            optimizer.step()
            optimizer.zero_grad()
            rows.append({"loss": error.mean().item(), "grad_norm": norm.item(), "lr": LR * factor, "val_loss": self.validation()})
        return rows


def test_the_loop_equals_diffusers_peft_and_torch(tiny, data, start, ours):
    """Two steps: tiles trained on and held out, plan, views, posterior draw, latent scale, noise offset, timesteps, dropped captions,
    min-SNR, accumulation, clipping, AdamW with decay and two rates, warm-up and cosine, validation, and the file that is written."""
    reference = Reference(tiny, data, start[0])
    before = reference.validation()
    expected = reference.run()
    logged = [json.loads(line) for line in (ours / "metrics.jsonl").read_text(encoding="utf8").splitlines()]
    steps, checks = ([row for row in logged if name in row] for name in ("loss", "val_loss"))
    assert [row["step"] for row in checks] == [0, 1, 2]
    assert checks[0]["val_loss"] == pytest.approx(before, rel=1e-5)
    for row, check, want in zip(steps, checks[1:], expected, strict=True):
        assert row["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)
        assert row["lr"] == pytest.approx(want["lr"], rel=1e-12, abs=1e-15)
        assert check["val_loss"] == pytest.approx(want["val_loss"], rel=1e-5)
    written = load_file(ours / "lora.safetensors")
    assert written.keys() == start[0].keys()
    moved = 0
    for key, value in reference.factors.items():
        assert written[key.rsplit(".lora_", 1)[0] + ".alpha"].item() == ALPHA
        # AdamW's first step is lr g / (|g| + eps): where |g| is at rounding level its sign is noise; so few may differ by a step
        off = (written[key] - value.detach()).abs() > 2e-6
        assert off.float().mean() < 0.02, key
        moved += (value.detach() - start[0][key] / (3 if "lora_up" in key else 1)).abs().max() > 1e-4
    assert moved == len(reference.factors)
