"""What a checkpoint says of itself is believed or refused: config.json, scheduler_config.json, ModelSpec, a .yaml
beside a file.

Every entry stands in a table here with the values that mean Stable Diffusion 1.x as it is written out in this room; an
entry that is in no table, or has another value, stops the load and is named: such a model would load, and draw wrong
pictures. Sources: the signatures of diffusers' schedulers, `UNet2DConditionModel` and `AutoencoderKL`; CompVis
`v1-inference.yaml`; ModelSpec 1.0.1 (github.com/Stability-AI/ModelSpec). Proven by tests/sd/test_configs.py.
"""
import math
import re
from pathlib import Path

from lesion.sd import plain
from lesion.sd.clip import TOKENS, CLIPTextConfig
from lesion.sd.unet import UNetConfig
from lesion.sd.vae import LATENT_SCALE, VAEConfig

ANY = object()  # an entry that changes nothing here: a name, or how some other solver would step (--sampler chooses ours)
LEVELS = 4  # of the U-Net and of the VAE: three halvings, which `resolution / 8` and multiples of 64 px rest on
LARGEST = {"layers_per_block": 8, "width": 8192, "groups": 1024, "heads": 256, "num_hidden_layers": 64,
           "vocab_size": 1_000_000}  # fmt: skip

# fmt: off
# the rest space timesteps as they like
LEADING = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "DDIMInverseScheduler")
SOLVERS = (*LEADING, *(f"{name}Scheduler" for name in (
    "LMSDiscrete", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "DPMSolverMultistepInverse",
    "DPMSolverSinglestep",
    "DPMSolverSDE", "UniPCMultistep", "DEISMultistep", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete",
    "SASolver")))
SCHEDULER = {
    "_class_name": SOLVERS, "_diffusers_version": ANY, "_name_or_path": ANY,
    # what the model was trained with
    "num_train_timesteps": (1000,), "beta_start": (0.00085,), "beta_end": (0.012,), "beta_schedule": ("scaled_linear",),
    "trained_betas": (None,), "prediction_type": ("epsilon",), "rescale_betas_zero_snr": (False,),
    "variance_type": ("fixed_small", "fixed_small_log", None), "timestep_type": ("discrete",), "sigma_min": (None,),
    "sigma_max": (None,),
    "use_flow_sigmas": (False, None), "use_dynamic_shifting": (False,), "shift_terminal": (None,),
    # how SD 1.x is drawn
    "clip_sample": (False,), "thresholding": (False,), "set_alpha_to_one": (False,), "timestep_spacing": ("leading",),
    "steps_offset": (1,),
    # numbers of what is off above, and how another solver steps
    **dict.fromkeys((
        "clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value", "skip_prk_steps", "algorithm_type",
        "solver_order",
        "solver_type", "lower_order_final", "euler_at_final", "final_sigmas_type", "use_karras_sigmas",
        "use_lu_lambdas",
        "use_exponential_sigmas", "use_beta_sigmas", "lambda_min_clipped", "interpolation_type", "predict_x0",
        "disable_corrector",
        "solver_p", "predictor_order", "corrector_order", "tau_func", "noise_sampler_seed", "flow_shift",
        "time_shift_type"), ANY),
}
# their classes' defaults, which say nothing
SOLVERS_OWN = {"timestep_spacing": ("leading", "linspace"), "steps_offset": (0, 1)}

SIZES = ANY  # checked number by number below
UNET = {
    **dict.fromkeys(("block_out_channels", "layers_per_block", "cross_attention_dim", "attention_head_dim",
    "num_attention_heads",
                     "in_channels", "out_channels", "norm_num_groups"), SIZES),
    "down_block_types": (["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],),
    "up_block_types": (["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",), "act_fn": ("silu", "swish"), "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "center_input_sample": (False,), "norm_eps": (1e-5,), "downsample_padding": (1,), "mid_block_scale_factor": (1,),
    "attention_type": ("default",), "conv_in_kernel": (3,), "conv_out_kernel": (3,), "resnet_out_scale_factor": (1,),
    "resnet_time_scale_shift": ("default",), "time_embedding_type": ("positional",),
    "transformer_layers_per_block": (1,),
    **dict.fromkeys(("_class_name", "_diffusers_version", "_name_or_path", "sample_size", "dropout", "upcast_attention",
                     "addition_embed_type_num_heads", "decay", "inv_gamma", "min_decay", "optimization_step", "power",
                     "update_after_step", "use_ema_warmup"), ANY),
}
VAE = {
    **dict.fromkeys(("block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups",
    "scaling_factor"), SIZES),
    "in_channels": (3,), "out_channels": (3,), "down_block_types": (["DownEncoderBlock2D"] * LEVELS,),
    "up_block_types": (["UpDecoderBlock2D"] * LEVELS,), "act_fn": ("silu", "swish"), "use_quant_conv": (True,),
    "use_post_quant_conv": (True,), "mid_block_add_attention": (True,), **dict.fromkeys(("_class_name",
    "_diffusers_version", "_name_or_path", "sample_size",
                                                         "force_upcast", "dropout"), ANY),
}
TEXT_ENCODER = {"hidden_act": ("quick_gelu",), "layer_norm_eps": (1e-5,), "model_type": ("clip_text_model", "clip"),
                # what else it holds are transformers' settings of generation and output
                "max_position_embeddings": (TOKENS,)}
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionControlNetPipeline")

MODELSPEC = {
    "architecture": re.compile(r"stable-diffusion-v1(-[45]|\.[45])?"), "prediction_type": re.compile("epsilon|eps"),
    "encoder_layer": re.compile("-?1|last"), "timestep_range": re.compile(r"\[?0 *, *(999|1000)\]?"),
    "is_negative_embedding": re.compile("false"), "preprocessor": re.compile("none|"),
    **dict.fromkeys(("sai_model_spec", "implementation", "implementation_version", "title", "description", "author",
    "date", "hash_sha256",
                     "usage_hint", "thumbnail", "tags", "license", "merged_from", "resolution", "trigger_phrase",
                     "unet_dtype",
                     "vae_dtype", "data_format", "format_type", "language", "format_trigger_phrase"), ANY),
}
VAE_ARCHITECTURE = re.compile(r"(stable-diffusion-v1(-[45]|\.[45])?|stable-diffusion-v1/vae|.*vae.*)")
# entries of kohya's trainer and of merging tools
TRAINERS = {"prediction_type": MODELSPEC["prediction_type"], **dict.fromkeys(
    ("ss_v2", "ss_v_parameterization", "ss_zero_terminal_snr", "v_pred", "ztsnr", "zsnr"), re.compile("false|none|0|"))}
MARKERS = {"v_pred": "v-prediction", "ztsnr": "a schedule that ends at zero signal", "edm_vpred.": "EDM's v-prediction",
           # tensors by which tools say so
           "edm_mean": "EDM's latents", "edm_std": "EDM's latents", "denoiser.": "another noise schedule"}
# fmt: on


def read_object(file: Path) -> dict:
    """The JSON object in a file. ValueError, naming the file: not JSON, nested too deep, something other than an
    object."""
    try:
        config = plain.of_json(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(config).__name__}")
    return config


def check(config: dict, table: dict, where: str, strict: bool = True, of: str = "Stable Diffusion 1.x") -> None:
    """Each entry of `config` has a value that `table` allows. ValueError, naming entry, value and what is allowed.

    An entry that the table lacks must be null; with `strict` off also false or empty will do (an option that came
    later, not used).
    """
    for key, value in config.items():
        allowed = table.get(key, (None,) if strict else (None, False, [], {}))
        if allowed is ANY or any(
            type(value) in (int, float)
            and type(one) in (int, float)
            and math.isclose(value, one, rel_tol=1e-9)
            or type(value) is type(one)
            and value == one
            for one in allowed
        ):
            continue
        if key in table:
            only = " or ".join(map(repr, allowed)) if len(allowed) < 4 else "one of " + ", ".join(map(str, allowed))
            raise ValueError(f"{where} has {key} {short(value)} and {of} has {only}: nothing else is built here")
        raise ValueError(
            f"{where} has an entry {short(key)}: {short(value)}, which is not understood here and might change the "
            "pictures"
        )


def short(value: object) -> str:
    """repr(value) on one line, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def check_scheduler(config: dict, where: str) -> None:
    """scheduler_config.json against SCHEDULER. ValueError names the first entry that SD 1.x does not have or that is
    unknown."""
    if config.get("prediction_type", "epsilon") == "v_prediction":
        raise ValueError(
            f"{where} is a Stable Diffusion 2 checkpoint or another variant (prediction_type 'v_prediction'): this "
            "project "
            "works on Stable Diffusion 1.x"
        )
    own = {} if config.get("_class_name", LEADING[0]) in LEADING else SOLVERS_OWN
    check(config, SCHEDULER | own, where)


def check_metadata(metadata: dict[str, str], where: str, architecture: re.Pattern = MODELSPEC["architecture"]) -> None:
    """The ModelSpec entries of a safetensors file, and what trainers write of the prediction; other tools' entries are
    free.

    architecture: the values of `modelspec.architecture` that are meant. ValueError names the entry that does not fit.
    """
    for key, text in metadata.items():
        name, known = key.removeprefix("modelspec."), TRAINERS
        if key.startswith("modelspec."):
            known = MODELSPEC | {"architecture": architecture}
            if name not in known:
                raise ValueError(
                    f"{where}: its metadata has {short(key)}: {short(text)}, which is not an entry of ModelSpec "
                    "1.0.1: it is "
                    "not understood here and might change the pictures"
                )
        pattern = known.get(key if known is TRAINERS else name, ANY)
        if pattern is not ANY and not pattern.fullmatch(text.strip().lower()):
            raise ValueError(
                f"{where}: its metadata says {key} is {short(text)}: this project works on Stable Diffusion 1.x with "
                "epsilon prediction, the last layer of its text encoder and its own noise schedule"
            )


def check_markers(tensors: list[str], where: str) -> None:
    """Tensor names by which tools mark another prediction or schedule. ValueError names the first."""
    for name in tensors:
        for marker, meaning in MARKERS.items():
            if name == marker or (marker.endswith(".") and name.startswith(marker)):
                raise ValueError(
                    f"{where} holds the tensor {name}, by which tools mark {meaning}: this project works on Stable "
                    "Diffusion "
                    "1.x with epsilon prediction and its own noise schedule"
                )


def check_pipeline(config: dict, where: str) -> None:
    """model_index.json: another family's or another task's pipeline is named. ValueError."""
    name = config.get("_class_name", PIPELINES[0])
    if name not in PIPELINES:
        raise ValueError(f"{where} is a {short(name)}: this project works on Stable Diffusion 1.x ({PIPELINES[0]})")


def whole(config: dict, key: str, default: int, where: str, largest: int) -> int:
    """A whole number of `config` from 1 to `largest`; `default` where it does not say. ValueError."""
    value = config.get(key, default)
    if type(value) is not int or not 1 <= value <= largest:
        raise ValueError(f"{where} has {key} {short(value)}: allowed is a whole number from 1 to {largest}")
    return value


def widths(config: dict, groups: int, where: str) -> tuple[int, ...]:
    """`block_out_channels`: as many as there are LEVELS, each a multiple of the normalisation's groups. ValueError."""
    value = config["block_out_channels"]
    if not isinstance(value, list) or len(value) != LEVELS:
        levels = f"{len(value)} levels" if isinstance(value, list) else short(value)
        raise ValueError(f"{where} has block_out_channels of {levels}; Stable Diffusion 1.x has {LEVELS}")
    for width in value:
        if type(width) is not int or not 1 <= width <= LARGEST["width"] or width % groups:
            raise ValueError(
                f"{where} has block_out_channels {short(value)}: allowed are whole numbers from {groups} to "
                f"{LARGEST['width']}, multiples of norm_num_groups ({groups})"
            )
    return tuple(value)


def unet_config(config: dict, where: str) -> UNetConfig:
    """Sizes of a unet/config.json, each checked. ValueError; KeyError where one is missing."""
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    if config.get("cross_attention_dim") == 1024 or config.get("use_linear_projection") or isinstance(heads, list):
        raise ValueError(
            f"{where} is a Stable Diffusion 2 checkpoint or another variant (linear projections, a context of 1024 or "
            "a "
            "list of heads): this project works on Stable Diffusion 1.x"
        )
    groups = whole(config, "norm_num_groups", 32, where, LARGEST["groups"])
    made = UNetConfig(
        widths(config, groups, where),
        whole(config, "layers_per_block", 2, where, LARGEST["layers_per_block"]),
        whole(
            {"cross_attention_dim": config["cross_attention_dim"]}, "cross_attention_dim", 0, where, LARGEST["width"]
        ),
        whole({"heads": heads}, "heads", 8, where, LARGEST["heads"]),
        whole(config, "in_channels", 4, where, LARGEST["width"]),
        whole(config, "out_channels", 4, where, LARGEST["width"]),
        groups,
    )
    check_unet(made, where)
    check(config, UNET, where, strict=False)
    return made


def check_unet(config: UNetConfig, where: str) -> None:
    """What both layouts must be: 4 channels in and out, attention widths that the heads divide. ValueError."""
    if config.in_channels != 4 or config.out_channels != 4:
        raise ValueError(
            f"{where}: the U-Net takes {config.in_channels} channels (an inpainting model?) and gives "
            f"{config.out_channels}; "
            "4 are needed"
        )
    for width in config.block_out_channels:
        if width % config.heads:
            raise ValueError(f"{where}: {config.heads} attention heads do not divide the width {width}")
        if width % config.norm_num_groups:
            raise ValueError(f"{where}: {config.norm_num_groups} normalisation groups do not divide the width {width}")


def vae_config(config: dict, where: str) -> VAEConfig:
    """Sizes of a vae/config.json and its latent scale, each checked. ValueError; KeyError where one is missing."""
    groups = whole(config, "norm_num_groups", 32, where, LARGEST["groups"])
    latents = whole(config, "latent_channels", 4, where, LARGEST["width"])
    if latents != 4:
        raise ValueError(f"{where}: the VAE has {latents} latent channels; Stable Diffusion 1.x has 4")
    made = VAEConfig(
        widths(config, groups, where),
        whole(config, "layers_per_block", 2, where, LARGEST["layers_per_block"]),
        latents,
        groups,
        scale(config.get("scaling_factor", LATENT_SCALE), "scaling_factor", where),
    )
    check(config, VAE, where, strict=False)
    return made


def scale(value: object, name: str, where: str) -> float:
    """A latent scale: a finite number above 0, within a factor of 1000 of SD 1.x's. ValueError."""
    if type(value) not in (int, float) or not LATENT_SCALE / 1000 < value < LATENT_SCALE * 1000:
        raise ValueError(
            f"{where} has {name} {short(value)}: allowed is a number near {LATENT_SCALE}, which every latent is "
            "multiplied by"
        )
    return float(value)


def text_config(config: dict, where: str) -> CLIPTextConfig:
    """Sizes of a text_encoder/config.json, each checked. ValueError."""
    config = config.get("text_config") or config  # a whole CLIP model's file keeps them one level down
    if not isinstance(config, dict):
        raise ValueError(f"{where}: expected text_config to be an object")
    check({key: value for key, value in config.items() if key in TEXT_ENCODER}, TEXT_ENCODER, where)
    default = CLIPTextConfig()
    largest = {
        "hidden_size": LARGEST["width"],
        "intermediate_size": 4 * LARGEST["width"],
        "num_attention_heads": LARGEST["heads"],
        "max_position_embeddings": TOKENS,
        **LARGEST,
    }
    made = CLIPTextConfig(**{key: whole(config, key, getattr(default, key), where, largest[key])
                             for key in CLIPTextConfig.__dataclass_fields__})
    if made.hidden_size % made.num_attention_heads:
        raise ValueError(
            f"{where}: {made.num_attention_heads} attention heads do not divide the width {made.hidden_size}"
        )
    return made
