"""LoRA (arXiv:2106.09685) as visible layers: W x + (alpha / rank) B A x, with A = `lora_down`, B = `lora_up`.

A LoRA layer is the layer it replaces, its own `weight` and `bias` under their old names, plus two small float32 factors.
Proven by tests/lora/test_layers.py and tests/parity/test_lora_step.py.
"""
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")  # U-Net's; text encoder's
ALL = (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "mlp.fc1", "mlp.fc2")  # kohya's set: 192 + 72 modules
TARGETS = {"attention": ATTENTION, "all": ALL}


class Factors(NamedTuple):
    """One module's update W + (alpha / r) up down: down [r,in] or [r,in,kh,kw], up [out,r] or [out,r,1,1], r = len(down)."""
    down: Tensor
    up: Tensor
    alpha: float


class LoRALinear(nn.Linear):
    """A linear layer with a low-rank update; the base is frozen, the factors are float32 whatever the base's dtype."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        with torch.device("meta"):
            super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
        self.weight, self.bias = base.weight, base.bias
        self.scale = alpha / rank
        self.merged_from: Tensor | None = None
        device = base.weight.device
        self.lora_down = nn.Linear(base.in_features, rank, bias=False, device=device, dtype=torch.float32)
        self.lora_up = nn.Linear(rank, base.out_features, bias=False, device=device, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight, self.bias)
        if self.merged_from is not None:
            return out
        return out + self.scale * self.lora_up(self.lora_down(x))

    def delta(self) -> Tensor:
        """(alpha / rank) B A, float32, shaped like the weight."""
        return self.scale * (self.lora_up.weight @ self.lora_down.weight)


class LoRAConv2d(nn.Conv2d):
    """The same for a convolution: A is a convolution of the base's kernel to `rank` channels, B a 1x1 convolution."""

    def __init__(self, base: nn.Conv2d, rank: int, alpha: float):
        shape = dict(kernel_size=base.kernel_size, stride=base.stride, padding=base.padding)
        with torch.device("meta"):
            super().__init__(base.in_channels, base.out_channels, bias=base.bias is not None, **shape)
        self.weight, self.bias = base.weight, base.bias
        self.scale = alpha / rank
        self.merged_from: Tensor | None = None
        where = dict(bias=False, device=base.weight.device, dtype=torch.float32)
        self.lora_down = nn.Conv2d(base.in_channels, rank, **shape, **where)
        self.lora_up = nn.Conv2d(rank, base.out_channels, 1, **where)

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if self.merged_from is not None:
            return out
        return out + self.scale * self.lora_up(self.lora_down(x))

    def delta(self) -> Tensor:
        """(alpha / rank) B A, float32, shaped like the weight."""
        return self.scale * torch.einsum("or,rikl->oikl", self.lora_up.weight[:, :, 0, 0], self.lora_down.weight)


def lora_layers(network: nn.Module) -> dict[str, LoRALinear | LoRAConv2d]:
    """{module path: layer} of every LoRA layer."""
    return {path: module for path, module in network.named_modules() if isinstance(module, LoRALinear | LoRAConv2d)}


def lora_parameters(network: nn.Module) -> list[nn.Parameter]:
    """The trainable factors, in module order: a list, since the optimizer and the gradient clipping both need it."""
    return [p for layer in lora_layers(network).values() for p in (layer.lora_down.weight, layer.lora_up.weight)]


def target_paths(network: nn.Module, targets: str) -> list[str]:
    """Paths of the modules that `targets`, "attention" or "all", names. ValueError if there is none."""
    if targets not in TARGETS:
        raise ValueError(f"LoRA targets {targets!r}: allowed are {', '.join(TARGETS)}")
    paths = [path for path, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
             and path.endswith(tuple("." + suffix for suffix in TARGETS[targets]))]
    if not paths:
        raise ValueError(f"LoRA targets {targets!r} match no module of {type(network).__name__}")
    return paths


def inject(network: nn.Module, paths: Iterable[str], rank: int, alpha: float, generator: torch.Generator) -> None:
    """Replace the modules at `paths` by LoRA layers that change nothing yet: A ~ U(-1/sqrt(fan_in), 1/sqrt(fan_in)), B = 0.

    That A is kaiming_uniform(a = sqrt 5), peft's and kohya's start. ValueError for rank < 1 or no paths.
    """
    paths = list(paths)
    if rank < 1 or not paths:
        raise ValueError(f"rank {rank} over {len(paths)} modules: both must be at least 1")
    for path in paths:
        layer = _replace(network, path, rank, alpha)
        down = layer.lora_down.weight
        bound = down[0].numel() ** -0.5
        with torch.no_grad():
            down.copy_(torch.empty(down.shape).uniform_(-bound, bound, generator=generator))
            layer.lora_up.weight.zero_()


def _replace(network: nn.Module, path: str, rank: int, alpha: float) -> LoRALinear | LoRAConv2d:
    parent_path, _, name = path.rpartition(".")
    parent = network.get_submodule(parent_path)
    base = parent.get_submodule(name)
    if isinstance(base, LoRALinear | LoRAConv2d):
        raise ValueError(f"{path} has a LoRA already")
    layer = (LoRALinear if isinstance(base, nn.Linear) else LoRAConv2d)(base, rank, alpha)
    layer.train(base.training)
    parent.register_module(name, layer)
    return layer


def set_factors(network: nn.Module, factors: dict[str, Factors]) -> None:
    """Give modules the factors {path: Factors}, injecting where there is no LoRA layer yet; ranks and alphas may differ."""
    for path, (down, up, alpha) in factors.items():
        layer = network.get_submodule(path)
        if not isinstance(layer, LoRALinear | LoRAConv2d):
            layer = _replace(network, path, len(down), alpha)
        if layer.lora_down.weight.shape != down.shape or layer.lora_up.weight.shape != up.shape:
            raise ValueError(f"{path}: LoRA of shapes {list(down.shape)}, {list(up.shape)} where {list(layer.lora_down.weight.shape)}, "
                             f"{list(layer.lora_up.weight.shape)} is expected; give the same --rank and --lora-targets")
        layer.scale = alpha / len(down)
        with torch.no_grad():
            layer.lora_down.weight.copy_(down)
            layer.lora_up.weight.copy_(up)


@torch.no_grad()
def remove(network: nn.Module) -> None:
    """Put plain layers back in place of the LoRA layers, with the base's weights, bit for bit."""
    unmerge(network)
    for path, layer in lora_layers(network).items():
        kind = nn.Linear if isinstance(layer, LoRALinear) else nn.Conv2d
        plain = kind.__new__(kind)
        plain.__dict__ = {**layer.__dict__, "_modules": {}}
        for name in ("scale", "merged_from", "forward"):  # a fast way to compute is of the LoRA layer: lesion.sd.fast.use makes it anew
            plain.__dict__.pop(name, None)
        parent_path, _, name = path.rpartition(".")
        network.get_submodule(parent_path).register_module(name, plain)


def get_factors(network: nn.Module) -> dict[str, Factors]:
    """{path: Factors} of every LoRA layer, float32 copies."""
    return {path: Factors(layer.lora_down.weight.detach().clone(), layer.lora_up.weight.detach().clone(),
                          layer.scale * len(layer.lora_down.weight)) for path, layer in lora_layers(network).items()}


def combine(weighted: list[tuple[dict[str, Factors], float]]) -> dict[str, Factors]:
    """Several LoRAs with weights as one: sum_i w_i s_i B_i A_i = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...], scale 1."""
    paths = {path: None for factors, _ in weighted for path in factors}
    combined = {}
    for path in paths:
        parts = [(factors[path], weight) for factors, weight in weighted if path in factors]
        down = torch.cat([part.down.float() for part, _ in parts])
        up = torch.cat([weight * part.alpha / len(part.down) * part.up.float() for part, weight in parts], dim=1)
        combined[path] = Factors(down, up, float(len(down)))
    return combined


@torch.no_grad()
def merge(network: nn.Module) -> None:
    """Fold every update into its base weight, summed in float32: no cost at inference. `unmerge` restores the bits."""
    for layer in lora_layers(network).values():
        if layer.merged_from is None:
            layer.merged_from = layer.weight.data
            layer.weight.data = (layer.weight.float() + layer.delta()).to(layer.weight.dtype)


@torch.no_grad()
def unmerge(network: nn.Module) -> None:
    """Undo `merge`, bit for bit."""
    for layer in lora_layers(network).values():
        if layer.merged_from is not None:
            layer.weight.data, layer.merged_from = layer.merged_from, None


def of_network(factors: dict, name: str) -> dict:
    """The factors of one network, by module path."""
    return {key.removeprefix(name + "."): value for key, value in factors.items() if key.startswith(name + ".")}


def all_factors(networks: dict[str, nn.Module]) -> dict[str, Factors]:
    """{"<network>.<path>": Factors} of several networks, as LoRA files name them."""
    return {f"{name}.{path}": part for name, network in networks.items() for path, part in get_factors(network).items()}
