"""Full-size facts: tensor and parameter counts of SD 1.5, the LoRA's, and the U-Net against diffusers' at 860 M parameters."""
import gc

import pytest
import torch

from lesion.lora import layers
from lesion.sd import names
from lesion.sd.clip import CLIPTextConfig, CLIPTextEncoder
from lesion.sd.unet import UNet, UNetConfig
from lesion.sd.vae import VAE, VAEConfig


@pytest.fixture(scope="module")
def meta():
    with torch.device("meta"):
        return UNet(), VAE(), CLIPTextEncoder()


@pytest.mark.parametrize(("which", "tensors", "parameters"), [(0, 686, 859_520_964), (1, 248, 83_653_863), (2, 196, 123_060_480)])
def test_counts(meta, which, tensors, parameters):
    """Tensors and parameters of each network are SD 1.5's, to the last."""
    state = meta[which].state_dict()
    assert (len(state), sum(value.numel() for value in state.values())) == (tensors, parameters)


def test_single_file_names_are_a_bijection(meta):
    """The maps to the single-file layout send 686 + 248 + 196 keys to as many different keys, with the two families' signposts."""
    unet, vae, text = meta
    theirs = [*names.ldm_unet_keys(unet.state_dict(), UNetConfig()).values(), *names.ldm_vae_keys(vae.state_dict(), VAEConfig()).values(),
              *names.ldm_text_keys(text.state_dict(), [names.TEXT + "text_model.x"]).values()]
    assert len(set(theirs)) == 686 + 248 + 196
    assert "model.diffusion_model.output_blocks.11.0.skip_connection.weight" in theirs
    assert "first_stage_model.decoder.up.3.upsample.conv.weight" in theirs


@pytest.mark.parametrize(
    ("targets", "unet_modules", "per_rank", "text_modules"), [("attention", 128, 199_296, 48), ("all", 192, 423_936, 72)]
)
def test_lora_counts(targets, unet_modules, per_rank, text_modules):
    """LoRA covers kohya's module sets: 128 + 48 attention projections, or 192 + 72, with 199,296 or 423,936 parameters a rank."""
    with torch.device("meta"):
        unet, text = UNet(), CLIPTextEncoder(CLIPTextConfig())
    paths = layers.target_paths(unet, targets)
    assert (len(paths), len(layers.target_paths(text, targets))) == (unet_modules, text_modules)
    modules = [unet.get_submodule(path) for path in paths]
    assert sum(sum(m.weight.shape[:2]) for m in modules) == per_rank


def test_text_lora_parameters():
    """Rank 4 on the text encoder's attention: 294,912 parameters."""
    with torch.device("meta"):
        text = CLIPTextEncoder()
    assert sum(4 * sum(text.get_submodule(p).weight.shape) for p in layers.target_paths(text, "attention")) == 294_912


def test_full_size_unet_equals_diffusers():
    """Same 860 M weights, same noise prediction as diffusers' U-Net within 1e-4 relative (fp32; 16x16 latents)."""
    from diffusers import UNet2DConditionModel
    torch.manual_seed(0)
    with torch.device("meta"):
        reference = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8, layers_per_block=2,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)
        ours = UNet()
    generator = torch.Generator().manual_seed(0)
    state = {key: torch.randn(value.shape, generator=generator) * (value[0].numel() ** -0.5 if value.ndim > 1 else 0.1) + (
        1.0 if "norm" in key and key.endswith("weight") else 0.0) for key, value in ours.state_dict().items()}
    reference.load_state_dict(state, assign=True)
    ours.load_state_dict(state, assign=True)
    x, t, context = torch.randn(1, 4, 16, 16, generator=generator), torch.tensor([417]), torch.randn(1, 77, 768, generator=generator)
    with torch.no_grad():
        expected, got = reference.eval()(x, t, context).sample, ours.eval()(x, t, context)
    del state, reference, ours
    gc.collect()
    assert ((got - expected).abs().max() / expected.abs().max()).item() < 1e-4
