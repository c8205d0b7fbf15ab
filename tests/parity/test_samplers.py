"""Whole sampling runs equal diffusers' schedulers, step noise given; the timesteps are theirs."""
import pytest
import torch

from lesion.sd import samplers, schedule

SD15 = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)


def noise_fn(x, timesteps):
    """A stand-in network: the noise of Gaussian data, bent a little, so that latents stay of unit scale as in a real run."""
    abar = schedule.ALPHAS_CUMPROD[timesteps].float().view(-1, 1, 1, 1)
    exact = (1 - abar).sqrt() * (x - 0.3 * abar.sqrt()) / (0.7 * abar + 1 - abar)
    return exact + 0.1 * torch.tanh(x.roll(1, -1)) * abar.sqrt()


@pytest.fixture
def latents():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def noises(count):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(2, 4, 8, 8, generator=g) for _ in range(count)]


@pytest.mark.parametrize("steps", [50, 30, 20])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim(latents, steps, eta):
    """DDIM with SD 1.5's settings (leading timesteps, offset 1, last step to abar_0, no clipping)."""
    from diffusers import DDIMScheduler
    scheduler = DDIMScheduler(**SD15, clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading")
    scheduler.set_timesteps(steps)
    draws = noises(steps)
    x = latents
    for t, noise in zip(scheduler.timesteps, draws):
        x = scheduler.step(noise_fn(x, torch.full((2,), int(t))), t, x, eta=eta, variance_noise=noise if eta > 0 else None).prev_sample
    feed = iter(draws)
    ours = samplers.ddim(noise_fn, latents, steps, eta, draw=lambda: next(feed))
    assert samplers.leading_timesteps(steps) == scheduler.timesteps.tolist()
    assert (ours - x).abs().max().item() < 1e-5


@pytest.mark.parametrize("steps", [50, 1000])
def test_ddpm(latents, steps, monkeypatch):
    """Ancestral sampling with the posterior variance, respaced and over the full chain."""
    from diffusers import DDPMScheduler
    from diffusers.schedulers import scheduling_ddpm
    scheduler = DDPMScheduler(**SD15, clip_sample=False, variance_type="fixed_small", timestep_spacing="leading", steps_offset=steps < 1000)
    scheduler.set_timesteps(steps)
    draws = noises(steps)
    if steps == 1000:  # a thousand float32 roundings are not the subject: both sides in float64
        scheduler.betas, scheduler.alphas = schedule.BETAS, 1 - schedule.BETAS
        scheduler.alphas_cumprod, scheduler.one = schedule.ALPHAS_CUMPROD, torch.tensor(1.0, dtype=torch.float64)
        latents, draws = latents.double(), [noise.double() for noise in draws]
    feed = iter(draws)
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: next(feed))
    x = latents
    for t in scheduler.timesteps:
        x = scheduler.step(noise_fn(x, torch.full((2,), int(t))), t, x).prev_sample
    again = iter(draws)
    ours = samplers.ddpm(noise_fn, latents, steps, draw=lambda: next(again))
    assert samplers.leading_timesteps(steps) == scheduler.timesteps.tolist()
    assert (ours - x).abs().max().item() < 1e-5


@pytest.mark.parametrize("steps", [20, 10, 25])
def test_dpmpp(latents, steps):
    """DPM-Solver++(2M) as diffusers runs it: uniform time, midpoint, final step to sigma 0 in first order."""
    from diffusers import DPMSolverMultistepScheduler
    scheduler = DPMSolverMultistepScheduler(**SD15, algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint")
    scheduler.set_timesteps(steps)
    x = latents
    for t in scheduler.timesteps:
        x = scheduler.step(noise_fn(x, torch.full((2,), int(t))), t, x).prev_sample
    ours = samplers.dpmpp(noise_fn, latents, steps)
    assert samplers.linspace_timesteps(steps) == scheduler.timesteps.tolist()
    assert (ours - x).abs().max().item() < 1e-5


def test_add_noise_and_tables():
    """The forward process and its tables are diffusers'."""
    from diffusers import DDIMScheduler
    scheduler = DDIMScheduler(**SD15)
    torch.testing.assert_close(schedule.ALPHAS_CUMPROD.float(), scheduler.alphas_cumprod, rtol=1e-5, atol=1e-7)
    g = torch.Generator().manual_seed(0)
    x, noise, t = torch.randn(3, 4, 8, 8, generator=g), torch.randn(3, 4, 8, 8, generator=g), torch.tensor([0, 500, 999])
    torch.testing.assert_close(schedule.add_noise(x, noise, t), scheduler.add_noise(x, noise, t), rtol=1e-5, atol=1e-6)
