"""A whole picture: same checkpoint, prompt, initial latents, DDIM 50, guidance 7.5 as diffusers' StableDiffusionPipeline."""
import numpy as np
import torch

from lesion.sd import checkpoint, pipeline
from lesion.sd.vae import to_images_u8


def test_picture_equals_diffusers(tiny):
    """The largest difference over all pixels is at most 1/255: rounding, guidance, scaling, last step and decoding all agree."""
    from diffusers import StableDiffusionPipeline
    prompts = ["a clinical photograph of a malignant skin lesion, dark brown", "a mole on light skin"]
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    reference = StableDiffusionPipeline.from_pretrained(tiny / "folder", safety_checker=None)
    reference.set_progress_bar_config(disable=True)
    expected = reference(prompts, negative_prompt=["blurry"] * 2, latents=latents.clone(), num_inference_steps=50, guidance_scale=7.5,
                         height=128, width=128, output_type="np").images
    expected = (expected * 255).round().astype(np.uint8)
    sd = checkpoint.load(tiny / "folder")
    with torch.no_grad():
        context, negative = pipeline.encode_prompts(sd, prompts), pipeline.encode_prompts(sd, ["blurry"] * 2)
    ours = to_images_u8(pipeline.decode(sd, pipeline.draw(sd, context, negative, [0, 1], 128, latents=latents)))
    assert np.abs(ours.astype(int) - expected).max() <= 1
    assert expected.std() > 10  # a picture, not a grey plane
