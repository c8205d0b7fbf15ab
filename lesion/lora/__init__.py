"""LoRA (arXiv:2106.09685): layers that can be injected and merged, and their file formats."""
