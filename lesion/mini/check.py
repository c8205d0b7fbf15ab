"""`python -m lesion pretrain --stage check`: measure the built-in model against tiles it has never seen (split `val`).

Gives the figures that the command prints, and writes OUT/samples/check-vae.png and check-base.png. Proven by tests/mini/test_pretrain.py.
"""
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from lesion.classify import features
from lesion.describe import adherence, attributes, prompts
from lesion.mini import vae as autoencoder
from lesion.run import cli, files, sheets
from lesion.sd import checkpoint, pipeline
from lesion.sd.vae import to_images_u8, to_pixels
from lesion.stats import fidelity
from lesion.tiles.decode import load_tiles

GUIDANCE = (2.0, 3.0, 5.0, 7.5)
STEERED = ("skin_tone", "color", "size")
TRIED, DRAWN = 64, 200  # tiles a guidance scale is chosen by, and judged on
DRAW_STEPS = 30


def check(data: Path, out: Path, features_from: Path | None = None, seed: int = 0) -> dict:
    """Figures of the autoencoder of the model in `out` and, where stage unet has ended, of the whole model."""
    result = {"autoencoder": check_vae(data, out)}
    if (out / "unet").is_dir():
        result["base"] = check_base(data, out, features.choose(features_from), seed)
    return result


def check_vae(data: Path, out: Path) -> dict:
    """Figures of the autoencoder and of the bicubic baseline on the tiles of split `val`; OUT/samples/check-vae.png."""
    rows = [row for row in files.read_manifest(data) if row.get("split") == "val"]
    images_u8 = np.array(load_tiles(data, rows, 128, progress=cli.progress).images_u8)
    rebuilt = reconstruct(autoencoder.load(out), images_u8)
    baseline = bicubic(images_u8)
    result = {"tiles": len(images_u8)}
    for name, other in (("vae", rebuilt), ("bicubic_8x", baseline)):
        result[name] = {
            "psnr_db": round(autoencoder.psnr(images_u8, other), 2),
            "psnr_color_db": round(autoencoder.psnr(autoencoder.chroma(images_u8), autoencoder.chroma(other)), 2),
            "high_frequency": round(autoencoder.high_frequency_ratio(images_u8, other), 4),
        }
    some = np.linspace(0, len(images_u8) - 1, 16).astype(int)
    sheet = np.concatenate([np.concatenate([kind[some[i : i + 8]] for kind in (images_u8, rebuilt, baseline)]) for i in (0, 8)])
    titles = ["real", "reconstructed", "bicubic, 8 times down and up"] * 2
    sheets.save_png(out / "samples" / "check-vae.png", sheets.contact_sheet(sheet, titles=titles))
    return result


def check_base(data: Path, out: Path, extractor: features.Extractor, seed: int) -> dict:
    """What the prompts steer (Spearman, asked against measured) and how far DRAWN tiles are from the benign tiles of `val` (KID beside
    the value between two real samples of that size). Captions come from the training tiles alone, and so do both guidance scales: that
    which steers best, and that whose tiles are nearest to the benign training tiles."""
    rows = [row for row in files.read_manifest(data) if row["label"] == "benign"]
    benign = [row for row in rows if row["split"] == "train"]
    sd = checkpoint.load(str(out))

    def real_tiles(some):
        tiles = load_tiles(data, some, 128)
        return tiles, features.cached(extractor, tiles.images_u8, data / ".cache")

    _, known = real_tiles(benign[:1000])
    tried = {}
    for scale in GUIDANCE:
        asked = prompts.draw_attributes(benign, TRIED, seed)
        images_u8 = draw_tiles(sd, asked, scale, 1_000_000)
        tried[scale] = {"kid": fidelity.kid(known, extractor.run(images_u8))[0],
                        **{name: part["mean"] for name, part in steer(asked, images_u8).items()}}
    steering = max(GUIDANCE, key=lambda scale: np.mean([tried[scale][name] or 0.0 for name in STEERED]))
    nearest = min(GUIDANCE, key=lambda scale: tried[scale]["kid"])
    asked = prompts.draw_attributes(benign, DRAWN, seed + 1)
    drawn = {scale: draw_tiles(sd, asked, scale, 2_000_000) for scale in {steering, nearest}}
    images_u8 = drawn[nearest]
    real, theirs = real_tiles([row for row in rows if row["split"] == "val"])
    value, error = fidelity.kid(theirs, extractor.run(images_u8))
    floor, spread = fidelity.real_vs_real(lambda x, y: fidelity.kid(x, y)[0], theirs, min(DRAWN, len(theirs) // 2))
    some = np.linspace(0, len(real.images_u8) - 1, 64).astype(int)
    sheet = np.concatenate([np.concatenate([images_u8[i:i + 8], real.images_u8[some[i:i + 8]]]) for i in range(0, 64, 8)])
    sheets.save_png(out / "samples" / "check-base.png", sheets.contact_sheet(sheet, 16, ["eight drawn, eight real"] * 8))
    return {"guidance_tried": tried, "drawn": DRAWN, "steering_guidance": steering, "steering": steer(asked, drawn[steering]),
            "kid_guidance": nearest, "kid": value, "kid_se": error, "real_vs_real": floor, "real_vs_real_sd": spread,
            "features": extractor.name}


def draw_tiles(sd: checkpoint.StableDiffusion, asked: list[dict], guidance_scale: float, first_seed: int) -> np.ndarray:
    """One benign tile an attribute combination: uint8 [N,128,128,3]."""
    texts = [prompts.to_sentence("benign", one) for one in asked]
    images = []
    for start in cli.progress(range(0, len(texts), 16), desc=f"draw at guidance {guidance_scale}", unit="batch"):
        part = texts[start:start + 16]
        with torch.no_grad():
            context, negative = pipeline.encode_prompts(sd, part), pipeline.encode_prompts(sd, [""] * len(part))
            latents = pipeline.draw(sd, context, negative, [first_seed + start + i for i in range(len(part))], 128, steps=DRAW_STEPS,
                                    guidance_scale=guidance_scale)
            images.append(to_images_u8(pipeline.decode(sd, latents)))
    return np.concatenate(images)


def steer(asked: list[dict], images_u8: np.ndarray) -> dict:
    """Per steered attribute: n, mean (Spearman), low, high."""
    measured = attributes.measure_all(list(images_u8), workers=1)
    rows = [{"attributes": one} for one in asked]
    return {name: {key: value for key, value in adherence.adherence(name, rows, measured).items() if key in ("n", "mean", "low", "high")}
            for name in STEERED}


@torch.no_grad()
def reconstruct(vae: nn.Module, images_u8: np.ndarray) -> np.ndarray:
    """Encode to the mean and decode: uint8 [N,R,R,3] -> same."""
    batches = cli.progress(range(0, len(images_u8), 16), desc="reconstruct", unit="batch")
    return np.concatenate([to_images_u8(vae.decode(vae.encode(to_pixels(images_u8[i : i + 16]))[0])) for i in batches])


def bicubic(images_u8: np.ndarray, factor: int = 8) -> np.ndarray:
    """The baseline: each tile `factor` times smaller and back, bicubic, antialiased."""
    side = images_u8.shape[1]
    small = [Image.fromarray(image).resize((side // factor, side // factor), Image.BICUBIC) for image in images_u8]
    return np.stack([np.asarray(image.resize((side, side), Image.BICUBIC)) for image in small])
