"""With the exact noise predictor of a Gaussian data distribution every sampler gives that distribution back."""
import functools

import pytest
import torch

from lesion.sd import samplers
from lesion.sd.schedule import ALPHAS_CUMPROD

MEAN, STD, COUNT = 0.8, 0.6, 40_000


def exact_noise(x, timesteps):
    """E[noise | x_t] for x_0 ~ N(MEAN, STD^2): sqrt(1 - abar) (x_t - sqrt(abar) MEAN) / (abar STD^2 + 1 - abar)."""
    abar = ALPHAS_CUMPROD[timesteps].float().view(-1, 1, 1, 1)
    return (1 - abar).sqrt() * (x - abar.sqrt() * MEAN) / (abar * STD**2 + 1 - abar)


def test_gaussian_is_recovered():
    """Mean and variance within 4 standard errors plus 1 % of the deviation for discretisation; a wrong variance or last step shows."""
    g = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, COUNT, 1, 1, 1, generator=g)

    def noised(t):  # SD's schedule ends at abar 0.0047, not 0: start at the true marginal, not at N(0, 1)
        abar = ALPHAS_CUMPROD[t].item()
        return abar**0.5 * MEAN + (abar * STD**2 + 1 - abar) ** 0.5 * draw()
    for name, x in {
        "ddim 0": samplers.ddim(exact_noise, noised(997), 250),
        "ddim 1": samplers.ddim(exact_noise, noised(999), 1000, 1.0, draw),
        "ddpm": samplers.ddpm(exact_noise, noised(999), 1000, draw),
        "dpmpp": samplers.dpmpp(exact_noise, noised(999), 250),
    }.items():
        assert x.mean().item() == pytest.approx(MEAN, abs=4 * STD / COUNT**0.5), name
        assert x.std().item() == pytest.approx(STD, rel=4 / (2 * COUNT) ** 0.5 + 0.01), name


def test_eta_zero_draws_nothing():
    """The deterministic sampler consumes no random numbers."""
    def refuse():
        raise AssertionError("drew noise")
    samplers.ddim(exact_noise, torch.ones(1, 1, 1, 1), 10, 0.0, refuse)


def test_guidance():
    """uncond + s (cond - uncond), in one call of the network; scale 1 calls it on the conditional half alone."""
    sizes = []

    def network(x, timesteps, context):
        sizes.append(len(x))
        return context.expand_as(x)
    cond, uncond, x = torch.full((2, 1, 1, 1), 3.0), torch.full((2, 1, 1, 1), 1.0), torch.zeros(2, 1, 1, 1)
    out = samplers.guided(network, cond, uncond, 7.5)(x, torch.tensor([5, 5]))
    assert out.flatten().tolist() == [16.0, 16.0]
    assert samplers.guided(network, cond, uncond, 1.0)(x, torch.tensor([5, 5])).flatten().tolist() == [3.0, 3.0]
    assert sizes == [4, 2]


def test_on_step_sees_every_step():
    """The callback receives index, timestep, latents and x0_pred of each step, for a test, an auditor or a GIF."""
    seen = []
    samplers.dpmpp(exact_noise, torch.ones(1, 1, 1, 1), 5, on_step=lambda i, t, x, x0: seen.append((i, t, x.shape, x0.shape)))
    assert [(i, t) for i, t, *_ in seen] == list(enumerate(samplers.linspace_timesteps(5)))
