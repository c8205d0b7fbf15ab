"""From prompts and seeds to pixels: encode text, sample with guidance, decode.

Each image has its own CPU generator, seeded by its own seed: its initial latents and every later draw come from there, so an image
does not depend on its neighbours in the batch, on the batch size or on the device. Proven by tests/parity/test_pipeline.py.
"""
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lesion.sd import fast, samplers
from lesion.sd.checkpoint import StableDiffusion

SAMPLERS = ("ddim", "ddpm", "dpmpp")


def encode_prompts(sd: StableDiffusion, prompts: list[str]) -> Tensor:
    """context [B,77,C] of the prompts, on the text encoder's device."""
    token_ids, _ = sd.tokenizer(prompts)
    return sd.text_encoder(token_ids.to(sd.text_encoder.text_model.final_layer_norm.weight.device))


class Draws:
    """Noise for a batch of images, each row from that image's own generator."""

    def __init__(self, seeds: list[int], shape: tuple[int, ...], device: torch.device):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape, self.device = shape, device

    def __call__(self) -> Tensor:
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)


@torch.no_grad()
def draw(sd: StableDiffusion, context: Tensor, negative_context: Tensor, seeds: list[int], resolution: int, sampler: str = "ddim",
         steps: int = 50, guidance_scale: float = 7.5, eta: float = 0.0, latents: Tensor | None = None,
         on_step: samplers.OnStep | None = None) -> Tensor:
    """Sample one image a seed: context, negative_context [B,77,C] -> latents [B,4,resolution/8,resolution/8], scaled.

    `latents`, if given, replaces the initial noise. eta is DDIM's only. Networks run in the caller's autocast; the sampler's
    arithmetic is float32. Raises ValueError for an unknown sampler, and where an image ends in NaN or infinity.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"no sampler {sampler!r}: allowed are {', '.join(SAMPLERS)}")
    device = context.device
    fresh = Draws(seeds, (sd.unet.config.in_channels, resolution // 8, resolution // 8), device)
    first = fresh()
    dtype = sd.unet.conv_in.weight.dtype

    def network(x: Tensor, timesteps: Tensor, both: Tensor) -> Tensor:
        return sd.unet(x.to(dtype), timesteps, both).float()
    noise_fn = samplers.guided(network, context.to(dtype), negative_context.to(dtype), guidance_scale)
    run: Callable = {"ddim": partial(samplers.ddim, eta=eta, draw=fresh), "ddpm": partial(samplers.ddpm, draw=fresh),
                     "dpmpp": samplers.dpmpp}[sampler]
    with fast.same_text(sd.unet):
        drawn = run(noise_fn, first if latents is None else latents, steps, on_step=on_step)
    bad = [seed for seed, image in zip(seeds, drawn) if not image.isfinite().all()]
    if bad:
        raise ValueError(f"the images of seeds {bad} end in NaN or infinity: is the checkpoint or LoRA damaged? In fp16, try bf16 or fp32")
    return drawn


@torch.no_grad()
def decode(sd: StableDiffusion, latents: Tensor) -> Tensor:
    """Scaled latents -> pixels [B,3,H,W], in float32 whatever the autocast: the VAE's half-precision activations overflow."""
    with torch.autocast(latents.device.type, enabled=False):
        return sd.vae.decode(latents.float() / sd.latent_scale)
