"""What watches a run: validation on fixed noise, sample sheets, metrics.jsonl and timing.jsonl, the loss curve.

Proven by tests/train/test_setup.py and tests/train/test_train_lora.py.
"""
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lesion.run import devices, files, folders, sheets
from lesion.run.files import atomic_path
from lesion.sd import pipeline, schedule
from lesion.sd.checkpoint import StableDiffusion
from lesion.sd.vae import to_images_u8, to_pixels
from lesion.tiles.decode import Tiles
from lesion.train.setup import Recipe, Texts
from lesion.train.step import Denoiser, noise_error

VAL_TIMESTEPS = (125, 375, 625, 875)  # the middle of each quartile


def loss_curve(metrics: Path, path: Path) -> None:
    """Training loss (each step and its running mean), by timestep quartile, and validation loss, from a run's metrics.jsonl."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    rows = folders.read_metrics(metrics)
    train = [row for row in rows if "loss" in row]
    checks = [row for row in rows if "val_loss" in row]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    steps, loss = np.array([row["step"] for row in train]), np.array([row["loss"] for row in train])
    left.plot(steps, loss, color="0.8", lw=0.6, label="training, each step")
    width = max(1, len(loss) // 30)
    if len(loss) >= 2 * width:
        smooth = np.convolve(loss, np.ones(width) / width, mode="valid")
        left.plot(steps[width - 1:], smooth, color=sheets.BLUE, lw=1.6, label=f"training, mean of {width}")
    if checks:
        left.plot([row["step"] for row in checks], [row["val_loss"] for row in checks], "o-", color=sheets.VERMILION, ms=3, lw=1.4,
                  label="held-out tiles, fixed noise")
    left.set(xlabel="step", ylabel="noise prediction error (MSE)", title="Loss")
    left.legend(frameon=False, fontsize=8)
    key, source, what = ("val_loss_q", checks, "held-out") if len(checks) > 1 else ("loss_q", train, "training")
    for quartile, color in enumerate((sheets.BLUE, sheets.GREEN, sheets.ORANGE, sheets.PURPLE), 1):
        points = [(row["step"], row[f"{key}{quartile}"]) for row in source if row.get(f"{key}{quartile}") is not None]
        if points:
            right.plot(*zip(*points), "o-" if what == "held-out" else "-", ms=2.5, lw=1.2, color=color,
                       label=f"t {250 * (quartile - 1)} to {250 * quartile - 1}")
    right.set(xlabel="step", yscale="log", title=f"By timestep, {what}")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130, metadata={"Software": None})


def validation(recipe: Recipe, sd: StableDiffusion, held_out: Tiles, device: torch.device) -> Callable[[], dict] | None:
    """A function that gives {val_loss, val_loss_q1..4}: the unweighted error on fixed (tile, timestep, noise) triples, latents
    at the posterior's mean; None without tiles."""
    if not held_out.rows:
        return None
    with torch.no_grad():
        mean = torch.cat([sd.vae.encode(to_pixels(image[None]).to(device))[0] for image in held_out.images_u8])
    latents = (sd.latent_scale * mean).repeat_interleave(len(VAL_TIMESTEPS), 0)
    timesteps = torch.tensor(VAL_TIMESTEPS, device=device).repeat(len(mean))
    noise = torch.randn(latents.shape, generator=devices.generator(recipe.seed, 0, 8)).to(device)
    tile = np.repeat(np.arange(len(mean)), len(VAL_TIMESTEPS))
    texts = Texts(sd, [row["text"] for row in held_out.rows], trained=recipe.phase == 2)
    model = Denoiser(sd.unet, sd.text_encoder)

    @torch.no_grad()
    def validate() -> dict[str, float]:
        errors = []
        for some in torch.arange(len(timesteps)).split(16):
            with devices.autocast(device, recipe.precision):
                errors.append(noise_error(model, latents[some], noise[some], timesteps[some], **texts(tile[some.numpy()])))
        error = torch.cat(errors).double()
        return {"val_loss": error.mean().item(), **{f"val_loss_q{q}": value for q, value in quartiles(error, timesteps).items()}}
    return validate


def sampling(recipe: Recipe, sd: StableDiffusion, rows: list[dict], device: torch.device) -> Callable[[Path], None]:
    """A function that draws the sample sheet: fixed seeds, fixed prompts of the training set, the networks as they are now."""
    chosen = np.random.default_rng([recipe.seed, 3]).integers(len(rows), size=recipe.sample_count)
    prompts = [rows[i]["text"] for i in chosen]
    guidance_scale = folders.recipe_for(recipe.base)["guidance_scale"]

    def sample(path: Path) -> None:
        images = []
        for start in range(0, len(prompts), recipe.batch_size):
            some = prompts[start:start + recipe.batch_size]
            with torch.no_grad(), devices.autocast(device, recipe.precision):
                context, negative = pipeline.encode_prompts(sd, some), pipeline.encode_prompts(sd, [""] * len(some))
                latents = pipeline.draw(sd, context, negative, list(range(start, start + len(some))), recipe.resolution,
                                        steps=recipe.sample_steps, guidance_scale=guidance_scale)
            images.append(to_images_u8(pipeline.decode(sd, latents)))
        if images:
            sheets.save_png(path, sheets.contact_sheet(np.concatenate(images)))
    return sample


def before_and_after(folder: Path, steps: int) -> None:
    """One picture of the first and the last sample sheet, one above the other."""
    drawn = [(folder / f"step-{step:06d}.png", f"step {step}") for step in (0, steps)]
    if all(path.is_file() for path, _ in drawn):
        sheets.save_png(
            folder / "before-after.png", sheets.stack([Image.open(path) for path, _ in drawn], [name for _, name in drawn])
        )


def quartiles(error: Tensor, timesteps: Tensor) -> dict[int, float | None]:
    """Mean error of the samples with timesteps in 0..249, 250..499, 500..749, 750..999; None where there is none."""
    quarter = timesteps.cpu() // (schedule.STEPS // 4)
    return {q + 1: error.cpu()[quarter == q].mean().item() if (quarter == q).any() else None for q in range(4)}


def _tensorboard(folder: Path, done: int):
    """A writer of curves that takes back what a stopped run wrote after `done`. ValueError where tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--log tensorboard needs the package tensorboard: pip install tensorboard") from None
    return SummaryWriter(str(folder), purge_step=done + 1)


class Log:
    """metrics.jsonl (the same bytes in every run of a recipe) and timing.jsonl (not): losses stay on the device until `flush`."""

    def __init__(self, folder: Path, device: torch.device, rows: list[dict], done: int, batch: int, writes: bool = True,
                 curves: bool = False):
        self.folder, self.device, self.rows, self.batch, self.writes = Path(folder), device, rows, batch, writes
        self.curves = _tensorboard(self.folder / "tensorboard", done) if curves and writes else None
        self.waiting: list[tuple] = []
        self.seen = [done, time.perf_counter()]

    def open(self, done: int) -> None:
        """Drop what a stopped run logged after its last checkpoint; without one, its validation of step 0 too."""
        for name in ("metrics.jsonl", "timing.jsonl"):
            folders.cut_metrics(self.folder / name, done or -1)

    def step(self, done: int, error: Tensor, timesteps: Tensor, tile: np.ndarray, grad_norm: Tensor, lr: float, skipped: int) -> None:
        self.waiting.append((done, error, timesteps, tile, grad_norm, lr, skipped))

    def flush(self, world: int = 1) -> str:
        """Write what waits, in the process that writes; a line for the progress bar. All `world` processes call it at the same
        step. ValueError at the first loss that is not finite, with its tiles; in the other processes too, so that none waits for
        one that has left."""
        own = ""
        for done, error, timesteps, tile, *_ in self.waiting:
            bad = (~error.isfinite()).nonzero()[:, 0].tolist()
            if bad and not own:
                own = (f"step {done}: loss is not finite for timesteps {[int(timesteps[i]) for i in bad]}, tiles "
                       f"{[self.rows[tile[i]]['file_name'] for i in bad]}; nothing was saved over the last checkpoint; "
                       "lower --lr or use --precision fp32")
        if devices.agree(bool(own), world):
            raise ValueError(own or f"step {self.waiting[-1][0]}: loss is not finite in another process, which names the tiles")
        if not self.writes:
            self.waiting = []
        rows = []
        for done, error, timesteps, _, grad_norm, lr, skipped in self.waiting:
            error = error.cpu().double()
            parts = {f"loss_q{q}": value for q, value in quartiles(error, timesteps).items()}
            norm = float(grad_norm) if math.isfinite(grad_norm) else None  # a skipped step's: JSON has no infinity
            rows.append({"step": done, "loss": error.mean().item(), **parts, "grad_norm": norm, "lr": lr, "skipped_steps": skipped})
        if not rows:
            return ""
        devices.synchronize(self.device)
        now, last = time.perf_counter(), rows[-1]["step"]
        seconds = (now - self.seen[1]) / (last - self.seen[0])
        self.waiting, self.seen = [], [last, now]
        memory = devices.peak_mem_gib(self.device)
        files.append_jsonl(self.folder / "metrics.jsonl", *rows)
        self._draw(*rows)
        files.append_jsonl(self.folder / "timing.jsonl", {"step": last, "step_ms": 1000 * seconds, "images_per_s": self.batch / seconds,
                                                            "peak_mem_gib": memory})
        loss = float(np.mean([row["loss"] for row in rows]))
        return f"loss {loss:.4f}, {self.batch / seconds:.1f} images/s, {memory:.1f} GiB" + (f", {rows[-1]['skipped_steps']} skipped" if
                                                                                           rows[-1]["skipped_steps"] else "")

    def validation(self, done: int, values: dict[str, float]) -> None:
        """Log a validation; ValueError if it is not finite. Its time does not count as training time."""
        if not math.isfinite(values["val_loss"]):
            raise ValueError(f"step {done}: validation loss is {values['val_loss']}; nothing was saved over the last checkpoint")
        files.append_jsonl(self.folder / "metrics.jsonl", {"step": done, **values})
        self._draw({"step": done, **values})

    def _draw(self, *rows: dict) -> None:
        """The rows as TensorBoard curves, one a name."""
        if self.curves is not None:
            for row in rows:
                for name, value in row.items():
                    if name != "step" and value is not None:
                        self.curves.add_scalar(name, value, row["step"])
            self.curves.flush()

    def restart_clock(self) -> None:
        """Leave out of the timing what has happened since the last flush (validation, samples, checkpoints)."""
        self.seen[1] = time.perf_counter()
