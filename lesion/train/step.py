"""One training step of a latent diffusion model, in the order in which it happens: THE algorithm, once.

    draws = draw_step(seed, step, ...)           every random number of the step
    error = backward(model, batch, ...)          a micro-batch: latents, noise, error, gradient; added up over micro-batches
    norm, overflowed = update(optimizer, ...)    unscale, clip, AdamW

`train_lora.py`, its validation, the base's pretraining and the bench all call these functions. Proven by
tests/parity/test_lora_step.py (against diffusers, peft and torch alone) and tests/train/test_step.py.
"""
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lesion.run import devices
from lesion.sd import schedule


class Draws(NamedTuple):
    """The random numbers of one step, on the CPU, a row a sample of the whole batch of all processes."""
    timesteps: Tensor  # [B] int64, uniform over 0..999
    noise: Tensor      # [B,4,h,w] float32: what is added and what is to be predicted
    posterior: Tensor  # [B,4,h,w] float32: the draw from the autoencoder's posterior
    dropped: Tensor    # [B] bool: those get the empty prompt

    def rows(self, some: slice) -> "Draws":
        """The draws of some samples."""
        return Draws(*(values[some] for values in self))

    def to(self, device: torch.device) -> "Draws":
        """The draws on the device where they are used."""
        return Draws(*(values.to(device) for values in self))


class Batch(NamedTuple):
    """What one micro-batch learns from, on the device. Of the two texts one is given."""
    mean: Tensor              # [B,4,h,w] of the posterior, unscaled
    logvar: Tensor            # [B,4,h,w]
    draws: Draws
    context: Tensor | None    # [B,77,C] float: the text encoder's output, computed beforehand
    token_ids: Tensor | None  # [B,77] int64, where the text encoder is trained


class Denoiser(nn.Module):
    """U-Net and text encoder as one module, so that DistributedDataParallel sees one forward."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, context: Tensor | None = None,
                token_ids: Tensor | None = None) -> Tensor:
        """noise_pred [B,4,h,w] given `context` [B,77,C] or, to train the text encoder too, `token_ids` [B,77]."""
        assert (context is None) != (token_ids is None), "one of context and token_ids"
        return self.unet(noisy_latents, timesteps, self.text_encoder(token_ids) if context is None else context)


def draw_step(seed: int, step: int, shape: tuple[int, ...], noise_offset: float = 0.0, caption_dropout: float = 0.0) -> Draws:
    """Every random number of step `step`, keyed by (seed, step): a resumed run draws what an uninterrupted one does.

    shape (B, 4, h, w) is of the whole batch of all processes. Noise offset: noise + offset * N(0, 1) per sample and
    channel, the same over all pixels, for wider brightness (crosslabs.org, "Diffusion with Offset Noise").
    """
    g = devices.generator(seed, step)
    timesteps = torch.randint(schedule.STEPS, shape[:1], generator=g)
    noise = torch.randn(shape, generator=g) + noise_offset * torch.randn(*shape[:2], 1, 1, generator=g)
    posterior = torch.randn(shape, generator=g)
    return Draws(timesteps, noise, posterior, torch.rand(shape[0], generator=g) < caption_dropout)


def posterior_sample(mean: Tensor, logvar: Tensor, noise: Tensor, latent_scale: float) -> Tensor:
    """latents = scale (mean + exp(logvar / 2) noise): a draw from the posterior q(z|x) (arXiv:1312.6114, eq. 10)."""
    return latent_scale * (mean + torch.exp(0.5 * logvar) * noise)


def noise_error(model: nn.Module, latents: Tensor, noise: Tensor, timesteps: Tensor, context: Tensor | None = None,
                token_ids: Tensor | None = None) -> Tensor:
    """[B]: mean over a sample's values of |eps_theta(x_t, t, text) - eps|^2 (arXiv:2006.11239, eq. 14), unweighted.

    x_t = sqrt(abar_t) latents + sqrt(1 - abar_t) noise (eq. 4). model: a `Denoiser`. Networks run in the caller's
    autocast, the error is float32.
    """
    noisy_latents = schedule.add_noise(latents, noise, timesteps)
    noise_pred = model(noisy_latents, timesteps, context=context, token_ids=token_ids)
    return (noise_pred.float() - noise).square().mean(dim=(1, 2, 3))


def backward(model: nn.Module, batch: Batch, latent_scale: float, scaler: torch.amp.GradScaler,
             min_snr_gamma: float | None = None, micro_batches: int = 1, precision: str = "fp32") -> Tensor:
    """Add a micro-batch's gradient to the parameters'; its unweighted error [B], detached.

    loss = mean_B(w(t) error) / micro_batches, with w = min(SNR, gamma) / SNR (arXiv:2303.09556, section 3.4) or 1: the
    gradients of `micro_batches` such calls add up to that of one batch of all their samples. The scaler multiplies the
    loss, so that small fp16 gradients survive (arXiv:1710.03740, section 3.2).
    """
    draws = batch.draws
    latents = posterior_sample(batch.mean, batch.logvar, draws.posterior, latent_scale)
    with devices.autocast(latents.device, precision):
        error = noise_error(model, latents, draws.noise, draws.timesteps, batch.context, batch.token_ids)
        weight = 1.0 if min_snr_gamma is None else schedule.min_snr_weight(draws.timesteps, min_snr_gamma)
        loss = (weight * error).mean() / micro_batches
        scaler.scale(loss).backward()
    return error.detach()


def update(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, parameters: Iterable[nn.Parameter],
           clip: float) -> tuple[Tensor, bool]:
    """AdamW on the gradients gathered so far; (their norm before clipping, whether an fp16 overflow made the step void).

    Unscale first, then clip the norm over all parameters to `clip` (arXiv:1211.5063, algorithm 1), then AdamW
    (arXiv:1711.05101, algorithm 2). A step whose gradients hold infinity or NaN changes nothing but the loss scale.
    """
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm, scaler.get_scale() < scale


def adamw(groups: list[dict], lr: float, weight_decay: float) -> torch.optim.AdamW:
    """The optimizer of both phases: decoupled weight decay (arXiv:1711.05101, algorithm 2), betas .9 and .999."""
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay, fused=True)
