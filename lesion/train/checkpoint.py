"""A training run's state: checkpoints that resume to the bit, LoRA files with their metadata.

Proven by tests/train/test_checkpoint.py and tests/train/test_train_lora.py.
"""

import json
from pathlib import Path

from torch import nn

from lesion.lora import formats, layers
from lesion.run.optim import load_optimizer_tensors, optimizer_tensors
from lesion.run.state import load_state, save_state


def save_checkpoint(args, networks: dict[str, nn.Module], optimizer, scaler, done: int, skipped: int, known: dict) -> None:
    """The run's state, the LoRA of this step, and at the last step RUN/lora.safetensors; each written atomically."""
    factors = layers.all_factors(networks)
    metadata = lora_metadata(args, known, done)
    formats.write(args.out / "checkpoints" / f"lora-{done:06d}.safetensors", factors, metadata, args.lora_format)
    if done == args.steps:
        formats.write(args.out / "lora.safetensors", factors, metadata, args.lora_format)
    tensors = {f"lora.{name}.{kind}": getattr(part, kind) for name, part in factors.items() for kind in ("down", "up")}
    tensors |= {f"optimizer.{key}": value for key, value in optimizer_tensors(optimizer).items()}
    save_state(args.out / "checkpoint.safetensors", tensors, {
        "step": done, "skipped": skipped, "scaler": scaler.state_dict(), "alpha": {name: part.alpha for name, part in factors.items()}})


def load_checkpoint(folder: Path, networks: dict[str, nn.Module], optimizer, scaler) -> tuple[int, int]:
    """Put the newest state back; (steps done, steps skipped for overflow), (0, 0) where there is none yet."""
    path = folder / "checkpoint.safetensors"
    if not path.is_file():
        return 0, 0
    tensors, meta = load_state(path)
    for name, network in networks.items():
        paths = layers.of_network(meta["alpha"], name)
        layers.set_factors(network, {key: layers.Factors(tensors[f"lora.{name}.{key}.down"], tensors[f"lora.{name}.{key}.up"], alpha)
                                     for key, alpha in paths.items()})
    load_optimizer_tensors(optimizer, {k.removeprefix("optimizer."): v for k, v in tensors.items() if k.startswith("optimizer.")})
    scaler.load_state_dict(meta["scaler"])
    return meta["step"], meta["skipped"]


def lora_metadata(args, known: dict, done: int) -> dict[str, str]:
    """kohya's and ModelSpec's entries, and ours: hashes of base and data, class, phase, resolution, the whole recipe, the step."""
    ours = {
        "lesion_base_sha256": known["base_sha256"],
        "lesion_data_sha256": known["data_sha256"],
        "lesion_label": args.label,
        "lesion_phase": str(args.phase),
        "lesion_resolution": str(args.resolution),
        "lesion_step": str(done),
        "lesion_seed": str(args.seed),
        "lesion_recipe": json.dumps({k: v for k, v in known.items() if k != "provenance"}, sort_keys=True),
        "lesion_git_commit": str(known["provenance"]["git_commit"]),
    }
    if args.lora_format == "diffusers":
        return ours
    return ours | formats.kohya_metadata(
        args.rank,
        args.alpha,
        output_name=f"{args.label}-phase{args.phase}",
        sd_model_name=Path(args.base).name,
        new_sd_model_hash=known["base_sha256"],
        resolution=f"({args.resolution}, {args.resolution})",
        learning_rate=args.lr,
        unet_lr=args.lr,
        seed=args.seed,
        steps=done,
        text_encoder_lr=(args.text_encoder_lr or args.lr) if args.phase == 2 else None,
        num_train_images=known["tiles"],
        max_grad_norm=args.clip,
        min_snr_gamma=args.min_snr_gamma,
        noise_offset=args.noise_offset,
        mixed_precision={"fp32": "no"}.get(args.precision, args.precision),
        optimizer="torch.optim.AdamW",
        lr_scheduler=args.schedule,
    )
