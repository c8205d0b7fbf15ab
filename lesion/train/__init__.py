"""Teaching a LoRA: the step, latents, set-up, watching, checkpoints."""
