"""A training run's state: checkpoints that resume to the bit, LoRA files with their metadata.

Proven by tests/train/test_train_lora.py.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lesion.lora import formats, layers
from lesion.run.folders import read_metrics
from lesion.run.optim import load_optimizer_tensors, optimizer_tensors
from lesion.run.state import fitting, grouped, load_newest, of_group, previous_of, save_state
from lesion.train.setup import Recipe

STATE = "checkpoint.safetensors"
STATES = (STATE, previous_of(Path(STATE)).name)  # verified by hashes of their own


@dataclass
class Progress:
    """How far a run is: steps done, steps void by an fp16 overflow in all, and those in a row up to now."""
    step: int = 0
    skipped: int = 0
    in_a_row: int = 0


def save_checkpoint(folder: Path, recipe: Recipe, record: dict, networks: dict[str, nn.Module], optimizer: torch.optim.Optimizer,
                    scaler: torch.amp.GradScaler, at: Progress) -> None:
    """The run's state (the last one stays as its predecessor), the LoRA of this step, and at the last step
    RUN/lora.safetensors; each written atomically. ValueError, and nothing written, at the end of a run that never learnt."""
    if at.step == recipe.steps == at.skipped:
        raise ValueError(f"all {at.step} steps overflowed in fp16: nothing was learnt, no LoRA is written; use --precision bf16 or fp32")
    factors = layers.all_factors(networks)
    lora = {f"{name}.{kind}": getattr(part, kind) for name, part in factors.items() for kind in ("down", "up")}
    save_state(folder / STATE, grouped(lora=lora, optimizer=optimizer_tensors(optimizer)), {
        **vars(at), "scaler": scaler.state_dict(), "alpha": {name: part.alpha for name, part in factors.items()}}, keep_last=True)
    write_loras(folder, recipe, record, networks, at.step)


def lora_of_step(folder: Path, done: int) -> Path:
    """Where the LoRA of a checkpoint is kept."""
    return folder / "checkpoints" / f"lora-{done:06d}.safetensors"


def write_loras(folder: Path, recipe: Recipe, record: dict, networks: dict[str, nn.Module], done: int) -> None:
    """checkpoints/lora-<step>.safetensors and, at the last step, lora.safetensors: what the state of that step holds."""
    factors, metadata = layers.all_factors(networks), lora_metadata(recipe, record, done)
    formats.write(lora_of_step(folder, done), factors, metadata, recipe.lora_format)
    if done == recipe.steps:
        formats.write(folder / "lora.safetensors", factors, metadata, recipe.lora_format)


def load_checkpoint(folder: Path, networks: dict[str, nn.Module], optimizer: torch.optim.Optimizer,
                    scaler: torch.amp.GradScaler, say: Callable[[str], None] = lambda text: None) -> Progress:
    """Put the newest whole state back and return how far it is; `say` hears of a damaged or missing one, and of a run that
    has none and so begins again. ValueError where what there is is damaged, or of another shape than this run."""
    found = load_newest(folder / STATE)
    if found is None:
        logged = len(read_metrics(folder / "metrics.jsonl")) if (folder / "metrics.jsonl").is_file() else 0
        if logged:
            say(f"{folder} has no saved state, only {logged} rows of its log: it begins again at step 0")
        return Progress()
    tensors, meta, notes = found
    for note in notes:
        say(note)
    with fitting(folder / STATE):
        at = Progress(*(meta[name] for name in vars(Progress())))
        if not all(type(value) is int and value >= 0 for value in vars(at).values()):
            raise ValueError(f"its steps are {vars(at)}, expected whole numbers")
        for name, network in networks.items():
            lora, alphas = of_group(tensors, f"lora.{name}"), layers.of_network(meta["alpha"], name)
            factors = {path: layers.Factors(lora[f"{path}.down"], lora[f"{path}.up"], alpha) for path, alpha in alphas.items()}
            layers.set_factors(network, factors)
        load_optimizer_tensors(optimizer, of_group(tensors, "optimizer"))
        scaler.load_state_dict(meta["scaler"])
    return at


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
        "lesion_recipe": json.dumps({k: v for k, v in record.items() if k not in ("provenance", "tag_frequency")}, sort_keys=True),
        "lesion_git_commit": str(record["provenance"]["git_commit"]),
    }
    if recipe.lora_format == "diffusers":
        return ours
    example = next(iter(record["tag_frequency"]), "")
    title = {"modelspec.title": f"{recipe.label} skin lesions, phase {recipe.phase}",
             "modelspec.resolution": f"{recipe.resolution}x{recipe.resolution}"}
    return ours | title | formats.kohya_metadata(
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
        tag_frequency={Path(recipe.data).name: record["tag_frequency"]},
        training_comment=f"prompts are phrases between commas ({example}, ...), in the words of lesion/describe/prompts.py",
    )
