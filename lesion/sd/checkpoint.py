"""Load Stable Diffusion 1.5: a diffusers folder, an original single `.safetensors` file, or a hub id.

Modules are built on the meta device and the memory-mapped tensors assigned: no random initialisation, no second copy.
Every expected tensor must be there with its shape, and nothing unknown beside it. Pickles (.ckpt, .bin, .pt) are refused.
Proven by tests/sd/test_checkpoint.py, tests/sd/test_hub.py and tests/parity/test_networks.py.
"""
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lesion.sd import names
from lesion.sd.clip import CLIPTextConfig, CLIPTextEncoder, Tokenizer
from lesion.sd.unet import UNet, UNetConfig
from lesion.sd.vae import LATENT_SCALE, VAE, VAEConfig

CLIP_HUB_ID = "openai/clip-vit-large-patch14"  # its vocabulary is SD 1.5's
HUB_FILES = ["model_index.json", "*/config.json", "scheduler/*.json", "tokenizer/*", "unet/diffusion_pytorch_model.safetensors",
             "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"]
CONVERT = ("is a pickle, which can run code when opened; convert it once, somewhere safe: safetensors.torch.save_file("
           "torch.load(FILE, weights_only=True)['state_dict'], 'model.safetensors')")
BUILT_IN = {  # what the code takes for granted: a folder that says otherwise would load, and draw wrong pictures
    "unet": {"act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0, "center_input_sample": False, "norm_eps": 1e-5},
    "vae": {"act_fn": "silu"},
    "text_encoder": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "scheduler": {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
}
COMPONENTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@dataclass
class StableDiffusion:
    """The networks of one checkpoint, in eval mode and frozen, and where they came from.

    unet(noisy_latents, timesteps, context) -> noise_pred; vae.encode(pixels) -> (mean, logvar); vae.decode(latents), unscaled;
    text_encoder(token_ids) -> context; tokenizer(prompts) -> (token_ids, cut). latents = latent_scale * (a sample of) mean.
    """
    unet: UNet
    vae: VAE
    text_encoder: CLIPTextEncoder
    tokenizer: Tokenizer
    source: str
    files: list[Path] = field(default_factory=list)  # the weight files, in a fixed order: hash them for provenance

    @property
    def latent_scale(self) -> float:
        return self.vae.config.scaling_factor


def load(path_or_hub_id: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
         tokenizer: str | Path | None = None) -> StableDiffusion:
    """Load all of a checkpoint. U-Net and text encoder in `dtype`; the VAE always in float32 (its fp16 activations overflow).

    tokenizer: folder with vocab.json and merges.txt; by default the checkpoint's own, for a single file the hub's CLIP_HUB_ID.
    Raises ValueError: not found, a pickle, damaged, tensors missing (listed), unknown or of a wrong shape, another model family.
    """
    path = Path(path_or_hub_id)
    if not path.exists() and _looks_like_hub_id(str(path_or_hub_id)):
        path = _download(str(path_or_hub_id), HUB_FILES)
    if not path.exists():
        raise ValueError(f"base model {path_or_hub_id} not found: give a folder, a .safetensors file or a hub id (owner/name)")
    unet, vae, text_encoder, own_tokenizer, files = _from_folder(path) if path.is_dir() else _from_single_file(path)
    if tokenizer is None and own_tokenizer is None:
        tokenizer = _download(CLIP_HUB_ID, ["vocab.json", "merges.txt"], "give --tokenizer DIR (vocab.json and merges.txt)")
    for network, kind in ((unet, dtype), (text_encoder, dtype), (vae, torch.float32)):
        network.to(device=device, dtype=kind).eval().requires_grad_(False)
    return StableDiffusion(unet, vae, text_encoder, Tokenizer(tokenizer or own_tokenizer), str(path_or_hub_id), files)


def _looks_like_hub_id(text: str) -> bool:
    return text.count("/") == 1 and not text.startswith((".", "/", "~")) and not text.endswith((".safetensors", ".ckpt"))


def _download(hub_id: str, patterns: list[str], otherwise: str = "give a folder or a .safetensors file with --base") -> Path:
    """Folder of the hub repository's files that match; only what is missing is fetched, a dropped connection is resumed."""
    from huggingface_hub import snapshot_download
    try:
        return _cached(hub_id, patterns) or Path(snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:  # what the network raises depends on the hub library's version: requests', httpx's ...
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{hub_id} could not be fetched from the hub ({reason}); {otherwise}") from None


def _cached(hub_id: str, patterns: list[str]) -> Path | None:
    """The local cache's folder if every pattern has a file in it, so that no network is needed."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=patterns, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return folder if all(any(folder.glob(pattern)) for pattern in patterns) else None


def _from_folder(folder: Path):
    if (folder / "text_encoder_2").exists():
        raise ValueError(f"{folder} is an SDXL checkpoint (it has text_encoder_2): this project works on Stable Diffusion 1.x")
    for part in COMPONENTS:
        if not (folder / part / "config.json").is_file():
            raise ValueError(f"{folder} is not a Stable Diffusion folder: {part}/config.json is missing")
    unet, vae, text = (_config(folder / part / "config.json") for part in COMPONENTS)
    scheduler = _config(file) if (file := folder / "scheduler" / "scheduler_config.json").is_file() else {}
    prediction = scheduler.get("prediction_type", "epsilon")
    heads = unet.get("num_attention_heads") or unet.get("attention_head_dim", 8)
    if unet.get("cross_attention_dim") == 1024 or unet.get("use_linear_projection") or prediction != "epsilon" \
            or not isinstance(heads, int):
        raise ValueError(f"{folder} is a Stable Diffusion 2 checkpoint or another variant (linear projections, "
                         f"{prediction} prediction or a list of heads): this project works on Stable Diffusion 1.x")
    for part, config in (("unet", unet), ("vae", vae), ("text_encoder", text), ("scheduler", scheduler)):
        for key, value in BUILT_IN[part].items():
            if config.get(key, value) != value:
                raise ValueError(f"{folder}: {part} has {key} {config[key]!r} and Stable Diffusion 1.x has {value!r}: nothing else is "
                                 "built here")
    try:
        unet_config = UNetConfig(tuple(unet["block_out_channels"]), unet.get("layers_per_block", 2), unet["cross_attention_dim"], heads,
                                 unet.get("in_channels", 4), unet.get("out_channels", 4), unet.get("norm_num_groups", 32))
        vae_config = VAEConfig(tuple(vae["block_out_channels"]), vae.get("layers_per_block", 2), vae.get("latent_channels", 4),
                               vae.get("norm_num_groups", 32), vae.get("scaling_factor", LATENT_SCALE))
        text_config = CLIPTextConfig(**{key: text[key] for key in CLIPTextConfig.__dataclass_fields__ if key in text})
        _check_family(folder, unet_config)
        with torch.device("meta"):
            networks = UNet(unet_config), VAE(vae_config), CLIPTextEncoder(text_config)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder}: a config.json does not describe Stable Diffusion 1.x ({type(error).__name__}: {error})") from None
    files = [_weights_file(folder / part, stem) for part, stem in COMPONENTS.items()]
    for network, file in zip(networks, files):
        assign(network, read_tensors(file), file, {})
    return *networks, folder / "tokenizer", files


def _config(file: Path) -> dict:
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(config).__name__}")
    return config


def _weights_file(folder: Path, stem: str) -> Path:
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
        if (folder / name).is_file():
            return folder / name
    pickles = [file.name for file in folder.glob("*") if file.suffix in (".bin", ".ckpt", ".pt", ".pth")]
    if pickles:
        raise ValueError(f"{folder / pickles[0]} {CONVERT}")
    raise ValueError(f"{folder} has no {stem}.safetensors (or {stem}.fp16.safetensors)")


def _from_single_file(file: Path):
    if file.suffix != ".safetensors":
        raise ValueError(f"{file} {CONVERT}" if file.suffix in (".ckpt", ".bin", ".pt", ".pth") else
                         f"{file} is neither a folder nor a .safetensors file")
    state = read_tensors(file)
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    if any(key.startswith("conditioner.embedders.") for key in state):
        raise ValueError(f"{file} is an SDXL checkpoint: this project works on Stable Diffusion 1.x")
    if any(key.startswith("cond_stage_model.model.") for key in state):
        raise ValueError(f"{file} is a Stable Diffusion 2 checkpoint: this project works on Stable Diffusion 1.x")
    if names.UNET + "output_blocks.11.0.skip_connection.weight" not in state:
        raise ValueError(
            f"{file} is not a Stable Diffusion 1.x checkpoint: {names.UNET}output_blocks.11.0.skip_connection.weight is missing"
        )
    try:
        unet_config, vae_config, text_config = names.sizes_of_single_file(shapes)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    _check_family(file, unet_config)
    with torch.device("meta"):
        networks = UNet(unet_config), VAE(vae_config), CLIPTextEncoder(text_config)
    unet, vae, text = networks
    maps = (names.ldm_unet_keys(unet.state_dict(), unet_config), names.ldm_vae_keys(vae.state_dict(), vae_config),
            names.ldm_text_keys(text.state_dict(), state))
    known = {theirs for one in maps for theirs in one.values()}
    unknown = [key for key in state if key not in known and not names.ignored(key)]
    if unknown:
        raise ValueError(f"{file}: {len(unknown)} unknown tensors, first {unknown[0]}")
    for network, one in zip(networks, maps):
        assign(network, {theirs: state[theirs] for theirs in one.values() if theirs in state}, file, one)
    return *networks, None, [file]


def _check_family(source: Path, config: UNetConfig) -> None:
    if config.in_channels != 4 or config.out_channels != 4:
        raise ValueError(f"{source}: the U-Net takes {config.in_channels} channels (an inpainting model?); 4 are needed")
    if len(config.block_out_channels) != 4:
        raise ValueError(f"{source}: the U-Net has {len(config.block_out_channels)} levels; Stable Diffusion 1.x has 4")


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, memory-mapped."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or not a safetensors file ({error})") from None


def assign(network: nn.Module, state: dict[str, Tensor], file: Path, theirs: Mapping[str, str]) -> None:
    """Give every parameter of the meta-device `network` its tensor; `theirs` maps our names to the file's where they differ."""
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
