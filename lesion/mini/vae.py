"""Stages `vae` and `texture` of `python -m lesion pretrain`: the autoencoder of `mini` on benign training tiles.

Stage vae trains it whole (arXiv:2112.10752) with a loss that asks for exact colour and for the right amount of texture. Stage
texture then trains the decoder alone, against a critic of patches (lesion/mini/texture.py): the encoder and so the latents stay,
and with them any U-Net trained on them. Proven by tests/mini/test_vae.py and tests/mini/test_pretrain.py.
"""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lesion.mini import loop
from lesion.mini.loop import Recipe, Sitting
from lesion.run import devices, files, sheets
from lesion.sd import weights
from lesion.sd.vae import LATENT_SCALE, VAE, VAEConfig, to_images_u8, to_pixels
from lesion.tiles.views import dihedral

WIDTHS, GROUPS = (16, 48, 80, 96), 8
YCBCR = ((0.299, 0.587, 0.114), (-0.169, -0.331, 0.5), (0.5, -0.419, -0.081))  # ITU-R BT.601, rows Y, Cb, Cr


def train(recipe: Recipe, sitting: Sitting) -> None:
    """Stage vae, from its checkpoint if there is one; at the last step OUT/vae is written."""
    images_u8, rows = loop.benign_training_tiles(sitting.data, 128)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        vae = VAE(VAEConfig(WIDTHS, norm_num_groups=GROUPS)).to(memory_format=memory_format(recipe))
    if sitting.start:
        vae.load_state_dict(load(sitting.start).state_dict())

    def losses(step: int) -> dict[str, Tensor]:
        pixels = augmented_crops(images_u8, recipe, step).contiguous(memory_format=memory_format(recipe))
        with devices.autocast(torch.device("cpu"), recipe.precision):
            mean, logvar = (part.float() for part in vae.encode(pixels))
            noise = torch.randn(mean.shape, generator=devices.generator(recipe.seed, step, 1))
            decoded = vae.decode(mean + (0.5 * logvar).exp() * noise).float()
        return vae_loss(decoded, pixels, mean, logvar, recipe)

    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    stage = loop.Stage("vae", vae, optimizer, losses, lambda step, ema: check(vae, ema, images_u8, sitting.out, f"vae-{step:06d}"), {})
    ema, sittings, ended = loop.train(stage, recipe, sitting)
    if ended:
        vae.load_state_dict(ema)
        to_unit_scale(vae.eval(), images_u8[:-loop.CHECK_TILES])
        export(sitting.out, vae, loop.origin(rows, sittings))


def memory_format(recipe: Recipe) -> torch.memory_format:
    """The faster layout on a CPU: channels-last in float32, plain in bfloat16 (measured; docs in the card of `mini`)."""
    return torch.channels_last if recipe.precision == "fp32" else torch.contiguous_format


def augmented_crops(images_u8: np.ndarray, recipe: Recipe, step: int) -> Tensor:
    """pixels [B,3,crop,crop] of step `step`: random tiles, crops, dihedral views, and for half of them a colour gain.

    The gain (per channel, +-30 % overall, +-10 % between channels) shows the autoencoder more skin tones than the archive has.
    `chroma_field` adds a smooth random field of Cb and Cr to half of the crops. In skin, hue follows brightness nearly everywhere,
    so an autoencoder need not encode it, and a grey lesion comes out red-brown; with the field it must.
    """
    g = devices.generator(recipe.seed, step)
    size, crop = recipe.batch_size, recipe.crop
    chosen = torch.randint(len(images_u8) - loop.CHECK_TILES, (size,), generator=g)
    corners = torch.randint(images_u8.shape[1] - crop + 1, (size, 2), generator=g).tolist()
    views = torch.randint(8, (size,), generator=g).tolist()
    gain = torch.exp(torch.empty(size, 1, 1, 1).uniform_(-0.5, 0.2, generator=g)
                     + torch.empty(size, 3, 1, 1).uniform_(-0.1, 0.1, generator=g))
    gain[torch.rand(size, generator=g) < 0.5] = 1.0
    pixels = torch.cat([
        dihedral(to_pixels(images_u8[i:i + 1, top:top + crop, left:left + crop]), view)
        for i, (top, left), view in zip(chosen.tolist(), corners, views)])
    pixels = (pixels + 1) * gain - 1
    if recipe.chroma_field:
        field = torch.randn(size, 2, 4, 4, generator=g) * recipe.chroma_field
        field = F.interpolate(field, size=crop, mode="bicubic")
        field[torch.rand(size, generator=g) < 0.5] = 0.0
        pixels = pixels + torch.einsum("oc,bchw->bohw", pixels.new_tensor([[0, 1.402], [-0.344, -0.714], [1.772, 0]]), field)
    return pixels.clamp(-1, 1)


# -------------------------------------------------------------------------------------------------------------- losses

def vae_loss(decoded: Tensor, pixels: Tensor, mean: Tensor, logvar: Tensor, recipe: Recipe) -> dict[str, Tensor]:
    """L1 + colour at a quarter of the size + L1 of gradients (edges) + texture energy + KL to N(0, I); "loss" is their sum."""
    error = decoded - pixels
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    parts = {"l1": error.abs().mean(), "color": color_loss(error, recipe), "edges": edges,
             "texture": (texture_energy(decoded) - texture_energy(pixels)).abs().mean(), "kl": kl}
    loss = parts["l1"] + parts["color"] + 0.5 * edges + recipe.texture_weight * parts["texture"] + recipe.kl_weight * kl
    return {"loss": loss, **parts}


def color_loss(error: Tensor, recipe: Recipe) -> Tensor:
    """Absolute and squared errors in Y, Cb, Cr at a quarter of the size, from `error` [B,3,H,W] in RGB of [-1, 1].

    Skin varies far more in brightness than in hue, and an autoencoder left alone spends its four channels on brightness: tones
    come out right and colours do not. So errors of Cb and Cr (ITU-R BT.601) count `chroma_weight` times. Absolute errors alone
    leave the small, dark lesion too pale, for it is rare; squares (`square_weight`) count large errors more.
    """
    weights = error.new_tensor(YCBCR) * error.new_tensor([[1.0], [recipe.chroma_weight], [recipe.chroma_weight]])
    coarse = torch.einsum("oc,bchw->bohw", weights, F.avg_pool2d(error, 4))
    return (coarse.abs() + recipe.square_weight * coarse.square()).sum(1).mean() / 2


def texture_energy(pixels: Tensor) -> Tensor:
    """Local root mean square of the high-pass image (pixels minus 3x3 mean) in 8x8 windows: [B,3,H,W] -> [B,3,H/4-1,W/4-1].

    How much fine texture there is, not where each grain lies, which eight-fold compression cannot keep.
    """
    high = pixels - F.avg_pool2d(pixels, 3, stride=1, padding=1, count_include_pad=False)
    return (F.avg_pool2d(high.square(), 8, stride=4) + 1e-6).sqrt()


# -------------------------------------------------------------------------------------------------------------- measure

def check(vae: VAE, ema: dict[str, Tensor], images_u8: np.ndarray, out: Path, name: str) -> dict[str, float]:
    """PSNR and texture of the averaged weights on held-back tiles; a sheet of pairs (tile above its reconstruction)."""
    real = images_u8[-loop.CHECK_TILES:][:64]
    with loop.averaged(vae, ema), torch.no_grad():
        latents = [vae.encode(to_pixels(batch)) for batch in np.array_split(real, 8)]
        rebuilt = np.concatenate([to_images_u8(vae.decode(mean)) for mean, _ in latents])
    mean = torch.cat([mean for mean, _ in latents])
    pairs = np.concatenate([np.concatenate([real[i:i + 8], rebuilt[i:i + 8]]) for i in (0, 8)])
    sheets.save_png(out / "samples" / f"{name}.png", sheets.contact_sheet(pairs))
    return {"psnr": psnr(real, rebuilt), "psnr_color": psnr(chroma(real), chroma(rebuilt)),
            "high_frequency": high_frequency_ratio(real, rebuilt),
            **{f"latent_std_{c}": mean[:, c].std().item() for c in range(4)},
            "posterior_std": torch.cat([(0.5 * logvar).exp() for _, logvar in latents]).mean().item()}


def chroma(images_u8: np.ndarray) -> np.ndarray:
    """Cb and Cr (ITU-R BT.601) of uint8 RGB [...,3], as floats [...,2]."""
    return images_u8 @ np.array(YCBCR[1:]).T


def psnr(images_u8: np.ndarray, other_u8: np.ndarray) -> float:
    """Mean over tiles of 10 log10(255^2 / mean squared error), in dB."""
    error = ((images_u8.astype(np.float64) - other_u8) ** 2).mean(axis=(1, 2, 3))
    return float((10 * np.log10(255**2 / np.maximum(error, 1e-9))).mean())


def high_frequency_ratio(images_u8: np.ndarray, other_u8: np.ndarray, low: float = 0.125) -> float:
    """Power above `low` cycles a pixel (finer than 8 px, about 1 mm) of `other_u8`'s luminance, over that of `images_u8`."""
    def power(images):
        grey = images.astype(np.float64) @ YCBCR[0]
        window = np.hanning(grey.shape[1])[:, None] * np.hanning(grey.shape[2])
        spectrum = np.abs(np.fft.rfft2((grey - grey.mean((1, 2), keepdims=True)) * window)) ** 2
        radius = np.hypot(np.fft.fftfreq(grey.shape[1])[:, None], np.fft.rfftfreq(grey.shape[2]))
        return spectrum[:, radius > low].sum()
    return float(power(other_u8) / power(images_u8))


# --------------------------------------------------------------------------------------------------------------- files

def to_unit_scale(vae: VAE, images_u8: np.ndarray) -> None:
    """Change the unit of the latents so that each channel has mean 0 and, times SD 1.5's scaling factor 0.18215, variance 1.

    The change is exact: it is folded into the 1x1 convolutions quant_conv and post_quant_conv
    (mean' = (mean - m) / s, logvar' = logvar - 2 log s, and back).
    """
    with torch.no_grad():
        means = torch.cat([vae.encode(to_pixels(batch))[0] for batch in np.array_split(images_u8[:1024], 128)])
        center, unit = means.mean((0, 2, 3)), means.std((0, 2, 3)) * LATENT_SCALE
        encode, decode = vae.quant_conv, vae.post_quant_conv
        encode.weight[:4] /= unit[:, None, None, None]
        encode.bias[:4] = (encode.bias[:4] - center) / unit
        encode.bias[4:] -= 2 * unit.log()
        decode.bias += decode.weight[:, :, 0, 0] @ center
        decode.weight *= unit[None, :, None, None]


def export(out: Path, vae: VAE, metadata: dict[str, str]) -> None:
    """Write OUT/vae in SD 1.5's layout, float16."""
    files.write_json(out / "vae" / "config.json", {
        "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": 4, "layers_per_block": 2,
        "block_out_channels": list(WIDTHS), "norm_num_groups": GROUPS, "scaling_factor": LATENT_SCALE, "sample_size": 128,
        "act_fn": "silu", "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4})
    loop.write_weights(out / "vae" / "diffusion_pytorch_model.safetensors", vae.state_dict(), metadata)


def load(folder: Path) -> VAE:
    """FOLDER/vae in float32, frozen. ValueError where stage vae has not ended."""
    path = Path(folder) / "vae" / "diffusion_pytorch_model.safetensors"
    if not path.is_file():
        raise ValueError(f"{path} is missing: run --stage vae first")
    with torch.device("meta"):
        vae = VAE(VAEConfig(WIDTHS, norm_num_groups=GROUPS))
    weights.assign(vae, weights.read(path)[0], path, {})
    return vae.float().eval().requires_grad_(False)
