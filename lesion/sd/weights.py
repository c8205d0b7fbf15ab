"""Weight files: safetensors, whole or in shards, memory-mapped, and given to the networks tensor by tensor.

Proven by tests/sd/test_checkpoint.py.
"""
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lesion.sd import configs, names

PICKLES = (".ckpt", ".bin", ".pt", ".pth")
TYPES = frozenset({*(getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn",
                   "float8_e5m2", "int64", "int32", "int16", "int8", "uint8", "bool"))})  # others cannot be computed with


def pickled(file: Path) -> ValueError:
    """The error for a pickle, with the command that converts it."""
    return ValueError(
        f"{file} is a pickle, which can run code when opened; convert it, without running any, with: python -m lesion "
        "convert "
        f"{shlex.quote(str(file))}"
    )


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a safetensors file, memory-mapped, and its metadata. ValueError, naming the file, if it is damaged."""
    try:
        with safe_open(file, framework="pt") as tensors:
            state = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118 (not a dict)
            odd = next((key for key, tensor in state.items() if tensor.dtype not in TYPES), None)
            if odd is not None:
                raise ValueError(f"{odd} is {state[odd].dtype}, which cannot be computed with here")
            return state, tensors.metadata() or {}
    except Exception as error:  # safetensors raises its own, torch's and Python's, by what is wrong with the file
        raise ValueError(
            f"{file} is damaged or not a safetensors file ({' '.join(str(error).split()) or type(error).__name__})"
        ) from None


def find(folder: Path, stem: str) -> list[Path]:
    """Weight files of a component: `stem`.safetensors, its shards, or those of the fp16 variant; full precision first.

    ValueError: none of them (a pickle is named with its conversion), an index that is damaged, leads elsewhere or lacks
    a shard.
    """
    for whole, index in ((f"{stem}.safetensors", f"{stem}.safetensors.index.json"),
                         (f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json")):
        if (folder / whole).is_file():
            return [folder / whole]
        if (folder / index).is_file():
            return shards(folder / index)
    for file in sorted(folder.glob("*")):
        if file.suffix in PICKLES:
            raise pickled(file)
    raise ValueError(
        f"{folder} has no {stem}.safetensors (or {stem}.fp16.safetensors, or shards with {stem}.safetensors.index.json)"
    )


def shards(index: Path) -> list[Path]:
    """The files that an index names, each in the index's own folder. ValueError."""
    weight_map = configs.read_object(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise ValueError(f"{index} is damaged: expected `weight_map`, a file for each tensor")
    found = sorted(set(weight_map.values()))
    for name in found:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} names {name!r}: allowed are .safetensors files beside it")
        if not (index.parent / name).is_file():
            raise ValueError(f"{index} names {name}, which is not there: {len(found)} shards belong together")
    return [index.parent / name for name in found]


def read_all(files: list[Path]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a component's files together. ValueError where two shards hold the same tensor."""
    state, metadata = {}, {}
    for file in files:
        tensors, more = read(file)
        twice = next((key for key in tensors if key in state), None)
        if twice is not None:
            raise ValueError(f"{file} holds {twice}, which another shard holds too")
        state |= tensors
        metadata |= more
    return state, metadata


class WithoutInitialisation(TorchFunctionMode):
    """Leaves out torch.nn.init's functions, which would be a third of the time that a network on the meta device
    takes."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def skeleton(kind: Callable, config: object) -> nn.Module:
    """kind(config) on the meta device: shapes without memory, for `assign`."""
    with torch.device("meta"), WithoutInitialisation():
        return kind(config)


def assign(network: nn.Module, state: dict[str, Tensor], file: Path, theirs: Mapping[str, str]) -> None:
    """Give every parameter of the meta-device `network` its tensor; `theirs` maps our names to the file's where they
    differ.

    ValueError lists what is missing, of a wrong shape or kind, or left over.
    """
    state = dict(state)
    result, missing, wrong = {}, [], []
    for key, parameter in network.state_dict().items():
        name = theirs.get(key, key)
        if name not in state and ".mid_block.attentions.0." in key:  # VAE attention as older diffusers spelt it
            for new, old in names.OLD_VAE_ATTENTION.items():
                name = name.replace(f".{new}.", f".{old}.")
        tensor = state.pop(name, None)
        if tensor is None:
            missing.append(name)
            continue
        if tensor.ndim == 4 and parameter.ndim == 2 and tensor.shape[2:] == (1, 1):
            tensor = tensor[:, :, 0, 0]  # the VAE's attention is four 1x1 convolutions in the original file
        if tensor.shape != parameter.shape or not tensor.is_floating_point():
            wrong.append(f"{name} is {tensor.dtype} {list(tensor.shape)}, expected {list(parameter.shape)}")
        result[key] = tensor
    unknown = [key for key in state if not names.ignored(key)]
    for problem, items in (("missing", missing), ("wrong", wrong), ("unknown", unknown)):
        if items:
            more = f" and {len(items) - 8} more" if len(items) > 8 else ""
            raise ValueError(f"{file}: {len(items)} {problem} tensors: {', '.join(items[:8])}{more}")
    network.load_state_dict(result, assign=True, strict=True)
