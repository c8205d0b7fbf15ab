"""A training run's state and log: checkpoints that resume to the bit, LoRA metadata, metrics.jsonl and timing.jsonl.

Proven by tests/test_training.py and tests/test_train_lora.py.
"""

import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lesion import files, runs, runtime
from lesion.lora import files as lora_files
from lesion.lora import layers
from lesion.sd import schedule


def quartiles(error: Tensor, timesteps: Tensor) -> dict[int, float | None]:
    """Mean error of the samples with timesteps in 0..249, 250..499, 500..749, 750..999; None where there is none."""
    quarter = timesteps.cpu() // (schedule.STEPS // 4)
    return {q + 1: error.cpu()[quarter == q].mean().item() if (quarter == q).any() else None for q in range(4)}


def save_checkpoint(args, networks: dict[str, nn.Module], optimizer, scaler, done: int, skipped: int, known: dict) -> None:
    """The run's state, the LoRA of this step, and at the last step RUN/lora.safetensors; each written atomically."""
    factors = layers.all_factors(networks)
    metadata = lora_metadata(args, known, done)
    lora_files.write(args.out / "checkpoints" / f"lora-{done:06d}.safetensors", factors, metadata, args.lora_format)
    if done == args.steps:
        lora_files.write(args.out / "lora.safetensors", factors, metadata, args.lora_format)
    tensors = {f"lora.{name}.{kind}": getattr(part, kind) for name, part in factors.items() for kind in ("down", "up")}
    tensors |= {f"optimizer.{key}": value for key, value in runtime.optimizer_tensors(optimizer).items()}
    runtime.save_state(args.out / "checkpoint.safetensors", tensors, {
        "step": done, "skipped": skipped, "scaler": scaler.state_dict(), "alpha": {name: part.alpha for name, part in factors.items()}})


def load_checkpoint(folder: Path, networks: dict[str, nn.Module], optimizer, scaler) -> tuple[int, int]:
    """Put the newest state back; (steps done, steps skipped for overflow), (0, 0) where there is none yet."""
    path = folder / "checkpoint.safetensors"
    if not path.is_file():
        return 0, 0
    tensors, meta = runtime.load_state(path)
    for name, network in networks.items():
        paths = layers.of_network(meta["alpha"], name)
        layers.set_factors(network, {key: layers.Factors(tensors[f"lora.{name}.{key}.down"], tensors[f"lora.{name}.{key}.up"], alpha)
                                     for key, alpha in paths.items()})
    runtime.load_optimizer_tensors(optimizer, {k.removeprefix("optimizer."): v for k, v in tensors.items() if k.startswith("optimizer.")})
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
    return ours | lora_files.kohya_metadata(
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


class Log:
    """metrics.jsonl (the same bytes in every run of a recipe) and timing.jsonl (not): losses stay on the device until `flush`."""

    def __init__(self, args, device: torch.device, rows: list[dict], done: int, batch: int):
        self.args, self.device, self.rows, self.batch = args, device, rows, batch
        self.waiting: list[tuple] = []
        self.seen = [done, time.perf_counter()]

    def open(self, done: int) -> None:
        """Drop what a stopped run logged after its last checkpoint; without one, its validation of step 0 too."""
        for name in ("metrics.jsonl", "timing.jsonl"):
            runs.cut_metrics(self.args.out / name, done or -1)

    def step(self, done: int, error: Tensor, timesteps: Tensor, tile: np.ndarray, grad_norm: Tensor, lr: float, skipped: int) -> None:
        self.waiting.append((done, error, timesteps, tile, grad_norm, lr, skipped))

    def flush(self) -> str:
        """Write what waits; a line for the progress bar. ValueError at the first loss that is not finite, with its tiles."""
        rows = []
        for done, error, timesteps, tile, grad_norm, lr, skipped in self.waiting:
            error = error.cpu().double()
            if not error.isfinite().all():
                bad = (~error.isfinite()).nonzero()[:, 0].tolist()
                raise ValueError(f"step {done}: loss is not finite for timesteps {[int(timesteps[i]) for i in bad]}, tiles "
                                 f"{[self.rows[tile[i]]['file_name'] for i in bad]}; nothing was saved over the last checkpoint; "
                                 "lower --lr or use --precision fp32")
            parts = {f"loss_q{q}": value for q, value in quartiles(error, timesteps).items()}
            norm = float(grad_norm) if math.isfinite(grad_norm) else None  # a skipped step's: JSON has no infinity
            rows.append({"step": done, "loss": error.mean().item(), **parts, "grad_norm": norm, "lr": lr, "skipped_steps": skipped})
        if not rows:
            return ""
        runtime.synchronize(self.device)
        now, last = time.perf_counter(), rows[-1]["step"]
        seconds = (now - self.seen[1]) / (last - self.seen[0])
        self.waiting, self.seen = [], [last, now]
        memory = runtime.peak_mem_gib(self.device)
        files.append_jsonl(self.args.out / "metrics.jsonl", *rows)
        files.append_jsonl(self.args.out / "timing.jsonl", {"step": last, "step_ms": 1000 * seconds, "images_per_s": self.batch / seconds,
                                                            "peak_mem_gib": memory})
        loss = float(np.mean([row["loss"] for row in rows]))
        return f"loss {loss:.4f}, {self.batch / seconds:.1f} images/s, {memory:.1f} GiB" + (f", {rows[-1]['skipped_steps']} skipped" if
                                                                                           rows[-1]["skipped_steps"] else "")

    def validation(self, done: int, values: dict[str, float]) -> None:
        """Log a validation; ValueError if it is not finite. Its time does not count as training time."""
        if not math.isfinite(values["val_loss"]):
            raise ValueError(f"step {done}: validation loss is {values['val_loss']}; nothing was saved over the last checkpoint")
        files.append_jsonl(self.args.out / "metrics.jsonl", {"step": done, **values})

    def restart_clock(self) -> None:
        """Leave out of the timing what has happened since the last flush (validation, samples, checkpoints)."""
        self.seen[1] = time.perf_counter()
