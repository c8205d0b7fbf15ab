"""`python -m lesion pretrain --stage check`: measure the built-in model on tiles it has never seen (split `val`).

Gives the figures that the command prints, and writes OUT/samples/check-vae.png. Proven by tests/test_pretrain.py.
"""

import numpy as np
import torch
from PIL import Image

from lesion import cli, files, pictures, pretrain
from lesion.data.tiles import load_tiles
from lesion.pretrain_unet import load_vae
from lesion.sd.vae import to_images_u8, to_pixels


def check(args) -> dict:
    """Figures of the autoencoder and of the bicubic baseline on the tiles of split `val`."""
    rows = [row for row in files.read_manifest(args.data) if row.get("split") == "val"]
    images_u8 = np.array(load_tiles(args.data, rows, 128, progress=cli.progress).images_u8)
    rebuilt = reconstruct(load_vae(args.out), images_u8)
    baseline = bicubic(images_u8)
    result = {"tiles": len(images_u8)}
    for name, other in (("vae", rebuilt), ("bicubic_8x", baseline)):
        result[name] = {
            "psnr_db": round(pretrain.psnr(images_u8, other), 2),
            "psnr_color_db": round(pretrain.psnr(chroma(images_u8), chroma(other)), 2),
            "high_frequency": round(pretrain.high_frequency_ratio(images_u8, other), 4),
        }
    some = np.linspace(0, len(images_u8) - 1, 16).astype(int)
    sheet = np.concatenate([np.concatenate([kind[some[i : i + 8]] for kind in (images_u8, rebuilt, baseline)]) for i in (0, 8)])
    titles = ["real", "reconstructed", "bicubic, 8 times down and up"] * 2
    pictures.save_png(args.out / "samples" / "check-vae.png", pictures.contact_sheet(sheet, titles=titles))
    return result


@torch.no_grad()
def reconstruct(vae, images_u8: np.ndarray) -> np.ndarray:
    """Encode to the mean and decode: uint8 [N,R,R,3] -> same."""
    batches = cli.progress(range(0, len(images_u8), 16), desc="reconstruct", unit="batch")
    return np.concatenate([to_images_u8(vae.decode(vae.encode(to_pixels(images_u8[i : i + 16]))[0])) for i in batches])


def bicubic(images_u8: np.ndarray, factor: int = 8) -> np.ndarray:
    """The baseline: each tile `factor` times smaller and back, bicubic, antialiased."""
    side = images_u8.shape[1]
    small = [Image.fromarray(image).resize((side // factor, side // factor), Image.BICUBIC) for image in images_u8]
    return np.stack([np.asarray(image.resize((side, side), Image.BICUBIC)) for image in small])


def chroma(images_u8: np.ndarray) -> np.ndarray:
    """Cb and Cr (ITU-R BT.601) of uint8 RGB, as floats."""
    return images_u8 @ np.array([[-0.169, 0.5], [-0.331, -0.419], [0.5, -0.081]])
