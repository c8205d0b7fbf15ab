"""lesion: teach Stable Diffusion 1.5 a rare skin lesion, draw synthetic tiles, measure whether they help."""

__version__ = "0.1.0"


def load(base=None, device: str = "auto", precision: str | None = None, tokenizer=None):
    """A base model (folder, .safetensors file, hub id; without one the built-in `mini`) that draws: see lesion.lora.drawing."""
    from lesion.lora.drawing import Drawing
    return Drawing(base, device, precision, tokenizer)
