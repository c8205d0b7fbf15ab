"""LoRA layers: start, arithmetic, combination, and what they refuse."""
import pytest
import torch
from torch import nn

from lesion.lora import layers
from lesion.lora.layers import Factors


class Block(nn.Module):
    """A linear, a 1x1 and a strided 3x3 convolution under names that the target lists know."""

    def __init__(self):
        super().__init__()
        self.a = nn.ModuleDict({"to_q": nn.Linear(6, 5), "proj_in": nn.Conv2d(3, 4, 1)})
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.requires_grad_(False)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_start():
    """lora_up is 0, lora_down uniform in +-1/sqrt(fan in) (kaiming, a = sqrt 5), reproducible from the generator."""
    first, second = Block(), Block()
    for block in (first, second):
        layers.inject(block, ["a.to_q"], 64, 64, generator())
    down = first.a["to_q"].lora_down.weight
    assert first.a["to_q"].lora_up.weight.abs().max() == 0
    assert down.abs().max() <= 6**-0.5
    assert down.abs().max() > 0.9 * 6**-0.5
    assert torch.equal(down, second.a["to_q"].lora_down.weight)


def test_linear_forward_is_the_formula():
    """W x + b + (alpha / r) B A x."""
    block = Block()
    layers.inject(block, ["a.to_q"], 2, 3, generator())
    layer = block.a["to_q"]
    nn.init.normal_(layer.lora_up.weight, generator=generator(1))
    x = torch.randn(7, 6, generator=generator(2))
    expected = x @ layer.weight.T + layer.bias + 1.5 * x @ layer.lora_down.weight.T @ layer.lora_up.weight.T
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("path", ["a.proj_in", "conv"])
def test_convolution_merges_exactly(path):
    """For 1x1 and strided 3x3 convolutions the merged kernel gives the unmerged output."""
    block = Block()
    layers.inject(block, [path], 2, 5, generator())
    layer = block.get_submodule(path)
    nn.init.normal_(layer.lora_up.weight, generator=generator(1))
    x = torch.randn(2, 3, 9, 9, generator=generator(2))
    unmerged = layer(x)
    layers.merge(block)
    torch.testing.assert_close(layer(x), unmerged, rtol=1e-5, atol=1e-5)
    layers.merge(block)  # a second merge does nothing
    torch.testing.assert_close(layer(x), unmerged, rtol=1e-5, atol=1e-5)


def test_combine():
    """Two LoRAs of different rank and alpha, one on fewer modules, equal the weighted sum of their updates."""
    g = generator()
    one = {"a.to_q": Factors(torch.randn(2, 6, generator=g), torch.randn(5, 2, generator=g), 3.0),
           "a.proj_in": Factors(torch.randn(2, 3, 1, 1, generator=g), torch.randn(4, 2, 1, 1, generator=g), 2.0)}
    two = {"a.to_q": Factors(torch.randn(3, 6, generator=g), torch.randn(5, 3, generator=g), 1.0)}
    block = Block()
    layers.set_factors(block, layers.combine([(one, 0.7), (two, -0.4)]))
    expected = 0.7 * 1.5 * one["a.to_q"].up @ one["a.to_q"].down - 0.4 / 3 * two["a.to_q"].up @ two["a.to_q"].down
    torch.testing.assert_close(block.a["to_q"].delta(), expected)
    torch.testing.assert_close(
        block.a["proj_in"].delta()[:, :, 0, 0], 0.7 * one["a.proj_in"].up[:, :, 0, 0] @ one["a.proj_in"].down[:, :, 0, 0]
    )


def test_factors_stay_float32_beside_a_half_base():
    """On a bf16 base the factors and their gradients are float32, under autocast."""
    block = Block().bfloat16()
    layers.inject(block, ["a.to_q"], 2, 2, generator())
    with torch.autocast("cpu", torch.bfloat16):
        block.a["to_q"](torch.randn(3, 6)).float().sum().backward()
    assert {p.dtype for p in layers.lora_parameters(block)} == {torch.float32}
    assert block.a["to_q"].lora_up.weight.grad.dtype == torch.float32


def test_refusals():
    """No match, rank 0, a second injection and factors of another shape are errors."""
    block = Block()
    with pytest.raises(ValueError, match="match no module"):
        layers.target_paths(nn.Sequential(nn.Linear(2, 2)), "attention")
    with pytest.raises(ValueError, match="allowed are attention, all"):
        layers.target_paths(block, "most")
    with pytest.raises(ValueError, match="rank 0"):
        layers.inject(block, ["a.to_q"], 0, 1, generator())
    layers.inject(block, ["a.to_q"], 2, 2, generator())
    with pytest.raises(ValueError, match="has a LoRA already"):
        layers.inject(block, ["a.to_q"], 2, 2, generator())
    with pytest.raises(ValueError, match="is expected"):
        layers.set_factors(block, {"a.to_q": Factors(torch.zeros(3, 6), torch.zeros(5, 3), 3.0)})
