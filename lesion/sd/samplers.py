"""Samplers as pure functions: DDPM (ancestral), DDIM and DPM-Solver++(2M); SAMPLERS is the one list of them.

Each takes `noise_fn(noisy_latents, timesteps) -> noise_pred` and never sees a network, a prompt or a device. Fresh noise comes from
`draw() -> Tensor` shaped like the latents, so that the caller decides the random numbers. `on_step(i, timestep, latents, x0_pred)`
is called after each step. All three start at `latents` ~ N(0, I) and return x_0 latents.
torch is imported where it is used: generate.py's --help lists SAMPLERS, and must not wait for it.
Proven against diffusers' schedulers in tests/parity/test_samplers.py and in closed form in tests/sd/test_samplers.py.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

NoiseFn = Callable[["Tensor", "Tensor"], "Tensor"]
OnStep = Callable[[int, int, "Tensor", "Tensor"], None]
Draw = Callable[[], "Tensor"]

STEPS = 1000  # of the forward process: lesion.sd.schedule.STEPS


def leading_timesteps(steps: int) -> list[int]:
    """`steps` evenly spaced timesteps, high to low, offset 1: 50 -> 981, 961 ... 1 (CompVis `make_ddim_timesteps`).

    CompVis and diffusers space them by the whole number 1000 // steps. That leaves out the noisiest part where at least one more
    such stride would fit above (501 steps would begin at t = 501): there, and only there, the spacing is 1000 / steps, rounded down.
    """
    _check_steps(steps)
    if steps == STEPS:
        return list(reversed(range(STEPS)))
    stride = STEPS // steps
    if STEPS - steps * stride < stride:
        return [i * stride + 1 for i in reversed(range(steps))]
    return [i * STEPS // steps + 1 for i in reversed(range(steps))]


def linspace_timesteps(steps: int) -> list[int]:
    """`steps` timesteps from 999 down, the last above 0: 20 -> 999, 949 ... 50 (DPM-Solver's uniform time grid); 1000: all of them."""
    _check_steps(steps)
    if steps == STEPS:
        return list(reversed(range(STEPS)))
    return [round(i * ((STEPS - 1) / steps)) for i in range(steps, 0, -1)]


def _check_steps(steps: int) -> None:
    if not 1 <= steps <= STEPS:
        raise ValueError(f"{steps} sampling steps: allowed is 1 to {STEPS}")


def ddim(noise_fn: NoiseFn, latents: Tensor, steps: int, eta: float = 0.0, draw: Draw | None = None,
         on_step: OnStep | None = None) -> Tensor:
    """DDIM (arXiv:2010.02502, eq. 12), eta 0 deterministic, eta 1 ancestral variance (eq. 16).

    The last step goes to abar_0, not to 1, and x0_pred is not clipped: CompVis' and diffusers' settings for SD 1.5.
    """
    from lesion.sd.schedule import ALPHAS_CUMPROD
    x = latents
    timesteps = leading_timesteps(steps)
    for i, (t, t_prev) in enumerate(zip(timesteps, [*timesteps[1:], 0])):
        abar, abar_prev = float(ALPHAS_CUMPROD[t]), float(ALPHAS_CUMPROD[t_prev])
        noise_pred = noise_fn(x, _batch(t, x))
        x0_pred = (x - (1 - abar) ** 0.5 * noise_pred) / abar**0.5  # eq. 9
        sigma = eta * ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)) ** 0.5  # eq. 16
        x = abar_prev**0.5 * x0_pred + (1 - abar_prev - sigma**2) ** 0.5 * noise_pred  # eq. 12
        if sigma > 0:
            x = x + sigma * draw()
        if on_step is not None:
            on_step(i, t, x, x0_pred)
    return x


def ddpm(noise_fn: NoiseFn, latents: Tensor, steps: int, draw: Draw, on_step: OnStep | None = None) -> Tensor:
    """Ancestral sampling (arXiv:2006.11239, eq. 7: posterior mean and variance), respaced as in arXiv:2102.09672, section 4.

    With fewer than 1,000 steps the chain jumps from t to the next timestep of the grid: alpha_t becomes abar_t / abar_prev.
    No noise is added in the last step, which lands on x0_pred.
    """
    from lesion.sd.schedule import ALPHAS_CUMPROD
    x = latents
    timesteps = leading_timesteps(steps)
    for i, t in enumerate(timesteps):
        abar = float(ALPHAS_CUMPROD[t])
        abar_prev = float(ALPHAS_CUMPROD[timesteps[i + 1]]) if i + 1 < steps else 1.0
        alpha = abar / abar_prev
        x0_pred = (x - (1 - abar) ** 0.5 * noise_fn(x, _batch(t, x))) / abar**0.5
        x = (abar_prev**0.5 * (1 - alpha) * x0_pred + alpha**0.5 * (1 - abar_prev) * x) / (1 - abar)  # eq. 7, mean
        variance = (1 - abar_prev) / (1 - abar) * (1 - alpha)  # eq. 7, beta tilde
        if variance > 0:
            x = x + variance**0.5 * draw()
        if on_step is not None:
            on_step(i, t, x, x0_pred)
    return x


def dpmpp(noise_fn: NoiseFn, latents: Tensor, steps: int, on_step: OnStep | None = None) -> Tensor:
    """DPM-Solver++(2M), multistep second order in data prediction (arXiv:2211.01095, algorithm 2); good at 20 steps.

    lambda = log(alpha / sigma). The first step and the last, which goes to sigma 0, are first order.
    """
    from lesion.sd.schedule import ALPHAS_CUMPROD
    timesteps = linspace_timesteps(steps)
    abar = ALPHAS_CUMPROD[timesteps]
    alphas = [*abar.sqrt().tolist(), 1.0]
    sigmas = [*(1 - abar).sqrt().tolist(), 0.0]
    lambdas = (0.5 * (abar / (1 - abar)).log()).tolist()
    x, x0_before = latents, None
    for i, t in enumerate(timesteps):
        x0_pred = (x - sigmas[i] * noise_fn(x, _batch(t, x))) / alphas[i]
        data = x0_pred
        if i + 1 < steps:
            h = lambdas[i + 1] - lambdas[i]
            if x0_before is not None:
                ratio = (lambdas[i] - lambdas[i - 1]) / h
                data = x0_pred + (x0_pred - x0_before) / (2 * ratio)
            x = sigmas[i + 1] / sigmas[i] * x + alphas[i + 1] * -math.expm1(-h) * data
        else:
            x = x0_pred
        x0_before = x0_pred
        if on_step is not None:
            on_step(i, t, x, x0_pred)
    return x


def guided(noise_fn: Callable[[Tensor, Tensor, Tensor], Tensor], context: Tensor, negative_context: Tensor,
           guidance_scale: float) -> NoiseFn:
    """Classifier-free guidance (arXiv:2207.12598, eq. 6 in SD's convention): uncond + guidance_scale (cond - uncond).

    noise_fn(noisy_latents, timesteps, context) is called once on both halves; guidance_scale 1 skips the unconditional half.
    """
    if guidance_scale == 1.0:
        return lambda x, timesteps: noise_fn(x, timesteps, context)
    import torch
    both = torch.cat([negative_context, context])

    def predict(x: Tensor, timesteps: Tensor) -> Tensor:
        uncond, cond = noise_fn(torch.cat([x, x]), torch.cat([timesteps, timesteps]), both).chunk(2)
        return uncond + guidance_scale * (cond - uncond)
    return predict


def _batch(t: int, x: Tensor) -> Tensor:
    import torch
    return torch.full((len(x),), t, dtype=torch.int64, device=x.device)


SAMPLERS = {  # name -> sampler(noise_fn, latents, steps, eta, draw, on_step); eta is DDIM's only
    "ddim": ddim,
    "ddpm": lambda noise_fn, latents, steps, eta, draw, on_step: ddpm(noise_fn, latents, steps, draw, on_step),
    "dpmpp": lambda noise_fn, latents, steps, eta, draw, on_step: dpmpp(noise_fn, latents, steps, on_step),
}
