"""The .yaml that original checkpoints have beside them (CompVis `v1-inference.yaml`): every entry is believed or
refused.

A1111's rule: `model.safetensors` is described by `model.yaml`. Proven by tests/sd/test_configs.py.
"""
from pathlib import Path

from lesion.sd import plain
from lesion.sd.configs import ANY, scale, short
from lesion.sd.vae import LATENT_SCALE

SCALE = object()  # the latent scale: believed
# fmt: off
UNET = {
    "in_channels": (4,), "out_channels": (4,), "num_heads": (8,), "num_head_channels": (-1, None),
    "num_res_blocks": (2,),
    "attention_resolutions": ([4, 2, 1],), "use_spatial_transformer": (True,), "use_linear_in_transformer": (False,),
    "transformer_depth": (1,), "dims": (2,), "num_classes": (None,), "conv_resample": (True,),
    "resblock_updown": (False,),
    "use_scale_shift_norm": (False,), "use_new_attention_order": (False,), "n_embed": (None,),
    "num_attention_blocks": (None,),
    "disable_middle_self_attn": (False,), "disable_self_attentions": (None,), "adm_in_channels": (None,),
    # sizes are those of the tensors themselves; the rest is the trainer's
    **dict.fromkeys(("image_size", "model_channels", "channel_mult", "context_dim", "use_checkpoint", "legacy",
    "use_fp16", "use_bf16",
                     "dropout", "spatial_transformer_attn_type", "num_heads_upsample"), ANY),
}
VAE = {
    "embed_dim": (4,), "ddconfig": {
        "double_z": (True,), "z_channels": (4,), "in_channels": (3,), "out_ch": (3,), "num_res_blocks": (2,),
        "attn_resolutions": ([],),
        "resamp_with_conv": (True,), "tanh_out": (False,), "use_linear_attn": (False,),
        **dict.fromkeys(("resolution", "ch", "ch_mult", "dropout", "attn_type"), ANY)},
    **dict.fromkeys(("monitor", "lossconfig", "ckpt_path", "ignore_keys", "image_key"), ANY),
}
TEXT_ENCODER = {"layer": ("last",), "layer_idx": (None,), "max_length": (77,), **dict.fromkeys(("version", "device",
    "freeze"), ANY)}
PARAMS = {
    "parameterization": ("eps",), "linear_start": (0.00085,), "linear_end": (0.012,), "timesteps": (1000,),
    "beta_schedule": ("linear",),
    "given_betas": (None,), "channels": (4,), "conditioning_key": ("crossattn", None), "concat_mode": (True, False),
    "scale_factor": SCALE, "scale_by_std": (False,), "num_timesteps_cond": (1, None), "clip_denoised": ANY,
    "use_positional_encodings": (False,), "learn_logvar": (False,), "cond_stage_forward": (None,),
    "make_it_fit": (False,),
    "unet_config": {"target": "UNetModel", "params": UNET}, "first_stage_config": {"target": "AutoencoderKL",
    "params": VAE},
    "cond_stage_config": {"target": "FrozenCLIPEmbedder", "params": TEXT_ENCODER},
    # how it was trained
    **dict.fromkeys(("log_every_t", "first_stage_key", "cond_stage_key", "image_size", "cond_stage_trainable",
    "monitor", "use_ema",
                     "scheduler_config", "ckpt_path", "ignore_keys", "load_only_unet", "loss_type", "v_posterior",
                     "cosine_s",
                     "l_simple_weight", "original_elbo_weight", "logvar_init", "unfreeze_model", "model_lr",
                     "first_stage_trainable", "ema_decay"), ANY),
}
FILE = {"model": {"target": "LatentDiffusion", "base_learning_rate": ANY, "params": PARAMS}, "data": ANY,
    "lightning": ANY}
# fmt: on


def beside(file: Path) -> Path | None:
    """The .yaml (or .yml) that belongs to a single-file checkpoint, `model.yaml` or `model.safetensors.yaml`, if there is one."""
    named = [file.with_name(stem + ending) for stem in (file.stem, file.name) for ending in (".yaml", ".yml")]
    return next((path for path in named if path.is_file()), None)


def latent_scale(file: Path) -> float:
    """The latent scale that the .yaml gives, LATENT_SCALE if it gives none, once every entry of it is understood.

    ValueError, one line that names the entry: not YAML, an entry that is not Stable Diffusion 1.x, or one that is not
    known.
    """
    try:
        config = plain.of_yaml(file)
    except ValueError as error:
        raise ValueError(f"{file} is not YAML: {error}") from None
    found = {}
    _check(config, FILE, "", file, found)
    return found.get("scale", LATENT_SCALE)


def _check(config: object, table: dict, place: str, file: Path, found: dict) -> None:
    if not isinstance(config, dict):
        raise ValueError(f"{file}: expected entries at {place or 'the top'}, got {short(config)}")
    for key, value in config.items():
        name = f"{place}{key}"
        allowed = table.get(key) if isinstance(key, str) else None
        if allowed is ANY:
            continue
        if allowed is SCALE:
            found["scale"] = scale(value, name, str(file))
        elif isinstance(allowed, dict):
            _check(value, allowed, f"{name}.", file, found)
        elif isinstance(allowed, str):  # the last part of a class's name: forks of the code keep it
            if not isinstance(value, str) or value.rpartition(".")[2] != allowed:
                raise ValueError(
                    f"{file} has {name} {short(value)} and Stable Diffusion 1.x has {allowed}: nothing else is built "
                    "here"
                )
        elif allowed is None:
            raise ValueError(
                f"{file} has an entry {name}: {short(value)}, which is not understood here and might change the "
                "pictures"
            )
        elif not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
            raise ValueError(
                f"{file} has {name} {short(value)} and Stable Diffusion 1.x has {allowed[0]!r}: nothing else is built "
                "here"
            )
