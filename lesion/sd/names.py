"""Names of the original single-file ("LDM") checkpoint for our (diffusers') names, and its sizes.

The maps are built block by block, as in CompVis' `openaimodel.py` and `model.py`: input_blocks count straight through the levels,
output_blocks likewise, and the VAE decoder's levels are numbered the other way round.
Proven by tests/sd/test_checkpoint.py (both layouts load to equal weights) and tests/parity/test_full_size.py (686 + 248 + 196 keys).
"""
from collections.abc import Iterable, Mapping

from lesion.sd.clip import CLIPTextConfig
from lesion.sd.unet import UNetConfig
from lesion.sd.vae import VAEConfig

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
NETWORKS = (UNET, VAE, "cond_stage_model.")  # a tensor of these that is not known is of another model; others stand beside them
LARGEST_LAYERS = 64  # of a text encoder: a number in a tensor's name is not believed
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OLD_VAE_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # diffusers before 0.14
IGNORED_PREFIXES = (
    "model_ema.",
    "sqrt_",
    "log_one_minus_",
    "posterior_",
    "betas",
    "alphas_cumprod",
    "logvar",
    "cond_stage_model.logit_scale",
    "lvlb_weights",
    "first_stage_model.loss.",
    "first_stage_model.model_ema.",
)
IGNORED_SUFFIXES = ("embeddings.position_ids",)


def ignored(key: str) -> bool:
    """True for what a checkpoint may hold beside the weights: EMA copies, schedule buffers, transformers' old position_ids."""
    return key.startswith(IGNORED_PREFIXES) or key.endswith(IGNORED_SUFFIXES)


def unet_prefixes(levels: int, layers: int) -> dict[str, str]:
    """{our module prefix: LDM module prefix} of the U-Net, residual blocks' insides excepted."""
    names = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
             "conv_norm_out": "out.0", "conv_out": "out.2", "mid_block.resnets.0": "middle_block.0",
             "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2"}
    for i in range(levels):
        for j in range(layers):
            block = (layers + 1) * i + j + 1
            names[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{block}.0"
            names[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{block}.1"
        names[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{(layers + 1) * (i + 1)}.0.op"
        for j in range(layers + 1):
            block = (layers + 1) * i + j
            names[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{block}.0"
            names[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{block}.1"
        names[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{(layers + 1) * i + layers}.{2 if i else 1}.conv"
    return names


def vae_prefixes(levels: int, layers: int) -> dict[str, str]:
    """{our module prefix: LDM module prefix} of the VAE, residual blocks' insides excepted."""
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side in ("encoder", "decoder"):
        names |= {f"{side}.conv_in": f"{side}.conv_in", f"{side}.conv_norm_out": f"{side}.norm_out",
                  f"{side}.conv_out": f"{side}.conv_out", f"{side}.mid_block.resnets.0": f"{side}.mid.block_1",
                  f"{side}.mid_block.attentions.0": f"{side}.mid.attn_1", f"{side}.mid_block.resnets.1": f"{side}.mid.block_2"}
    for i in range(levels):
        for j in range(layers):
            names[f"encoder.down_blocks.{i}.resnets.{j}"] = f"encoder.down.{i}.block.{j}"
        names[f"encoder.down_blocks.{i}.downsamplers.0.conv"] = f"encoder.down.{i}.downsample.conv"
        up = levels - 1 - i  # reversed order
        for j in range(layers + 1):
            names[f"decoder.up_blocks.{i}.resnets.{j}"] = f"decoder.up.{up}.block.{j}"
        names[f"decoder.up_blocks.{i}.upsamplers.0.conv"] = f"decoder.up.{up}.upsample.conv"
    return names


def to_ldm(keys: Iterable[str], prefixes: Mapping[str, str], inside: Mapping[str, str]) -> dict[str, str]:
    """{our key: LDM key}: the longest prefix is replaced, and so are `inside`'s names where the prefix is a block with insides."""
    result = {}
    for key in keys:
        prefix = max((p for p in prefixes if key.startswith(p + ".")), key=len)
        rest = key.removeprefix(prefix + ".")
        name, _, leaf = rest.rpartition(".")
        result[key] = f"{prefixes[prefix]}.{inside[name]}.{leaf}" if name in inside else f"{prefixes[prefix]}.{rest}"
    return result


def ldm_unet_keys(keys: Iterable[str], config: UNetConfig) -> dict[str, str]:
    """{our key: LDM key} of the U-Net."""
    prefixes = unet_prefixes(len(config.block_out_channels), config.layers_per_block)
    return {ours: UNET + theirs for ours, theirs in to_ldm(keys, prefixes, RESNET).items()}


def ldm_vae_keys(keys: Iterable[str], config: VAEConfig) -> dict[str, str]:
    """{our key: LDM key} of the VAE."""
    prefixes = vae_prefixes(len(config.block_out_channels), config.layers_per_block)
    inside = {"conv_shortcut": "nin_shortcut", **VAE_ATTENTION}
    return {ours: VAE + theirs for ours, theirs in to_ldm(keys, prefixes, inside).items()}


def ldm_text_keys(keys: Iterable[str], present: Iterable[str]) -> dict[str, str]:
    """Names stay; some files lack the `text_model.` level."""
    has_level = any(key.startswith(TEXT + "text_model.") for key in present)
    return {key: TEXT + (key if has_level else key.removeprefix("text_model.")) for key in keys}


def sizes_of_single_file(shapes: Mapping[str, tuple[int, ...]],
                         with_vae: bool = True) -> tuple[UNetConfig, VAEConfig | None, CLIPTextConfig]:
    """The three configs, read from tensor shapes {LDM key: shape}; None for the VAE that is not asked for.

    Numbers of heads leave no trace in shapes. U-Net: 8, as in every SD 1.x. Text encoder: width / 64, as in every published
    CLIP; miniature ones (width under 256) are taken to have 4. Raises ValueError where a tensor is missing or of other axes.
    """
    text = TEXT if TEXT + "embeddings.token_embedding.weight" in shapes else TEXT + "text_model."
    vocab_size, width = _shape(shapes, text + "embeddings.token_embedding.weight", 2)
    numbers = [key.removeprefix(text + "encoder.layers.").split(".")[0] for key in shapes if key.startswith(text + "encoder.layers.")]
    layers = 1 + max((int(number) for number in numbers if number.isdecimal() and len(number) < 9), default=-1)
    if not 1 <= layers <= LARGEST_LAYERS:
        raise ValueError(f"the text encoder has {layers} layers; allowed is 1 to {LARGEST_LAYERS}")
    unet = UNetConfig(
        block_out_channels=tuple(_shape(shapes, f"{UNET}input_blocks.{3 * i + 1}.0.out_layers.3.weight", 4)[0] for i in range(4)),
        cross_attention_dim=_shape(shapes, f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", 2)[1],
        in_channels=_shape(shapes, f"{UNET}input_blocks.0.0.weight", 4)[1], out_channels=_shape(shapes, f"{UNET}out.2.weight", 4)[0])
    return unet, vae_sizes(shapes) if with_vae else None, CLIPTextConfig(
        vocab_size=vocab_size, hidden_size=width, intermediate_size=_shape(shapes, f"{text}encoder.layers.0.mlp.fc1.weight", 2)[0],
        num_hidden_layers=layers, num_attention_heads=width // 64 if width >= 256 else 4,
        max_position_embeddings=_shape(shapes, text + "embeddings.position_embedding.weight", 2)[0])


def vae_sizes(shapes: Mapping[str, tuple[int, ...]], prefix: str = VAE) -> VAEConfig:
    """The VAE's config, read from tensor shapes under LDM's names or diffusers'. Raises ValueError as above."""
    name = "encoder.down_blocks.{}.resnets.0.conv2.weight"
    if prefix + name.format(0) not in shapes:
        name = "encoder.down.{}.block.0.conv2.weight"
    widths = tuple(_shape(shapes, prefix + name.format(i), 4)[0] for i in range(4))
    groups = VAEConfig().norm_num_groups
    if any(width % groups or not width for width in widths):
        raise ValueError(f"the VAE's widths {list(widths)} are not multiples of {groups}")
    latents = _shape(shapes, f"{prefix}post_quant_conv.weight", 4)[0]
    if latents != 4:
        raise ValueError(f"the VAE has {latents} latent channels; Stable Diffusion 1.x has 4")
    return VAEConfig(block_out_channels=widths, latent_channels=latents)


def _shape(shapes: Mapping[str, tuple[int, ...]], key: str, axes: int) -> tuple[int, ...]:
    if key not in shapes:
        raise ValueError(f"tensor {key} is missing: not a Stable Diffusion 1.x checkpoint, or a damaged one")
    if len(shapes[key]) != axes or 0 in shapes[key]:
        raise ValueError(f"tensor {key} has shape {list(shapes[key])}, expected {axes} axes, none empty")
    return shapes[key]
