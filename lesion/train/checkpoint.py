"""A training run's state: checkpoints that resume to the bit, LoRA files with their metadata.

Proven by tests/train/test_train_lora.py.
"""

import json
from pathlib import Path

import torch
from torch import nn

from lesion.lora import formats, layers
from lesion.run.optim import load_optimizer_tensors, optimizer_tensors
from lesion.run.state import grouped, load_state, of_group, save_state
from lesion.train.setup import Recipe


def save_checkpoint(folder: Path, recipe: Recipe, record: dict, networks: dict[str, nn.Module], optimizer: torch.optim.Optimizer,
                    scaler: torch.amp.GradScaler, done: int, skipped: int) -> None:
    """The run's state, the LoRA of this step, and at the last step RUN/lora.safetensors; each written atomically."""
    factors = layers.all_factors(networks)
    metadata = lora_metadata(recipe, record, done)
    formats.write(folder / "checkpoints" / f"lora-{done:06d}.safetensors", factors, metadata, recipe.lora_format)
    if done == recipe.steps:
        formats.write(folder / "lora.safetensors", factors, metadata, recipe.lora_format)
    lora = {f"{name}.{kind}": getattr(part, kind) for name, part in factors.items() for kind in ("down", "up")}
    save_state(folder / "checkpoint.safetensors", grouped(lora=lora, optimizer=optimizer_tensors(optimizer)), {
        "step": done, "skipped": skipped, "scaler": scaler.state_dict(), "alpha": {name: part.alpha for name, part in factors.items()}})


def load_checkpoint(folder: Path, networks: dict[str, nn.Module], optimizer: torch.optim.Optimizer,
                    scaler: torch.amp.GradScaler) -> tuple[int, int]:
    """Put the newest state back; (steps done, steps skipped for overflow), (0, 0) where there is none yet."""
    path = folder / "checkpoint.safetensors"
    if not path.is_file():
        return 0, 0
    tensors, meta = load_state(path)
    for name, network in networks.items():
        lora, alphas = of_group(tensors, f"lora.{name}"), layers.of_network(meta["alpha"], name)
        factors = {path: layers.Factors(lora[f"{path}.down"], lora[f"{path}.up"], alpha) for path, alpha in alphas.items()}
        layers.set_factors(network, factors)
    load_optimizer_tensors(optimizer, of_group(tensors, "optimizer"))
    scaler.load_state_dict(meta["scaler"])
    return meta["step"], meta["skipped"]


def lora_metadata(recipe: Recipe, record: dict, done: int) -> dict[str, str]:
    """kohya's and ModelSpec's entries, and ours: hashes of base and data, class, phase, resolution, the whole recipe, the step."""
    ours = {
        "lesion_base_sha256": record["base_sha256"],
        "lesion_data_sha256": record["data_sha256"],
        "lesion_label": recipe.label,
        "lesion_phase": str(recipe.phase),
        "lesion_resolution": str(recipe.resolution),
        "lesion_step": str(done),
        "lesion_seed": str(recipe.seed),
        "lesion_recipe": json.dumps({k: v for k, v in record.items() if k != "provenance"}, sort_keys=True),
        "lesion_git_commit": str(record["provenance"]["git_commit"]),
    }
    if recipe.lora_format == "diffusers":
        return ours
    return ours | formats.kohya_metadata(
        recipe.rank,
        recipe.alpha,
        output_name=f"{recipe.label}-phase{recipe.phase}",
        sd_model_name=Path(recipe.base).name,
        new_sd_model_hash=record["base_sha256"],
        resolution=f"({recipe.resolution}, {recipe.resolution})",
        learning_rate=recipe.lr,
        unet_lr=recipe.lr,
        seed=recipe.seed,
        steps=done,
        text_encoder_lr=recipe.rates().get("text_encoder"),
        num_train_images=record["tiles"],
        max_grad_norm=recipe.clip,
        min_snr_gamma=recipe.min_snr_gamma,
        noise_offset=recipe.noise_offset,
        mixed_precision={"fp32": "no"}.get(recipe.precision, recipe.precision),
        optimizer="torch.optim.AdamW",
        lr_scheduler=recipe.schedule,
    )
