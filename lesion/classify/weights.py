"""A classifier's starting weights from whatever file people keep them in, or a refusal that says why.

Read: torchvision's state dicts (old ones too, without num_batches_tracked), .safetensors, training checkpoints that hold the
state dict under one of `INSIDE`, and names behind one prefix (`module.` of DataParallel, `model.` of Lightning, `backbone.` ...).
Proven by tests/classify/test_weights.py.
"""
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from lesion.run import files

INSIDE = ("state_dict", "model", "model_state_dict", "model_state", "net", "weights")
HEAD = "fc."                     # the classification head: another task's, left out
MARKS = ("conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer4.1.conv1.weight")  # by which a ResNet is known
COUNTER = "num_batches_tracked"  # of batch normalisation: absent from files of torch before 1.0, and without effect at momentum .1


def read(path: Path) -> dict[str, Tensor]:
    """The ResNet's tensors in a file, by torchvision's names. ValueError, in one line, if there are none, or those of several."""
    if not path.is_file():
        raise ValueError(f"--weights {path}: no such file; allowed are imagenet, none or the path of a state dict")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise many kinds; all mean the file is not a state dict
        raise ValueError(f"--weights {path} is not a state dict of tensors ({type(error).__name__}); of a whole pickled module save "
                         "its state_dict()") from None
    return unwrapped(found, path)


def from_hub(path: Path) -> dict[str, Tensor]:
    """The state dict in a file of torch's hub cache, whose name ends in the first digits of its SHA-256: torch compares them when it
    downloads, and never again. ValueError, in one line, if the file is not what its name says."""
    said = re.search(r"-([0-9a-f]{8,})\.", path.name)
    if said and not files.sha256_file(path).startswith(said[1]):
        raise ValueError(f"{path} is damaged: its SHA-256 does not begin with {said[1]}, as its name says; delete it")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # see `read`
        raise ValueError(f"{path} is damaged: no state dict of tensors ({type(error).__name__}); delete it") from None


def unwrapped(found: object, path: Path) -> dict[str, Tensor]:
    """The ResNet's tensors of what a file held: out of a checkpoint's dictionary, without their common prefix."""
    if not isinstance(found, dict):
        raise ValueError(f"--weights {path} is not a state dict of tensors ({type(found).__name__})")
    nested = [key for key in INSIDE if isinstance(found.get(key), dict)]
    if len(nested) > 1:
        raise ValueError(f"--weights {path} holds several state dicts ({', '.join(nested)}): save the one to use by itself")
    state = found[nested[0]] if nested else found
    state = {key: value for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)}
    ends = [key.removesuffix(MARKS[0]) for key in state if key.endswith(MARKS[0])]
    prefixes = [prefix for prefix in ends if all(prefix + mark in state for mark in MARKS)]
    if len(prefixes) > 1:
        raise ValueError(f"--weights {path} holds several networks ({', '.join(repr(prefix) for prefix in prefixes)}): save the one "
                         "to use by itself")
    prefix = prefixes[0] if prefixes else ""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def load(model: nn.Module, state: dict[str, Tensor], name: str) -> None:
    """Put a state dict's tensors into a torchvision ResNet, its head left as it is.

    ValueError if a tensor is absent, of another shape, or not of this network (a wider or gated relative would be misread).
    """
    state = {key: value for key, value in state.items() if not key.startswith(HEAD)}
    own = {key: value.shape for key, value in model.state_dict().items() if not key.startswith(HEAD)}
    wrong = [key for key, shape in own.items() if state.get(key) is None and not key.endswith(COUNTER)
             or key in state and state[key].shape != shape]
    if wrong:
        raise ValueError(f"--weights {name} does not fit the network: {len(wrong)} of {len(own)} tensors are absent or "
                         f"of another shape (first: {wrong[0]}); give the state dict of the same --arch")
    foreign = [key for key in state if key not in own]
    if foreign:
        raise ValueError(f"--weights {name} is of another network: {len(foreign)} of its tensors have no place in this one (first: "
                         f"{foreign[0]}); give torchvision's or timm's ResNet of the same --arch")
    model.load_state_dict(state, strict=False)
