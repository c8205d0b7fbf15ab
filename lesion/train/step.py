"""The training step."""

import torch
from torch import Tensor, nn


class Denoiser(nn.Module):
    """U-Net and text encoder as one module, so that DistributedDataParallel sees one forward: text is context or token_ids."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        context = text if text.is_floating_point() else self.text_encoder(text)
        return self.unet(noisy_latents, timesteps, context)


def posterior_sample(mean: Tensor, logvar: Tensor, noise: Tensor, latent_scale: float) -> Tensor:
    """latents = scale (mean + exp(logvar / 2) noise): a draw from the posterior q(z|x) (arXiv:1312.6114, eq. 10)."""
    return latent_scale * (mean + torch.exp(0.5 * logvar) * noise)
