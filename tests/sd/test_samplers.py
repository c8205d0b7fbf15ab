"""With the exact noise predictor of a Gaussian data distribution every sampler gives that distribution back."""
import functools
import types

import pytest
import torch

from lesion.sd import pipeline, samplers
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


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_ddpm_ends_on_its_picture(steps):
    """The last ancestral step adds no noise and lands on x0_pred: one draw fewer than there are steps."""
    drawn, seen = [], []
    x = samplers.ddpm(exact_noise, torch.full((1, 1, 1, 1), 0.3, dtype=torch.float64), steps,
                      lambda: drawn.append(1) or torch.ones(1, 1, 1, 1), lambda i, t, x, x0_pred: seen.append(x0_pred))
    assert len(drawn) == steps - 1
    assert x.item() == pytest.approx(seen[-1].item(), abs=1e-12)


SIGNAL = [abar**0.5 * MEAN for abar in ALPHAS_CUMPROD.tolist()]
GAIN = [(1 - abar) ** 0.5 / (abar * STD**2 + 1 - abar) for abar in ALPHAS_CUMPROD.tolist()]


def spread(name: str, steps: int) -> tuple[float, float]:
    """Mean and deviation of what a sampler makes of N(0, 1), exactly: with this noise predictor each step is x -> a x + b + c noise.

    Three points are enough: from 0 and from 1 without noise (b and a), from 0 with noise 1 (c).
    """
    x, kick = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    seen = [x]
    samplers.SAMPLERS[name](lambda x, t: (x - SIGNAL[int(t[0])]) * GAIN[int(t[0])], x, steps, 0.0, lambda: kick,
                            lambda i, t, x, x0_pred: seen.append(x))
    assert len(seen) == steps + 1
    rows = torch.stack(seen)
    scale = rows[:, 1] - rows[:, 0]
    if name == "dpmpp":  # multistep: no noise, and only the whole run is x -> a x + b
        return float(rows[-1, 0]), float(scale[-1].abs())
    gain = scale[1:] / scale[:-1]
    noise = rows[1:, 2] - rows[1:, 0] - gain * (rows[:-1, 2] - rows[:-1, 0])
    variance = 1.0
    for a, c in zip(gain.tolist(), noise.tolist()):
        variance = a * a * variance + c * c
    return float(rows[-1, 0]), variance**0.5


@pytest.mark.parametrize(("name", "mean", "slack"), [("ddim", 0.767, 1.3), ("ddpm", 0.799, 4.5), ("dpmpp", 0.767, 0.9)])
def test_every_number_of_steps(name, mean, slack):
    """1 to 1000 steps on the closed-form Gaussian, from N(0, 1): the error of the spread falls as 1 / steps, and one step more never
    changes it by more than a little. A grid that begins below the noisiest part (501 steps once began at t = 501) jumps by 15 %.
    `mean` is the limit: N(0, 1) is not quite the noisiest marginal, and the deterministic samplers keep what is lacking."""
    before = None
    for steps in range(1, 1001):
        got, deviation = spread(name, steps)
        assert abs(deviation - STD) < slack / steps + 0.002, steps
        if steps >= 20:
            assert abs(got - mean) < 0.012, steps
            assert before is None or abs(deviation - before) < 0.1 / steps + 0.0015, steps
            before = deviation


@pytest.mark.parametrize("grid", [samplers.leading_timesteps, samplers.linspace_timesteps])
def test_every_grid_is_even(grid):
    """1 to 1000 steps: each timestep once, within 0..999, strides that differ by 1 at most, and less than one stride left out above."""
    for steps in range(1, 1001):
        timesteps = grid(steps)
        strides = {a - b for a, b in zip(timesteps, timesteps[1:])}
        assert len(timesteps) == steps
        assert 0 <= timesteps[-1] <= timesteps[0] <= 999
        assert all(stride > 0 for stride in strides)
        assert not strides or max(strides) - min(strides) <= 1
        assert steps == 1 or 1000 - timesteps[0] <= 2 * max(strides), steps


def test_grids_are_the_published_ones_where_the_stride_divides():
    """CompVis' and diffusers' timesteps, i (1000 / steps) + 1 and numpy's linspace, wherever they are even; at 30 steps too."""
    import numpy as np
    for steps in range(1, 1000):
        if 1000 % steps == 0 or steps == 30:
            assert samplers.leading_timesteps(steps) == [i * (1000 // steps) + 1 for i in reversed(range(steps))]
        assert samplers.linspace_timesteps(steps) == np.linspace(0, 999, steps + 1).round()[:0:-1].astype(int).tolist()
    assert samplers.leading_timesteps(1000) == samplers.linspace_timesteps(1000) == list(range(999, -1, -1))
    assert samplers.leading_timesteps(501)[0] == 999


def test_one_table_of_samplers():
    """generate.py offers what the table holds, the table is read without torch, and an unknown name is told what there is."""
    import subprocess
    import sys
    code = "import sys; from lesion.sd.samplers import SAMPLERS; print(*SAMPLERS, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.split() == [*samplers.SAMPLERS, "False"]
    with pytest.raises(ValueError, match="no sampler 'euler': allowed are ddim, ddpm, dpmpp"):
        pipeline.draw(types.SimpleNamespace(), torch.zeros(1, 77, 8), torch.zeros(1, 77, 8), [0], 64, "euler")


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
