"""The noise schedule's numbers, and the min-SNR weights."""
import pytest
import torch

from lesion.sd import schedule


@pytest.mark.parametrize(("t", "abar", "snr"), [(0, 0.9991500000, 1175.47), (500, 0.2763326838, 0.38185), (999, 0.0046600985, 0.0046819)])
def test_values(t, abar, snr):
    """alphas_cumprod and SNR at both ends and the middle, to the digits published."""
    assert schedule.ALPHAS_CUMPROD[t].item() == pytest.approx(abar, abs=5e-11)
    assert schedule.snr(torch.tensor([t])).item() == pytest.approx(snr, rel=2e-5)


def test_sigmas():
    """sigma = sqrt((1 - abar) / abar) runs from 0.029167 to 14.614641."""
    sigma = ((1 - schedule.ALPHAS_CUMPROD) / schedule.ALPHAS_CUMPROD).sqrt()
    assert sigma[0].item() == pytest.approx(0.029167, abs=5e-7)
    assert sigma[-1].item() == pytest.approx(14.614641, abs=5e-7)
    assert schedule.ALPHAS_CUMPROD.dtype == torch.float64


def test_min_snr_weight():
    """min(SNR, 5) / SNR: 5/1175.47 at t = 0, exactly 1 where SNR < 5."""
    weight = schedule.min_snr_weight(torch.tensor([0, 500, 999]), 5.0)
    assert weight.tolist() == pytest.approx([5 / 1175.4706, 1.0, 1.0], rel=1e-5)


def test_timestep_lists():
    """DDIM's timesteps at 50, 30 and 20 steps begin and end as published."""
    from lesion.sd.samplers import leading_timesteps
    for steps, start in ((50, [981, 961]), (30, [958, 925]), (20, [951, 901])):
        timesteps = leading_timesteps(steps)
        assert timesteps[:2] == start
        assert timesteps[-1] == 1
    with pytest.raises(ValueError, match="1 to 1000"):
        leading_timesteps(0)
