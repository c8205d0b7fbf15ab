"""Stage `texture` of `python -m lesion pretrain`: the decoder of OUT/vae learns detail that looks real, against a critic.

Eight-fold compression cannot keep where each grain of skin lies, and any pixel loss answers with a smooth mean. A critic of
patches (arXiv:1611.07004, section 3.2.2) with the hinge loss (arXiv:1705.02894) and spectral normalisation (arXiv:1802.05957),
as in arXiv:2012.09841, asks instead for grain that cannot be told from real. Encoder and latents stay as they are.
Proven by tests/mini/test_texture.py.
"""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from lesion.mini import loop
from lesion.mini import vae as autoencoder
from lesion.mini.loop import Recipe, Sitting
from lesion.run import devices
from lesion.sd.vae import VAE, to_pixels
from lesion.tiles.views import VIEWS, dihedral
from lesion.train.step import posterior_sample

WIDTHS = (32, 64, 96)
OCTAVES = 4
BLUR, GAIN = 9, 8  # the critic sees detail finer than BLUR pixels GAIN times larger: it is faint in skin


class Critic(nn.Module):
    """Pixels [B,3,H,W] in [-1, 1] -> a score a patch of 22 pixels [B,1,H/4-2,W/4-2]: positive for what looks real."""

    def __init__(self):
        super().__init__()
        layers, width = [], 6
        for number, out in enumerate(WIDTHS):
            layers += [spectral_norm(nn.Conv2d(width, out, 4 if number < 2 else 3, stride=2 if number < 2 else 1, padding=1)),
                       nn.LeakyReLU(0.2)]
            width = out
        self.layers = nn.Sequential(*layers, spectral_norm(nn.Conv2d(width, 1, 3)))

    def forward(self, pixels: Tensor) -> Tensor:
        smooth = F.avg_pool2d(pixels, BLUR, stride=1, padding=BLUR // 2, count_include_pad=False)
        return self.layers(torch.cat([(pixels - smooth) * GAIN, smooth], 1))


def critic_loss(real: Tensor, drawn: Tensor) -> Tensor:
    """Hinge (arXiv:1705.02894, eq. 2): mean(max(0, 1 - D(real))) + mean(max(0, 1 + D(drawn))), of scores."""
    return F.relu(1 - real).mean() + F.relu(1 + drawn).mean()


def octaves_loss(decoded: Tensor, pixels: Tensor, recipe: Recipe) -> Tensor:
    """sum over octaves o = 0..3, and Y, Cb, Cr, of mean |E(decoded) - E(pixels)| / 2 at 1/2^o the size; E: `texture_energy`.

    How much grain there is in each of four octaves, 3 to 24 px, as energies of a pyramid's bands (Heeger and Bergen, SIGGRAPH 1995,
    section 3), in colour too: the critic alone gave fine grain twice the colour of skin's and coarse grain two thirds of it. Cb and
    Cr count `chroma_weight` times, as in `color_loss`.
    """
    weights = pixels.new_tensor(autoencoder.YCBCR) * pixels.new_tensor([[1.0], [recipe.chroma_weight], [recipe.chroma_weight]])
    pair = torch.einsum("oc,bchw->bohw", weights, torch.cat([decoded, pixels]))
    loss = pixels.new_zeros(())
    for octave in range(OCTAVES):
        ours, theirs = autoencoder.texture_energy(F.avg_pool2d(pair, 2 ** octave)).chunk(2)
        loss = loss + (ours - theirs).abs().sum(1).mean() / 2
    return loss


def decoder_loss(decoded: Tensor, pixels: Tensor, scores: Tensor, recipe: Recipe) -> dict[str, Tensor]:
    """L1 + colour (lesion.mini.vae) + texture_weight * `octaves_loss` - adversarial_weight * mean critic's score; "loss" is their sum."""
    error = decoded - pixels
    energy = octaves_loss(decoded, pixels, recipe)
    parts = {"l1": error.abs().mean(), "color": autoencoder.color_loss(error, recipe), "texture": energy, "score": scores.mean()}
    loss = parts["l1"] + parts["color"] + recipe.texture_weight * energy - recipe.adversarial_weight * parts["score"]
    return {"loss": loss, **parts}


def train(recipe: Recipe, sitting: Sitting) -> None:
    """Stage texture, from its checkpoint if there is one; at the last step OUT/vae is written with the new decoder.

    Starts from --start's autoencoder (default: OUT's own). ValueError where there is none.
    """
    images_u8, rows = loop.benign_training_tiles(sitting.data, 128)
    vae, critic = autoencoder.load(sitting.start or sitting.out), build_critic(recipe.seed)
    decoder = nn.ModuleList([vae.decoder, vae.post_quant_conv]).requires_grad_(True)
    weights = loop.rare_weights(rows[:-loop.CHECK_TILES], recipe.rare_power)
    critic_optimizer = adamw(critic, recipe)

    def losses(step: int) -> dict[str, Tensor]:
        tile, view, noise = draw(recipe, step, weights)
        pixels = torch.cat([dihedral(to_pixels(images_u8[i:i + 1]), v) for i, v in zip(tile, view)])
        with devices.autocast(torch.device("cpu"), recipe.precision):
            mean, logvar = vae.encode(pixels)
            decoded = vae.decode(posterior_sample(mean.float(), logvar.float(), noise, 1.0)).float()
            loss = critic_loss(critic(pixels).float(), critic(decoded.detach()).float())
        loop.update(critic_optimizer, critic, loss, step)
        critic.requires_grad_(False)
        with devices.autocast(torch.device("cpu"), recipe.precision):
            scores = critic(decoded).float()
        critic.requires_grad_(True)
        return {**decoder_loss(decoded, pixels, scores, recipe), "critic": loss.detach()}

    stage = loop.Stage("texture", decoder, adamw(decoder, recipe), losses,
                       lambda step, ema: check(vae, decoder, ema, images_u8, sitting.out, step), {"critic": (critic, critic_optimizer)})
    ema, sittings, ended = loop.train(stage, recipe, sitting)
    if ended:
        decoder.load_state_dict(ema)
        autoencoder.export(sitting.out, vae, loop.origin(rows, sittings))


def build_critic(seed: int) -> Critic:
    """A critic initialised by the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Critic()


def adamw(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """The optimizer of decoder and critic: short memory, as adversarial training needs (arXiv:1809.11096: beta1 0)."""
    return torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.0, 0.99), weight_decay=0.0)


def draw(recipe: Recipe, step: int, weights: np.ndarray) -> tuple[list[int], list[int], Tensor]:
    """(tiles in proportion to `weights` [N], views 0..7, posterior noise [B,4,16,16]) of a step, keyed by (seed, step)."""
    g = devices.generator(recipe.seed, step, 2)
    tile = torch.multinomial(torch.from_numpy(weights), recipe.batch_size, replacement=True, generator=g).tolist()
    view = torch.randint(VIEWS, (recipe.batch_size,), generator=g).tolist()
    return tile, view, torch.randn(recipe.batch_size, 4, 16, 16, generator=g)


def check(vae: VAE, decoder: nn.Module, ema: dict[str, Tensor], images_u8: np.ndarray, out: Path, step: int) -> dict[str, float]:
    """lesion.mini.vae.check with the averaged decoder."""
    with loop.averaged(decoder, ema):
        whole = {key: value.clone() for key, value in vae.state_dict().items()}
        return autoencoder.check(vae, whole, images_u8, out, f"texture-{step:06d}")
