"""The forward process of Stable Diffusion 1.5: noise schedule and loss weights.

beta_t = linspace(sqrt(.00085), sqrt(.012), 1000)^2 (`scaled_linear` in diffusers, confusingly `linear` in CompVis), tables in
float64. timesteps run 0..999, 0 = least noise. Proven by tests/sd/test_schedule.py and tests/parity/test_samplers.py.
"""
import torch
from torch import Tensor

STEPS = 1000
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, STEPS, dtype=torch.float64) ** 2
ALPHAS_CUMPROD = torch.cumprod(1 - BETAS, dim=0)  # abar_t, float64 [1000]


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """q(x_t | x_0): sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (arXiv:2006.11239, eq. 4). latents, noise [B,4,h,w], timesteps [B]."""
    abar = ALPHAS_CUMPROD[timesteps.cpu()].view(-1, 1, 1, 1)
    signal, sigma = (x.to(latents) for x in (abar.sqrt(), (1 - abar).sqrt()))
    return signal * latents + sigma * noise


def snr(timesteps: Tensor) -> Tensor:
    """Signal-to-noise ratio abar_t / (1 - abar_t), float64, same shape as timesteps."""
    abar = ALPHAS_CUMPROD[timesteps.cpu()]
    return abar / (1 - abar)


def min_snr_weight(timesteps: Tensor, gamma: float) -> Tensor:
    """min(SNR, gamma) / SNR: the min-SNR weight for noise prediction (arXiv:2303.09556, section 3.4). float32 [B]."""
    ratio = snr(timesteps)
    return (ratio.clamp(max=gamma) / ratio).float().to(timesteps.device)
