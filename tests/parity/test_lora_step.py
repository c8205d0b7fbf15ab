"""One LoRA training step equals peft's on diffusers' and transformers' networks: loss, gradients, AdamW update; alpha is not rank."""
import copy

import pytest
import torch

from lesion.lora import layers
from lesion.run.state import weights_sha256
from lesion.sd import checkpoint, schedule

RANK, ALPHA = 4, 6.0


def batch():
    g = torch.Generator().manual_seed(3)
    latents, noise = torch.randn(2, 4, 16, 16, generator=g), torch.randn(2, 4, 16, 16, generator=g)
    return latents, noise, torch.tensor([17, 803]), torch.randint(0, 49408, (2, 77), generator=g)


def ours(tiny, targets):
    """Our networks with LoRA, both factors random so that every gradient is non-zero."""
    sd = checkpoint.load(tiny / "folder")
    g = torch.Generator().manual_seed(5)
    for network in (sd.unet, sd.text_encoder):
        layers.inject(network, layers.target_paths(network, targets), RANK, ALPHA, g)
        for layer in layers.lora_layers(network).values():
            torch.nn.init.normal_(layer.lora_up.weight, std=0.3, generator=g)
    return sd


def reference(tiny, sd, targets):
    """peft on the reference networks with the same factors."""
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig, get_peft_model
    from transformers import CLIPTextModel
    unet_targets = ["to_q", "to_k", "to_v", "to_out.0"] + (["proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"] if targets == "all" else [])
    text_targets = ["q_proj", "k_proj", "v_proj", "out_proj"] + (["fc1", "fc2"] if targets == "all" else [])
    unet = get_peft_model(UNet2DConditionModel.from_pretrained(tiny / "folder" / "unet"), LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=unet_targets, lora_dropout=0.0))
    text = get_peft_model(CLIPTextModel.from_pretrained(tiny / "folder" / "text_encoder"), LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=text_targets, lora_dropout=0.0))
    parameters = {}
    for name, model, network in (("unet", unet, sd.unet), ("text_encoder", text, sd.text_encoder)):
        for path, layer in layers.lora_layers(network).items():
            try:
                module = model.base_model.model.get_submodule(path)
            except AttributeError:  # transformers 5 dropped this level
                module = model.base_model.model.get_submodule(path.removeprefix("text_model."))
            for kind, theirs in (("down", module.lora_A["default"].weight), ("up", module.lora_B["default"].weight)):
                theirs.data.copy_(getattr(layer, f"lora_{kind}").weight.data.reshape(theirs.shape))
                parameters[f"{name}.{path}.{kind}"] = theirs
    return unet, text, parameters


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_step_equals_peft(tiny, targets):
    """Loss, all LoRA gradients and the parameters after one clipped AdamW step, both networks trained, within 1e-6."""
    latents, noise, timesteps, token_ids = batch()
    sd = ours(tiny, targets)
    unet, text, theirs = reference(tiny, sd, targets)
    noisy = schedule.add_noise(latents, noise, timesteps)

    loss = (sd.unet(noisy, timesteps, sd.text_encoder(token_ids)) - noise).square().mean()
    loss.backward()
    mine = {
        f"{name}.{path}.{kind}": getattr(layer, f"lora_{kind}").weight
        for name, network in (("unet", sd.unet), ("text_encoder", sd.text_encoder))
        for path, layer in layers.lora_layers(network).items()
        for kind in ("down", "up")
    }

    reference_loss = (unet(noisy, timesteps, text(token_ids).last_hidden_state).sample - noise).square().mean()
    reference_loss.backward()
    assert mine.keys() == theirs.keys()
    assert loss.item() == pytest.approx(reference_loss.item(), abs=1e-6)
    for key in mine:
        assert mine[key].grad.abs().max() > 0, key
        torch.testing.assert_close(
            mine[key].grad, theirs[key].grad.reshape(mine[key].shape), rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
        )

    settings = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    for parameters in (mine, theirs):
        listed = list(parameters.values())
        torch.nn.utils.clip_grad_norm_(listed, 1.0)
        torch.optim.AdamW(listed, **settings).step()
    # AdamW's first step is lr * g / (|g| + eps): where |g| is at rounding level its sign is noise, so those few are left out
    for key in mine:
        clear = mine[key].grad.abs() > 1e-3 * mine[key].grad.abs().max()
        assert clear.float().mean() > 0.5, key
        torch.testing.assert_close(mine[key].data[clear], theirs[key].data.reshape(mine[key].shape)[clear], rtol=0, atol=1e-6)


def test_forgotten_alpha_is_seen(tiny):
    """The comparison has teeth: with scale 1 instead of alpha / rank = 1.5 the loss is off by far more than its tolerance."""
    latents, noise, timesteps, token_ids = batch()
    sd = ours(tiny, "attention")
    noisy, context = schedule.add_noise(latents, noise, timesteps), sd.text_encoder(token_ids)
    loss = (sd.unet(noisy, timesteps, context) - noise).square().mean()
    for layer in layers.lora_layers(sd.unet).values():
        layer.scale = 1.0
    assert abs(loss - (sd.unet(noisy, timesteps, context) - noise).square().mean()).item() > 1e-4


def test_identity_at_injection_and_frozen_base(tiny):
    """Injection changes no bit of the output; training changes no bit of the base; the weight keeps its name."""
    latents, noise, timesteps, token_ids = batch()
    sd = checkpoint.load(tiny / "folder")
    plain = copy.deepcopy(sd.unet)
    before, context = sd.unet(latents, timesteps, sd.text_encoder(token_ids)), sd.text_encoder(token_ids)
    base_hash = weights_sha256(plain)
    layers.inject(sd.unet, layers.target_paths(sd.unet, "all"), RANK, ALPHA, torch.Generator().manual_seed(0))
    assert torch.equal(sd.unet(latents, timesteps, context), before)
    optimizer = torch.optim.AdamW(layers.lora_parameters(sd.unet), lr=0.1)
    (sd.unet(latents, timesteps, context) - noise).square().mean().backward()
    optimizer.step()
    assert not torch.equal(sd.unet(latents, timesteps, context), before)
    plain.load_state_dict({key: value for key, value in sd.unet.state_dict().items() if ".lora_" not in key})
    assert weights_sha256(plain) == base_hash
    assert [name for name, p in sd.unet.named_parameters() if p.requires_grad] == [
        f"{path}.lora_{kind}.weight" for path in layers.lora_layers(sd.unet) for kind in ("down", "up")]


def test_merged_equals_unmerged(tiny):
    """Merging into the weights gives the same noise prediction, and unmerging restores the bits."""
    latents, _, timesteps, token_ids = batch()
    sd = ours(tiny, "all")
    with torch.no_grad():
        context = sd.text_encoder(token_ids)
        before, base = sd.unet(latents, timesteps, context), weights_sha256(sd.unet)
        layers.merge(sd.unet)
        merged = sd.unet(latents, timesteps, context)
        assert weights_sha256(sd.unet) != base
        layers.unmerge(sd.unet)
    torch.testing.assert_close(merged, before, rtol=0, atol=1e-5)
    assert weights_sha256(sd.unet) == base
