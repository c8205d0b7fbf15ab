"""Checkpoints in every known spelling load to equal weights; everything else is refused in one line that says why."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lesion.sd import checkpoint, names
from lesion.sd.clip import Tokenizer
from lesion.sd.vae import LATENT_SCALE

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def load(path, shared):
    return checkpoint.load(path, tokenizer=shared / "clip_tokenizer")


def weights(sd):
    networks = {"unet": sd.unet, "vae": sd.vae, "text": sd.text_encoder}
    return {f"{name}.{key}": value for name, network in networks.items() for key, value in network.state_dict().items()}


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.fixture(scope="module", autouse=True)
def quick_tokenizer():
    """The networks are what is loaded here; reading the vocabulary each time would cost more than they do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "Tokenizer", lambda folder: folder)
        yield


@pytest.fixture(scope="module")
def reference(tiny, shared):
    """The weights as the folder layout gives them."""
    return weights(load(tiny / "folder", shared))


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of the folder layout to spoil: files are links until they are rewritten."""
    return shutil.copytree(tiny / "folder", tmp_path / "folder", copy_function=lambda a, b: os.link(a, b))


@pytest.fixture
def single(tiny, tmp_path):
    """(tensors of the single-file layout, a function that writes them and gives the path)."""
    tensors = load_file(tiny / "single.safetensors")

    def write():
        save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path / "model.safetensors"

    return tensors, write


def rewrite(file, change):
    """Load a safetensors file, change its tensors, write it back as a file of its own."""
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    save_file(tensors, file)


def configure(folder, part, **changes):
    """Change entries of a component's config.json; None removes one."""
    file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    config = {**json.loads(file.read_text(encoding="utf-8")), **changes}
    file.unlink()
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}), encoding="utf-8")


def refusal(path, shared):
    """The message of a load that must fail with a ValueError of one line."""
    with pytest.raises(ValueError) as error:
        load(path, shared)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    return message


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_both_layouts_load_to_equal_weights(tiny, shared, reference):
    """The single file's LDM names map one to one onto the folder's; sizes read from its shapes are the configs'."""
    sd = load(tiny / "single.safetensors", shared)
    assert equal(weights(sd), reference)
    folder = load(tiny / "folder", shared)
    assert (sd.unet.config, sd.vae.config) == (folder.unet.config, folder.vae.config)
    assert sd.text_encoder.config == folder.text_encoder.config
    assert [file.name for file in folder.files] == [UNET.split("/")[1], VAE.split("/")[1], TEXT.split("/")[1]]


def test_networks_come_frozen_and_in_eval_mode(tiny, shared):
    """dtype is the U-Net's and the text encoder's; the VAE stays in float32, whose fp16 activations would overflow."""
    sd = checkpoint.load(tiny / "folder", dtype=torch.bfloat16)
    for network, dtype in ((sd.unet, torch.bfloat16), (sd.text_encoder, torch.bfloat16), (sd.vae, torch.float32)):
        assert not network.training
        assert {p.dtype for p in network.parameters()} == {dtype}
        assert not any(p.requires_grad for p in network.parameters())
        assert {p.device.type for p in network.parameters()} == {"cpu"}


def test_fp16_variant(folder, shared, reference):
    """*.fp16.safetensors are read where there is no full file, and only there."""
    for file in (UNET, VAE, TEXT):
        half = {key: value.half() for key, value in load_file(folder / file).items()}
        save_file(half, folder / file.replace(".safetensors", ".fp16.safetensors"))
    assert equal(weights(load(folder, shared)), reference)
    for file in (UNET, VAE, TEXT):
        (folder / file).unlink()
    halved = {key: value.half().float() for key, value in reference.items()}
    assert equal(weights(load(folder, shared)), halved)


@pytest.mark.parametrize("axes", [2, 4])
def test_old_vae_attention_names(folder, shared, reference, axes):
    """query, key, value, proj_attn of older diffusers, as matrices or as 1x1 convolutions."""

    def change(tensors):
        for key in [key for key in tensors if ".mid_block.attentions.0." in key]:
            old, value = key, tensors.pop(key)
            for ours, theirs in ATTENTION.items():
                old = old.replace(f".{ours}.", f".{theirs}.")
            tensors[old] = value[:, :, None, None].contiguous() if axes == 4 and value.ndim == 2 else value
        assert sum(".proj_attn." in key for key in tensors) == 4

    rewrite(folder / VAE, change)
    assert equal(weights(load(folder, shared)), reference)


def test_vae_attention_as_matrices_in_a_single_file(single, shared, reference):
    """Converters write the VAE's attention 2-D too."""
    tensors, write = single
    for key, value in tensors.items():
        if ".mid.attn_1." in key and value.ndim == 4:
            tensors[key] = value[:, :, 0, 0].contiguous()
    assert equal(weights(load(write(), shared)), reference)


def test_single_file_without_the_text_model_level(single, shared, reference):
    """cond_stage_model.transformer.embeddings... as well as ...transformer.text_model.embeddings..."""
    tensors, write = single
    for key in [key for key in tensors if ".text_model." in key]:
        tensors[key.replace(".text_model.", ".")] = tensors.pop(key)
    assert equal(weights(load(write(), shared)), reference)


def test_what_is_no_weight_is_passed_over(single, folder, shared, reference):
    """position_ids, EMA copies and schedule buffers are in many files, a text encoder's position_ids in old folders."""
    tensors, write = single
    buffers = """sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod posterior_variance logvar
        posterior_log_variance_clipped posterior_mean_coef1 log_one_minus_alphas_cumprod alphas_cumprod_prev
        model_ema.num_updates model_ema.diffusion_modelinput_blocks00weight"""
    for name in buffers.split():
        tensors[name] = torch.ones(3)
    assert "model_ema.decay" in tensors
    assert any(key.endswith("position_ids") for key in tensors)
    assert equal(weights(load(write(), shared)), reference)
    rewrite(folder / TEXT, lambda t: t.update({"text_model.embeddings.position_ids": torch.arange(77)[None]}))
    assert equal(weights(load(folder, shared)), reference)


def test_scaling_factor(tiny, folder, shared):
    """From the folder's vae/config.json, 0.18215 where it does not say; a single file cannot."""
    configure(folder, "vae", scaling_factor=0.5)
    assert load(folder, shared).latent_scale == 0.5
    configure(folder, "vae", scaling_factor=None)
    assert load(folder, shared).latent_scale == LATENT_SCALE == 0.18215
    assert load(tiny / "single.safetensors", shared).latent_scale == 0.18215


def test_settings_are_part_of_the_identity(folder, shared, monkeypatch):
    """Equal weights with another latent scale or vocabulary are another base: `settings_sha256` differs, and only then."""
    monkeypatch.setattr(checkpoint, "Tokenizer", Tokenizer)
    before = checkpoint.load(folder).settings_sha256
    merges = folder / "tokenizer" / "merges.txt"
    content = merges.read_text(encoding="utf-8")
    merges.write_bytes(content.replace("\n", "\r\n").encode())
    assert checkpoint.load(folder).settings_sha256 == before
    lines = content.splitlines()
    merges.write_text("\n".join([*lines[:-2], lines[-1], lines[-2]]), encoding="utf-8")
    assert checkpoint.load(folder).settings_sha256 != before
    merges.write_text(content, encoding="utf-8")
    configure(folder, "vae", scaling_factor=0.18214)
    assert checkpoint.load(folder).settings_sha256 != before


def test_tokenizer(folder, shared, monkeypatch):
    """The folder's own by default, another one if given; an incomplete one is named with the flag that helps."""
    monkeypatch.setattr(checkpoint, "Tokenizer", Tokenizer)
    assert checkpoint.load(folder).tokenizer.folder == folder / "tokenizer"
    assert checkpoint.load(folder, tokenizer=shared / "clip_tokenizer").tokenizer.folder == shared / "clip_tokenizer"
    (folder / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(ValueError, match="has no merges.txt; give --tokenizer DIR"):
        checkpoint.load(folder)


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of mapped files")
def test_no_initialisation_and_no_second_copy(tiny, shared, monkeypatch):
    """No random initialisation is run, and every parameter lies where the file is mapped into memory."""

    def refuse(*_, **__):
        raise AssertionError("a random initialisation")

    for name in ("kaiming_uniform_", "uniform_", "normal_", "_no_grad_uniform_", "_no_grad_normal_"):
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor if tensor.is_meta else refuse())
    for path in (tiny / "folder", tiny / "single.safetensors"):
        sd = load(path, shared)
        parts = [line.split() for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines() if str(path) in line]
        mapped = [tuple(int(end, 16) for end in part[0].split("-")) for part in parts]
        parameters = [*sd.unet.parameters(), *sd.vae.parameters(), *sd.text_encoder.parameters()]
        assert all(any(low <= p.data_ptr() < high for low, high in mapped) for p in parameters)


# --- damaged ---------------------------------------------------------------------------------------------------------


def test_not_found(tmp_path, shared):
    """A path that leads nowhere says what a base can be."""
    message = refusal(tmp_path / "none", shared)
    assert "not found: give a folder, a .safetensors file or a hub id (owner/name)" in message
    with pytest.raises(ValueError, match="base model sd15 not found"):
        checkpoint.load("sd15")


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".pth"])
def test_pickles_are_refused_unopened(tmp_path, folder, shared, suffix):
    """A pickle can run code: the file is not read, and the conversion is named."""
    file = tmp_path / f"model{suffix}"
    file.write_bytes(b"\x80\x04cos\nsystem\n")
    assert "is a pickle" in refusal(file, shared)
    assert refusal(file, shared).endswith(f"python -m lesion convert {file}")
    (folder / UNET).unlink()
    (folder / UNET).with_suffix(suffix).write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match=rf"diffusion_pytorch_model{re.escape(suffix)} is a pickle"):
        load(folder, shared)


def test_another_kind_of_file(tmp_path, shared):
    """Neither a folder nor a checkpoint's suffix."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "neither a folder nor a .safetensors file" in refusal(tmp_path / "model.gguf", shared)


@pytest.mark.parametrize("length", [0, 7, 100, 500_000, -1])
def test_truncated(tiny, tmp_path, shared, length):
    """Cut in the header, in the tensors, or by one byte."""
    data = (tiny / "single.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[:length])
    assert "is damaged or not a safetensors file" in refusal(tmp_path / "cut.safetensors", shared)


def test_truncated_in_a_folder(folder, shared):
    """The component's file is named."""
    data = (folder / VAE).read_bytes()
    (folder / VAE).unlink()
    (folder / VAE).write_bytes(data[: len(data) // 2])
    assert f"{folder / VAE} is damaged" in refusal(folder, shared)


def test_missing_tensors_are_listed(folder, single, shared):
    """Up to eight by name, the rest by number, in the file's own spelling."""

    def change(tensors):
        for key in [key for key in tensors if key.startswith("mid_block.resnets.0.")][:9] + ["conv_in.bias"]:
            del tensors[key]

    rewrite(folder / UNET, change)
    message = refusal(folder, shared)
    assert f"{folder / UNET}: 10 missing tensors: conv_in.bias, mid_block.resnets.0." in message
    assert message.endswith(" and 2 more")
    tensors, write = single
    del tensors["first_stage_model.quant_conv.bias"]
    assert "1 missing tensors: first_stage_model.quant_conv.bias" in refusal(write(), shared)


@pytest.mark.parametrize("name", ["model.diffusion_model.label_emb.0.0.weight", "first_stage_model.encoder.adapter.weight",
                                  "cond_stage_model.transformer.text_model.adapter.weight", "cond_stage_model.roberta.weight"])  # fmt: skip
def test_unknown_tensors_in_a_network_are_refused(folder, single, shared, name):
    """A tensor that is of one of the three networks and not known makes another model: named."""
    rewrite(folder / TEXT, lambda tensors: tensors.update({"text_model.adapter.weight": torch.ones(2)}))
    assert "1 unknown tensors: text_model.adapter.weight" in refusal(folder, shared)
    tensors, write = single
    tensors[name] = torch.ones(2)
    assert f"1 unknown tensors, first {name}" in refusal(write(), shared)


def test_tensors_beside_the_networks_are_noted(tiny, folder, single, shared, reference):
    """Harmless strangers: a ControlNet, an embedding, a step count, CLIP's projection. The weights are right, and a
    note names them."""
    tensors, write = single
    strangers = [
        "control_model.zero_convs.0.weight",
        "global_step",
        "embedding_manager.emb",
        "cond_stage_model.transformer.text_projection.weight",
    ]
    for name in strangers:
        tensors[name] = torch.ones(2)
    sd = load(write(), shared)
    assert equal(weights(sd), reference)
    assert len(sd.notes) == 1
    assert "4 tensors that are none of the three networks' and were passed over: " in sd.notes[0]
    assert all(name in sd.notes[0] for name in strangers)
    rewrite(folder / TEXT, lambda tensors: tensors.update({"text_projection.weight": torch.eye(64)}))
    sd = load(folder, shared)
    assert equal(weights(sd), reference)
    assert "text_projection.weight" in sd.notes[0]
    assert load(tiny / "folder", shared).notes == load(tiny / "single.safetensors", shared).notes == []


def test_a_text_encoder_without_the_text_model_level(folder, shared, reference):
    """What transformers 5 keeps in memory and some tools save: `encoder.layers.0...`; a whole CLIP model's file too."""
    def change(tensors):
        for key in list(tensors):
            tensors[key.removeprefix("text_model.")] = tensors.pop(key)
        tensors["text_projection.weight"] = torch.eye(64)
    rewrite(folder / TEXT, change)
    assert equal(weights(load(folder, shared)), reference)


def test_a_pipeline_saved_again_by_diffusers(tiny, tmp_path, reference):
    """StableDiffusionPipeline.save_pretrained of today's diffusers and transformers loads, its own tokenizer.json
    included."""
    from diffusers import StableDiffusionPipeline
    StableDiffusionPipeline.from_pretrained(tiny / "folder", safety_checker=None).save_pretrained(tmp_path / "saved")
    assert equal(weights(checkpoint.load(tmp_path / "saved")), reference)


def shard(file, parts, fp16=False):
    """Rewrite a weight file as shards with an index, as diffusers does."""
    tensors = load_file(file)
    file.unlink()
    stem, names_of = file.name.removesuffix(".safetensors"), sorted(tensors)
    middle = ".fp16" if fp16 else ""
    files, where = [], {}
    for part in range(parts):
        name = f"{stem}{middle}-{part + 1:05d}-of-{parts:05d}.safetensors"
        keys = names_of[part::parts]
        save_file({key: tensors[key].half() if fp16 else tensors[key] for key in keys}, file.parent / name)
        where |= dict.fromkeys(keys, name)
        files.append(file.parent / name)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (file.parent / f"{stem}.safetensors.index{middle}.json").write_text(json.dumps(index), encoding="utf-8")
    return files


def test_shards(folder, shared, reference):
    """Weights in several files with an index: equal weights, every shard among the files that are hashed."""
    files = shard(folder / UNET, 3) + [folder / VAE] + shard(folder / TEXT, 2)
    sd = load(folder, shared)
    assert equal(weights(sd), reference)
    assert sd.files == files


def test_fp16_shards(folder, shared, reference):
    """The fp16 variant's index."""
    shard(folder / UNET, 2, fp16=True)
    got = weights(load(folder, shared))
    assert all(
        torch.equal(got[key], value.half().float()) for key, value in reference.items() if key.startswith("unet.")
    )


def test_shards_are_not_believed(folder, shared):
    """A shard that is missing, leads out of the folder, or an index that is none: named."""
    files = shard(folder / UNET, 2)
    index = files[0].parent / "diffusion_pytorch_model.safetensors.index.json"
    good = json.loads(index.read_text(encoding="utf-8"))
    for content, says in (
        ({"weight_map": {"a": "../../x.safetensors"}}, "allowed are .safetensors files beside it"),
        ({"weight_map": {"a": "/etc/passwd"}}, "allowed are"),
        ({"weight_map": []}, "expected `weight_map`"),
        ({"weight_map": {"a": 3}}, "expected `weight_map`"),
        ({"weight_map": {"a": "no.safetensors"}}, "is not there"),
    ):
        index.write_text(json.dumps(content), encoding="utf-8")
        assert says in refusal(folder, shared)
    index.write_text(json.dumps(good), encoding="utf-8")
    data = files[1].read_bytes()
    files[1].unlink()
    assert "2 shards belong together" in refusal(folder, shared)
    files[1].write_bytes(data)
    shutil.copy(files[1], files[0])
    assert "which another shard holds too" in refusal(folder, shared)


@pytest.mark.parametrize("kind", ["fp8", "half"])
def test_mixed_precisions(single, shared, reference, kind):
    """An fp8 U-Net with fp16 text encoder and bf16 VAE, or fp16 and bf16 by turns: each tensor's own value in
    float32."""
    tensors, write = single
    for number, (key, value) in enumerate(sorted(tensors.items())):
        if value.is_floating_point():
            fp8 = (
                torch.float8_e4m3fn
                if key.startswith(names.UNET)
                else torch.float16
                if key.startswith("cond")
                else torch.bfloat16
            )
            tensors[key] = value.to(fp8 if kind == "fp8" else (torch.float16, torch.bfloat16)[number % 2])
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None].half() * 0.583
    got = weights(load(write(), shared))
    assert all((got[key] - value).abs().max() <= 0.07 * value.abs().max() for key, value in reference.items())
    assert got["vae.decoder.conv_in.weight"].dtype == torch.float32


def test_wrong_shapes_are_named(folder, shared):
    """Name, shape and the expected one; integers in place of weights too."""

    def change(tensors):
        tensors["conv_in.weight"] = torch.zeros(32, 4, 1, 1)
        tensors["conv_in.bias"] = torch.zeros(32, dtype=torch.int64)

    rewrite(folder / UNET, change)
    message = refusal(folder, shared)
    assert "2 wrong tensors" in message
    assert "conv_in.weight is torch.float32 [32, 4, 1, 1], expected [32, 4, 3, 3]" in message
    assert "conv_in.bias is torch.int64 [32], expected [32]" in message


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_incomplete_folders(folder, shared, part):
    """Without a component's weights, then without its config, then with a config that is not one."""
    weight_file = next((folder / part).glob("*.safetensors"))
    data = weight_file.read_bytes()
    weight_file.unlink()
    assert f"{folder / part} has no {weight_file.name}" in refusal(folder, shared)
    weight_file.write_bytes(data)
    config = folder / part / "config.json"
    for text, says in (("{", "is not JSON"), ("[]", "expected a JSON object")):
        config.unlink()
        config.write_text(text, encoding="utf-8")
        assert f"{config}" in refusal(folder, shared)
        assert says in refusal(folder, shared)
    config.unlink()
    assert f"not a Stable Diffusion folder: {part}/config.json is missing" in refusal(folder, shared)


@pytest.mark.parametrize(
    ("part", "key"), [("unet", "block_out_channels"), ("unet", "cross_attention_dim"), ("vae", "block_out_channels")]
)
def test_a_config_without_its_sizes(folder, shared, part, key):
    """A config.json of something else is not a traceback."""
    configure(folder, part, **{key: None})
    assert "does not describe Stable Diffusion 1.x" in refusal(folder, shared)


# --- other families --------------------------------------------------------------------------------------------------


def test_sdxl_is_named(single, folder, shared):
    """Both layouts of SDXL."""
    tensors, write = single
    tensors["conditioner.embedders.0.transformer.text_model.final_layer_norm.bias"] = torch.ones(2)
    assert "is an SDXL checkpoint" in refusal(write(), shared)
    (folder / "text_encoder_2").mkdir()
    assert "is an SDXL checkpoint" in refusal(folder, shared)


@pytest.mark.parametrize(("part", "changes"), [
    ("unet", {"cross_attention_dim": 1024}), ("unet", {"use_linear_projection": True}),
    ("unet", {"attention_head_dim": [5, 10, 20, 20]}), ("scheduler", {"prediction_type": "v_prediction"})])  # fmt: skip
def test_sd2_folder_is_named(folder, shared, part, changes):
    """Each mark of Stable Diffusion 2 by itself; a v-prediction model of the 1.x shape would load and draw noise."""
    configure(folder, part, **changes)
    assert "is a Stable Diffusion 2 checkpoint or another variant" in refusal(folder, shared)


@pytest.mark.parametrize(("part", "changes"), [
    ("text_encoder", {"hidden_act": "gelu"}), ("unet", {"flip_sin_to_cos": False}), ("vae", {"act_fn": "gelu"}),
    ("scheduler", {"beta_schedule": "linear"})])  # fmt: skip
def test_other_formulas_are_refused(folder, shared, part, changes):
    """The shapes of 1.x with another activation, embedding or noise schedule: it would load, and draw something
    else."""
    configure(folder, part, **changes)
    ((key, value),) = changes.items()
    assert f"{part} has {key} {value!r} and Stable Diffusion 1.x has" in refusal(folder, shared)


def test_sd2_single_file_is_named(single, shared):
    """OpenCLIP's names give it away."""
    tensors, write = single
    for key in [key for key in tensors if key.startswith(names.TEXT)]:
        tensors[key.replace(names.TEXT + "text_model.", "cond_stage_model.model.")] = tensors.pop(key)
    assert "is a Stable Diffusion 2 checkpoint" in refusal(write(), shared)


def test_inpainting_is_named(single, folder, shared):
    """Nine input channels, in both layouts."""
    tensors, write = single
    tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(32, 9, 3, 3)
    assert "the U-Net takes 9 channels (an inpainting model?)" in refusal(write(), shared)
    configure(folder, "unet", in_channels=9)
    assert "the U-Net takes 9 channels (an inpainting model?)" in refusal(folder, shared)


def test_something_else_is_named(tmp_path, shared):
    """A LoRA given as the base, and a checkpoint without its VAE."""
    save_file({"lora_unet_mid.lora_up.weight": torch.ones(2)}, tmp_path / "lora.safetensors")
    assert "is not a Stable Diffusion 1.x checkpoint" in refusal(tmp_path / "lora.safetensors", shared)


def test_without_a_vae(single, shared):
    """A "no VAE" file says so, with the flag that helps."""
    tensors, write = single
    for key in [key for key in tensors if key.startswith(names.VAE)]:
        del tensors[key]
    assert "holds no VAE (no tensor first_stage_model....): give --vae PATH" in refusal(write(), shared)


def vae_forms(tiny, tmp_path):
    """The tiny checkpoint's VAE in each form that people have."""
    whole = load_file(tiny / "single.safetensors")
    original = {key: value for key, value in whole.items() if key.startswith(names.VAE)}
    save_file(original, tmp_path / "prefixed.safetensors")
    bare = {key.removeprefix(names.VAE): value for key, value in original.items()}
    save_file(
        {**bare, "loss.discriminator.main.0.weight": torch.ones(2), "model_ema.decay": torch.ones(1)},
        tmp_path / "bare.safetensors",
    )
    shutil.copy(tiny / "folder" / VAE, tmp_path / "diffusers.safetensors")
    return {
        "folder": tiny / "folder" / "vae",
        "checkpoint's folder": tiny / "folder",
        "its file": tiny / "folder" / VAE,
        "whole single file": tiny / "single.safetensors",
        "prefixed": tmp_path / "prefixed.safetensors",
        "bare": tmp_path / "bare.safetensors",
        "diffusers": tmp_path / "diffusers.safetensors",
    }


@pytest.mark.parametrize(
    "form", ["folder", "checkpoint's folder", "its file", "whole single file", "prefixed", "bare", "diffusers"]
)
def test_another_vae(tiny, single, folder, tmp_path, shared, reference, form):
    """--vae in LDM's and diffusers' forms: for a file without one, for a folder without one, and instead of another;
    hashed with the rest."""
    tensors, write = single
    for key in [key for key in tensors if key.startswith(names.VAE)]:
        del tensors[key]
    path = vae_forms(tiny, tmp_path)[form]
    sd = checkpoint.load(write(), tokenizer=shared / "clip_tokenizer", vae=path)
    assert equal(weights(sd), reference)
    assert sd.latent_scale == LATENT_SCALE
    assert len(sd.files) == 2
    shutil.rmtree(folder / "vae")
    assert "give --vae PATH" in refusal(folder, shared)
    assert equal(weights(checkpoint.load(folder, tokenizer=shared / "clip_tokenizer", vae=path)), reference)


def test_a_vae_replaces_the_checkpoints_own(tiny, single, tmp_path, shared, reference):
    """With --vae the checkpoint's own is not looked at, and the other one is what decodes."""
    tensors, write = single
    for key in tensors:
        if key.startswith(names.VAE):
            tensors[key] = torch.zeros_like(tensors[key])
    got = weights(checkpoint.load(write(), tokenizer=shared / "clip_tokenizer", vae=tiny / "folder" / "vae"))
    assert equal(got, reference)


def test_what_is_no_vae(tiny, tmp_path, shared):
    """A path that leads nowhere, a pickle, a U-Net, another family's VAE: named with what is allowed."""
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    (tmp_path / "x.pt").write_bytes(b"\x80")
    (tmp_path / "empty").mkdir()
    wide = {f"encoder.down.{i}.block.0.conv2.weight": torch.zeros(32, 32, 3, 3) for i in range(4)}
    save_file({**wide, "post_quant_conv.weight": torch.zeros(16, 16, 1, 1)}, tmp_path / "flux.safetensors")
    for path, says in (
        ("none", "not found: give a folder"),
        ("x.pt", "python -m lesion convert"),
        ("empty", "holds no VAE"),
        ("x.safetensors", "is not a VAE of Stable Diffusion 1.x"),
        ("flux.safetensors", "has 16 latent channels"),
    ):
        with pytest.raises(ValueError, match=says):
            checkpoint.load(tiny / "folder", tokenizer=shared / "clip_tokenizer", vae=tmp_path / path)


def test_pruned_files_say_what_they_are(single, shared):
    """Without text encoder, a bare U-Net, a moving average alone: each is told what it is."""
    tensors, write = single
    whole = dict(tensors)
    for key in whole:
        if key.startswith("cond_stage_model."):
            del tensors[key]
    assert "holds no text encoder (cond_stage_model.transformer....)" in refusal(write(), shared)
    tensors.clear()
    tensors |= {key.removeprefix(names.UNET): value for key, value in whole.items() if key.startswith(names.UNET)}
    assert "it holds a U-Net alone, without text encoder and VAE" in refusal(write(), shared)
    tensors.clear()
    tensors |= {f"model_ema.{key.removeprefix('model.').replace('.', '')}" if key.startswith(names.UNET) else key: value
                for key, value in whole.items()}
    assert "holds the moving average (model_ema) alone" in refusal(write(), shared)


@pytest.mark.parametrize(("key", "shape"), [
    ("cond_stage_model.transformer.text_model.embeddings.token_embedding.weight", (8,)), ("model.diffusion_model.out.2.weight", (4,)),
    ("model.diffusion_model.input_blocks.0.0.weight", ()), ("first_stage_model.post_quant_conv.weight", (4, 4)),
    ("cond_stage_model.transformer.text_model.encoder.layers.999999999.x", (1,)),
    ("model.diffusion_model.input_blocks.1.0.out_layers.3.weight", (33, 32, 3, 3)),
    ("cond_stage_model.transformer.text_model.encoder.layers.x.y", (2,))])  # fmt: skip
def test_shapes_are_not_believed(single, shared, key, shape):
    """Tensors of other axes, a layer number without end, widths that no group divides: one line, at once."""
    tensors, write = single
    tensors[key] = torch.zeros(shape)
    assert refusal(write(), shared)
