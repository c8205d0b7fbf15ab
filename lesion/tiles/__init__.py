"""Tiles: sources, decoding, colour, views, splits, and what a LoRA has seen."""
