"""What the stages share: averages, rates, weights' bytes."""
from types import SimpleNamespace

import pytest
import torch

from lesion.mini import loop


def test_moving_average():
    """d = min(decay, (1 + step) / (10 + step)): step 0 keeps a tenth of the old, a late one `decay` of it."""
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    ema = {"weight": torch.zeros(1, 1)}
    loop.ema_update(ema, model, 0.99, 0)
    assert ema["weight"].item() == pytest.approx(0.9)
    loop.ema_update(ema, model, 0.99, 10_000)
    assert ema["weight"].item() == pytest.approx(0.99 * 0.9 + 0.01)


def test_averaged_weights_are_put_back():
    """In the context the model has its averages, after it its own weights, after an error too."""
    model = torch.nn.Linear(1, 1, bias=False)
    own, inside = model.weight.item(), []

    def fail():
        with loop.averaged(model, {"weight": torch.tensor([[5.0]])}):
            inside.append(model.weight.item())
            raise KeyError
    with pytest.raises(KeyError):
        fail()
    assert (inside, model.weight.item()) == ([5.0], own)


def test_rates_reach_every_optimizer():
    """Warm-up, then a half cosine: the stage's optimizer and the critic's take the step's rate."""
    one, two = (torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=9.0) for _ in range(2))
    stage = SimpleNamespace(optimizer=one, also={"critic": (None, two)})
    recipe = SimpleNamespace(lr=1.0, steps=110, warmup_steps=10)
    for step, rate in ((0, 0.1), (10, 1.0), (60, 0.5)):
        loop.set_rate(stage, recipe, step)
        assert [optimizer.param_groups[0]["lr"] for optimizer in (one, two)] == pytest.approx([rate, rate])


def test_a_loss_that_is_not_finite_stops():
    """NaN changes no weight and is one line."""
    model = torch.nn.Linear(1, 1)
    before = model.weight.clone()
    with pytest.raises(ValueError, match="lower --lr"):
        loop.update(torch.optim.SGD(model.parameters(), lr=1.0), model, model.weight.sum() * float("nan"), 3)
    assert torch.equal(model.weight, before)


def test_weights_have_the_same_bytes_every_time(tmp_path):
    """Many entries of metadata, written five times: one file's bytes, float16, metadata as given."""
    about = {f"key{i}": str(i) for i in range(12)}
    for i in range(5):
        loop.write_weights(tmp_path / f"{i}.safetensors", {"a": torch.ones(3)}, about)
    assert len({(tmp_path / f"{i}.safetensors").read_bytes() for i in range(5)}) == 1
    from safetensors import safe_open
    with safe_open(tmp_path / "0.safetensors", "pt") as file:
        assert file.metadata() == about
        assert file.get_tensor("a").dtype == torch.float16
