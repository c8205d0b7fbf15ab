"""Load Stable Diffusion 1.5: a diffusers folder, an original single `.safetensors` file, or a hub id.

Modules are built on the meta device and the memory-mapped tensors assigned: no random initialisation, no second copy.
Every expected tensor must be there with its shape, and nothing unknown within the three networks; what stands beside
them is noted. What a checkpoint says of itself is in lesion/sd/configs.py. Pickles (.ckpt, .bin, .pt) are refused:
`python -m lesion convert`. Proven by tests/sd/test_checkpoint.py, tests/sd/test_hub.py and
tests/parity/test_networks.py.
"""
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from lesion.sd import configs, hub, ldm_yaml, names, vocabulary, weights
from lesion.sd.clip import CLIPTextEncoder, Tokenizer
from lesion.sd.unet import UNet
from lesion.sd.vae import VAE

BESIDE_TEXT = (
    "text_projection.",
    "vision_model.",
    "visual_projection.",
    "logit_scale",
)  # the rest of CLIP, in some text encoders' files


@dataclass
class StableDiffusion:
    """The networks of one checkpoint, in eval mode and frozen, and where they came from.

    unet(noisy_latents, timesteps, context) -> noise_pred; vae.encode(pixels) -> (mean, logvar); vae.decode(latents),
    unscaled; text_encoder(token_ids) -> context; tokenizer(prompts) -> (token_ids, cut). latents = latent_scale * (a
    sample of) mean.
    """
    unet: UNet
    vae: VAE
    text_encoder: CLIPTextEncoder
    tokenizer: Tokenizer
    source: str
    files: list[Path] = field(default_factory=list)  # the weight files, in a fixed order: hash them for provenance
    notes: list[str] = field(default_factory=list)  # what was passed over, one line each: for the user to see

    @property
    def settings_sha256(self) -> str:
        """What decides the numbers beside the weights: sizes of the networks, latent scale, vocabulary and merges."""
        sizes = [repr(network.config) for network in (self.unet, self.vae, self.text_encoder)]
        folder = self.tokenizer.folder
        words = [(folder / name).read_text(encoding="utf-8").splitlines() for name in vocabulary.tokenizer_files(folder)]
        return hashlib.sha256(json.dumps([sizes, words]).encode()).hexdigest()

    @property
    def latent_scale(self) -> float:
        """What latents are multiplied by after encoding and divided by before decoding."""
        return self.vae.config.scaling_factor


def load(path_or_hub_id: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
         tokenizer: str | Path | None = None, vae: str | Path | None = None) -> StableDiffusion:
    """Load all of a checkpoint. U-Net and text encoder in `dtype`; the VAE always in float32 (its fp16 activations
    overflow).

    tokenizer: folder of the vocabulary; by default the checkpoint's own, for a single file the hub's
    clip-vit-large-patch14. vae: another VAE instead of the checkpoint's, or for one without: a folder, a .safetensors
    file (LDM's or diffusers' names), a hub id. Raises ValueError: not found, a pickle, damaged, tensors missing
    (listed), unknown or of a wrong shape, another model family, an entry of its configs or metadata that is not SD
    1.x's, a vocabulary that is not the text encoder's.
    """
    path = Path(path_or_hub_id)
    if not path.exists() and hub.looks_like_id(str(path_or_hub_id)):
        path = hub.fetch(str(path_or_hub_id), hub.of_checkpoint, _is_whole, "unet/config.json")
    if not path.exists():
        raise ValueError(
            f"base model {path_or_hub_id} not found: give a folder, a .safetensors file or a hub id (owner/name)"
        )
    sd = _from_folder(path, vae is None) if path.is_dir() else _from_single_file(path, vae is None)
    if vae is not None:
        sd.vae, more = load_vae(vae)
        text = next((i for i, file in enumerate(sd.files) if file.parent.name == "text_encoder"), len(sd.files))
        sd.files[text:text] = more  # where a folder's own VAE stands: the same weights have the same hash
    if tokenizer is None and sd.tokenizer is None:
        tokenizer = hub.fetch(hub.CLIP_HUB_ID, lambda _: ["vocab.json", "merges.txt"], _has_vocabulary, "vocab.json",
                              "give --tokenizer DIR (vocab.json and merges.txt)")
    for network, kind in ((sd.unet, dtype), (sd.text_encoder, dtype), (sd.vae, torch.float32)):
        network.to(device=device, dtype=kind).eval().requires_grad_(False)
    vocabulary.check_vocabulary(Path(tokenizer or sd.tokenizer), sd.text_encoder.config.vocab_size)
    return replace(sd, tokenizer=Tokenizer(tokenizer or sd.tokenizer), source=str(path_or_hub_id))


def _is_whole(folder: Path) -> bool:
    """Nothing is lacking in the hub cache's folder, so that no network is needed."""
    try:
        for part, stem in hub.COMPONENTS.items():
            weights.find(folder / part, stem)
        vocabulary.tokenizer_files(folder / "tokenizer")
    except ValueError:
        return False
    return all((folder / part / "config.json").is_file() for part in hub.COMPONENTS)


def _has_vocabulary(folder: Path) -> bool:
    return (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()


# ---------------------------------------------------------------------------------------------------- diffusers folders

def _from_folder(folder: Path, with_vae: bool) -> StableDiffusion:
    if (folder / "text_encoder_2").exists():
        raise ValueError(
            f"{folder} is an SDXL checkpoint (it has text_encoder_2): this project works on Stable Diffusion 1.x"
        )
    if (folder / "model_index.json").is_file():
        configs.check_pipeline(configs.read_object(folder / "model_index.json"), str(folder))
    parts = [part for part in hub.COMPONENTS if with_vae or part != "vae"]
    for part in parts:
        if not (folder / part / "config.json").is_file():
            hint = " (give --vae PATH for a checkpoint without one)" if part == "vae" else ""
            raise ValueError(f"{folder} is not a Stable Diffusion folder: {part}/config.json is missing{hint}")
    if (folder / "scheduler" / "scheduler_config.json").is_file():
        configs.check_scheduler(
            configs.read_object(folder / "scheduler" / "scheduler_config.json"), f"{folder}: scheduler"
        )
    made, files, notes = {}, [], []
    readers = {
        "unet": (configs.unet_config, UNet),
        "vae": (configs.vae_config, VAE),
        "text_encoder": (configs.text_config, CLIPTextEncoder),
    }
    for part in parts:
        read_config, kind = readers[part]
        try:
            config = read_config(configs.read_object(folder / part / "config.json"), f"{folder}: {part}")
        except KeyError as error:
            raise ValueError(
                f"{folder}: {part}/config.json does not describe Stable Diffusion 1.x (KeyError: {error})"
            ) from None
        made[part] = weights.skeleton(kind, config)
    _check_context(folder, made["unet"], made["text_encoder"])
    for part in parts:
        found = weights.find(folder / part, hub.COMPONENTS[part])
        state, metadata = weights.read_all(found)
        configs.check_metadata(metadata, str(found[0]))
        theirs = {}
        if part == "text_encoder":
            notes += _passed_over(found[0], [key for key in state if key.startswith(BESIDE_TEXT)])
            state = {key: value for key, value in state.items() if not key.startswith(BESIDE_TEXT)}
            if not any(key.startswith("text_model.") for key in state):  # transformers 5 dropped the level
                theirs = {key: key.removeprefix("text_model.") for key in made[part].state_dict()}
        weights.assign(made[part], state, found[0], theirs)
        files += found
    return StableDiffusion(
        made["unet"], made.get("vae"), made["text_encoder"], folder / "tokenizer", str(folder), files, notes
    )


def _check_context(source: Path, unet: UNet, text: CLIPTextEncoder) -> None:
    if unet.config.cross_attention_dim != text.config.hidden_size:
        raise ValueError(
            f"{source}: the U-Net takes a context of width {unet.config.cross_attention_dim} and the text encoder "
            "gives "
            f"{text.config.hidden_size}: they do not belong together"
        )


def _passed_over(file: Path, foreign: Iterable[str]) -> list[str]:
    foreign = list(foreign)
    if not foreign:
        return []
    more = f" and {len(foreign) - 4} more" if len(foreign) > 4 else ""
    return [
        f"{file} holds {len(foreign)} tensors that are none of the three networks' and were passed over: "
        f"{', '.join(foreign[:4])}{more}"
    ]


# --------------------------------------------------------------------------------------------------- original single
# files

def _from_single_file(file: Path, with_vae: bool) -> StableDiffusion:
    if file.suffix != ".safetensors":
        raise weights.pickled(file) if file.suffix in weights.PICKLES else \
            ValueError(f"{file} is neither a folder nor a .safetensors file")
    described = ldm_yaml.beside(file)
    latent_scale = ldm_yaml.latent_scale(described) if described else None
    state, metadata = weights.read(file)
    configs.check_metadata(metadata, str(file))
    configs.check_markers(list(state), str(file))
    _check_parts(file, state, with_vae)
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    try:
        unet_config, vae_config, text_config = names.sizes_of_single_file(shapes, with_vae)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    configs.check_unet(unet_config, str(file))
    networks = {"unet": weights.skeleton(UNet, unet_config), "text": weights.skeleton(CLIPTextEncoder, text_config)}
    if with_vae:
        networks["vae"] = weights.skeleton(
            VAE, replace(vae_config, scaling_factor=latent_scale or vae_config.scaling_factor)
        )
    _check_context(file, networks["unet"], networks["text"])
    maps = {"unet": names.ldm_unet_keys(networks["unet"].state_dict(), unet_config), "text": names.ldm_text_keys(
        networks["text"].state_dict(), state)}
    if with_vae:
        maps["vae"] = names.ldm_vae_keys(networks["vae"].state_dict(), vae_config)
    known = {theirs for one in maps.values() for theirs in one.values()}
    left = [
        key
        for key in state
        if key not in known and not names.ignored(key) and (with_vae or not key.startswith(names.VAE))
    ]
    beside = tuple(names.TEXT + key for key in BESIDE_TEXT)
    foreign = [key for key in left if not key.startswith(names.NETWORKS) or key.startswith(beside)]
    unknown = [key for key in left if key not in set(foreign)]
    if unknown:
        raise ValueError(f"{file}: {len(unknown)} unknown tensors, first {unknown[0]}")
    for part, network in networks.items():
        weights.assign(
            network, {theirs: state[theirs] for theirs in maps[part].values() if theirs in state}, file, maps[part]
        )
    return StableDiffusion(
        networks["unet"], networks.get("vae"), networks["text"], None, str(file), [file], _passed_over(file, foreign)
    )


def _check_parts(file: Path, state: dict[str, Tensor], with_vae: bool) -> None:
    """The three networks are in the file, and of Stable Diffusion 1.x. ValueError names the family, or what is missing
    and what helps."""
    def has(prefix: str) -> bool:
        return any(key.startswith(prefix) for key in state)
    if has("conditioner.embedders."):
        raise ValueError(f"{file} is an SDXL checkpoint: this project works on Stable Diffusion 1.x")
    if has("cond_stage_model.model."):
        raise ValueError(f"{file} is a Stable Diffusion 2 checkpoint: this project works on Stable Diffusion 1.x")
    sign = "output_blocks.11.0.skip_connection.weight"
    if names.UNET + sign not in state:
        why = f"{names.UNET}{sign} is missing"
        if sign in state:
            why = "it holds a U-Net alone, without text encoder and VAE: give a whole checkpoint"
        elif not has(names.UNET) and has("model_ema.diffusion_model"):
            why = "of the U-Net it holds the moving average (model_ema) alone: give the file made for drawing"
        raise ValueError(f"{file} is not a Stable Diffusion 1.x checkpoint: {why}")
    if not has(names.TEXT):
        raise ValueError(f"{file} holds no text encoder ({names.TEXT}...): give a whole checkpoint")
    if with_vae and not has(names.VAE):
        raise ValueError(
            f"{file} holds no VAE (no tensor {names.VAE}...): give --vae PATH, a VAE's folder, .safetensors file or "
            "hub id (such "
            "as stabilityai/sd-vae-ft-mse)"
        )


# ---------------------------------------------------------------------------------------------------------------------
# VAE

def load_vae(path_or_hub_id: str | Path) -> tuple[VAE, list[Path]]:
    """A VAE by itself and its files: a folder with config.json (or a checkpoint's folder with vae/), a .safetensors
    file, a hub id.

    A file may be LDM's (`encoder.down.0...`, with or without `first_stage_model.`, also a whole checkpoint) or
    diffusers'. ValueError as for `load`.
    """
    path = Path(path_or_hub_id)
    if not path.exists() and hub.looks_like_id(str(path_or_hub_id)):
        path = hub.fetch(
            str(path_or_hub_id),
            lambda all_names: ["config.json", *hub.of_weights(all_names, "")],
            _is_vae,
            "config.json",
            "give a folder or a .safetensors file with --vae",
        )
    if path.is_dir():
        path = path if (path / "config.json").is_file() else path / "vae"
        if not (path / "config.json").is_file():
            raise ValueError(
                f"{path_or_hub_id} holds no VAE: expected config.json and diffusion_pytorch_model.safetensors, or "
                "vae/ with them"
            )
        files, described = weights.find(path, hub.COMPONENTS["vae"]), path / "config.json"
    elif path.is_file() and path.suffix == ".safetensors":
        beside = path.name.startswith(hub.COMPONENTS["vae"]) and (path.parent / "config.json").is_file()
        files, described = [path], path.parent / "config.json" if beside else None
    elif path.suffix in weights.PICKLES and path.is_file():
        raise weights.pickled(path)
    else:
        raise ValueError(f"VAE {path_or_hub_id} not found: give a folder, a .safetensors file or a hub id (owner/name)")
    state, metadata = weights.read_all(files)
    configs.check_metadata(metadata, str(files[0]), configs.VAE_ARCHITECTURE)
    prefix = names.VAE if any(key.startswith(names.VAE) for key in state) else ""
    state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    state = {key: value for key, value in state.items() if not names.ignored(key) and not key.startswith("loss.")}
    try:
        if described:
            config = configs.vae_config(configs.read_object(described), str(described))
        else:
            config = names.vae_sizes({key: tuple(value.shape) for key, value in state.items()}, "")
    except (ValueError, KeyError) as error:
        raise ValueError(f"{files[0]} is not a VAE of Stable Diffusion 1.x: {error}") from None
    vae = weights.skeleton(VAE, config)
    original = "encoder.down.0.block.0.conv1.weight" in state
    theirs = (
        {ours: key.removeprefix(names.VAE) for ours, key in names.ldm_vae_keys(vae.state_dict(), config).items()}
        if original
        else {}
    )
    weights.assign(vae, state, files[0], theirs)
    return vae, files


def _is_vae(folder: Path) -> bool:
    try:
        return bool(weights.find(folder, hub.COMPONENTS["vae"])) and (folder / "config.json").is_file()
    except ValueError:
        return False
