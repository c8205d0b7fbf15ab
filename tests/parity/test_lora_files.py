"""What we save, diffusers loads with the same effect, in both layouts; what diffusers, peft and old tools save, we load."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lesion.lora import formats, layers
from lesion.sd import checkpoint

RANK, ALPHA = 4, 6.0


def inputs():
    g = torch.Generator().manual_seed(3)
    return torch.randn(2, 4, 16, 16, generator=g), torch.tensor([17, 803]), torch.randint(0, 49407, (2, 77), generator=g)


def predict(sd):
    x, t, token_ids = inputs()
    with torch.no_grad():
        return sd.unet(x, t, sd.text_encoder(token_ids))


def random_lora(sd, targets="attention", seed=0):
    """Random factors for both networks, set in place; {"<network>.<path>": Factors}."""
    g = torch.Generator().manual_seed(seed)
    factors = {}
    for name, network in (("unet", sd.unet), ("text_encoder", sd.text_encoder)):
        layers.inject(network, layers.target_paths(network, targets), RANK, ALPHA, g)
        for layer in layers.lora_layers(network).values():
            torch.nn.init.normal_(layer.lora_up.weight, std=0.1, generator=g)
        factors |= {f"{name}.{path}": part for path, part in layers.get_factors(network).items()}
    return factors


def load_into_fresh(tiny, path):
    sd = checkpoint.load(tiny / "folder")
    factors, metadata = formats.read(path, {"unet": sd.unet, "text_encoder": sd.text_encoder})
    for name, network in (("unet", sd.unet), ("text_encoder", sd.text_encoder)):
        layers.set_factors(network, {key.removeprefix(name + "."): value for key, value in factors.items() if key.startswith(name + ".")})
    return sd, factors, metadata


def diffusers_prediction(tiny, folder, name):
    from diffusers import StableDiffusionPipeline
    pipe = StableDiffusionPipeline.from_pretrained(tiny / "folder", safety_checker=None)
    pipe.load_lora_weights(folder, weight_name=name)
    x, t, token_ids = inputs()
    with torch.no_grad():
        return pipe.unet(x, t, pipe.text_encoder(token_ids).last_hidden_state).sample


@pytest.mark.parametrize("layout", formats.FORMATS)
@pytest.mark.parametrize("targets", ["attention", "all"])
def test_diffusers_loads_ours(tiny, tmp_path, layout, targets):
    """diffusers' load_lora_weights gives our noise prediction, alpha 6 at rank 4 included; so does our own reader."""
    sd = checkpoint.load(tiny / "folder")
    plain = predict(sd)
    factors = random_lora(sd, targets)
    expected = predict(sd)
    assert (expected - plain).abs().max() > 0.1
    metadata = formats.kohya_metadata(RANK, ALPHA, seed=0) if layout == "kohya" else {"lesion_step": "7"}
    formats.write(tmp_path / "lora.safetensors", factors, metadata, layout)
    torch.testing.assert_close(diffusers_prediction(tiny, tmp_path, "lora.safetensors"), expected, rtol=0, atol=2e-5)
    again, read, _ = load_into_fresh(tiny, tmp_path / "lora.safetensors")
    torch.testing.assert_close(predict(again), expected, rtol=0, atol=1e-5)
    assert read.keys() == factors.keys()


def test_kohya_keys_are_pinned(tiny, tmp_path):
    """Names, shapes and alpha of kohya's layout, spelt out; metadata values are strings and hold kohya's minimum and the hash."""
    sd = checkpoint.load(tiny / "folder")
    formats.write(tmp_path / "a.safetensors", random_lora(sd, "all"), formats.kohya_metadata(RANK, ALPHA))
    tensors = load_file(tmp_path / "a.safetensors")
    assert len(tensors) == 3 * (192 + 12)
    down = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_"
    assert tensors[f"{down}attn1_to_q.lora_down.weight"].shape == (RANK, 32)
    assert tensors[f"{down}attn1_to_out_0.lora_up.weight"].shape == (32, RANK)
    assert tensors[f"{down}ff_net_0_proj.lora_up.weight"].shape == (256, RANK)
    assert tensors[f"{down}ff_net_2.lora_down.weight"].shape == (RANK, 128)
    assert tensors["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"].shape == (RANK, 64, 1, 1)
    assert tensors["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"].shape == (64, RANK, 1, 1)
    assert tensors["lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha"].shape == ()
    assert tensors["lora_te_text_model_encoder_layers_1_mlp_fc1.alpha"].item() == ALPHA
    assert all(key.startswith(("lora_unet_", "lora_te_text_model_encoder_layers_")) for key in tensors)
    from safetensors import safe_open
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    assert {"ss_v2": "False", "ss_base_model_version": "sd_v1", "ss_network_module": "networks.lora", "ss_network_dim": "4",
            "ss_network_alpha": "6.0"}.items() <= metadata.items()
    import hashlib
    data = (tmp_path / "a.safetensors").read_bytes()
    assert metadata["sshs_model_hash"] == hashlib.sha256(data[8 + int.from_bytes(data[:8], "little"):]).hexdigest()


def test_diffusers_keys_are_pinned(tiny, tmp_path):
    """diffusers' layout: only lora_A and lora_B keys, scale alpha / rank inside lora_B."""
    sd = checkpoint.load(tiny / "folder")
    factors = random_lora(sd)
    formats.write(tmp_path / "a.safetensors", factors, {}, "diffusers")
    tensors = load_file(tmp_path / "a.safetensors")
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    assert len(tensors) == 2 * (128 + 8)
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in tensors)
    torch.testing.assert_close(tensors[f"{name}.lora_B.weight"], factors[name].up * 1.5)
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight" in tensors


@pytest.mark.parametrize("alpha", [RANK, ALPHA])
def test_we_load_diffusers(tiny, tmp_path, alpha):
    """A LoRA trained with peft and saved by StableDiffusionPipeline.save_lora_weights, alpha in its adapter metadata."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig, inject_adapter_in_model
    from peft.utils import get_peft_model_state_dict
    pipe = StableDiffusionPipeline.from_pretrained(tiny / "folder", safety_checker=None)
    config = LoraConfig(r=RANK, lora_alpha=alpha, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    text_config = LoraConfig(r=RANK, lora_alpha=alpha, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"])
    for model, settings in ((pipe.unet, config), (pipe.text_encoder, text_config)):  # transformers' add_adapter wants a peft to come
        inject_adapter_in_model(settings, model)
        model.peft_config = {"default": settings}
    g = torch.Generator().manual_seed(0)
    for model in (pipe.unet, pipe.text_encoder):
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.data.normal_(std=0.1, generator=g)
    x, t, token_ids = inputs()
    with torch.no_grad():
        expected = pipe.unet(x, t, pipe.text_encoder(token_ids).last_hidden_state).sample
    pipe.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(pipe.text_encoder),
        unet_lora_adapter_metadata=config.to_dict(),
        text_encoder_lora_adapter_metadata=text_config.to_dict(),
    )
    sd, factors, _ = load_into_fresh(tiny, tmp_path)
    assert len(factors) == 128 + 8
    torch.testing.assert_close(predict(sd), expected, rtol=0, atol=1e-5)


def test_we_load_peft(tiny, tmp_path):
    """peft's own save_pretrained: base_model.model. names, alpha in adapter_config.json."""
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig, get_peft_model
    model = get_peft_model(UNet2DConditionModel.from_pretrained(tiny / "folder" / "unet"), LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    g = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.data.normal_(std=0.1, generator=g)
    model.save_pretrained(tmp_path)
    sd, factors, _ = load_into_fresh(tiny, tmp_path)
    assert len(factors) == 128
    x, t, token_ids = inputs()
    with torch.no_grad():
        context = sd.text_encoder(token_ids)
        torch.testing.assert_close(sd.unet(x, t, context), model(x, t, context).sample, rtol=0, atol=1e-5)


@pytest.mark.parametrize("spelling", ["lora.down", "processor", "lora_linear_layer", "lora_te1"])
def test_old_spellings(tiny, tmp_path, spelling):
    """diffusers' older names and the SDXL-style text prefix load to the same factors."""
    sd = checkpoint.load(tiny / "folder")
    factors = random_lora(sd)
    if spelling == "lora_te1":
        formats.write(tmp_path / "k.safetensors", factors, formats.kohya_metadata(RANK, ALPHA))
        old = {key.replace("lora_te_", "lora_te1_"): value for key, value in load_file(tmp_path / "k.safetensors").items()}
    else:
        old = {}
        for name, (down, up, alpha) in factors.items():
            text = name.startswith("text_encoder")
            if spelling == "lora_linear_layer" or text:
                stems = [f"{name}.lora_linear_layer.{kind}.weight" for kind in ("down", "up")]
            elif spelling == "lora.down":
                stems = [f"{name}.lora.{kind}.weight" for kind in ("down", "up")]
            else:
                parent, last = name.removesuffix(".0").rsplit(".", 1)
                stems = [f"{parent}.processor.{last}_lora.{kind}.weight" for kind in ("down", "up")]
            old |= dict(zip(stems, (down, up * alpha / RANK)))
    save_file({key: value.contiguous() for key, value in old.items()}, tmp_path / "old.safetensors")
    expected = predict(sd)
    again, read, _ = load_into_fresh(tiny, tmp_path / "old.safetensors")
    assert read.keys() == factors.keys()
    torch.testing.assert_close(predict(again), expected, rtol=0, atol=1e-5)


def test_recorded_metadata_survives(tiny, tmp_path):
    """Provenance written into the file is read back."""
    sd = checkpoint.load(tiny / "folder")
    formats.write(tmp_path / "a.safetensors", random_lora(sd), {"lesion_recipe": json.dumps({"seed": 3})})
    assert json.loads(load_into_fresh(tiny, tmp_path / "a.safetensors")[2]["lesion_recipe"]) == {"seed": 3}
