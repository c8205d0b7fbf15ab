"""What a checkpoint says of itself is believed or refused: every entry, in every place where it can stand."""
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lesion.sd import checkpoint, configs, ldm_yaml

UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


@pytest.fixture(autouse=True)
def quick_tokenizer(monkeypatch):
    monkeypatch.setattr(checkpoint, "Tokenizer", lambda folder: folder)


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of the folder layout to spoil: files are links until they are rewritten."""
    return shutil.copytree(tiny / "folder", tmp_path / "folder", copy_function=lambda a, b: os.link(a, b))


def configure(folder, part, **changes):
    file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    text = json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changes})
    file.unlink()
    file.write_text(text, encoding="utf-8")


def refusal(path, shared, **more):
    with pytest.raises(ValueError) as error:
        checkpoint.load(path, tokenizer=shared / "clip_tokenizer", **more)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- scheduler_config.json -------------------------------------------------------------------------------------------

OTHER = {
    "prediction_type": "sample", "rescale_betas_zero_snr": True, "trained_betas": [0.1, 0.2], "timestep_spacing": "trailing",
    "steps_offset": 0, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 500,
    "clip_sample": True, "thresholding": True, "set_alpha_to_one": True, "variance_type": "learned_range", "timestep_type": "continuous",
    "sigma_min": 0.002, "sigma_max": 80.0, "use_flow_sigmas": True, "use_dynamic_shifting": True, "shift_terminal": 0.1,
    "_class_name": "FlowMatchEulerDiscreteScheduler", "an_entry_of_tomorrow": 0.5, "another": True, "third": "x",
}  # fmt: skip


@pytest.mark.parametrize("key", OTHER)
def test_another_scheduler_is_named(folder, shared, key):
    """Every entry that is not SD 1.5's, and every one that is unknown, stops the load and is named with its value."""
    configure(folder, "scheduler", **{key: OTHER[key]})
    message = refusal(folder, shared)
    assert key in message
    assert configs.short(OTHER[key]) in message


def test_v_prediction_is_named(folder, shared):
    """The usual case: it once drew noise as if it were an epsilon model."""
    configure(folder, "scheduler", prediction_type="v_prediction")
    assert "prediction_type 'v_prediction'" in refusal(folder, shared)


def test_linspace_with_a_scheduler_that_spaces_leading(folder, shared):
    """DDIM with linspace was made so on purpose; for Euler and DPM-Solver++ it is their class's default, which says
    nothing."""
    configure(folder, "scheduler", timestep_spacing="linspace")
    assert "timestep_spacing 'linspace'" in refusal(folder, shared)
    configure(folder, "scheduler", _class_name="EulerDiscreteScheduler", steps_offset=0)
    assert checkpoint.load(folder, tokenizer=shared / "clip_tokenizer").unet


@pytest.mark.parametrize("name", ["DDIM", "DDPM", "PNDM", "LMSDiscrete", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep",
                                  "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep", "HeunDiscrete", "KDPM2Discrete",
                                  "KDPM2AncestralDiscrete"])  # fmt: skip
def test_what_diffusers_writes_is_understood(name):
    """Every scheduler that diffusers makes of SD 1.5's own config, as users save it, passes: no door is shut by the
    list."""
    import diffusers

    own = diffusers.PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1)
    base = {**json.loads(own.to_json_string()), "clip_sample": False}  # as SD 1.5's scheduler_config.json, with every entry written out
    made = getattr(diffusers, f"{name}Scheduler").from_config(base)
    configs.check_scheduler(json.loads(made.to_json_string()), "x")


# --- config.json of the networks -------------------------------------------------------------------------------------

NUMBERS = [
    ("unet", "layers_per_block", 10**9), ("unet", "layers_per_block", 0), ("unet", "layers_per_block", -1),
    ("unet", "layers_per_block", 2.0), ("unet", "layers_per_block", True), ("unet", "layers_per_block", [2, 2, 2, 2]),
    ("unet", "norm_num_groups", 0), ("unet", "norm_num_groups", 7), ("unet", "norm_num_groups", "32"),
    ("unet", "attention_head_dim", 7), ("unet", "attention_head_dim", -8), ("unet", "attention_head_dim", 10**12),
    ("unet", "cross_attention_dim", 0), ("unet", "cross_attention_dim", 10**12), ("unet", "cross_attention_dim", "64"),
    ("unet", "cross_attention_dim", [64, 64, 64]), ("unet", "block_out_channels", [32, 64, 64]), ("unet", "block_out_channels", 32),
    ("unet", "block_out_channels", [32, 64, 64, 10**9]), ("unet", "block_out_channels", [32, 64, 64, 0]),
    ("unet", "block_out_channels", [32, 64, 64, -64]), ("unet", "block_out_channels", [32, 64, 64, 64.0]),
    ("unet", "block_out_channels", ["32", "64", "64", "64"]), ("unet", "in_channels", 0), ("unet", "out_channels", 8),
    ("vae", "layers_per_block", 10**9), ("vae", "norm_num_groups", 0), ("vae", "latent_channels", 16), ("vae", "latent_channels", 0),
    ("vae", "block_out_channels", [32]), ("vae", "block_out_channels", [32] * 9), ("vae", "scaling_factor", 0),
    ("vae", "scaling_factor", float("nan")), ("vae", "scaling_factor", float("inf")), ("vae", "scaling_factor", -0.18),
    ("vae", "scaling_factor", "0.18215"), ("vae", "scaling_factor", True), ("vae", "scaling_factor", 1e9), ("vae", "scaling_factor", None),
    ("text_encoder", "num_hidden_layers", 10**9), ("text_encoder", "num_hidden_layers", 0), ("text_encoder", "num_attention_heads", 5),
    ("text_encoder", "num_attention_heads", 0), ("text_encoder", "hidden_size", -64), ("text_encoder", "vocab_size", 10**12),
    ("text_encoder", "max_position_embeddings", 248), ("text_encoder", "intermediate_size", None), ("text_encoder", "hidden_size", 128),
]  # fmt: skip


@pytest.mark.parametrize(("part", "key", "value"), NUMBERS, ids=lambda value: str(value)[:30])
def test_numbers_are_not_believed(folder, shared, part, key, value):
    """Sizes that are not numbers, too large, zero, negative, or that do not divide end in one line at once, not in a
    traceback, a hang or a wrong picture."""
    configure(folder, part, **{key: value})
    message = refusal(folder, shared)
    assert "None" not in message or value is None
    assert any(word in message for word in (key, "head", "U-Net takes", "latent channels", "width", "norm"))


@pytest.mark.parametrize(("part", "key", "value"), [
    ("unet", "time_cond_proj_dim", 256), ("unet", "class_embed_type", "timestep"), ("unet", "resnet_time_scale_shift", "scale_shift"),
    ("unet", "only_cross_attention", True), ("unet", "time_embedding_type", "fourier"), ("unet", "mid_block_scale_factor", 1.414),
    ("unet", "down_block_types", ["DownBlock2D"] * 4), ("unet", "an_option_of_tomorrow", True), ("unet", "transformer_layers_per_block", 2),
    ("unet", "addition_embed_type", "text_time"), ("unet", "encoder_hid_dim", 512), ("vae", "shift_factor", 0.1),
    ("vae", "latents_mean", [0, 0, 0, 0]), ("vae", "use_quant_conv", False), ("vae", "act_fn", "gelu"),
    ("text_encoder", "model_type", "xlm-roberta"), ("text_encoder", "hidden_act", "gelu")], ids=lambda value: str(value)[:30])  # fmt: skip
def test_another_network_is_named(folder, shared, part, key, value):
    """The shapes of SD 1.5 with another formula in them."""
    configure(folder, part, **{key: value})
    message = refusal(folder, shared)
    assert key in message
    assert part in message


def test_moving_averages_leave_their_settings(folder, shared):
    """diffusers' training script saves the EMA's settings into unet/config.json: they change nothing."""
    configure(
        folder,
        "unet",
        decay=0.9999,
        inv_gamma=1.0,
        min_decay=0.0,
        optimization_step=5,
        power=2 / 3,
        update_after_step=0,
        use_ema_warmup=False,
        an_option_of_tomorrow=None,
        another=False,
    )
    assert checkpoint.load(folder, tokenizer=shared / "clip_tokenizer").unet


def test_another_pipeline_is_named(folder, shared):
    """model_index.json of a latent-consistency or inpainting pipeline."""
    index = folder / "model_index.json"
    text = index.read_text(encoding="utf-8").replace("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
    index.unlink()
    index.write_text(text, encoding="utf-8")
    assert "is a 'LatentConsistencyModelPipeline'" in refusal(folder, shared)


@pytest.mark.parametrize("file", ["unet/config.json", "scheduler/scheduler_config.json", "model_index.json"])
@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"", b"null", b"3"])
def test_json_that_is_none(folder, shared, file, content):
    """Nested without end, not UTF-8, empty, or no object: one line that names the file."""
    (folder / file).unlink()
    (folder / file).write_bytes(content)
    assert file.split("/")[-1] in refusal(folder, shared)


# --- single files: ModelSpec, marker tensors, yaml -------------------------------------------------------------------

@pytest.fixture
def single(tiny, tmp_path):
    """Write the single-file layout with more tensors or with metadata; its path."""
    def write(more=None, metadata=None):
        save_file({**load_file(tiny / "single.safetensors"), **(more or {})}, tmp_path / "model.safetensors", metadata)
        return tmp_path / "model.safetensors"
    return write


SPOKEN = [{"modelspec.prediction_type": "v"}, {"modelspec.prediction_type": "v_prediction"}, {"modelspec.encoder_layer": "2"},
          {"modelspec.architecture": "stable-diffusion-v2-768-v"}, {"modelspec.architecture": "stable-diffusion-v1/lora"},
          {"modelspec.timestep_range": "0,200"}, {"modelspec.something_new": "1"}, {"ss_v_parameterization": "True"}, {"ss_v2": "True"},
          {"prediction_type": "v_prediction"}, {"ss_zero_terminal_snr": "True"}, {"modelspec.is_negative_embedding": "true"}]  # fmt: skip


@pytest.mark.parametrize("metadata", SPOKEN, ids=str)
def test_metadata_is_not_passed_over(single, shared, metadata):
    """Each entry of ModelSpec and of trainers that says another prediction, layer or family, or that is unknown, is
    named."""
    ((key, value),) = metadata.items()
    message = refusal(single(metadata=metadata), shared)
    assert key in message
    assert value in message


def test_what_modelspec_says_of_sd15_is_understood(single, shared):
    """A whole ModelSpec header of an SD 1.5 file, with other tools' entries beside it, changes nothing."""
    metadata = {f"modelspec.{key}": value for key, value in {
        "sai_model_spec": "1.0.0", "architecture": "stable-diffusion-v1", "implementation": "diffusers", "title": "x", "author": "y",
        "prediction_type": "epsilon", "encoder_layer": "1", "timestep_range": "0,1000", "resolution": "512x512", "thumbnail": "data:",
        "hash_sha256": "0x0", "merged_from": "a, b", "usage_hint": "z", "date": "2024-01-01"}.items()}  # fmt: skip
    path = single(metadata=metadata | {"format": "pt", "ss_v2": "False", "sd_merge_recipe": "{}"})
    assert checkpoint.load(path, tokenizer=shared / "clip_tokenizer").notes == []


def test_metadata_in_a_folder_counts_too(folder, shared):
    """The U-Net's own file may carry it."""
    tensors = load_file(folder / UNET)
    (folder / UNET).unlink()
    save_file(tensors, folder / UNET, {"modelspec.prediction_type": "v"})
    assert "modelspec.prediction_type is 'v'" in refusal(folder, shared)


@pytest.mark.parametrize("marker", ["v_pred", "ztsnr", "edm_vpred.sigma_max", "denoiser.sigmas"])
def test_marker_tensors(single, shared, marker):
    """ComfyUI's and others' marks of another prediction or schedule, as tensors: not harmless strangers."""
    message = refusal(single({marker: torch.tensor([1.0])}), shared)
    assert f"holds the tensor {marker}, by which tools mark" in message


V1 = """
model:
  base_learning_rate: 1.0e-04
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 0.00085
    linear_end: 0.0120
    num_timesteps_cond: 1
    log_every_t: 200
    timesteps: 1000
    first_stage_key: "jpg"
    cond_stage_key: "txt"
    image_size: 64
    channels: 4
    cond_stage_trainable: false
    conditioning_key: crossattn
    monitor: val/loss_simple_ema
    scale_factor: 0.18215
    use_ema: False
    scheduler_config:
      target: ldm.lr_scheduler.LambdaLinearScheduler
      params: {warm_up_steps: [10000], cycle_lengths: [10000000000000], f_start: [1.e-6], f_max: [1.], f_min: [1.]}
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params: {image_size: 32, in_channels: 4, out_channels: 4, model_channels: 320, attention_resolutions: [4, 2, 1], num_res_blocks: 2,
               channel_mult: [1, 2, 4, 4], num_heads: 8, use_spatial_transformer: True, transformer_depth: 1, context_dim: 768,
               use_checkpoint: True, legacy: False}
    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: 4
        monitor: val/rec_loss
        ddconfig: {double_z: true, z_channels: 4, resolution: 256, in_channels: 3, out_ch: 3, ch: 128, ch_mult: [1, 2, 4, 4],
                   num_res_blocks: 2, attn_resolutions: [], dropout: 0.0}
        lossconfig:
          target: torch.nn.Identity
    cond_stage_config:
      target: ldm.modules.encoders.modules.FrozenCLIPEmbedder
"""  # CompVis' configs/stable-diffusion/v1-inference.yaml, entry for entry

CHANGED = [
    ("channels: 4", 'parameterization: "v"'),
    ("linear_start: 0.00085", "linear_start: 0.0001"),
    ("timesteps: 1000", "timesteps: 500"),
    ("num_heads: 8", "num_heads: 4"),
    ("FrozenCLIPEmbedder", "FrozenOpenCLIPEmbedder"),
    ("LatentDiffusion", "LatentInpaintDiffusion"),
    ("conditioning_key: crossattn", "conditioning_key: hybrid"),
    ("use_ema: False", "rescale_betas_zero_snr: True"),
    ("legacy: False", "use_linear_in_transformer: True"),
    ("scale_factor: 0.18215", "scale_factor: .nan"),
    ("FrozenCLIPEmbedder", 'FrozenCLIPEmbedder\n      params: {layer: "penultimate"}'),
    ("z_channels: 4", "z_channels: 16"),
]


def test_the_original_yaml_is_understood(single, shared):
    """v1-inference.yaml beside the file, and its latent scale is believed."""
    path = single()
    path.with_suffix(".yaml").write_text(V1, encoding="utf-8")
    assert checkpoint.load(path, tokenizer=shared / "clip_tokenizer").latent_scale == 0.18215
    path.with_suffix(".yaml").write_text(V1.replace("scale_factor: 0.18215", "scale_factor: 0.5"), encoding="utf-8")
    assert checkpoint.load(path, tokenizer=shared / "clip_tokenizer").latent_scale == 0.5


@pytest.mark.parametrize(("old", "new"), CHANGED, ids=[new[:40] for _, new in CHANGED])
def test_another_yaml_is_named(tmp_path, old, new):
    """Each entry that makes another model of the same shapes stops the load, and is named with the file."""
    assert old in V1
    (tmp_path / "model.yaml").write_text(V1.replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match="model.yaml has ") as error:
        ldm_yaml.latent_scale(tmp_path / "model.yaml")
    assert new.partition(":")[0].split()[0] in str(error.value) or "layer 'penultimate'" in str(error.value)


def test_the_yaml_of_a_v_model_stops_the_load(single, shared):
    """The whole way: a single file with the short description that v-prediction models come with (.yaml or .yml)."""
    path = single()
    text = 'model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n  params:\n    parameterization: "v"\n    linear_start: 0.00085\n'
    for ending in (".yaml", ".yml", ".safetensors.yaml"):
        path.with_suffix(ending).write_text(text, encoding="utf-8")
        assert "model.params.parameterization 'v'" in refusal(path, shared)
        path.with_suffix(ending).unlink()


@pytest.mark.parametrize(
    "content",
    [
        b"a: [",
        b"\xff\xff",
        b"!!python/object/apply:os.system ['touch ran']",
        b"- a\n- b",
        b"",
        b"a: &a [x]\nb: *a",
        b"[" * 20_000,
        b"model: 3",
        b"model: {params: [1]}",
    ],
    ids=lambda c: str(c[:12]),
)
def test_yaml_that_is_none(tmp_path, monkeypatch, content):
    """Not YAML, not text, a command, a list, aliases, nested without end: one line, and nothing runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.yaml").write_bytes(content)
    with pytest.raises(ValueError, match="model.yaml") as error:
        ldm_yaml.latent_scale(tmp_path / "model.yaml")
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["model.yaml"]
