"""Drawing from Python: a base with LoRA files that turns prompts into pictures.

    import lesion
    sd = lesion.load("runs/base")           # folder, .safetensors file or hub id; the built-in `mini` without an argument
    sd.add_lora("runs/malignant-phase2")    # as often as wanted, each with its weight
    images = sd.draw(["a clinical photograph of a malignant skin lesion"] * 4, seeds=[0, 1, 2, 3])

The same networks, seeds and sampler as generate.py, so the same pictures. Proven by tests/lora/test_drawing.py.
"""
from pathlib import Path

import torch
from PIL import Image

from lesion.lora import formats, layers
from lesion.run import devices, folders
from lesion.sd import checkpoint, fast, pipeline
from lesion.sd.vae import to_images_u8


class Drawing:
    """A loaded base. `networks`: {"unet": ..., "text_encoder": ...}; `sd`: all of it (lesion.sd.checkpoint.StableDiffusion)."""

    def __init__(self, base: str | Path | None = None, device: str = "auto", precision: str | None = None,
                 tokenizer: str | Path | None = None):
        self.base = folders.named(str(base or folders.MINI))
        self.device = devices.device(device)
        self.precision = precision or folders.recipe_for(self.base)["precision"] or fast.default_precision(self.device)
        self.sd = checkpoint.load(self.base, self.device, devices.DTYPES[self.precision], tokenizer)
        self.networks = {"unet": self.sd.unet, "text_encoder": self.sd.text_encoder}
        self.loras: list[tuple[dict[str, layers.Factors], float]] = []
        self._hasten()

    def add_lora(self, path: str | Path, weight: float = 1.0) -> "Drawing":
        """Merge a LoRA file (or a run's folder) into the weights, times `weight`, beside those added before. ValueError as
        lesion.lora.formats.read."""
        factors, _ = formats.read(Path(path), self.networks)
        self.loras.append((factors, weight))
        combined = layers.combine(self.loras)
        for name, network in self.networks.items():
            layers.remove(network)
            layers.set_factors(network, layers.of_network(combined, name))
            layers.merge(network)
        self._hasten()
        return self

    def _hasten(self) -> None:
        if self.device.type == "cpu":
            fast.use(self.sd.unet, self.sd.text_encoder, self.sd.vae)

    def draw(self, prompts: str | list[str], seeds: list[int] | None = None, negative_prompt: str = "", resolution: int = 128,
             sampler: str = "ddim", steps: int = 50, guidance_scale: float | None = None, eta: float = 0.0,
             batch_size: int = 8) -> list[Image.Image]:
        """One RGB picture of `resolution` pixels a prompt; picture i comes from seeds[i] (default 0, 1, 2 ...) alone.

        guidance_scale None is the base's default (SD 1.5: 7.5). ValueError for an unknown sampler, or where the numbers of
        prompts and seeds differ.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        seeds = list(range(len(prompts))) if seeds is None else list(seeds)
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds: one seed a prompt is needed")
        scale = folders.recipe_for(self.base)["guidance_scale"] if guidance_scale is None else guidance_scale
        images = []
        for start in range(0, len(prompts), batch_size):
            some, their = prompts[start:start + batch_size], seeds[start:start + batch_size]
            with torch.no_grad():
                context = pipeline.encode_prompts(self.sd, some)
                negative = pipeline.encode_prompts(self.sd, [negative_prompt]).expand(len(some), -1, -1)
                latents = pipeline.draw(self.sd, context, negative, their, resolution, sampler, steps, scale, eta)
                images += [Image.fromarray(image) for image in to_images_u8(pipeline.decode(self.sd, latents))]
        return images
