"""LoRA files: write kohya's layout (read by every UI) or diffusers'; read those, peft's own and old diffusers'.

Keys and scales, per layout:
  kohya      lora_unet_<path, dots as underscores>.{lora_down.weight, lora_up.weight, alpha}; text lora_te_ (lora_te1_ is read too)
  diffusers  unet.<path>.lora_{A,B}.weight, text_encoder.<path>...; scale alpha/rank baked into B: the file has no place for alpha.
             Read as well: .lora.{down,up}, .lora_linear_layer.{down,up}, .processor.to_q_lora.{down,up}, `lora_adapter_metadata`
  peft       base_model.model.<path>.lora_{A,B}.weight with adapter_config.json beside it
In memory a LoRA is {"unet.<path>" or "text_encoder.<path>": Factors}. Proven by tests/lora/test_files.py, tests/parity/test_lora_files.py.
"""
import hashlib
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lesion.lora.layers import Factors
from lesion.run.files import write_bytes
from lesion.run.state import in_order

KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
FORMATS = ("kohya", "diffusers")
NAMES_IN_FOLDER = ("lora.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.safetensors")
ROLES = {"lora_down.weight": "down", "lora_A.weight": "down", "lora_A.default.weight": "down", "lora.down.weight": "down",
         "lora_linear_layer.down.weight": "down", "lora_up.weight": "up", "lora_B.weight": "up", "lora_B.default.weight": "up",
         "lora.up.weight": "up", "lora_linear_layer.up.weight": "up", "alpha": "alpha"}


def write(path: Path, factors: dict[str, Factors], metadata: dict[str, str], layout: str = "kohya") -> None:
    """Write a LoRA atomically in `layout`, one of FORMATS. ValueError if there is nothing to write or a value is not finite."""
    if layout not in FORMATS or not factors:
        raise ValueError(f"cannot write {len(factors)} LoRA modules as {layout!r}: layouts are {', '.join(FORMATS)}")
    bad = [name for name, part in factors.items() if not (part.down.isfinite().all() and part.up.isfinite().all())]
    if bad:
        raise ValueError(f"{path} not written: {len(bad)} LoRA modules hold NaN or infinity, first {bad[0]}")
    tensors: dict[str, Tensor] = {}
    for name, (down, up, alpha) in factors.items():
        network, module = name.split(".", 1)
        down, up = down.detach().float().cpu().contiguous(), up.detach().float().cpu().contiguous()
        if layout == "kohya":
            key = KOHYA[network] + module.replace(".", "_")
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(float(alpha))}
        else:
            tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up * (alpha / len(down))}
    metadata = {**metadata, "sshs_model_hash": _tensor_hash(save(tensors))} if layout == "kohya" else {"format": "pt", **metadata}
    write_bytes(path, in_order(save(tensors, metadata=metadata)))


def _tensor_hash(data: bytes) -> str:
    """SHA-256 of the tensor bytes after the header (8-byte little-endian length n, then n bytes): A1111's LoRA hash."""
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little"):]).hexdigest()


def read(path: Path, networks: dict[str, nn.Module]) -> tuple[dict[str, Factors], dict[str, str]]:
    """A LoRA of any of the spellings above, matched to the modules of `networks` {"unet": ..., "text_encoder": ...}, and its metadata.

    ValueError: no such file, damaged, an unknown key, a module without both factors, shapes that do not fit, not finite, nothing in it.
    """
    path = find(Path(path))
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error})") from None
    modules = {f"{name}.{module_path}": module for name, network in networks.items()
               for module_path, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    kohya = {KOHYA[name.split(".", 1)[0]] + name.split(".", 1)[1].replace(".", "_"): name for name in modules}
    found: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        name, role = _resolve(key, kohya, modules)
        if name is None or role in found.setdefault(name, {}):
            unknown.append(key)
        else:
            found[name][role] = tensor
    if unknown:
        raise ValueError(f"{path}: {len(unknown)} of {len(tensors)} keys match no module of this model, first {unknown[0]}")
    if not found:
        raise ValueError(f"{path} holds no tensors")
    adapter = _adapter_config(path, metadata)
    return {name: _factors(path, name, parts, modules[name], adapter) for name, parts in found.items()}, metadata


def find(path: Path) -> Path:
    """The LoRA file that `path`, a file or a run's or adapter's folder, means. ValueError if there is none."""
    if path.is_dir():
        for name in NAMES_IN_FOLDER:
            if (path / name).is_file():
                return path / name
        raise ValueError(f"folder {path} holds none of {', '.join(NAMES_IN_FOLDER)}")
    if not path.is_file():
        raise ValueError(f"LoRA file {path} not found")
    return path


def _resolve(key: str, kohya: dict[str, str], modules: dict[str, nn.Module]) -> tuple[str | None, str]:
    """(name of the module, role of the tensor) that a key means; (None, "") if it means nothing here."""
    for ending, role in ROLES.items():
        if not key.endswith("." + ending):
            continue
        stem = key.removesuffix("." + ending)
        if stem.startswith("lora_"):
            return kohya.get(re.sub("^lora_te1_", "lora_te_", stem)), role
        return (None, "") if role == "alpha" else (_dotted(stem, modules), role)  # diffusers refuses a dotted alpha too
    match = re.fullmatch(r"(.*)\.processor\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight", key)
    if match:
        module = match[2] + (".0" if match[2] == "to_out" else "")
        return _dotted(f"{match[1]}.{module}", modules), match[3]
    return None, ""


def _dotted(stem: str, modules: dict[str, nn.Module]) -> str | None:
    """A dotted name, with the network's prefix or peft's, with or without `text_model.` (transformers 5 dropped it)."""
    for name in (stem, stem.replace("text_encoder.", "text_encoder.text_model.", 1),
                 *(stem.replace("base_model.model.", prefix, 1) for prefix in ("unet.", "text_encoder.", "text_encoder.text_model."))):
        if name in modules:
            return name
    return None


def _adapter_config(path: Path, metadata: dict[str, str]) -> dict[str, dict]:
    """{"unet": LoraConfig fields, "text_encoder": ...} where the file or its folder says them."""
    beside = path.parent / "adapter_config.json"
    if path.name == "adapter_model.safetensors" and beside.is_file():
        config = json.loads(beside.read_text(encoding="utf-8"))
        return {"unet": config, "text_encoder": config}
    flat = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    return {network: {key.removeprefix(network + "."): value for key, value in flat.items() if key.startswith(network + ".")}
            for network in KOHYA}


def _factors(path: Path, name: str, parts: dict[str, Tensor], module: nn.Module, adapter: dict[str, dict]) -> Factors:
    network, module_path = name.split(".", 1)
    if not {"down", "up"} <= parts.keys():
        raise ValueError(f"{path}: {name} has {' and '.join(sorted(parts))} only, both factors are needed")
    down, up = parts["down"].float(), parts["up"].float()
    if min(down.ndim, up.ndim) < 2 or not len(down) or parts.get("alpha", torch.zeros(())).numel() != 1:
        raise ValueError(f"{path}: {name} has factors {list(down.shape)}, {list(up.shape)}: rank must be at least 1, alpha one number")
    rank = len(down)
    if isinstance(module, nn.Conv2d):  # some tools flatten 1x1 convolutions
        down, up = (x if x.ndim == 4 else x.reshape(*x.shape, 1, 1) if x.ndim == 2 else x for x in (down, up))
        expected = [rank, module.in_channels, *module.kernel_size], [module.out_channels, rank, 1, 1]
    else:
        down, up = (x.flatten(1) if x.ndim == 4 and x.shape[2:] == (1, 1) else x for x in (down, up))
        expected = [rank, module.in_features], [module.out_features, rank]
    if [list(down.shape), list(up.shape)] != list(expected):
        raise ValueError(f"{path}: {name} has factors {list(down.shape)}, {list(up.shape)}; this model needs {expected[0]}, {expected[1]} "
                         "(a LoRA of another model family?)")
    alpha = float(parts["alpha"].float()) if "alpha" in parts else _configured_alpha(adapter.get(network) or {}, module_path, rank)
    if not (down.isfinite().all() and up.isfinite().all() and abs(alpha) < float("inf")):
        raise ValueError(f"{path}: {name} holds NaN or infinity")
    return Factors(down, up, alpha)


def _configured_alpha(config: dict, module_path: str, rank: int) -> float:
    """alpha of a peft LoraConfig for a module (alpha_pattern first); without one alpha = rank, scale 1."""
    if config.get("use_dora"):
        raise ValueError("this LoRA uses DoRA, which is not plain LoRA: not supported")
    patterns = (config.get("alpha_pattern") or {}).items()
    matching = [value for pattern, value in patterns if re.fullmatch(rf"(.*\.)?({pattern})", module_path)]
    alpha = matching[0] if matching else config.get("lora_alpha", rank)
    return float(alpha) * (rank**0.5 if config.get("use_rslora") else 1.0)


def kohya_metadata(rank: int, alpha: float, **known: object) -> dict[str, str]:
    """The `ss_*` and ModelSpec entries that kohya's tools and A1111 look for, every value a string; `known` adds ss_<name>."""
    metadata = {
        "ss_v2": "False",
        "ss_base_model_version": "sd_v1",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(alpha)),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.prediction_type": "epsilon",
    }
    return metadata | {
        f"ss_{name}": value if isinstance(value, str) else json.dumps(value) for name, value in known.items() if value is not None
    }
