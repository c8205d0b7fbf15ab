"""lesion: teach Stable Diffusion 1.5 a rare skin lesion, draw synthetic tiles, measure whether they help."""

__version__ = "0.1.0"
