"""What every training loop shares about its optimizer: the learning rate by step, and its state as named tensors.

Proven by tests/run/test_state.py and tests/train/test_setup.py.
"""
import math

import torch
from torch import Tensor


def warmup_cosine(peak: float, step: int, steps: int, warmup_steps: int, schedule: str = "cosine") -> float:
    """The learning rate of `step` (0-based) of `steps`: linear to `peak` over the warm-up, then half a cosine to 0 at the
    last step (arXiv:1608.03983, eq. 5 without restarts), or with schedule "constant" the peak."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(min(math.pi, math.pi * (step - warmup_steps) / max(1, steps - warmup_steps))))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """{"<parameter number>.<name>": tensor} of an optimizer's state; hyperparameters are not state, they come from flags."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": torch.as_tensor(value) for number, values in state.items() for name, value in values.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` took. ValueError for an entry of another shape, name or parameter than this optimizer has."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    names = set().union(*state.values())
    if odd := [number for number, values in state.items() if number >= count or values.keys() != names]:
        raise ValueError(f"the optimizer's state of parameter {min(odd)} is not that of the others ({', '.join(sorted(state[min(odd)]))})")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, values in optimizer.state.items():  # fused AdamW walks raw memory: moments must lie as their parameter does
        for name, value in values.items():
            if value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            elif value.ndim:
                raise ValueError(f"the optimizer's {name} has shape {list(value.shape)}, its parameter {list(parameter.shape)}")
