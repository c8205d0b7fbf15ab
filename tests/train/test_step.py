"""The functions of lesion/train/step.py one by one, on small float32 networks, against their formulas written out here.

tests/parity proves the whole loop in fp32 against diffusers and peft; here are the loss scale, accumulation and the void step, which
fp16 needs and a CPU can show exactly: with a power of two as scale nothing may change at all.
"""
import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from lesion.train.step import Batch, Draws, adamw, backward, draw_step, noise_error, posterior_sample, update

SCALE = 0.18215
CLIP = 0.05


class Toy(nn.Module):
    """A denoiser whose prediction depends on every input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.text, self.time = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(6, 4), nn.Linear(1, 4)

    def forward(self, noisy_latents, timesteps, context=None, token_ids=None):
        shift = self.text(context.mean(1)) + self.time(timesteps[:, None].float() / 1000)
        return self.mix(noisy_latents) + shift[:, :, None, None]


def batch_of(count=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    draws = Draws(torch.tensor([999, 0, 500, 10, 300, 750][:count]), torch.randn(count, 4, 8, 8, generator=g),
                  torch.randn(count, 4, 8, 8, generator=g), torch.zeros(count, dtype=torch.bool))
    return Batch(torch.randn(count, 4, 8, 8, generator=g), torch.randn(count, 4, 8, 8, generator=g), draws,
                 torch.randn(count, 77, 6, generator=g), None)


def part(batch, some):
    return Batch(batch.mean[some], batch.logvar[some], batch.draws.rows(some), batch.context[some], None)


def alphas_cumprod():
    """SD 1.5's schedule, scaled linear, in float64."""
    return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)


def written_out(model, batch, gamma=None):
    """(error [B], loss) of the published formulas, float64 where the schedule is concerned."""
    draws, abar = batch.draws, alphas_cumprod()[batch.draws.timesteps]
    latents = SCALE * (batch.mean + (batch.logvar / 2).exp() * draws.posterior)
    a, b = (x.sqrt().float()[:, None, None, None] for x in (abar, 1 - abar))
    error = ((model(a * latents + b * draws.noise, draws.timesteps, context=batch.context) - draws.noise) ** 2).mean((1, 2, 3))
    snr = abar / (1 - abar)
    weight = 1.0 if gamma is None else (snr.clamp(max=gamma) / snr).float()
    return error, (weight * error).mean()


def scaler_of(init=2.0**16, enabled=True):
    return torch.amp.GradScaler("cpu", init_scale=init, enabled=enabled)


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


# --- the draws -------------------------------------------------------------------------------------------------------------


def test_draw_step_is_keyed_and_in_order():
    """Timesteps, noise, offset, posterior and dropout come in this order from one generator keyed by (seed, step)."""
    seed, step, shape, offset, share = 7, 11, (16, 4, 6, 6), 0.3, 0.4
    g = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]) & (2**63 - 1))
    timesteps = torch.randint(1000, (16,), generator=g)
    noise = torch.randn(shape, generator=g)
    noise = noise + offset * torch.randn(16, 4, 1, 1, generator=g)
    posterior, dropped = torch.randn(shape, generator=g), torch.rand(16, generator=g) < share
    drawn = draw_step(seed, step, shape, offset, share)
    for ours, expected in zip(drawn, (timesteps, noise, posterior, dropped), strict=True):
        assert torch.equal(ours, expected)
    other = draw_step(seed, step + 1, shape, offset, share)
    assert not any(torch.equal(a, b) for a, b in zip(drawn[:3], other[:3]))
    assert torch.equal(drawn.rows(slice(3, 5)).noise, noise[3:5])


def test_draws_have_their_distributions():
    """Timesteps reach both ends, dropout its share, and an offset adds offset^2 to the variance of a channel's mean alone."""
    many = draw_step(0, 0, (20_000, 1, 4, 4), 0.0, 0.1)
    assert (many.timesteps.min(), many.timesteps.max()) == (0, 999)
    assert many.dropped.float().mean().item() == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / 20_000))
    assert not draw_step(0, 0, (100, 1, 2, 2)).dropped.any()
    means = draw_step(0, 1, (20_000, 1, 4, 4), 0.5).noise.mean((1, 2, 3))
    assert means.var().item() == pytest.approx(1 / 16 + 0.25, rel=0.05)
    assert abs(torch.corrcoef(torch.stack([many.noise.flatten(), many.posterior.flatten()]))[0, 1]) < 0.01


def test_posterior_sample_is_the_formula():
    """scale (mean + exp(logvar / 2) noise), noise not left out and the variance not taken for the deviation."""
    mean, logvar, noise = torch.tensor([1.0, -2.0]), torch.tensor([math.log(4.0), 0.0]), torch.tensor([3.0, 0.5])
    torch.testing.assert_close(posterior_sample(mean, logvar, noise, 0.5), torch.tensor([0.5 * (1 + 2 * 3), 0.5 * (-2 + 0.5)]))


# --- the gradient ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("scale", [None, 1.0, 2.0**16])
def test_backward_is_the_formulas_gradient(gamma, scale):
    """Error unweighted and detached, gradient of the (weighted) mean, times the loss scale and nothing else."""
    model, batch = Toy(), batch_of()
    reference = copy.deepcopy(model)
    error, loss = written_out(reference, batch, gamma)
    loss.backward()
    ours = backward(model, batch, SCALE, scaler_of(scale or 1.0, enabled=scale is not None), gamma)
    assert not ours.requires_grad
    torch.testing.assert_close(ours, error.detach(), rtol=1e-5, atol=1e-6)
    for p, q in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(p.grad, q.grad * (scale or 1.0), rtol=2e-5, atol=1e-6 * (scale or 1.0))


def test_micro_batches_add_up_to_one_batch():
    """Three calls with two samples each give the gradient of one call with six, min-SNR included; errors are those of the whole."""
    model, batch = Toy(), batch_of()
    whole = copy.deepcopy(model)
    errors = [backward(model, part(batch, slice(i, i + 2)), SCALE, scaler_of(), 5.0, micro_batches=3) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.cat(errors), backward(whole, batch, SCALE, scaler_of(), 5.0), rtol=1e-5, atol=1e-6)
    for p, q in zip(model.parameters(), whole.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=2e-5, atol=2e-2)  # scaled by 2^16


def test_the_error_is_of_the_noise_that_was_added():
    """A model that returns the noise has no error; one that returns another has."""
    batch = batch_of()
    for guess, right in ((batch.draws.noise, True), (batch.draws.posterior, False)):
        error = noise_error(lambda *_, guess=guess, **__: guess, batch.mean, batch.draws.noise, batch.draws.timesteps, batch.context)
        assert (error.max().item() == 0) == right


# --- the update ------------------------------------------------------------------------------------------------------------


def reference_update(model, batch, steps, lr=1e-2, decay=0.1):
    """AdamW by hand on unscaled gradients, clipped to CLIP: (parameters, norms)."""
    parameters = list(model.parameters())
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    norms = []
    for t in range(1, steps + 1):
        model.zero_grad()
        written_out(model, batch)[1].backward()
        norm = torch.cat([p.grad.flatten() for p in parameters]).norm()
        norms.append(norm.item())
        with torch.no_grad():
            for p, m, v in zip(parameters, first, second):
                g = p.grad * min(1.0, CLIP / (norm.item() + 1e-6))
                p.mul_(1 - lr * decay)
                m.mul_(0.9).add_(g, alpha=0.1)
                v.mul_(0.999).addcmul_(g, g, value=0.001)
                p.sub_(lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8))
    return parameters, norms


@pytest.mark.parametrize("enabled", [False, True])
def test_update_is_adamw_on_unscaled_clipped_gradients(enabled):
    """With and without a loss scale of 2^16: the same parameters after four steps as AdamW by hand, the true norm returned (far above
    the limit, so that clipping before unscaling would shrink every step 65,536 times over), and gradients cleared."""
    model, batch = Toy(), batch_of()
    expected, norms = reference_update(copy.deepcopy(model), batch, 4)
    assert min(norms) > 2 * CLIP
    optimizer, scaler = adamw([{"params": list(model.parameters())}], 1e-2, 0.1), scaler_of(enabled=enabled)
    for step in range(4):
        backward(model, batch, SCALE, scaler)
        norm, overflowed = update(optimizer, scaler, model.parameters(), CLIP)
        assert not overflowed
        assert norm.item() == pytest.approx(norms[step], rel=1e-4)
        assert all(p.grad is None for p in model.parameters())
    for p, q in zip(model.parameters(), expected):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=2e-5)


def test_scaled_equals_unscaled_to_the_bit():
    """A power of two only moves exponents: LoRA factors after three scaled steps are those after three unscaled ones."""
    models = [Toy(), Toy()]
    for model, enabled in zip(models, (False, True)):
        optimizer, scaler = adamw([{"params": list(model.parameters())}], 1e-2, 0.1), scaler_of(enabled=enabled)
        for seed in range(3):
            for some in (slice(0, 3), slice(3, 6)):
                backward(model, part(batch_of(seed=seed), some), SCALE, scaler, 5.0, micro_batches=2)
            update(optimizer, scaler, model.parameters(), CLIP)
    assert all(torch.equal(p, q) for p, q in zip(*(model.parameters() for model in models)))


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_an_overflow_is_void(bad):
    """Infinity or NaN in one gradient: no parameter and no moment moves, the scale halves, the step is reported, the gradient is gone
    and the next step is taken as if nothing had been."""
    model, batch = Toy(), batch_of()
    other = copy.deepcopy(model)
    optimizers = [adamw([{"params": list(m.parameters())}], 1e-2, 0.1) for m in (model, other)]
    scalers = [scaler_of(), scaler_of()]
    for m, optimizer, scaler in zip((model, other), optimizers, scalers):
        backward(m, batch, SCALE, scaler)
        assert update(optimizer, scaler, m.parameters(), CLIP)[1] is False
    before = [p.clone() for p in model.parameters()]
    moments = copy.deepcopy(optimizers[0].state_dict()["state"])
    backward(model, batch, SCALE, scalers[0])
    model.mix.weight.grad[0, 0, 0, 0] = bad
    assert update(optimizers[0], scalers[0], model.parameters(), CLIP)[1] is True
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
    for number, values in optimizers[0].state_dict()["state"].items():
        assert all(torch.equal(value, moments[number][name]) for name, value in values.items())
    assert scalers[0].get_scale() == 2.0**15
    assert all(p.grad is None for p in model.parameters())
    for m, optimizer, scaler in zip((model, other), optimizers, scalers):
        backward(m, batch, SCALE, scaler)
        update(optimizer, scaler, m.parameters(), CLIP)
    for p, q in zip(model.parameters(), other.parameters()):
        assert torch.equal(p, q)
