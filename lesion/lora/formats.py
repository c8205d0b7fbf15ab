"""LoRA files: write kohya's layout (read by every UI) or diffusers'; read those and every other in docs/FORMATS.md.

Keys and scales, per layout:
  kohya      lora_unet_<path, dots as underscores>.{lora_down.weight, lora_up.weight, alpha}; text lora_te_ (lora_te1_
  is read too) diffusers  unet.<path>.lora_{A,B}.weight, text_encoder.<path>...; scale alpha/rank baked into B: the file
  has no place for alpha.
             Read as well: .lora.{down,up}, .lora_linear_layer.{down,up}, .processor.to_q_lora.{down,up},
             `lora_adapter_metadata`
  peft       base_model.model.<path>.lora_{A,B}.weight with adapter_config.json beside it
Names are in lesion/lora/naming.py, strengths in strength.py, LoHa, LoKr and DoRA in lycoris.py.
In memory a LoRA is {"unet.<path>" or "text_encoder.<path>": Factors}. Proven by tests/lora and
tests/parity/test_lora_files.py.
"""
import hashlib
import json
import re
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from lesion.lora import lycoris, naming, strength
from lesion.lora.layers import Factors
from lesion.run.files import write_bytes
from lesion.run.state import in_order
from lesion.sd import configs, weights

KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
FORMATS = ("kohya", "diffusers")
NAMES_IN_FOLDER = ("lora.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.safetensors")
ARCHITECTURE = re.compile(r"stable-diffusion-v1([-.][45])?(/.*)?")
FREE_IN_LORA = ("modelspec.encoder_layer", "modelspec.timestep_range")  # how it was trained: said in a note


def write(path: Path, factors: dict[str, Factors], metadata: dict[str, str], layout: str = "kohya") -> None:
    """Write a LoRA atomically in `layout`, one of FORMATS. ValueError if there is nothing to write or a value is not
    finite."""
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
            tensors |= {
                f"{key}.lora_down.weight": down,
                f"{key}.lora_up.weight": up,
                f"{key}.alpha": torch.tensor(float(alpha)),
            }
        else:
            tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up * (alpha / len(down))}
    metadata = (
        {**metadata, "sshs_model_hash": _tensor_hash(save(tensors))}
        if layout == "kohya"
        else {"format": "pt", **metadata}
    )
    write_bytes(path, in_order(save(tensors, metadata=metadata)))


def _tensor_hash(data: bytes) -> str:
    """SHA-256 of the tensor bytes after the header (8-byte little-endian length n, then n bytes): A1111's LoRA hash."""
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little"):]).hexdigest()


def read(path: Path, networks: dict[str, nn.Module], alpha: float | None = None,
         notes: list[str] | None = None) -> tuple[dict[str, Factors], dict[str, str]]:
    """A LoRA of any of the spellings above, matched to the modules of `networks` {"unet": ..., "text_encoder": ...},
    and its metadata.

    alpha: of the modules whose file, metadata and config say none (--lora-alpha). LoHa, LoKr and DoRA come as the
    factors that they equal. `notes` gets one line for each thing that the user should know.
    ValueError: no such file, damaged, an unknown key (of another kind of adapter: named), a module without both
    factors, shapes that do not fit, not finite, nothing in it, an entry of metadata or config that is not understood, a
    strength that is nowhere said.
    """
    found: dict[str, Factors] = {}
    metadata: dict[str, str] = {}
    notes = [] if notes is None else notes
    for part in files(path):
        factors, more = _read_file(part, networks, alpha, notes)
        twice = next((name for name in factors if name in found), None)
        if twice is not None:
            raise ValueError(f"{part}: {twice} is in the other part of the LoRA too")
        found |= factors
        metadata |= more
    return found, metadata


def files(path: Path) -> list[Path]:
    """The file or files that `path` means: a LoRA file, a run's or adapter's folder, or one with unet/ and
    text_encoder/ adapters in it.

    ValueError if there is none, or several that are not told apart.
    """
    path = Path(path)
    if not path.is_dir():
        if not path.is_file():
            raise ValueError(f"LoRA file {path} not found")
        return [path]
    for name in NAMES_IN_FOLDER:
        if (path / name).is_file():
            return [path / name]
    parts = [files(path / part)[0] for part in KOHYA if (path / part).is_dir()]
    if parts:
        return parts
    others = sorted(path.glob("*.safetensors"))
    if len(others) == 1:
        return others
    several = f" and {len(others)} other .safetensors files: give one of them" if others else ""
    raise ValueError(f"folder {path} holds none of {', '.join(NAMES_IN_FOLDER)}{several}")


def find(path: Path) -> Path:
    """The one LoRA file that `path`, a file or a run's or adapter's folder, means. ValueError if there is none, or if
    it is in parts."""
    found = files(path)
    if len(found) > 1:
        raise ValueError(
            f"{path} holds a LoRA in {len(found)} files ({', '.join(map(str, found))}): generate.py draws with it; "
            "here give one file"
        )
    return found[0]


def _read_file(
    path: Path, networks: dict[str, nn.Module], alpha: float | None, notes: list[str]
) -> tuple[dict[str, Factors], dict[str, str]]:
    if path.suffix in weights.PICKLES:
        raise weights.pickled(path)
    tensors, metadata = weights.read(path)
    configs.check_metadata(
        {key: value for key, value in metadata.items() if key not in FREE_IN_LORA}, str(path), ARCHITECTURE
    )
    notes += _training_notes(path, metadata)
    spellings = naming.spellings(networks)
    found: dict[str, dict[str, Tensor]] = {}
    unknown, without_effect = [], []
    for key, tensor in tensors.items():
        name, role = naming.resolve(key, spellings)
        if name is not None and role not in found.setdefault(name, {}):
            found[name][role] = tensor
        elif naming.NO_EFFECT.fullmatch(key):
            without_effect.append(key)
        else:
            unknown.append(key)
    if unknown:
        kinds = naming.kinds(unknown)
        what = (
            f"it holds {' and '.join(kinds)}, which are not read here" if kinds else "a LoRA of another model family?"
        )
        raise ValueError(
            f"{path}: {len(unknown)} of {len(tensors)} keys match no module of this model, first {unknown[0]} ({what})"
        )
    if without_effect:
        notes.append(
            f"{path}: {len(without_effect)} tensors act after the text encoder's output and have no effect here, "
            f"first {without_effect[0]}"
        )
    if not found:
        raise ValueError(
            f"{path} holds no tensors" if not without_effect else f"{path} holds nothing that acts on this model"
        )
    modules = {name: networks[name.split(".", 1)[0]].get_submodule(name.split(".", 1)[1]) for name in found}
    peft = [key for key in tensors if key.startswith("base_model.model.")]
    adapter = strength.of_file(path, metadata) if peft or not all(key.startswith("lora_") for key in tensors) else {}
    alphas = {
        name: _alpha(path, name, parts, adapter.get(name.split(".", 1)[0]) or {}) for name, parts in found.items()
    }
    silent = [name for name, value in alphas.items() if value is None and not _whole_lokr(found[name])]
    if silent and alpha is None and peft:
        raise ValueError(
            f"{path} does not say how strong it is (no alpha in it and no adapter_config.json beside it): put peft's "
            "adapter_config.json into its folder, or give --lora-alpha N, the lora_alpha that it was trained with"
        )
    if silent and alpha is None and not any(key.startswith("lesion_") for key in metadata):
        notes.append(
            f"{path} says no alpha for {len(silent)} of {len(found)} modules: read at scale 1, as other tools do; if "
            "it was trained with another alpha than its rank, give --lora-alpha N"
        )
    if alpha is not None and not silent:
        notes.append(f"{path} says its own alpha: --lora-alpha {alpha:g} was not used")
    if all(value == 0 for value in alphas.values()):
        notes.append(f"{path} says alpha 0 for every module: it changes nothing")
    return {name: _factors(path, name, parts, modules[name], alpha if alphas[name] is None else alphas[name],
                           (adapter.get(name.split(".", 1)[0]) or {})) for name, parts in found.items()}, metadata


def _training_notes(path: Path, metadata: dict[str, str]) -> list[str]:
    skip = metadata.get("ss_clip_skip", metadata.get("modelspec.encoder_layer", "1")).strip()
    if skip in ("1", "-1", "None", "last", ""):
        return []
    return [f"{path} was trained with clip skip {skip[:20]!r}; the text encoder's last layer is used here"]


def _alpha(path: Path, name: str, parts: dict[str, Tensor], config: dict) -> float | None:
    """alpha of a module, from its own tensor or the adapter's config; None where neither says it."""
    if "alpha" in parts:
        if parts["alpha"].numel() != 1 or parts["alpha"].is_complex():
            raise ValueError(
                f"{path}: {name} has an alpha of shape {list(parts['alpha'].shape)}: allowed is alpha one number"
            )
        return float(parts["alpha"].float())
    rank_of = next((parts[key] for key in ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b") if key in parts), None)
    rank = len(rank_of) if rank_of is not None and rank_of.ndim else config.get("r") or 1
    return strength.alpha(config, name.split(".", 1)[1], rank, str(path))


def _whole_lokr(parts: dict[str, Tensor]) -> bool:
    return {"lokr_w1", "lokr_w2"} <= parts.keys()  # nothing is decomposed: its scale is 1 whatever alpha


def _factors(
    path: Path, name: str, parts: dict[str, Tensor], module: nn.Module, alpha: float | None, config: dict
) -> Factors:
    """One module's factors, checked against its shape; alpha None is scale 1."""
    for role, tensor in parts.items():
        if role != "alpha" and not tensor.is_floating_point():
            raise ValueError(f"{path}: {name} has {role} of {tensor.dtype}: floating point is needed")
    parts = {role: tensor.float() for role, tensor in parts.items()}
    if not all(tensor.isfinite().all() for tensor in parts.values()) or not abs(alpha or 0.0) < float("inf"):
        raise ValueError(f"{path}: {name} holds NaN or infinity")
    magnitude = parts.pop("magnitude", None)
    over_outputs = parts.pop("dora_scale", None)
    shape = module.weight.shape
    if any(role.startswith(("hada_", "lokr_")) for role in parts):
        factors = _decomposed(path, name, parts, shape, alpha, config)
    else:
        factors = _plain(path, name, parts, module, alpha)
    if config.get("use_dora") and magnitude is None:
        raise ValueError(f"{path}: {name} has no lora_magnitude_vector, and the adapter's config says use_dora")
    try:
        if magnitude is not None:
            factors = lycoris.dora(factors, magnitude, module)
        elif over_outputs is not None:
            inputs = over_outputs.ndim > 1 and over_outputs.shape[0] == 1 and shape[0] != 1
            factors = lycoris.dora(factors, over_outputs, module, inputs)
    except ValueError as error:
        raise ValueError(f"{path}: {name} has {error}") from None
    if not (factors.down.isfinite().all() and factors.up.isfinite().all() and abs(factors.alpha) < float("inf")):
        raise ValueError(f"{path}: {name} comes to NaN or infinity")
    return factors


def _decomposed(
    path: Path, name: str, parts: dict[str, Tensor], shape: torch.Size, alpha: float | None, config: dict
) -> Factors:
    """LoHa or LoKr. ValueError where parts lack, or do not make the weight's shape."""
    try:
        if set(lycoris.LOHA) <= parts.keys():
            return lycoris.loha(parts, shape, alpha)
        rank = config.get("r") if config.get("peft_type") == "LOKR" and "alpha" not in parts else None
        return lycoris.lokr(parts, shape, alpha, rank)
    except (KeyError, RuntimeError, IndexError, ZeroDivisionError, TypeError):
        shapes = ", ".join(f"{role} {list(tensor.shape)}" for role, tensor in parts.items())
        raise ValueError(
            f"{path}: {name} has {shapes}, which do not make its weight {list(shape)} (a LoRA of another model family?)"
        ) from None


def _plain(path: Path, name: str, parts: dict[str, Tensor], module: nn.Module, alpha: float | None) -> Factors:
    """LoRA or LoCon: both factors, CP-decomposed convolutions multiplied out. ValueError where they do not fit the
    module."""
    if not {"down", "up"} <= parts.keys():
        raise ValueError(
            f"{path}: {name} has {' and '.join(sorted(parts)) or 'a magnitude'} only, both factors are needed"
        )
    down, up = parts["down"], parts["up"]
    if min(down.ndim, up.ndim) < 2 or not len(down):
        raise ValueError(f"{path}: {name} has factors {list(down.shape)}, {list(up.shape)}: rank must be at least 1")
    rank = len(down)
    if isinstance(module, nn.Conv2d):  # some tools flatten 1x1 convolutions
        down, up = (x if x.ndim == 4 else x.reshape(*x.shape, 1, 1) if x.ndim == 2 else x for x in (down, up))
        if (
            "mid" in parts
            and parts["mid"].ndim == 4
            and down.shape[1:] == (module.in_channels, 1, 1)
            and parts["mid"].shape[1:] == (rank, *module.kernel_size)
            and up.shape[1] == len(parts["mid"])
        ):
            down = lycoris.cp(down, parts["mid"])
        expected = [len(down), module.in_channels, *module.kernel_size], [module.out_channels, len(down), 1, 1]
    else:
        down, up = (x.flatten(1) if x.ndim == 4 and x.shape[2:] == (1, 1) else x for x in (down, up))
        expected = [rank, module.in_features], [module.out_features, rank]
    if [list(down.shape), list(up.shape)] != list(expected) or ("mid" in parts and not isinstance(module, nn.Conv2d)):
        raise ValueError(
            f"{path}: {name} has factors {list(down.shape)}, {list(up.shape)}; this model needs {expected[0]}, "
            f"{expected[1]} "
            "(a LoRA of another model family?)"
        )
    return Factors(down, up, float(len(down)) if alpha is None else alpha * len(down) / rank)


def kohya_metadata(rank: int, alpha: float, **known: object) -> dict[str, str]:
    """The `ss_*` and ModelSpec entries that kohya's tools and A1111 look for, every value a string; `known` adds
    ss_<name>."""
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
        f"ss_{name}": value if isinstance(value, str) else json.dumps(value)
        for name, value in known.items()
        if value is not None
    }
