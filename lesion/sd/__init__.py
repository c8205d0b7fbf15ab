"""Stable Diffusion 1.5, written out. Nothing in this room imports the rest of `lesion`."""
